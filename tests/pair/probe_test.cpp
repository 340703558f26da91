// SPDX-License-Identifier: Apache-2.0
// The owner is killed at each stage of a transaction, and an heir at each stage of its takeover.
#include <signal.h>

#include <array>

#include "tests/pair/fixture.hpp"
#include "tests/pair/probe_file.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

constexpr std::array<const char*, static_cast<std::size_t>(ProbePoint::kCount)> kNames{"staged",
                                                                                       "armed",
                                                                                       "frames marked",
                                                                                       "destination written",
                                                                                       "destination published",
                                                                                       "source written",
                                                                                       "source published",
                                                                                       "cursors advanced",
                                                                                       "disarmed",
                                                                                       "notified",
                                                                                       "completion cleared",
                                                                                       "takeover: epoch",
                                                                                       "takeover: replayed",
                                                                                       "handover: asked",
                                                                                       "handover: granted",
                                                                                       "handover: let go"};

void require_paired(PairHost& host, Traffic& traffic, pid_t not_this) {
  const bool paired = traffic.pump_until([&] {
    const auto pair = host.pair();
    return pair["state"] == "paired" && pair["active"]["pid"].is_number() && pair["active"]["pid"] != not_this;
  });
  if (!paired) FAIL("no pair again: " << host.status().dump(2) << host.log());
}

void kill_everywhere(bool in, bool out, const std::vector<ProbePoint>& points) {
  const Probes probes;
  PairHost host({.backend = TANDEM_PROBED_BACKEND_BINARY});
  host.environment["TANDEM_PROBE_FILE"] = probes.path();
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac, {.in = in, .out = out});
    for (const ProbePoint point : points) {
      const auto number = static_cast<std::size_t>(point);
      INFO("killed when " << kNames[number]);
      for (const std::uint32_t countdown : {1u, 7u}) {
        REQUIRE(traffic.pump_frames(50));
        const pid_t victim = host.active();
        probes.arm(point, countdown);
        REQUIRE(traffic.pump_until([&] { return probes->killed.load() != 0; }));
        CHECK(static_cast<pid_t>(probes->killed.load()) == victim);
        require_paired(host, traffic, victim);
      }
    }
    REQUIRE(traffic.pump_frames(50));
    const TrafficResult result = traffic.finish();
    CAPTURE(result, host.nic(kMac).dump());
    CHECK(result.clean());
    CHECK(host.nic(kMac)["fault"] == "");
  }
  require_clean_end(host, {"one"});
}

using P = ProbePoint;
const std::vector<P> kBoth{P::kStaged,        P::kArmed,           P::kDestinationWritten, P::kDestinationPublished,
                           P::kSourceWritten, P::kSourcePublished, P::kCursorsAdvanced,    P::kDisarmed,
                           P::kNotified};

}  // namespace

TEST_CASE("killed at each stage of a transaction: outside to guest") {
  SKIP_UNLESS_PAIR();
  kill_everywhere(true, false, kBoth);
}

TEST_CASE("killed at each stage of a transaction: guest to outside") {
  SKIP_UNLESS_PAIR();
  auto points = kBoth;
  points.insert(points.end(), {P::kFramesMarked, P::kCompletionCleared});
  kill_everywhere(false, true, points);
}

TEST_CASE("killed at each stage of a transaction: both ways at once") {
  SKIP_UNLESS_PAIR();
  kill_everywhere(true, true, {P::kArmed, P::kDestinationPublished, P::kSourcePublished, P::kCompletionCleared});
}

TEST_CASE("the heir is killed in its takeover, after an owner that was in mid-transaction") {
  SKIP_UNLESS_PAIR();
  const Probes probes;
  PairHost host({.backend = TANDEM_PROBED_BACKEND_BINARY});
  host.environment["TANDEM_PROBE_FILE"] = probes.path();
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    for (const P point : {P::kTakeoverEpoch, P::kTakeoverReplayed}) {
      for (const P first : {P::kStaged, P::kArmed, P::kDestinationPublished, P::kCursorsAdvanced}) {
        INFO("owner killed when " << kNames[static_cast<std::size_t>(first)] << ", heir when "
                                  << kNames[static_cast<std::size_t>(point)]);
        REQUIRE(traffic.pump_frames(50));
        const pid_t heir = host.standby();
        probes.arm(first, 3, point);
        REQUIRE(traffic.pump_until([&] { return static_cast<pid_t>(probes->killed.load()) == heir; }));
        require_paired(host, traffic, heir);
      }
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("a transaction that its owner and two heirs leave behind is finished by the third") {
  SKIP_UNLESS_PAIR();
  const Probes probes;
  PairHost host({.backend = TANDEM_PROBED_BACKEND_BINARY});
  host.environment["TANDEM_PROBE_FILE"] = probes.path();
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    for (const P stage : {P::kArmed, P::kDestinationWritten, P::kDestinationPublished, P::kSourceWritten,
                          P::kSourcePublished, P::kCursorsAdvanced}) {
      INFO("killed when " << kNames[static_cast<std::size_t>(stage)]);
      REQUIRE(traffic.pump_frames(20));
      pid_t victim = host.active();
      // The replay passes the same points as the first attempt: each heir dies at the same one.
      for (int death = 0; death < 3; ++death) {
        probes.arm(stage, 1);
        REQUIRE(traffic.pump_until([&] { return probes->killed.load() != 0; }));
        victim = static_cast<pid_t>(probes->killed.load());
      }
      require_paired(host, traffic, victim);
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}
