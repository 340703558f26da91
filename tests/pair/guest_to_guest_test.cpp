// SPDX-License-Identifier: Apache-2.0
// Two guests of one pair on one bridge: numbered frames go from ring to ring, exactly once, while owners are killed; a
// receiver that is taken away costs the sender nothing; a new tandemd adopts both.
#include <signal.h>
#include <unistd.h>

#include <array>
#include <fstream>
#include <span>
#include <vector>

#include "tests/pair/fixture.hpp"
#include "tests/pair/probe_file.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

/// Frames from one guest to another, few enough on their way that no ring overflows.
struct Lane {
  ScriptedFrontEnd& from;
  ScriptedFrontEnd& to;
  std::string from_mac, to_mac;
  std::uint16_t flow;
  std::uint32_t pair = 0;  ///< queue pair at either end
  std::uint32_t sent = 0;
  FlowAccount account = {};

  void pump(bool send) {
    while (send && sent - account.arrived() < 64 &&
           from.transmit(pair, numbered_frame(to_mac, from_mac, flow, sent, 60 + sent % 700)))
      ++sent;
    for (const Frame& frame : to.receive(pair))
      if (const auto found = parse_numbered(frame); found && found->flow == flow)
        account.note(found->number, found->intact);
  }
};

/// Until as many frames more have arrived in each lane.
bool pump_frames(std::span<Lane> lanes, std::uint64_t frames) {
  std::vector<std::uint64_t> goals;
  for (const Lane& lane : lanes) goals.push_back(lane.account.arrived() + frames);
  return eventually([&] {
    bool all = true;
    for (std::size_t i = 0; i < lanes.size(); ++i) {
      lanes[i].pump(true);
      all = all && lanes[i].account.arrived() >= goals[i];
    }
    return all;
  });
}

/// What was sent has arrived, once, in order, whole.
void check_clean(std::span<Lane> lanes) {
  CHECK(eventually([&] {
    std::uint64_t lost = 0;
    for (Lane& lane : lanes) {
      lane.pump(false);
      lost += lane.account.lost(lane.sent);
    }
    return lost == 0;
  }));
  for (const Lane& lane : lanes) CHECK(lane.account.duplicated + lane.account.reordered + lane.account.corrupt == 0);
}

/// Frames that a NIC has sent through its uplink.
std::uint64_t crossed_uplink(const PairHost& host, const std::string& mac) {
  std::uint64_t frames = 0;
  std::ifstream("/sys/class/net/" + host.nic(mac)["uplink"]["device"].get<std::string>() + "/statistics/tx_packets") >>
      frames;
  return frames;
}

}  // namespace

TEST_CASE("guest to guest: ring to ring and exactly once while killed at each stage, the rest through the bridge") {
  SKIP_UNLESS_PAIR();
  const bool direct = GENERATE(true, false);
  INFO((direct ? "direct" : "direct='no'"));
  const Probes probes;
  PairHost host({.backend = TANDEM_PROBED_BACKEND_BINARY});
  host.environment["TANDEM_PROBE_FILE"] = probes.path();
  host.start();
  const std::string uplink = direct ? "bridge=\"br0\"" : "bridge=\"br0\" direct=\"no\"";
  require_domain(host, "one", {{.mac = kMac, .uplink = uplink}});
  require_domain(host, "two", {{.mac = kOtherMac, .uplink = uplink}});
  {
    ScriptedFrontEnd one = start_guest(host, kMac), two = start_guest(host, kOtherMac);
    Outside outside;
    std::array<Lane, 2> lanes{Lane{one, two, kMac, kOtherMac, 1}, Lane{two, one, kOtherMac, kMac, 2}};
    REQUIRE(pump_frames(lanes, 300));
    using P = ProbePoint;
    for (const P point : {P::kStaged, P::kArmed, P::kDestinationWritten, P::kDestinationPublished, P::kSourceWritten,
                          P::kSourcePublished, P::kCursorsAdvanced, P::kDisarmed, P::kNotified}) {
      if (!direct) break;
      INFO("probe point " << static_cast<int>(point));
      const pid_t victim = host.active();
      probes.arm(point, 5);
      REQUIRE(eventually([&] {
        for (Lane& lane : lanes) lane.pump(true);
        return probes->killed.load() != 0;
      }));
      REQUIRE(eventually([&] {
        for (Lane& lane : lanes) lane.pump(true);
        const auto pair = host.pair();
        return pair["state"] == "paired" && pair["active"]["pid"].is_number() && pair["active"]["pid"] != victim;
      }));
    }
    check_clean(lanes);
    // Whether the uplinks' ports saw those frames.
    const std::uint64_t crossed = crossed_uplink(host, kMac);
    CAPTURE(crossed, lanes[0].sent);
    CHECK((crossed < 100) == direct);
    // Broadcasts pass the bridge: the other guest and the outside get one each.
    REQUIRE(one.transmit(0, numbered_frame("ff:ff:ff:ff:ff:ff", kMac, 7, 0, 100)));
    bool at_two = false, outside_too = false;
    CHECK(eventually([&] {
      for (const Frame& frame : two.receive(0)) at_two |= parse_numbered(frame).value_or(Numbered{}).flow == 7;
      for (const Frame& frame : outside.receive()) outside_too |= parse_numbered(frame).value_or(Numbered{}).flow == 7;
      return at_two && outside_too;
    }));
  }
  require_clean_end(host, {"one", "two"});
}

