// SPDX-License-Identifier: Apache-2.0
// Uplinks that are wrong or disappear: a sentence for the operator, and everything can be released all the same.
#include "tests/pair/fixture.hpp"

using namespace tandem;
using namespace tandem::test;

TEST_CASE("an uplink that disappears") {
  SKIP_UNLESS_PAIR();
  struct Row {
    const char* command;
    const char* undo;
  };
  const Row row = GENERATE(Row{"ip link del br0", nullptr}, Row{"ip link set br0 down", "ip link set br0 up"},
                           Row{"ip link del tdm123456a", nullptr},
                           Row{"ip link set tdm123456b nomaster", "ip link set tdm123456b master br0"});
  INFO(row.command);
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(100));
    const pid_t owner = host.active();
    REQUIRE(shell(row.command));
    REQUIRE(eventually([&] { return host.nic(kMac)["uplink_problem"] != ""; }));
    const std::string problem = host.nic(kMac)["uplink_problem"];
    CAPTURE(problem);
    CHECK(problem.size() > 20);
    CHECK(host.logged(problem));
    // The guest sends into the void; its driver gets its buffers back or waits, and nobody dies.
    for (int frame = 0; frame < 50; ++frame) guest.transmit(0, numbered_frame("02:00:00:00:00:01", kMac, 0, 1, 100));
    guest.settle();
    CHECK(host.active() == owner);
    if (row.undo != nullptr) {
      REQUIRE(shell(row.undo));
      REQUIRE(eventually([&] { return host.nic(kMac)["uplink_problem"] == ""; }));
    }
    guest.stop();
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("domains that cannot be served: a sentence that says what to change, and nothing left") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  const auto refused = [&](const std::vector<TestNic>& nics) {
    const auto answer = host.prepare_domain("one", nics);
    CAPTURE(answer.dump());
    CHECK(answer["ok"] == false);
    CHECK(host.status()["nics"].empty());
    return answer.value("error", "");
  };
  CHECK(refused({{.uplink = "bridge=\"nobridge\""}}).find("nobridge") != std::string::npos);
  CHECK(refused({{.uplink = "bridge=\"host0\""}}).find("host0") != std::string::npos);
  CHECK(refused({{.uplink = "dev=\"nodev\""}}).find("nodev") != std::string::npos);
  CHECK(refused({{.uplink = "null=\"yes\""}}).find("'loopback'") != std::string::npos);
  CHECK(refused({{.uplink = "wire=\"br0\""}}).find("wire") != std::string::npos);
  // All or nothing.
  CHECK(refused({{.mac = kMac}, {.mac = kOtherMac, .uplink = "bridge=\"nobridge\""}}).find("nobridge") !=
        std::string::npos);
  require_domain(host, "two", {{.mac = kOtherMac}});
  const auto twice = host.prepare_domain("three", {{.mac = kOtherMac}});
  CHECK(twice["ok"] == false);
  CHECK(twice.value("error", "").find("another MAC") != std::string::npos);
  // A domain that is none of our business.
  CHECK(host.hook("other", "prepare", "begin", "<domain type='kvm'><name>other</name></domain>").value("ok", false));
  CHECK(host.release_domain("other").value("ok", false));
  CHECK_FALSE(host.hook("broken", "prepare", "begin", "<domain").value("ok", true));
  require_clean_end(host, {"two"});
}

TEST_CASE("no backend program, no account: the start of the domain is refused with the reason") {
  SKIP_UNLESS_PAIR();
  PairHost host({.backend = "/nonexistent/tandem-backend"});
  host.start();
  const auto answer = host.prepare_domain("one", {{}});
  CAPTURE(answer.dump());
  CHECK(answer["ok"] == false);
  CHECK(answer.value("error", "").find("backend.path") != std::string::npos);
  CHECK(host.stop() == "");
}
