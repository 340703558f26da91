// SPDX-License-Identifier: Apache-2.0
// The active backend dies under numbered traffic, again and again; its heir finishes, and what is known is recorded.
#include <signal.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "common/monotonic_clock.hpp"
#include "tests/pair/fixture.hpp"

using namespace tandem;
using namespace tandem::test;
using nlohmann::json;

namespace {

/// Whether an incident says everything that it should; `cause` as it is named.
void check_incident(const json& incident, const std::string& cause, pid_t victim, pid_t heir) {
  CAPTURE(incident.dump(2));
  CHECK(incident["pair"] == "default");
  CHECK(incident["cause"] == cause);
  CHECK(incident["victim_pid"] == victim);
  CHECK(incident["heir_pid"] == heir);
  CHECK(incident["signal"].get<int>() > 0);
  CHECK(incident["detected_by"] == "fence");
  CHECK(incident["time_ms"].get<std::int64_t>() > 1'600'000'000'000);
  CHECK(incident["epoch"].get<int>() > 1);
  CHECK(incident["complete"] == true);
  CHECK(incident["queue_pairs"] == 1);
  const json& line = incident["timeline_ns"];
  CHECK(line["last_heartbeat"].get<std::int64_t>() <= 1'000'000);  // clocks differ by microseconds at most
  CHECK(line["fenced"] == 0);
  std::int64_t before = 0;
  for (const char* stage : {"heir_awake", "epoch_taken", "replayed", "first_transaction"}) {
    INFO(stage);
    REQUIRE(line[stage].is_number());
    CHECK(line[stage].get<std::int64_t>() >= before);
    before = line[stage];
  }
  const json& replayed = incident["replayed"];
  REQUIRE(replayed["armed"].is_boolean());
  if (replayed["armed"] == true) {
    CHECK(replayed["valid"] == true);
    CHECK((replayed["direction"] == "transmit" || replayed["direction"] == "receive"));
    CHECK(replayed["packets"].get<int>() > 0);
    CHECK(replayed["queue_pair"] == 0);
  }
}

void kill_at_random_moments(unsigned kills, const PairHostOptions& options) {
  PairHost host(options);
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    const auto seed = std::random_device{}();
    CAPTURE(seed);
    std::mt19937 random(seed);
    for (unsigned kill = 0; kill < kills; ++kill) {
      REQUIRE(traffic.pump_frames(std::uniform_int_distribution<std::uint64_t>(1, 400)(random)));
      const pid_t victim = host.active(), heir = host.standby();
      REQUIRE(victim > 0);
      REQUIRE(::kill(victim, SIGKILL) == 0);
      pump_until_paired(host, traffic, victim);
      CHECK(host.active() == heir);
      CHECK(host.standby() != victim);
      REQUIRE(traffic.pump_until([&] { return host.incidents().back()["complete"] == true; }));
      check_incident(host.incidents().back(), "SIGKILL", victim, heir);
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
    CHECK(host.incidents().size() == kills);
    CHECK(host.nic(kMac)["overflow"] == 0);
    CHECK(host.processes("tandem-backend").size() == 2);
  }
  require_clean_end(host, {"one"});
}

}  // namespace

TEST_CASE("SIGKILL at random moments under traffic both ways") {
  SKIP_UNLESS_PAIR();
  kill_at_random_moments(12, {});
}

TEST_CASE("SIGKILL at random moments, with heirs that poll") {
  SKIP_UNLESS_PAIR();
  kill_at_random_moments(8, {.heirs = "polling"});
}

