// SPDX-License-Identifier: Apache-2.0
// Incident records: causes, relative times, files.
#include "recovery/supervisor/incident.hpp"

#include <catch2/catch.hpp>
#include <csignal>
#include <filesystem>
#include <fstream>

using namespace tandem;
using nlohmann::json;

namespace {

struct Directory {
  Directory() {
    std::string pattern = "/tmp/tandem-incidents-XXXXXX";
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path = pattern;
  }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;
  ~Directory() { std::filesystem::remove_all(path); }
  std::string path;
};

Incident sample() {
  Incident incident;
  incident.pair = "default";
  incident.shard = 1;
  incident.wall_clock_ms = 1'700'000'000'000;
  incident.slot.cause = TANDEM_FENCE_SIGNAL;
  incident.slot.signal = SIGSEGV;
  incident.victim_pid = 100;
  incident.heir_pid = 200;
  incident.timeline.epoch = 7;
  incident.timeline.fence_ns = 5'000'000;
  incident.timeline.last_heartbeat_ns = 4'999'000;
  incident.timeline.awake_ns = 5'060'000;
  incident.timeline.epoch_ns = 5'061'000;
  incident.timeline.replayed_ns = 5'070'000;
  incident.timeline.queue_pairs = 3;
  return incident;
}

}  // namespace

TEST_CASE("the cause of an incident") {
  Incident incident;
  CHECK(incident.cause() == "unknown");
  incident.slot.cause = TANDEM_FENCE_EXIT;
  CHECK(incident.cause() == "exit");
  incident.slot.cause = TANDEM_FENCE_SIGNAL;
  incident.slot.signal = SIGKILL;
  CHECK(incident.cause() == "SIGKILL");
  // What the kernel says of the process counts more than what one thread saw: a group's other threads die of SIGKILL.
  incident.reaped = true;
  incident.exit_signal = SIGABRT;
  CHECK(incident.cause() == "SIGABRT");
  incident.exit_signal = 0;
  incident.exit_status = 3;
  CHECK(incident.cause() == "exit 3");
  CHECK(signal_name(SIGBUS) == "SIGBUS");
  CHECK(signal_name(500) == "signal 500");
}

