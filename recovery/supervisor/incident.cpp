// SPDX-License-Identifier: Apache-2.0
// Incident records as JSON.
#include "recovery/supervisor/incident.hpp"

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>

namespace tandem {

namespace {

constexpr std::size_t kKept = 1000;

nlohmann::json hang_name(HangVerdict verdict) {
  switch (verdict) {
    case HangVerdict::kNone:
      return nullptr;
    case HangVerdict::kSpinning:
      return "spinning";
    case HangVerdict::kBlocked:
      return "blocked";
    case HangVerdict::kAsleepWithWork:
      return "asleep with work pending";
    case HangVerdict::kStarved:
      return "starved";
  }
  return "unknown";
}

nlohmann::json relative(std::uint64_t time, std::uint64_t zero) {
  if (time == 0 || zero == 0) return nullptr;
  return static_cast<std::int64_t>(time) - static_cast<std::int64_t>(zero);
}

// In what the heir had to fall back to less than exactly once, because of what its predecessor had left behind.
nlohmann::json fallbacks(const TakeoverTimeline& timeline) {
  nlohmann::json list = nlohmann::json::array();
  if (timeline.record_armed != 0 && timeline.record_valid == 0)
    list.push_back(timeline.replayed_kind == 0
                       ? "the record was damaged or its device gone: its burst may be lost or repeated"
                       : "record and cursors did not match: that queue was stopped");
  return list;
}

}  // namespace

std::string signal_name(int signal) {
  const char* name = ::sigabbrev_np(signal);
  return name != nullptr ? std::string("SIG") + name : "signal " + std::to_string(signal);
}

std::string Incident::cause() const {
  if (reaped && exit_signal != 0) return signal_name(exit_signal);
  if (reaped) return "exit " + std::to_string(exit_status);
  if (slot.cause == TANDEM_FENCE_SIGNAL) return signal_name(static_cast<int>(slot.signal));
  return slot.cause == TANDEM_FENCE_EXIT ? "exit" : "unknown";
}

nlohmann::json Incident::to_json() const {
  const std::uint64_t zero = timeline.fence_ns;
  nlohmann::json replayed{{"armed", timeline.record_armed != 0}};
  if (timeline.record_armed != 0) {
    replayed["valid"] = timeline.record_valid != 0;
    replayed["direction"] =
        timeline.replayed_kind == static_cast<std::uint32_t>(RedoKind::kTransmit) ? "transmit" : "receive";
    replayed["packets"] = timeline.replayed_packets;
    replayed["queue_pair"] = timeline.replayed_queue_pair;
  }
  return {{"id", id},
          {"pair", pair},
          {"shard", shard},
          {"time_ms", wall_clock_ms},
          {"cause", cause()},
          {"signal", exit_signal != 0 ? exit_signal : static_cast<std::int32_t>(slot.signal)},
          {"thread_signal", slot.signal},
          {"victim_pid", victim_pid},
          {"heir_pid", heir_pid},
          {"epoch", timeline.epoch},
          {"detected_by", timeline.verdict == HangVerdict::kNone ? "fence" : "watchdog"},
          {"hang", hang_name(timeline.verdict)},
          {"fence_time_ns", zero},
          {"owner_state", timeline.owner_was_asleep != 0 ? "asleep" : "running"},
          {"timeline_ns",
           {{"last_heartbeat", relative(timeline.last_heartbeat_ns, zero)},
            {"hang_verdict", relative(timeline.verdict_ns, zero)},
            {"fenced", 0},
            {"heir_awake", relative(timeline.awake_ns, zero)},
            {"epoch_taken", relative(timeline.epoch_ns, zero)},
            {"replayed", relative(timeline.replayed_ns, zero)},
            {"first_transaction", relative(timeline.first_transaction_ns, zero)}}},
          {"replayed", std::move(replayed)},
          {"queue_pairs", timeline.queue_pairs},
          {"fallback", fallbacks(timeline)},
          {"complete", closed}};
}

Result<IncidentLog> IncidentLog::open(const std::string& directory) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error)
    return fail(ErrorKind::kSystem, "open the incident directory " + directory + ": " + error.message() +
                                        "; make it writable or set incident_dir in the configuration");
  IncidentLog log;
  log.directory_ = directory;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    const std::string stem = entry.path().stem().string();
    if (stem.empty() || stem.size() > 18 || stem.find_first_not_of("0123456789") != std::string::npos) continue;
    const std::uint64_t id = std::stoull(stem);
    log.next_id_ = std::max<std::uint64_t>(log.next_id_, id + 1);
    std::ifstream file(entry.path());
    auto record = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
    if (record.is_object()) log.earlier_[id] = std::move(record);
  }
  while (log.earlier_.size() > kKept) log.earlier_.erase(log.earlier_.begin());
  return log;
}

Incident& IncidentLog::add(Incident incident) {
  incident.id = next_id_++;
  recent_.push_back(std::move(incident));
  if (recent_.size() > kKept) recent_.pop_front();
  return recent_.back();
}

nlohmann::json IncidentLog::all() const {
  nlohmann::json list = nlohmann::json::array();
  for (const auto& [id, record] : earlier_) list.push_back(record);
  for (const Incident& incident : recent_) list.push_back(incident.to_json());
  return list;
}

Incident* IncidentLog::find(std::uint64_t id) {
  for (Incident& incident : recent_)
    if (incident.id == id) return &incident;
  return nullptr;
}

Status IncidentLog::save(const Incident& incident) const {
  const std::string path = directory_ + "/" + std::to_string(incident.id) + ".json";
  const std::string temporary = path + ".new";
  std::ofstream file(temporary, std::ios::trunc);
  file << incident.to_json().dump(2) << '\n';
  file.close();
  std::error_code error;
  if (file) std::filesystem::rename(temporary, path, error);
  if (!file || error) return fail(ErrorKind::kSystem, "write incident " + path + ": disk full or directory gone");
  return {};
}

}  // namespace tandem
