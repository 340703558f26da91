// SPDX-License-Identifier: Apache-2.0
// NICs without a link: parked because their packets kill, or disabled by an operator; others on the pair go on.
#include <signal.h>

#include "tests/pair/fixture.hpp"
#include "tests/pair/poison.hpp"
#include "tests/pair/probe_file.hpp"

using namespace tandem;
using namespace tandem::test;
using nlohmann::json;

namespace {

bool can_connect(const PairHost& host, const std::string& mac) {
  return shell("timeout 5 python3 -c \"import socket; socket.socket(socket.AF_UNIX).connect('" + host.nic_socket(mac) +
               "')\"");
}

bool virt_tandem(const PairHost& host, const std::string& words) {
  return shell(std::string(TANDEM_CLI_BINARY) + " --socket " + host.control_socket() + " " + words);
}

}  // namespace

TEST_CASE("a NIC that keeps killing is parked until it is enabled, the other one loses nothing") {
  SKIP_UNLESS_PAIR();
  const Probes probes;
  PairHost host({.backend = TANDEM_PROBED_BACKEND_BINARY, .configuration = "[parking]\nkills = 3\nwindow_s = 600\n"});
  host.environment["TANDEM_PROBE_FILE"] = probes.path();
  host.start();
  require_domain(host, "one", {{}, {.mac = kOtherMac}});
  {
    ScriptedFrontEnd other = start_guest(host, kOtherMac);
    Traffic others(other, kOtherMac);
    {
      ScriptedFrontEnd guest = start_guest(host, kMac);
      REQUIRE(others.pump_frames(50));
      for (int packet = 0; packet < 3; ++packet)
        REQUIRE(guest.transmit(0, poison_frame(false, kMac, DrillFault::kAbort)));
      const bool disabled = others.pump_until([&] { return host.nic(kMac)["disabled"].is_object(); });
      CAPTURE(host.incidents().dump(1));
      REQUIRE(disabled);
      CHECK(guest.wait_closed());
    }
    const auto parked = [&] {
      const json nic = host.nic(kMac);
      CAPTURE(nic.dump(1));
      REQUIRE(nic["disabled"].is_object());
      CHECK(nic["disabled"]["by"] == "tandem");
      CHECK(nic["disabled"]["reason"].get<std::string>().find("its packets killed") == 0);
      CHECK(nic["connected"] == false);
      CHECK(nic["running_queues"] == 0);
      CHECK_FALSE(can_connect(host, kMac));
    };
    REQUIRE(others.pump_until([&] { return host.pair()["state"] == "paired"; }));
    parked();
    const json incidents = host.incidents();
    CAPTURE(incidents.dump(1));
    CHECK(std::any_of(incidents.begin(), incidents.end(),
                      [](const json& incident) { return incident["parked"] == kMac; }));

    INFO("a new tandemd goes on with it");
    REQUIRE(::kill(host.processes("tandemd").front(), SIGKILL) == 0);
    REQUIRE(others.pump_until([&] { return host.status().value("ok", false); }));
    parked();
    REQUIRE(others.pump_frames(50));

    REQUIRE(others.pump_until([&] { return virt_tandem(host, "nic unpark " + kMac); }));
    CHECK(host.nic(kMac)["disabled"].is_null());
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(50));
    REQUIRE(others.pump_frames(50));
    const TrafficResult result = traffic.finish(), others_result = others.finish();
    CAPTURE(result, others_result);
    CHECK(result.clean());
    CHECK(others_result.clean());
    CHECK(host.nic(kMac)["disabled"].is_null());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("an operator takes a NIC's link down and gives it back") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}, {.mac = kOtherMac}});
  {
    ScriptedFrontEnd other = start_guest(host, kOtherMac);
    Traffic others(other, kOtherMac);
    {
      ScriptedFrontEnd guest = start_guest(host, kMac);
      Traffic traffic(guest, kMac);
      REQUIRE(traffic.pump_frames(20));
      REQUIRE(virt_tandem(host, "nic disable " + kMac + " --reason 'cable is being changed'"));
      CHECK(guest.wait_closed());
    }
    const json nic = host.nic(kMac);
    CAPTURE(nic.dump(1));
    CHECK(nic["disabled"]["by"] == "operator");
    CHECK(nic["disabled"]["reason"] == "cable is being changed");
    CHECK(nic["disabled"]["since_ms"].get<std::int64_t>() > 1'600'000'000'000);
    CHECK_FALSE(can_connect(host, kMac));
    CHECK_FALSE(virt_tandem(host, "nic disable " + kMac));
    CHECK_FALSE(virt_tandem(host, "nic disable 52:54:00:00:00:99"));
    CHECK_FALSE(virt_tandem(host, "nic enable " + kOtherMac));
    CHECK_FALSE(virt_tandem(host, "nic disable " + kOtherMac + " --reason \"$(printf 'two\\nlines')\""));
    REQUIRE(others.pump_frames(50));
    REQUIRE(virt_tandem(host, "nic enable " + kMac));
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(50));
    const TrafficResult result = traffic.finish(), others_result = others.finish();
    CAPTURE(result, others_result);
    CHECK(result.clean());
    CHECK(others_result.clean());

    INFO("released while it is disabled");
    REQUIRE(virt_tandem(host, "nic disable " + kMac));
  }
  require_clean_end(host, {"one"});
}
