// SPDX-License-Identifier: Apache-2.0
// Planned handovers of a real pair under numbered traffic: many in a row, with deaths of either side and of tandemd in
// the middle.
//
// TANDEM_HANDOVERS=10000 in the environment makes the first case as long as you like.
#include <signal.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <thread>

#include "tests/pair/fixture.hpp"
#include "tests/pair/probe_file.hpp"

using namespace tandem;
using namespace tandem::test;
using nlohmann::json;

namespace {

void check_handover(const json& incident, pid_t former, pid_t heir) {
  CAPTURE(incident.dump(2));
  CHECK(incident["kind"] == "handover");
  CHECK(incident["cause"] == "planned");
  CHECK(incident["detected_by"] == "request");
  CHECK(incident["former_pid"] == former);
  CHECK(incident["heir_pid"] == heir);
  CHECK(incident["replayed"]["armed"] == false);
  CHECK(incident["complete"] == true);
  const json& line = incident["timeline_ns"];
  CHECK(line["requested"] == 0);
  CHECK(line["fenced"].is_null());
  std::int64_t before = 0;
  for (const char* stage : {"granted", "heir_awake", "epoch_taken", "replayed"}) {
    INFO(stage);
    REQUIRE(line[stage].is_number());
    CHECK(line[stage].get<std::int64_t>() >= before);
    before = line[stage];
  }
}

class Figures {
 public:
  void note(const json& value) {
    if (value.is_number()) values_.push_back(value.get<std::int64_t>());
  }
  void print(const char* what) {
    if (values_.empty()) return;
    std::sort(values_.begin(), values_.end());
    const auto at = [&](std::size_t percent) {
      return static_cast<double>(values_[(values_.size() - 1) * percent / 100]) / 1000;
    };
    std::printf("  %-34s median %8.1f us, p99 %9.1f us, max %9.1f us\n", what, at(50), at(99), at(100));
  }

