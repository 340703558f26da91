// SPDX-License-Identifier: Apache-2.0
// Outcomes: the worst counts, and the verdict can fail.
#include "tests/inject/outcome.hpp"

#include <catch2/catch.hpp>

using namespace tandem::test;

namespace {

Observed recovered() {
  Observed seen;
  seen.injected = seen.died = true;
  return seen;
}

}  // namespace

TEST_CASE("each observation has its class, the worst one counts") {
  Observed seen = recovered();
  CHECK(classify(seen) == OutcomeClass::kCrashRecovered);
  seen.hung = true;
  CHECK(classify(seen) == OutcomeClass::kHangRecovered);
  seen.harm.tally.lost = 1;
  CHECK(classify(seen) == OutcomeClass::kPacketHarm);
  seen.other_harmed = true;
  CHECK(classify(seen) == OutcomeClass::kOtherHarmed);
  seen.damaged_bytes = 1;
  CHECK(classify(seen) == OutcomeClass::kOtherHarmed);
  seen.other_harmed = false;
  CHECK(classify(seen) == OutcomeClass::kWindowHit);
  seen.other_harmed = true;
  seen.windows_have_key = true;
  CHECK(classify(seen) == OutcomeClass::kGuestHarmed);
  seen.windows_have_key = false;
  seen.front_ends_connected = false;
  CHECK(classify(seen) == OutcomeClass::kGuestHarmed);
  CHECK(classify(Observed{}) == OutcomeClass::kNotInjected);

  Observed quiet;
  quiet.injected = true;
  CHECK(classify(quiet) == OutcomeClass::kNoEffect);
  quiet.queues_go_on = false;
  CHECK(classify(quiet) == OutcomeClass::kPacketHarm);
  quiet = {};
  quiet.injected = true;
  quiet.harm.stalls = 1;
  CHECK(classify(quiet) == OutcomeClass::kPacketHarm);
}

TEST_CASE("one unrecovered fault in a hundred is the most") {
  const auto verdict = [](int harmed, int whole) {
    InjectReport report;
    Run run;
    run.kind = "heap";
    run.seen = recovered();
    for (int i = 0; i < whole; ++i) report.add(run);
    run.seen.harm.tally.lost = 1;
    for (int i = 0; i < harmed; ++i) report.add(run);
    report.set_complete();
    return report.good();
  };
  CHECK(verdict(0, 10));
  CHECK(verdict(1, 99));
  CHECK_FALSE(verdict(1, 98));
  InjectReport unfinished;
  CHECK_FALSE(unfinished.good());
  InjectReport guest;
  Run run;
  run.seen = recovered();
  run.seen.front_ends_connected = false;
  guest.add(run);
  guest.set_complete();
  CHECK_FALSE(guest.good());
}