TEST_CASE("an incident as JSON") {
  Incident incident = sample();
  json text = incident.to_json();
  CHECK(text["kind"] == "failover");
  CHECK(text["cause"] == "SIGSEGV");
  CHECK(text["signal"] == SIGSEGV);
  CHECK(text["pair"] == "default");
  CHECK(text["shard"] == 1);
  CHECK(text["victim_pid"] == 100);
  CHECK(text["heir_pid"] == 200);
  CHECK(text["epoch"] == 7);
  CHECK(text["detected_by"] == "fence");
  CHECK(text["hang"].is_null());
  CHECK(text["owner_state"] == "running");
  CHECK(text["queue_pairs"] == 3);
  CHECK(text["complete"] == false);
  CHECK(text["timeline_ns"] == json{{"last_heartbeat", -1000},
                                    {"hang_verdict", nullptr},
                                    {"requested", nullptr},
                                    {"granted", nullptr},
                                    {"fenced", 0},
                                    {"heir_awake", 60'000},
                                    {"epoch_taken", 61'000},
                                    {"replayed", 70'000},
                                    {"first_transaction", nullptr}});
  CHECK(text["replayed"] == json{{"armed", false}});

  incident.timeline.record_armed = incident.timeline.record_valid = 1;
  incident.timeline.replayed_kind = static_cast<std::uint32_t>(RedoKind::kTransmit);
  incident.timeline.replayed_packets = 32;
  incident.timeline.replayed_queue_pair = 2;
  incident.timeline.owner_was_asleep = 1;
  incident.timeline.first_transaction_ns = 5'100'000;
  incident.closed = true;
  text = incident.to_json();
  CHECK(text["replayed"] ==
        json{{"armed", true}, {"valid", true}, {"direction", "transmit"}, {"packets", 32}, {"queue_pair", 2}});
  CHECK(text["owner_state"] == "asleep");
  CHECK(text["timeline_ns"]["first_transaction"] == 100'000);
  CHECK(text["complete"] == true);

  // Without the fence's mark there is nothing to be relative to.
  incident.timeline.fence_ns = 0;
  CHECK(incident.to_json()["timeline_ns"]["heir_awake"].is_null());
}

TEST_CASE("a handover is recorded as an incident that is no failure") {
  Incident incident = sample();
  incident.slot = {};
  incident.timeline.kind = TakeoverKind::kHandover;
  incident.timeline.fence_ns = 0;
  incident.timeline.requested_ns = 5'050'000;
  incident.timeline.granted_ns = 5'058'000;
  json text = incident.to_json();
  CHECK(text["kind"] == "handover");
  CHECK(text["cause"] == "planned");
  CHECK(text["detected_by"] == "request");
  CHECK(text["signal"] == 0);
  CHECK(text["former_pid"] == 100);
  CHECK_FALSE(text.contains("victim_pid"));
  CHECK(text["timeline_ns"] == json{{"last_heartbeat", -51'000},
                                    {"hang_verdict", nullptr},
                                    {"requested", 0},
                                    {"granted", 8000},
                                    {"fenced", nullptr},
                                    {"heir_awake", 10'000},
                                    {"epoch_taken", 11'000},
                                    {"replayed", 20'000},
                                    {"first_transaction", nullptr}});
  incident.timeline.kind = TakeoverKind::kTakenBack;
  CHECK(incident.to_json()["kind"] == "handover taken back");
}

TEST_CASE("incidents become files, numbered on from what is there") {
  const Directory directory;
  {
    auto log = IncidentLog::open(directory.path + "/made/on/demand");
    REQUIRE(log.has_value());
    CHECK(log->add(sample()).id == 1);
    Incident& second = log->add(sample());
    CHECK(second.id == 2);
    REQUIRE(log->save(second).has_value());
    CHECK(json::parse(std::ifstream(directory.path + "/made/on/demand/2.json")) == second.to_json());
    second.closed = true;
    REQUIRE(log->save(second).has_value());
    CHECK(json::parse(std::ifstream(directory.path + "/made/on/demand/2.json"))["complete"] == true);
    CHECK(log->find(2) == &second);
    CHECK(log->find(3) == nullptr);
  }
  for (const char* noise : {"notes.txt", "999999999999999999999.json", "-5.json", "7x.json", "2.json.new"})
    std::ofstream(directory.path + "/made/on/demand/" + noise) << "{}";
  auto log = IncidentLog::open(directory.path + "/made/on/demand");
  REQUIRE(log.has_value());
  CHECK(log->add(sample()).id == 3);
}

TEST_CASE("what a dead owner had in hand") {
  Incident incident = sample();
  CHECK(incident.to_json()["suspect"].is_null());
  CHECK(incident.to_json()["poison"] == json::array());
  CHECK(incident.to_json()["parked"].is_null());
  incident.timeline.suspect = static_cast<std::uint32_t>(PacketPhase::kReceive) | 2u << 8 | 17u << 16;
  incident.suspect_mac = "52:54:00:00:00:01";
  incident.parked_mac = "52:54:00:00:00:01";
  incident.poison.push_back({"52:54:00:00:00:01", true, 17, 60, 60, "/x/1.pcap"});
  incident.poison.push_back({"52:54:00:00:00:01", false, 17, 60, 0, ""});
  const json text = incident.to_json();
  CHECK(text["suspect"] ==
        json{{"direction", "receive"}, {"queue_pair", 17}, {"deaths", 2}, {"mac", "52:54:00:00:00:01"}});
  CHECK(text["poison"][0]["file"] == "/x/1.pcap");
  CHECK(text["poison"][1]["file"].is_null());
  CHECK(text["poison"][1]["direction"] == "transmit");
  CHECK(text["parked"] == "52:54:00:00:00:01");
  // From a backend, so anything.
  for (const std::uint32_t nonsense : {4u | 1u << 8, 0xffu, 1u, 1u | 1u << 8 | 256u << 16, 0xffffffffu}) {
    incident.timeline.suspect = nonsense;
    CHECK_FALSE(decode_suspect(incident.timeline));
    CHECK(incident.to_json()["suspect"].is_null());
  }
}

TEST_CASE("captures: one file an incident, the last hundred") {
  const Directory directory;
  const std::vector<std::byte> packet(60, std::byte{7});
  const auto path = [&](int id) { return directory.path + "/" + std::to_string(id) + ".pcap"; };
  for (const int from : {1, 61}) {  // the second half by another tandemd
    auto log = IncidentLog::open(directory.path);
    REQUIRE(log.has_value());
    for (int id = from; id < from + 60; ++id) {
      const Incident& incident = log->add(sample());
      REQUIRE(incident.id == static_cast<std::uint64_t>(id));
      const auto kept = log->keep_packet(incident, packet, 60);
      REQUIRE(kept.has_value());
      CHECK(*kept == path(id));
    }
    if (from == 61) CHECK(log->keep_packet(log->recent().back(), packet, 1500).has_value());
  }
  CHECK_FALSE(std::filesystem::exists(path(20)));
  CHECK(std::filesystem::file_size(path(21)) == 24 + 16 + 60);
  CHECK(std::filesystem::file_size(path(120)) == 24 + 2 * (16 + 60));
  CHECK(std::filesystem::status(path(120)).permissions() ==
        (std::filesystem::perms::owner_read | std::filesystem::perms::owner_write));
}

TEST_CASE("incidents do not fill memory") {
  const Directory directory;
  auto log = IncidentLog::open(directory.path);
  REQUIRE(log.has_value());
  for (int n = 0; n < 2500; ++n) log->add(sample());
  CHECK(log->recent().size() == 1000);
  CHECK(log->recent().back().id == 2500);
  CHECK(log->find(1) == nullptr);
}

TEST_CASE("an incident directory that cannot be") {
  const Directory directory;
  std::ofstream(directory.path + "/file") << "x";
  const auto log = IncidentLog::open(directory.path + "/file");
  REQUIRE_FALSE(log.has_value());
  CHECK(log.error().text.find("incident_dir") != std::string::npos);
}
