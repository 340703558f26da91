// SPDX-License-Identifier: Apache-2.0
// Incident: the record of one failover or planned handover, kept in memory and as a JSON file.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "common/layout/fence_slot.h"
#include "common/layout/segment.hpp"
#include "common/result.hpp"

namespace tandem {

/// A packet that was dropped because owners died on it.
struct PoisonRecord {
  std::string mac;
  bool receive = false;
  std::uint32_t queue_pair = 0;  ///< index in the segment
  std::uint32_t length = 0, captured = 0;
  std::string file;  ///< the capture; empty if there is none
};

/// TakeoverTimeline::suspect, as far as it makes sense.
struct SuspectView {
  PacketPhase phase;
  std::uint32_t deaths, queue_pair;
};
std::optional<SuspectView> decode_suspect(const TakeoverTimeline& timeline);

/// What is known of one failover or handover (timeline.kind); grows as reports come in. Times are CLOCK_MONOTONIC ns
/// unless named otherwise.
struct Incident {
  std::uint64_t id = 0;
  std::string pair;
  std::uint32_t shard = 0;
  std::int64_t wall_clock_ms = 0;  ///< since 1970, UTC
  tandem_fence_slot slot{};        ///< what the fence saw of the dead thread
  std::int32_t victim_pid = 0;     ///< who owned before; after a handover it lives on
  std::int32_t heir_pid = 0;
  bool reaped = false;
  std::int32_t exit_signal = 0;  ///< of the process; 0 if it exited by itself
  std::int32_t exit_status = 0;
  TakeoverTimeline timeline{};
  std::string suspect_mac;           ///< whose packet the dead owner had in hand, if that killed it
  std::string parked_mac;            ///< NIC that was parked for it
  std::vector<PoisonRecord> poison;  ///< dropped by the heir
  bool closed = false;               ///< nothing more will be added

  [[nodiscard]] bool planned() const { return timeline.kind != TakeoverKind::kFailover; }
  /// "SIGSEGV", "SIGKILL", "exit 1": what the process died of, if reaped; else what the fence saw. "planned" for a
  /// handover.
  [[nodiscard]] std::string cause() const;
  /// "spinning", "blocked", ...: what its standby killed it for; empty if that did not.
  [[nodiscard]] std::string hang() const;
  /// Times in `timeline_ns` are relative to the fence's mark, those of a handover to its request; absent ones are null.
  [[nodiscard]] nlohmann::json to_json() const;
};

/// Keeps the last incidents and writes each to DIR/ID.json. Not thread-safe.
class IncidentLog {
 public:
  /// `directory` is made if missing; what earlier runs recorded there is read, and numbering goes on from it.
  static Result<IncidentLog> open(const std::string& directory);
  Incident& add(Incident incident);
  /// Writes the record's file anew (whole, by rename).
  Status save(const Incident& incident) const;
  /// Adds a packet to the incident's capture, DIR/ID.pcap; its path. The oldest captures go when there are too many.
  Result<std::string> keep_packet(const Incident& incident, std::span<const std::byte> bytes, std::uint32_t length);
  [[nodiscard]] std::deque<Incident>& recent() { return recent_; }
  [[nodiscard]] const std::deque<Incident>& recent() const { return recent_; }
  /// Earlier runs' records, oldest first, then this one's.
  [[nodiscard]] nlohmann::json all() const;
  Incident* find(std::uint64_t id);

 private:
  std::string directory_;
  std::uint64_t next_id_ = 1;
  std::map<std::uint64_t, nlohmann::json> earlier_;
  std::deque<Incident> recent_;
  std::set<std::uint64_t> captures_;  // incidents with one
};

/// "SIGSEGV" for 11.
std::string signal_name(int signal);

}  // namespace tandem
