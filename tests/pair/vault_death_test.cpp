// SPDX-License-Identifier: Apache-2.0
// The vault dies: front ends lose their connections, come back within 2 s, and their traffic goes on; the pair stays.
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/pair/fixture.hpp"

using namespace tandem;
using namespace tandem::test;
using namespace std::chrono_literals;

namespace {

/// The vault itself, not the process that starts it again.
pid_t vault_of(const PairHost& host) {
  const std::vector<pid_t> both = host.processes("tandem-vault");
  for (const pid_t pid : both)
    for (const pid_t parent : both)
      if (proc_status(pid, "PPid") == std::to_string(parent)) return pid;
  FAIL("no vault under a parent of its name");
  return 0;
}

/// Frames go out by every queue pair, and come in (by which of them is the bridge's choice).
void require_every_pair(PairHost& host, Traffic& traffic) {
  if (!traffic.pump_until([&] { return traffic.least_out() > 100 && traffic.arrived_in() > 100; }))
    FAIL("a queue pair stands still: " << host.nic(kMac).dump(2) << host.pair().dump(2));
  const TrafficResult result = traffic.finish();
  CAPTURE(result);
  CHECK(result.clean());
}

void kill_vault(std::uint32_t queue_pairs) {
  PairHost host({.outside_queues = 2 * queue_pairs});
  host.start();
  require_domain(host, "one", {{.queues = queue_pairs}});
  {
    FrontEndOptions options;
    options.queue_pairs = queue_pairs;
    ScriptedFrontEnd guest = start_guest(host, kMac, options);
    const std::vector<pid_t> backends = host.processes("tandem-backend");
    for (const bool failover : {false, true}) {
      INFO(queue_pairs << " queue pairs, " << (failover ? "with" : "without") << " a failover in between");
      {
        Traffic traffic(guest, kMac, {.flows_in = 8});
        require_every_pair(host, traffic);
      }
      const auto died = std::chrono::steady_clock::now();
      ::kill(vault_of(host), SIGKILL);
      if (failover) ::kill(host.active(), SIGKILL);
      REQUIRE(guest.wait_closed());
      // QEMU tries once a second; here it is as soon as the socket answers.
      REQUIRE(eventually([&] {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        const std::string path = host.nic_socket(kMac);
        path.copy(address.sun_path, sizeof address.sun_path - 1);
        const UniqueFd probe{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
        return ::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
      }));
      guest.reconnect(host.nic_socket(kMac));
      guest.negotiate();
      guest.resume();
      const auto back = std::chrono::steady_clock::now() - died;
      WARN("back after " << std::chrono::duration_cast<std::chrono::milliseconds>(back).count() << " ms");
      CHECK(back < 2s);
      Traffic traffic(guest, kMac, {.flows_in = 8});
      require_every_pair(host, traffic);
      if (!failover) CHECK(host.processes("tandem-backend") == backends);
      REQUIRE(host.wait_paired());
    }
  }
  require_clean_end(host, {"one"});
}

}  // namespace

TEST_CASE("the vault is killed: the front end is back within 2 s, the pair stays") {
  SKIP_UNLESS_PAIR();
  kill_vault(1);
}

TEST_CASE("the vault is killed: several queue pairs come back") {
  SKIP_UNLESS_PAIR();
  kill_vault(2);
}

TEST_CASE("the vault is killed in mid-traffic: nobody hangs, nothing is corrupt") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    std::optional<Traffic> before(std::in_place, guest, kMac);
    REQUIRE(before->pump_frames(200));
    ::kill(vault_of(host), SIGKILL);
    REQUIRE(before->pump_until([&] { return guest.readable(0ms); }));
    REQUIRE(guest.wait_closed());
    // QEMU goes by used.idx at this very moment: nobody may move it any more, nor write.
    const std::uint16_t used[] = {guest.queue(0).used_index(), guest.queue(1).used_index()};
    // Until tandemd has a new vault it answers all the same.
    CHECK(host.status().value("ok", false));
    REQUIRE(eventually([&] { return host.logged("attached to a new tandem-vault"); }));
    CHECK(guest.queue(0).used_index() == used[0]);
    CHECK(guest.queue(1).used_index() == used[1]);
    guest.reconnect(host.nic_socket(kMac));
    guest.negotiate();
    guest.resume();
    // What was in the virtqueues may come twice, as after any reconnection; nothing is lost or damaged.
    const TrafficResult result = before->finish();
    CAPTURE(result);
    CHECK(result.lost == 0);
    CHECK(result.corrupt == 0);
    before.reset();
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(200));
    CHECK(traffic.finish().clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("the vault is killed: a front end is back before the owners have let go of its old connection") {
  SKIP_UNLESS_PAIR();
  const bool goes_on = GENERATE(true, false);
  INFO((goes_on ? "owner and heir go on" : "owner and heir are ended as hung"));
  PairHost host;
  host.start();
  // Long enough for everything that is to happen while nobody lets go.
  require_domain(host, "one", {{.watchdog = R"(spin="3s" blocked="3s")"}});
  {
    ScriptedFrontEnd old = start_guest(host, kMac);
    {
      Traffic traffic(old, kMac);
      REQUIRE(traffic.pump_frames(100));
      REQUIRE(traffic.finish().clean());
    }
    const std::string connected = "NIC " + kMac + ": QEMU connected";
    const std::size_t logged = host.log().size();
    const pid_t owner = host.active(), heir = host.standby();
    for (const pid_t pid : {heir, owner}) ::kill(pid, SIGSTOP);
    const auto stopped = std::chrono::steady_clock::now();
    ::kill(vault_of(host), SIGKILL);
    REQUIRE(eventually([&] { return host.logged("attached to a new tandem-vault"); }));
    ScriptedFrontEnd next(host.nic_socket(kMac));
    next.send(VhostUserRequest::kGetFeatures);
    REQUIRE(eventually([&] { return host.log().find(connected, logged) != std::string::npos; }));
    // QEMU goes by used.idx when its connection ends, so the old one may not end yet; nor may the new one be answered.
    const bool old_open = !old.readable(0ms), next_waits = !next.readable(0ms);
    if (std::chrono::steady_clock::now() - stopped < 2s) {
      CHECK(old_open);
      CHECK(next_waits);
    } else {
      WARN("the machine was too slow for a look at both connections");
    }
    if (goes_on)
      for (const pid_t pid : {heir, owner}) ::kill(pid, SIGCONT);
    REQUIRE(next.reply_u64(VhostUserRequest::kGetFeatures) != 0);
    CHECK(old.readable(0ms));  // its end, which came first
    REQUIRE(old.wait_closed());
    const std::uint16_t used[] = {old.queue(0).used_index(), old.queue(1).used_index()};
    const std::vector<std::byte> before(old.memory().begin(), old.memory().end());
    next.negotiate();
    next.start();
    REQUIRE(host.wait_paired());
    CHECK((host.active() == owner) == goes_on);
    {
      Traffic traffic(next, kMac);
      REQUIRE(traffic.pump_frames(200));
      CHECK(traffic.finish().clean());
    }
    // The old guest's memory is nobody's to write any more.
    CHECK(old.queue(0).used_index() == used[0]);
    CHECK(old.queue(1).used_index() == used[1]);
    CHECK(std::equal(before.begin(), before.end(), old.memory().begin()));
  }
  require_clean_end(host, {"one"});
}
