// SPDX-License-Identifier: Apache-2.0
// pair.busy_poll: an owner that runs its netdev's queue itself, and heirs that do so in its place.
#include <signal.h>

#include <fstream>

#include "tests/pair/fixture.hpp"

using namespace tandem;
using namespace tandem::test;

/// Leaves the test as skipped where the kernel cannot poll a veth. Then the log has to say so.
#define SKIP_UNLESS_POLLED(host)                                                                        \
  do {                                                                                                  \
    if ((host).nic(kMac)["uplink"]["busy_poll"] == true) break;                                         \
    REQUIRE((host).logged("pair.busy_poll has no effect on tdm"));                                      \
    require_clean_end(host, {"one"});                                                                   \
    TANDEM_SKIP("needs a kernel that polls a veth busily: Linux 6.4 to 6.12, CONFIG_NET_RX_BUSY_POLL"); \
  } while (false)

TEST_CASE("the owner polls the netdev, and so does each heir after it", "[kernel]") {
  SKIP_UNLESS_PAIR();
  PairHost host({.polling = "always", .configuration = "busy_poll = 64\n"});
  host.start();
  require_domain(host, "one", {{}});
  SKIP_UNLESS_POLLED(host);
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(100));
    // From here on the kernel would wait for a quarter of an hour before it brought a frame by itself.
    const std::string netdev = "/sys/class/net/" + host.nic(kMac)["uplink"]["device"].get<std::string>();
    std::ofstream timeout(netdev + "/gro_flush_timeout");
    REQUIRE(timeout << 1'000'000'000'000 << std::flush);
    REQUIRE(traffic.pump_frames(2000));
    for (int kill = 0; kill < 4; ++kill) {
      const pid_t victim = host.active();
      REQUIRE(victim > 0);
      REQUIRE(::kill(victim, SIGKILL) == 0);
      pump_until_paired(host, traffic, victim);
      REQUIRE(traffic.pump_frames(300));
    }
    switch_over_for_good(host, traffic);
    REQUIRE(traffic.pump_frames(300));
    // A supervisor that adopts the uplink gives it to new backends as it was.
    const std::vector<pid_t> before = host.processes("tandemd");
    REQUIRE(before.size() == 1);
    REQUIRE(::kill(before.front(), SIGKILL) == 0);
    REQUIRE(
        traffic.pump_until([&] { return host.status().value("ok", false) && host.processes("tandemd") != before; }));
    CHECK(host.nic(kMac)["uplink"]["busy_poll"] == true);
    for (int kill = 0; kill < 2; ++kill) {
      require_whole(host, traffic);
      const pid_t victim = host.active();
      REQUIRE(victim > 0);
      REQUIRE(::kill(victim, SIGKILL) == 0);
      pump_until_paired(host, traffic, victim);
      REQUIRE(traffic.pump_frames(300));
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
    CHECK(host.nic(kMac)["overflow"] == 0);
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("an owner that polls its netdev hangs: its heir polls it", "[kernel]") {
  SKIP_UNLESS_PAIR();
  PairHost host({.polling = "always", .configuration = "busy_poll = 64\n"});
  host.start();
  require_domain(host, "one", {{}});
  SKIP_UNLESS_POLLED(host);
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    for (int hang = 0; hang < 3; ++hang) {
      REQUIRE(traffic.pump_frames(300));
      const pid_t victim = host.active();
      REQUIRE(victim > 0);
      REQUIRE(::kill(victim, SIGSTOP) == 0);
      pump_until_paired(host, traffic, victim);
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
    CHECK(host.nic(kMac)["overflow"] == 0);
  }
  require_clean_end(host, {"one"});
}
