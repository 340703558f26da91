// SPDX-License-Identifier: Apache-2.0
// Packets that kill real backends: two failovers each, a capture, and everything else exactly once.
#include "tests/pair/poison.hpp"

#include <signal.h>
#include <sys/stat.h>

#include <cstring>
#include <fstream>
#include <iterator>

#include "tests/pair/fixture.hpp"
#include "tests/pair/probe_file.hpp"

using namespace tandem;
using namespace tandem::test;
using nlohmann::json;

namespace {

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// What one poisonous packet must have left behind: two deaths blamed on it, and its capture.
void check_told(PairHost& host, const Frame& frame, bool receive, std::size_t incidents_before, bool spin,
                int epoch_before) {
  const json all = host.incidents();
  CAPTURE(all.dump(1));
  // On a busy host a spinning owner may be taken for a starved one, which is nobody's fault and one failover more.
  std::vector<json> deaths;
  for (std::size_t n = incidents_before; n < all.size(); ++n) {
    CHECK((all[n]["suspect"].is_object() || all[n]["hang"] == "starved"));
    if (all[n]["suspect"].is_object()) deaths.push_back(all[n]["suspect"]);
  }
  // An heir that dies within microseconds of its takeover does not come to report it: the segment knows, the last one
  // tells.
  REQUIRE(!deaths.empty());
  CHECK(deaths.back()["deaths"] == 2);
  if (!spin) CHECK(host.pair()["epoch"] == epoch_before + 2);
  for (std::size_t death = 0; death < deaths.size(); ++death) {
    const json& suspect = deaths[death];
    CHECK(suspect["direction"] == (receive ? "receive" : "transmit"));
    CHECK(suspect["deaths"] == death + 3 - deaths.size());
    CHECK(suspect["mac"] == kMac);
  }
  REQUIRE(all.back()["poison"].size() == 1);
  const json& poison = all.back()["poison"][0];
  CHECK(poison["direction"] == (receive ? "receive" : "transmit"));
  CHECK(poison["mac"] == kMac);
  CHECK(poison["length"] == frame.size());
  REQUIRE(poison["file"].is_string());
  const std::string path = poison["file"];
  CHECK(path == host.incident_dir() + "/" + std::to_string(all.back()["id"].get<int>()) + ".pcap");
  struct stat status {};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0600);
  const std::string capture = content(path);
  REQUIRE(capture.size() == 24 + 16 + frame.size());
  std::uint32_t magic = 0, link_type = 0, captured = 0;
  std::memcpy(&magic, capture.data(), 4);
  std::memcpy(&link_type, capture.data() + 20, 4);
  std::memcpy(&captured, capture.data() + 32, 4);
  CHECK(magic == 0xa1b2c3d4);
  CHECK(link_type == 1);
  CHECK(captured == frame.size());
  CHECK(std::memcmp(capture.data() + 40, frame.data(), frame.size()) == 0);
}

}  // namespace

TEST_CASE("poison both ways and of every kind: two failovers each, the rest of two NICs exactly once") {
  SKIP_UNLESS_PAIR();
  const Probes probes;
  PairHost host({.backend = TANDEM_PROBED_BACKEND_BINARY, .configuration = "[parking]\nkills = 0\n"});
  host.environment["TANDEM_PROBE_FILE"] = probes.path();
  host.start();
  require_domain(host, "one", {{}, {.mac = kOtherMac}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac), other = start_guest(host, kOtherMac);
    Traffic traffic(guest, kMac, {.window_in = 48}), others(other, kOtherMac, {.window_in = 48});
    std::uint64_t dropped[2] = {};
    for (const bool receive : {false, true})
      for (const DrillFault fault :
           {DrillFault::kBadStore, DrillFault::kAbort, DrillFault::kBusError, DrillFault::kSpin}) {
        INFO((receive ? "receive" : "transmit") << ", fault " << static_cast<int>(fault));
        REQUIRE(traffic.pump_frames(50));
        REQUIRE(others.pump_frames(50));
        const std::size_t before = host.incidents().size();
        const int epoch = host.pair()["epoch"];
        const Frame frame = poison_frame(receive, kMac, fault);
        if (receive)
          traffic.outside().send(frame);
        else
          REQUIRE(guest.transmit(0, frame));
        ++dropped[receive ? 1 : 0];
        REQUIRE(pump_until(traffic, others, [&] {
          const json nic = host.nic(kMac);
          return nic[receive ? "rx" : "tx"]["poisoned"] == dropped[receive ? 1 : 0] &&
                 host.pair()["state"] == "paired" && host.incidents().back()["poison"].size() == 1;
        }));
        check_told(host, frame, receive, before, fault == DrillFault::kSpin, epoch);
      }
    REQUIRE(traffic.pump_frames(50));
    REQUIRE(others.pump_frames(50));
    const TrafficResult result = traffic.finish(), other_result = others.finish();
    CAPTURE(result, other_result, host.status().dump(1));
    CHECK(result.clean());
    CHECK(other_result.clean());
    const json nic = host.nic(kMac);
    CHECK(nic["tx"]["dropped"] == dropped[0]);
    CHECK(nic["rx"]["dropped"] == dropped[1]);
    CHECK(nic["fault"] == "");
    CHECK(nic["disabled"].is_null());
    CHECK(host.nic(kOtherMac)["tx"]["dropped"] == 0);
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("owners killed from outside with the same packets in hand, again and again: nothing is dropped") {
  SKIP_UNLESS_PAIR();
  const Probes probes;
  PairHost host({.backend = TANDEM_PROBED_BACKEND_BINARY});
  host.environment["TANDEM_PROBE_FILE"] = probes.path();
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(20));
    pid_t victim = 0;
    for (int death = 0; death < 6; ++death) {
      probes.arm(ProbePoint::kStaged, 1);
      REQUIRE(traffic.pump_until([&] { return probes->killed.load() != 0; }));
      victim = static_cast<pid_t>(probes->killed.load());
    }
    REQUIRE(traffic.pump_until([&] { return host.pair()["state"] == "paired" && host.active() != victim; }));
    REQUIRE(traffic.pump_frames(20));
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
    const json nic = host.nic(kMac);
    for (const char* direction : {"rx", "tx"}) {
      CHECK(nic[direction]["dropped"] == 0);
      CHECK(nic[direction]["poisoned"] == 0);
    }
    for (const json& incident : host.incidents()) CHECK(incident["suspect"].is_null());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("the backend that ships knows no poison") {
  SKIP_UNLESS_PAIR();
  CHECK(content(TANDEM_BACKEND_BINARY).find(kPoisonMagic) == std::string::npos);
  CHECK(content(TANDEM_PROBED_BACKEND_BINARY).find(kPoisonMagic) != std::string::npos);
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(10));
    const std::uint64_t before = host.nic(kMac)["tx"]["packets"];
    REQUIRE(guest.transmit(0, poison_frame(false, kMac, DrillFault::kBadStore)));
    REQUIRE(traffic.pump_frames(10));
    CHECK(traffic.finish().clean());
    CHECK(host.nic(kMac)["tx"]["packets"] >= before + 11);
    CHECK(host.nic(kMac)["tx"]["dropped"] == 0);
    CHECK(host.incidents().empty());
  }
  require_clean_end(host, {"one"});
}