 private:
  std::vector<std::int64_t> values_;
};

void hand_over_in_a_row(int wanted, const PairHostOptions& options, const char* title) {
  PairHost host(options);
  host.start();
  // Nobody is to die here, whoever takes CPUs away from us: hang_test has the short limits.
  require_domain(host, "one", {{.watchdog = R"(spin="1s" blocked="1s")"}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    std::set<pid_t> pids{host.active(), host.standby()};
    Figures granted, polling, first;
    for (int n = 0; n < wanted; ++n) {
      REQUIRE(traffic.pump_frames(5));
      const pid_t former = host.active(), heir = host.standby();
      const json answer = switch_over_for_good(host, traffic);
      REQUIRE(answer["incidents"].size() == 1);
      check_handover(answer["incident"], former, heir);
      CHECK(host.active() == heir);
      CHECK(host.standby() == former);
      const json& line = answer["incident"]["timeline_ns"];
      granted.note(line["granted"]);
      polling.note(line["replayed"]);
      first.note(line["first_transaction"]);
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
    const auto now = host.processes("tandem-backend");
    CHECK(std::set<pid_t>(now.begin(), now.end()) == pids);  // nobody died, nobody was started
    int taken_back = 0;
    for (const json& incident : host.incidents()) {
      taken_back += incident["kind"] == "handover taken back";
      CHECK(incident["kind"] != "failover");
    }
    std::printf("%d handovers, %s (%d of the last 1000 records: taken back), from the request:\n", wanted, title,
                taken_back);
    granted.print("owner lets go");
    polling.print("heir polls");
    first.print("heir has moved its first packets");
    CHECK(host.nic(kMac)["overflow"] == 0);
  }
  require_clean_end(host, {"one"});
}

}  // namespace

TEST_CASE("fifty switchovers in a row under traffic both ways") {
  SKIP_UNLESS_PAIR();
  const char* wanted = std::getenv("TANDEM_HANDOVERS");
  hand_over_in_a_row(wanted == nullptr ? 50 : std::atoi(wanted), {}, "adaptive");
}

TEST_CASE("switchovers of a pair that always polls") {
  SKIP_UNLESS_PAIR();
  hand_over_in_a_row(20, {.backend = {}, .shards = 1, .polling = "always", .outside_queues = 1}, "always polling");
}

TEST_CASE("switchovers to heirs that poll") {
  SKIP_UNLESS_PAIR();
  hand_over_in_a_row(20, {.heirs = "polling"}, "heirs poll");
}

TEST_CASE("two owners never work at once") {
  SKIP_UNLESS_PAIR();
  const Probes probes;
  PairHost host({.backend = TANDEM_PROBED_BACKEND_BINARY});
  host.environment["TANDEM_PROBE_FILE"] = probes.path();
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    for (int n = 0; n < 20; ++n) {
      REQUIRE(traffic.pump_frames(20));
      switch_over_for_good(host, traffic);
    }
    CHECK(traffic.finish().clean());
    CHECK(probes->transactions.load() > 800);
    CHECK(probes->overlaps.load() == 0);
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("several shards change hands together") {
  SKIP_UNLESS_PAIR();
  PairHost host({.backend = {}, .shards = 2, .polling = "adaptive", .outside_queues = 2});
  host.start();
  require_domain(host, "one", {{.mac = kMac, .queues = 2, .uplink = "bridge=\"br0\"", .pair = "default"}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac, {.queue_pairs = 2});
    Traffic traffic(guest, kMac, {.flows_in = 8});
    for (int n = 0; n < 10; ++n) {
      REQUIRE(traffic.pump_frames(50));
      const json answer = switch_over_for_good(host, traffic);
      // An attempt that moved only one of them before it was refused leaves one for this.
      CHECK(answer["incidents"].size() >= 1);
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("the new owner dies: the former one takes over again") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    for (int round = 0; round < 5; ++round) {
      REQUIRE(traffic.pump_frames(50));
      const pid_t former = host.active(), heir = host.standby();
      switch_over_for_good(host, traffic);
      ::kill(heir, SIGKILL);
      REQUIRE(traffic.pump_until([&] {
        const json all = host.incidents();
        return all.back()["kind"] == "failover" && all.back()["victim_pid"] == heir && all.back()["complete"] == true;
      }));
      const json incident = host.incidents().back();
      CAPTURE(incident.dump(2));
      CHECK(incident["heir_pid"] == former);
      CHECK(incident["cause"] == "SIGKILL");
      require_whole(host, traffic);
      CHECK(host.active() == former);
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("either side is killed in the middle of a switchover") {
  SKIP_UNLESS_PAIR();
  const Probes probes;
  PairHost host({.backend = TANDEM_PROBED_BACKEND_BINARY});
  host.environment["TANDEM_PROBE_FILE"] = probes.path();
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    struct Row {
      ProbePoint point;
      bool owner;  // it is the owner who passes there
    };
    for (const Row row : {Row{ProbePoint::kHandoverAsked, false}, Row{ProbePoint::kHandoverGranted, true},
                          Row{ProbePoint::kHandoverLetGo, true}, Row{ProbePoint::kTakeoverEpoch, false},
                          Row{ProbePoint::kTakeoverReplayed, false}}) {
      for (int round = 0; round < 2; ++round) {
        INFO("probe " << static_cast<int>(row.point) << ", round " << round);
        REQUIRE(traffic.pump_frames(50));
        const pid_t owner = host.active(), heir = host.standby();
        probes.arm(row.point, 1);
        const json answer = ask_beside(host, traffic, {{"command", "switchover"}, {"pair", "default"}});
        INFO(answer.dump(2));
        REQUIRE(traffic.pump_until([&] { return probes->killed.load() != 0; }));
        CHECK(static_cast<pid_t>(probes->killed.load()) == (row.owner ? owner : heir));
        // Who lives is the owner now, whoever it was.
        REQUIRE(traffic.pump_until([&] {
          const json pair = host.pair();
          return pair["state"] == "paired" && pair["active"]["pid"] == (row.owner ? heir : owner) &&
                 pair["standby"]["pid"] != (row.owner ? owner : heir);
        }));
      }
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("tandemd is killed in the middle of a switchover: the next one adopts what it finds") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    const auto seed = std::random_device{}();
    CAPTURE(seed);
    std::mt19937 random(seed);
    const auto backends = host.processes("tandem-backend");
    for (int round = 0; round < 8; ++round) {
      REQUIRE(traffic.pump_frames(30));
      const auto before = host.processes("tandemd");
      REQUIRE(before.size() == 1);
      std::thread asking([&] { host.ask({{"command", "switchover"}, {"pair", "default"}}); });
      // Somewhere between the request and its answer.
      std::this_thread::sleep_for(std::chrono::microseconds(std::uniform_int_distribution<>(0, 1500)(random)));
      ::kill(before[0], SIGKILL);
      asking.join();
      REQUIRE(traffic.pump_until([&] {
        const auto now = host.processes("tandemd");
        return now.size() == 1 && now != before && host.pair().is_object() && host.pair()["state"] == "paired";
      }));
      CHECK(host.processes("tandem-backend") == backends);
      REQUIRE(traffic.pump_frames(30));
    }
    // It knows who is who: a switchover and a failover work.
    switch_over_for_good(host, traffic);
    ::kill(host.active(), SIGKILL);
    require_whole(host, traffic);
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("a switchover that cannot be is refused, and nothing changes") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    CHECK_FALSE(host.ask({{"command", "switchover"}, {"pair", "nobody's"}}).value("ok", true));
    CHECK_FALSE(host.ask({{"command", "switchover"}}).value("ok", true));
    const pid_t owner = host.active(), standby = host.standby();
    REQUIRE(traffic.pump_frames(50));
    // Without a standby there is nobody to switch over to.
    ::kill(standby, SIGKILL);
    json answer;
    REQUIRE(eventually([&] { return host.standby() != standby; }));
    answer = ask_beside(host, traffic, {{"command", "switchover"}, {"pair", "default"}});
    if (!answer.value("ok", false)) CHECK(answer["error"].get<std::string>().find("again") != std::string::npos);
    REQUIRE(traffic.pump_frames(50));
    CHECK((answer.value("ok", false) || host.active() == owner));
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}