TEST_CASE("guest to guest: two shards, owners killed without a tandemd and with a new one that has adopted both") {
  SKIP_UNLESS_PAIR();
  PairHost host({.supervised = false, .shards = 2});
  host.start();
  require_domain(host, "one", {{.mac = kMac, .queues = 2}});
  require_domain(host, "two", {{.mac = kOtherMac, .queues = 2}});
  {
    FrontEndOptions two_pairs;
    two_pairs.queue_pairs = 2;
    ScriptedFrontEnd one = start_guest(host, kMac, two_pairs), two = start_guest(host, kOtherMac, two_pairs);
    // Of each shard a lane each way. Each guest's other queue pair is another lane's to empty.
    std::vector<Lane> lanes;
    for (std::uint32_t pair = 0; pair < 2; ++pair) {
      const auto flow = static_cast<std::uint16_t>(1 + 2 * pair);
      lanes.push_back({one, two, kMac, kOtherMac, flow, pair});
      lanes.push_back({two, one, kOtherMac, kMac, static_cast<std::uint16_t>(flow + 1), pair});
    }
    REQUIRE(pump_frames(lanes, 300));
    for (int round = 0; round < 3; ++round) {
      INFO("round " << round);
      const pid_t first = host.active();
      const auto supervisors = host.processes("tandemd");
      REQUIRE(supervisors.size() == 1);
      ::kill(supervisors[0], SIGKILL);
      REQUIRE(pump_frames(lanes, 200));
      ::kill(first, SIGKILL);
      REQUIRE(pump_frames(lanes, 200));  // the heir moves them, of both shards
      host.start_tandemd();
      REQUIRE(host.wait_paired(first));
      REQUIRE(pump_frames(lanes, 200));
      const pid_t second = host.active();
      ::kill(second, SIGKILL);
      REQUIRE(pump_frames(lanes, 200));
      REQUIRE(host.wait_paired(second));
    }
    check_clean(lanes);
    for (const std::string& mac : {kMac, kOtherMac}) CHECK(crossed_uplink(host, mac) < 100);
  }
  require_clean_end(host, {"one", "two"});
}

