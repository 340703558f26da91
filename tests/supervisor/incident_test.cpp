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
