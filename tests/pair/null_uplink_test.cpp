// SPDX-License-Identifier: Apache-2.0
// Uplinks for measurement: a scripted guest on a sink, a source, a loopback; through failovers, a new tandemd, release.
#include <signal.h>

#include "tests/pair/fixture.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

constexpr std::uint32_t kFrames = 3000;
const std::string kPeer = "02:00:00:00:00:01";

// Sends numbered frames 0..kFrames-1 on every queue pair and takes what comes back; `at` is called with the number of
// frames that have come, once per round.
std::vector<FlowAccount> send_and_take(ScriptedFrontEnd& guest, const std::function<void(std::uint64_t)>& at) {
  const std::uint32_t pairs = guest.options().queue_pairs;
  std::vector<FlowAccount> flows(pairs);
  std::vector<std::uint32_t> next(pairs, 0);
  std::uint64_t came = 0;
  REQUIRE(eventually([&] {
    bool moved = true;
    while (moved) {
      moved = false;
      for (std::uint32_t pair = 0; pair < pairs; ++pair) {
        const auto flow = static_cast<std::uint16_t>(pair);
        for (int burst = 0; burst < 16 && next[pair] < kFrames; ++burst, ++next[pair])
          if (!guest.transmit(pair, numbered_frame(kPeer, kMac, flow, next[pair], 60 + next[pair] % 1000))) break;
        for (const Frame& frame : guest.receive(pair)) {
          const auto numbered = parse_numbered(frame);
          REQUIRE(numbered);
          CHECK(numbered->flow == flow);
          flows[pair].note(numbered->number, numbered->intact);
          ++came;
          moved = true;
        }
      }
      at(came);
    }
    return came >= std::uint64_t{pairs} * kFrames;
  }));
  return flows;
}

}  // namespace

TEST_CASE("null='loopback': every frame comes back once, through failovers and a new tandemd") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{.queues = 2, .uplink = "null=\"loopback\""}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac, {.queue_pairs = 2});
    CHECK(host.nic(kMac)["uplink"]["null"] == "loopback");
    pid_t tandemd = host.processes("tandemd").front();
    unsigned kills = 0;
    const auto flows = send_and_take(guest, [&](std::uint64_t came) {
      if (kills == 4 || came < (kills + 1) * kFrames / 4) return;
      if (kills == 2) {
        // The third one dies without a supervisor: the next one has to adopt the uplink first.
        REQUIRE(::kill(tandemd, SIGKILL) == 0);
        REQUIRE(eventually(
            [&] { return host.status().value("ok", false) && host.processes("tandemd").front() != tandemd; }));
      }
      const pid_t owner = host.active();
      REQUIRE(host.wait_paired());
      REQUIRE(::kill(owner, SIGKILL) == 0);
      REQUIRE(host.wait_paired(owner));
      ++kills;
    });
    CHECK(kills == 4);
    for (const FlowAccount& flow : flows) {
      CHECK(flow.lost(kFrames) == 0);
      CHECK(flow.duplicated == 0);
      CHECK(flow.reordered == 0);
      CHECK(flow.corrupt == 0);
    }
    const auto nic = host.nic(kMac);
    CAPTURE(nic.dump());
    CHECK(nic["rx"]["packets"] == 2 * kFrames);
    CHECK(nic["tx"]["packets"] == 2 * kFrames);
    CHECK(nic["overflow"] == 0);
    CHECK(nic["uplink_problem"] == "");
    guest.stop();
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("null='sink' takes everything, null='source' gives frames of its length, neither ends with its owner") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(
      host, "one",
      {{.mac = kMac, .uplink = "null=\"sink\""}, {.mac = kOtherMac, .uplink = "null=\"source\" frame=\"300\""}});
  {
    ScriptedFrontEnd sink = start_guest(host, kMac);
    ScriptedFrontEnd source = start_guest(host, kOtherMac);
    std::uint32_t sent = 0;
    std::uint64_t came = 0;
    const auto pump = [&](std::uint64_t frames) {
      const std::uint64_t target = came + frames;
      const std::uint32_t last = sent + static_cast<std::uint32_t>(frames);
      return eventually([&] {
        for (int burst = 0; burst < 64; ++burst) {
          if (sent < last && sink.transmit(0, numbered_frame(kPeer, kMac, 0, sent, 100))) ++sent;
          for (const Frame& frame : source.receive(0)) {
            ++came;
            CHECK(frame.size() == 300);
            CHECK(std::equal(frame.begin(), frame.begin() + 6, Frame{0x52, 0x54, 0, 0x12, 0x34, 0x57}.begin()));
          }
        }
        return sent == last && came >= target && sink.in_flight(0) == 0;
      });
    };
    REQUIRE(pump(2000));
    const pid_t owner = host.active();
    REQUIRE(::kill(owner, SIGKILL) == 0);
    REQUIRE(pump(2000));
    REQUIRE(host.wait_paired(owner));
    REQUIRE(pump(2000));
    CHECK(sink.receive(0).empty());
    CHECK(host.nic(kMac)["tx"]["packets"] == sent);
    // A guest that takes nothing lets the owner of a source sleep: it waits for buffers.
    source.receive(0, /*repost=*/false);
    CHECK(eventually([&] { return host.pair()["active"]["state"] == "asleep"; }));
    sink.stop();
    source.stop();
  }
  require_clean_end(host, {"one"});
}
