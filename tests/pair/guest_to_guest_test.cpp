// SPDX-License-Identifier: Apache-2.0
// Two guests of one pair on one bridge: numbered frames go from ring to ring, exactly once, while owners are killed.
#include <signal.h>

#include <array>
#include <fstream>

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
  std::uint32_t sent = 0;
  FlowAccount account = {};

  void pump(bool send) {
    while (send && sent - account.arrived() < 64 &&
           from.transmit(0, numbered_frame(to_mac, from_mac, flow, sent, 60 + sent % 700)))
      ++sent;
    for (const Frame& frame : to.receive(0))
      if (const auto found = parse_numbered(frame); found && found->flow == flow)
        account.note(found->number, found->intact);
  }
};

/// Until as many frames more have arrived in each lane.
bool pump_frames(std::array<Lane, 2>& lanes, std::uint64_t frames) {
  const std::uint64_t first = lanes[0].account.arrived() + frames, second = lanes[1].account.arrived() + frames;
  return eventually([&] {
    for (Lane& lane : lanes) lane.pump(true);
    return lanes[0].account.arrived() >= first && lanes[1].account.arrived() >= second;
  });
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
        return host.active() != victim && host.active() != 0 && host.standby() != 0;
      }));
    }
    CHECK(eventually([&] {
      for (Lane& lane : lanes) lane.pump(false);
      return lanes[0].account.lost(lanes[0].sent) + lanes[1].account.lost(lanes[1].sent) == 0;
    }));
    for (const Lane& lane : lanes) CHECK(lane.account.duplicated + lane.account.reordered + lane.account.corrupt == 0);
    // Whether the uplinks' ports saw those frames.
    std::uint64_t crossed = 0;
    std::ifstream("/sys/class/net/" + host.nic(kMac)["uplink"]["device"].get<std::string>() +
                  "/statistics/tx_packets") >>
        crossed;
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