TEST_CASE("drills: faults of the backend's own under traffic") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    const std::tuple<const char*, const char*, unsigned> rows[] = {
        {"segv", "SIGSEGV", 0}, {"abort", "SIGABRT", 0}, {"bus", "SIGBUS", 0}, {"segv", "SIGSEGV", 30}};
    for (const auto& [fault, cause, after_ms] : rows) {
      INFO(fault);
      REQUIRE(traffic.pump_frames(100));
      const pid_t victim = host.active(), heir = host.standby();
      // The answer comes after the failover, which needs traffic for its first transaction: ask beside it.
      const std::uint64_t asked = monotonic_ns();
      const json answer = ask_beside(
          host, traffic, {{"command", "drill"}, {"pair", "default"}, {"fault", fault}, {"after_ms", after_ms}});
      INFO(answer.dump(2));
      REQUIRE(answer.value("ok", false));
      check_incident(answer["incident"], cause, victim, heir);
      CHECK(answer["incident"]["fence_time_ns"].get<std::uint64_t>() >= asked + std::uint64_t{after_ms} * 1'000'000);
      // The file says the same.
      std::ifstream file(host.incident_dir() + "/" + std::to_string(answer["incident"]["id"].get<int>()) + ".json");
      CHECK(json::parse(file) == answer["incident"]);
      pump_until_paired(host, traffic, victim);
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
    CHECK_FALSE(host.ask({{"command", "drill"}, {"pair", "default"}, {"fault", "flood"}}).value("ok", true));
    CHECK_FALSE(host.ask({{"command", "drill"}, {"pair", "nobody's"}, {"fault", "segv"}}).value("ok", true));
    for (const json& after : {json(10'001), json(-1), json("1"), json(1.5)}) {
      const json answer = host.ask({{"command", "drill"}, {"pair", "default"}, {"fault", "segv"}, {"after_ms", after}});
      CHECK(answer.value("error", "").find("after_ms") != std::string::npos);
    }
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("drills that wait: of an owner that sleeps, and called off by a switchover") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  // Nobody is to die here but by the drill.
  require_domain(host, "one", {{.watchdog = R"(spin="1s" blocked="1s")"}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(10));
    REQUIRE(eventually([&] { return host.pair()["active"]["state"] == "asleep"; }));
    const pid_t first = host.active(), second = host.standby();
    const json answer = host.ask({{"command", "drill"}, {"pair", "default"}, {"fault", "segv"}, {"after_ms", 20}});
    INFO(answer.dump(2));
    REQUIRE(answer.value("ok", false));
    CHECK(answer["incident"]["victim_pid"] == first);
    CHECK(host.active() == second);
    pump_until_paired(host, traffic, first);
    const pid_t third = host.standby();
    const UniqueFd drill =
        host.tell({{"command", "drill"}, {"pair", "default"}, {"fault", "segv"}, {"after_ms", 1000}});
    REQUIRE(drill);  // the answer would come after 20 s
    const std::uint64_t due = monotonic_ns() + 1'100'000'000;
    for (int turn = 0; turn < 2; ++turn) switch_over_for_good(host, traffic);
    // There is no event for "it does not die": the time when it would have has to pass.
    REQUIRE(traffic.pump_until([&] { return monotonic_ns() > due; }));
    CHECK(host.active() == second);
    CHECK(host.standby() == third);
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("owner and heir die together: a new backend goes on") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    for (int round = 0; round < 3; ++round) {
      REQUIRE(traffic.pump_frames(200));
      require_whole(host, traffic);
      const pid_t victim = host.active(), heir = host.standby();
      REQUIRE(victim > 0);
      REQUIRE(heir > 0);  // 0 would be this process's own group
      const bool heir_first = round % 2 == 0;
      ::kill(heir_first ? heir : victim, SIGKILL);
      ::kill(heir_first ? victim : heir, SIGKILL);
      pump_until_paired(host, traffic, victim);
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result, host.nic(kMac).dump());
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("a standby that dies is replaced and costs nothing") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(100));
    const pid_t owner = host.active(), standby = host.standby();
    ::kill(standby, SIGKILL);
    REQUIRE(traffic.pump_until([&] { return host.standby() != 0 && host.standby() != standby; }));
    CHECK(host.active() == owner);
    CHECK(host.incidents().empty());
    // The new one is an heir as good as the old one.
    ::kill(owner, SIGKILL);
    pump_until_paired(host, traffic, owner);
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}