TEST_CASE("guest to guest: a receiver that is taken away, and an owner that dies over it, cost the sender nothing") {
  SKIP_UNLESS_PAIR();
  enum class Away { kRingStopped, kDisconnected, kMemoryGone };
  const Away away = GENERATE(Away::kRingStopped, Away::kDisconnected, Away::kMemoryGone);
  const bool killed = GENERATE(false, true);
  INFO("way " << static_cast<int>(away) << (killed ? ", owner killed" : ""));
  PairHost host;
  host.start();
  require_domain(host, "one", {{.mac = kMac}});
  require_domain(host, "two", {{.mac = kOtherMac}});
  {
    ScriptedFrontEnd one = start_guest(host, kMac), two = start_guest(host, kOtherMac);
    std::vector<Lane> lanes{Lane{one, two, kMac, kOtherMac, 1}};
    REQUIRE(pump_frames(lanes, 300));
    check_clean(lanes);

    // To the outside, in order, between frames for whoever is not there.
    const std::string outside_mac = "02:00:00:00:00:01";
    Outside outside;
    FlowAccount account;
    std::uint32_t sent = 0, vain = 0;
    const auto pump = [&](bool send) {
      if (send && sent - account.arrived() < 32 &&
          one.transmit(0, numbered_frame(outside_mac, kMac, 2, sent, 60 + sent % 700))) {
        ++sent;
        if (one.transmit(0, numbered_frame(kOtherMac, kMac, kUncountedFlow, vain, 100))) ++vain;
      }
      for (const Frame& frame : outside.receive())
        if (const auto found = parse_numbered(frame); found && found->flow == 2)
          account.note(found->number, found->intact);
    };
    const auto pump_to = [&](std::uint64_t frames) {
      return eventually([&] {
        pump(true);
        return account.arrived() >= frames;
      });
    };
    REQUIRE(pump_to(100));
    const pid_t victim = host.active();
    // Frames for it are on their way when it goes.
    for (int i = 0; i < 8; ++i) pump(true);
    if (away == Away::kRingStopped)
      two.send_state(VhostUserRequest::kSetVringEnable, 0, 0);
    else if (away == Away::kDisconnected)
      two.disconnect();
    else
      REQUIRE(::ftruncate(two.memory_fd(), 0) == 0);
    if (killed) ::kill(victim, SIGKILL);
    REQUIRE(pump_to(400));
    if (killed) REQUIRE(host.wait_paired(victim));
    REQUIRE(pump_to(600));
    CHECK(eventually([&] {
      pump(false);
      return account.lost(sent) == 0;
    }));
    CHECK(account.duplicated + account.reordered + account.corrupt == 0);
    CHECK(eventually([&] { return one.in_flight(0) == 0; }));
    CHECK(host.nic(kMac)["fault"] == "");
    CHECK(host.nic(kMac)["tx"]["dropped"] == 0);
    if (away == Away::kMemoryGone) CHECK(host.nic(kOtherMac)["fault"] == "guest memory disappeared");
    if (killed || away == Away::kMemoryGone) CHECK(host.incidents().size() <= (killed ? 1u : 0u));

    // Another guest in its place gets what is sent from then on, from ring to ring.
    two.disconnect();
    ScriptedFrontEnd next = start_guest(host, kOtherMac);
    // What crossed the bridge meanwhile waits in the uplink, and takes each buffer that comes free: until a few frames in
    // a row have gone from ring to ring, and nothing else has come between them.
    std::uint64_t crossed = 0;
    int alone = 0;
    REQUIRE(eventually([&] {
      crossed = crossed_uplink(host, kMac);
      const std::uint32_t number = vain++;
      if (!one.transmit(0, numbered_frame(kOtherMac, kMac, kUncountedFlow, number, 100))) return false;
      std::uint64_t others = 0;
      const bool arrived = eventually(
          [&] {
            bool found = false;
            for (const Frame& frame : next.receive(0)) {
              const Numbered numbered = parse_numbered(frame).value_or(Numbered{});
              const bool ours = numbered.flow == kUncountedFlow && numbered.number == number;
              found = found || ours;
              others += !ours;
            }
            return found;
          },
          std::chrono::milliseconds{200});
      alone = arrived && others == 0 && crossed_uplink(host, kMac) == crossed ? alone + 1 : 0;
      return alone == 5;
    }));
    std::vector<Lane> again{Lane{one, next, kMac, kOtherMac, 3}};
    REQUIRE(pump_frames(again, 300));
    check_clean(again);
    CHECK(crossed_uplink(host, kMac) < crossed + 100);
  }
  require_clean_end(host, {"one", "two"});
}
