// SPDX-License-Identifier: Apache-2.0
// The soak's report can fail.
#include "tests/soak/report.hpp"

#include <catch2/catch.hpp>

using namespace tandem::test;
using nlohmann::json;

namespace {

json incident() {
  return {{"owner_state", "running"},
          {"timeline_ns", {{"last_heartbeat", -1000}, {"heir_awake", 20'000}, {"replayed", 25'000}}},
          {"replayed", {{"armed", true}, {"valid", true}}}};
}

Kill kill_of(const char* cause) {
  Kill kill;
  kill.cause = cause;
  kill.gap_ns = 100'000;
  kill.control_ns = 50'000;
  kill.incidents = {incident()};
  return kill;
}

SoakReport::Totals complete() {
  SoakReport::Totals totals;
  totals.complete = true;
  return totals;
}

}  // namespace

TEST_CASE("quantiles are values that were seen") {
  Samples samples;
  CHECK(samples.quantile(0.5) == 0);
  CHECK(samples.to_json().is_null());
  for (const std::int64_t value : {5, 1, 4, 2, 3}) samples.add(value);
  CHECK(samples.quantile(0.5) == 3);
  CHECK(samples.quantile(0.99) == 5);
  CHECK(samples.quantile(0) == 1);
}

TEST_CASE("a run without harm is clean, by cause and in all") {
  SoakReport report;
  report.add(kill_of("SIGKILL"));
  report.add(kill_of("exit"));
  report.finish(complete());
  CHECK(report.clean());
  const json figures = report.to_json();
  CHECK(figures["causes"].size() == 2);
  CHECK(figures["causes"]["exit"]["count"] == 1);
  CHECK(figures["causes"]["exit"]["detection_us"]["median"] == 21.0);
  CHECK(figures["longest_gaps"].size() == 2);
  CHECK(figures["causes"]["exit"]["takeover_us"]["max"] == 5.0);
  CHECK(figures["total"]["gap_us"]["p99"] == 100.0);
  CHECK(figures["total"]["replayed"] == 2);
}

TEST_CASE("each kind of harm makes a run fail") {
  const auto verdict = [](auto spoil) {
    SoakReport report;
    SoakReport::Totals totals = complete();
    Kill kill = kill_of("SIGKILL");
    spoil(kill, totals);
    report.add(kill);
    report.finish(totals);
    return report.clean();
  };
  CHECK(verdict([](Kill&, SoakReport::Totals&) {}));
  CHECK_FALSE(verdict([](Kill&, SoakReport::Totals& totals) { totals.count.tally.lost = 1; }));
  CHECK_FALSE(verdict([](Kill&, SoakReport::Totals& totals) { totals.count.tally.duplicated = 1; }));
  CHECK_FALSE(verdict([](Kill&, SoakReport::Totals& totals) { totals.count.tally.reordered = 1; }));
  CHECK_FALSE(verdict([](Kill&, SoakReport::Totals& totals) { totals.count.tally.corrupt = 1; }));
  CHECK_FALSE(verdict([](Kill&, SoakReport::Totals& totals) { totals.count.ring_errors = 1; }));
  CHECK_FALSE(verdict([](Kill&, SoakReport::Totals& totals) { totals.overflow = 1; }));
  CHECK_FALSE(verdict([](Kill&, SoakReport::Totals& totals) { totals.complete = false; }));
  CHECK_FALSE(verdict([](Kill&, SoakReport::Totals& totals) { totals.left_behind = "a link"; }));
  CHECK_FALSE(verdict([](Kill& kill, SoakReport::Totals&) { kill.unexpected = "died of something else"; }));
}
