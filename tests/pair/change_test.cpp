// SPDX-License-Identifier: Apache-2.0
// What a guest and QEMU change while it runs, with the active backend killed in the middle of each change.
#include <signal.h>

#include "tests/pair/fixture.hpp"

using namespace tandem;
using namespace tandem::test;
using R = VhostUserRequest;

namespace {

void require_paired(PairHost& host, Traffic& traffic) {
  if (!traffic.pump_until([&] { return host.pair()["state"] == "paired" && host.standby() != 0; }))
    FAIL("no pair again: " << host.status().dump(2));
}

/// A reset throws away what is on its way; what did arrive must be right.
void require_nothing_wrong(Traffic& traffic) {
  const TrafficResult result = traffic.finish(std::chrono::milliseconds{0});
  CAPTURE(result);
  CHECK(result.duplicated == 0);
  CHECK(result.corrupt == 0);
  CHECK(result.reordered == 0);
}

void require_clean(Traffic& traffic) {
  const TrafficResult result = traffic.finish();
  CAPTURE(result);
  CHECK(result.clean());
}

}  // namespace

TEST_CASE("reset and reboot and rebind: the active is killed before and in and after the stop and in the start") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    for (int moment = 0; moment < 6; ++moment) {
      INFO("killed at moment " << moment);
      {
        Traffic traffic(guest, kMac);
        REQUIRE(traffic.pump_frames(100));
        const pid_t victim = host.active();
        const auto kill_at = [&](int now) {
          if (now == moment) ::kill(victim, SIGKILL);
        };
        kill_at(0);
        guest.send_body(R::kSetStatus, std::uint64_t{0});
        kill_at(1);
        guest.send_state(R::kGetVringBase, 0, 0);
        kill_at(2);
        guest.reply(R::kGetVringBase);
        kill_at(3);
        guest.get_base(1);
        kill_at(4);
        // Everything that was written is in the rings by now: nothing may come any more.
        const std::uint16_t used[] = {guest.queue(0).used_index(), guest.queue(1).used_index()};
        require_nothing_wrong(traffic);
        CHECK(guest.queue(0).used_index() == used[0]);
        CHECK(guest.queue(1).used_index() == used[1]);
      }
      guest.reset_rings();
      if (moment == 5) ::kill(host.active(), SIGKILL);
      guest.start();
      // Frames that the uplink kept for the old driver may come first: another flow's account does not know them.
      Traffic drain(guest, kMac, {.in = false, .out = false});
      for (int turn = 0; turn < 200; ++turn) drain.pump();
      Traffic traffic(guest, kMac);
      require_paired(host, traffic);
      REQUIRE(traffic.pump_frames(100));
      require_clean(traffic);
    }
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("the guest changes its number of queue pairs under traffic, the active is killed in the middle") {
  SKIP_UNLESS_PAIR();
  PairHost host({.outside_queues = 4});
  host.start();
  require_domain(host, "one", {{.queues = 2}});
  {
    FrontEndOptions options;
    options.queue_pairs = 2;
    ScriptedFrontEnd guest = start_guest(host, kMac, options);
    Traffic traffic(guest, kMac, {.flows_in = 8});
    for (int round = 0; round < 6; ++round) {
      INFO("round " << round);
      REQUIRE(traffic.pump_frames(100));
      const pid_t victim = host.active();
      if (round % 3 == 0) ::kill(victim, SIGKILL);
      for (const std::uint32_t vring : {2u, 3u}) guest.send_state(R::kSetVringEnable, vring, 0, true);
      if (round % 3 == 1) ::kill(victim, SIGKILL);
      for (int answer = 0; answer < 2; ++answer) CHECK(guest.reply_u64(R::kSetVringEnable) == 0);
      for (int turn = 0; turn < 50; ++turn) traffic.pump();
      for (const std::uint32_t vring : {2u, 3u}) guest.send_state(R::kSetVringEnable, vring, 1, true);
      if (round % 3 == 2) ::kill(victim, SIGKILL);
      for (int answer = 0; answer < 2; ++answer) CHECK(guest.reply_u64(R::kSetVringEnable) == 0);
      require_paired(host, traffic);
    }
    require_clean(traffic);
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("memory is added and removed under traffic, the active is killed in the middle: as a table") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    for (int round = 0; round < 8; ++round) {
      INFO("round " << round);
      REQUIRE(traffic.pump_frames(60));
      const pid_t victim = host.active();
      if (round % 4 < 2) ::kill(victim, SIGKILL);
      if (round % 2 == 0)
        guest.send_larger_mem_table(true);
      else
        guest.send_mem_table(true);
      if (round % 4 >= 2) ::kill(victim, SIGKILL);
      CHECK(guest.reply_u64(R::kSetMemTable) == 0);
      require_paired(host, traffic);
    }
    require_clean(traffic);
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("memory is added and removed under traffic, the active is killed in the middle: as slots") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    guest.send_body(R::kSetProtocolFeatures, default_protocol_features());
    Traffic traffic(guest, kMac);
    for (int round = 0; round < 8; ++round) {
      INFO("round " << round);
      REQUIRE(traffic.pump_frames(60));
      const VhostUserSingleRegion region{0, guest.extra_region()};
      const int fd = guest.extra_fd();
      const R request = round % 2 == 0 ? R::kAddMemReg : R::kRemMemReg;
      const pid_t victim = host.active();
      if (round % 4 < 2) ::kill(victim, SIGKILL);
      guest.send_body(request, region, std::span(&fd, request == R::kAddMemReg ? 1 : 0), true);
      if (round % 4 >= 2) ::kill(victim, SIGKILL);
      CHECK(guest.reply_u64(request) == 0);
      require_paired(host, traffic);
    }
    require_clean(traffic);
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("the device is unplugged, or QEMU is killed, in mid-traffic with the active: the next one finds it good") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  for (int round = 0; round < 4; ++round) {
    INFO("round " << round);
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic drain(guest, kMac, {.in = false, .out = false});
    for (int turn = 0; turn < 200; ++turn) drain.pump();
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(100));
    require_paired(host, traffic);
    const pid_t victim = host.active();
    if (round == 1) ::kill(victim, SIGKILL);
    // An unplug ends with messages; a killed QEMU does not.
    if (round >= 2) guest.send_body(R::kSetStatus, std::uint64_t{0});
    if (round == 3) ::kill(victim, SIGKILL);
    if (round >= 2) guest.get_base(0);
    guest.disconnect();
    require_nothing_wrong(traffic);
    REQUIRE(eventually([&] { return host.nic(kMac)["connected"] == false && host.nic(kMac)["running_queues"] == 0; }));
    REQUIRE(host.wait_paired());
  }
  require_clean_end(host, {"one"});
}
