// SPDX-License-Identifier: Apache-2.0
// Clean starts after unclean ends.
#include <signal.h>

#include <filesystem>

#include "tests/pair/fixture.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

std::vector<std::string> our_links() {
  std::vector<std::string> links;
  for (const std::string& name : entries("/sys/class/net"))
    if (name.starts_with("tdm")) links.push_back(name);
  return links;
}

void require_good_as_new(PairHost& host) {
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(200));
    CHECK(traffic.finish().clean());
  }
  require_clean_end(host, {"one"});
}

}  // namespace

TEST_CASE("everything is killed at once with a guest at work: the next start clears the site") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  require_domain(host, "gone", {{.mac = kOtherMac}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(100));
    host.kill_everything();
    CHECK(guest.wait_closed());
  }
  CHECK_FALSE(our_links().empty());
  CHECK(std::filesystem::exists(host.nic_socket(kOtherMac)));
  host.start();
  CHECK(our_links().empty());
  CHECK(entries(host.run_dir() + "/nic").empty());
  CHECK(host.processes("tandem-backend").empty());
  CHECK(host.status()["nics"].empty());
  require_good_as_new(host);
}

TEST_CASE("vault and tandemd are killed, backends are not: these end by themselves") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  ScriptedFrontEnd guest = start_guest(host, kMac);
  for (const char* name : {"tandem-vault", "tandemd"})
    for (const pid_t pid : host.processes(name)) ::kill(pid, SIGKILL);
  CHECK(guest.wait_closed());
  CHECK(eventually([&] { return host.processes().empty(); }));
  host.start();
  CHECK(our_links().empty());
  require_good_as_new(host);
}

TEST_CASE("tandemd alone is killed: traffic goes on, failover works without it, and the next one adopts the pair") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(100));
    for (const bool failover : {false, true}) {
      const std::vector<pid_t> before = host.processes("tandemd"), backends = host.processes("tandem-backend");
      REQUIRE(before.size() == 1);
      REQUIRE(backends.size() == 2);
      const pid_t active = host.active();
      ::kill(before[0], SIGKILL);
      if (failover) ::kill(active, SIGKILL);
      REQUIRE(traffic.pump_frames(200));
      REQUIRE(eventually([&] {
        const auto now = host.processes("tandemd");
        return now.size() == 1 && now != before && host.nic(kMac).is_object() && host.pair()["state"] == "paired";
      }));
      CHECK(host.nic(kMac)["domain"] == "one");
      CHECK(eventually([&] { return host.nic(kMac)["connected"] == true; }));
      if (!failover) CHECK(host.processes("tandem-backend") == backends);
      REQUIRE(traffic.pump_frames(200));
    }
    CHECK(traffic.finish().clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("stopped in order while a guest runs, then started: nothing of before is left") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  ScriptedFrontEnd guest = start_guest(host, kMac);
  host.stop();  // leaves the guest's NIC, which cannot live without its vault
  CHECK(host.processes().empty());
  CHECK(guest.wait_closed());
  host.start();
  CHECK(our_links().empty());
  require_good_as_new(host);
}

TEST_CASE("a second tandemd for the same run_dir is refused") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  CHECK_FALSE(shell(std::string(TANDEM_TANDEMD_BINARY) + " --config " + host.run_dir() + "/../tandemd.toml"));
  CHECK(host.status().value("ok", false));
  CHECK(host.stop() == "");
}
