// SPDX-License-Identifier: Apache-2.0
// Incident records as JSON.
#include "recovery/supervisor/incident.hpp"

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "recovery/supervisor/pcap.hpp"

namespace tandem {

namespace {

constexpr std::size_t kKept = 1000;
constexpr std::size_t kCapturesKept = 100;

std::string hang_name(HangVerdict verdict) {
  switch (verdict) {
    case HangVerdict::kNone:
      return "";
    case HangVerdict::kSpinning:
      return "spinning";
    case HangVerdict::kBlocked:
      return "blocked";
    case HangVerdict::kAsleepWithWork:
      return "asleep with work pending";
    case HangVerdict::kStarved:
      return "starved";
    case HangVerdict::kNoProgress:
      return "no progress";
  }
  return "unknown";
}

const char* kind_name(TakeoverKind kind) {
  switch (kind) {
    case TakeoverKind::kFailover:
      return "failover";
    case TakeoverKind::kHandover:
      return "handover";
    case TakeoverKind::kTakenBack:
      return "handover taken back";
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

const char* direction_name(std::uint32_t kind) {
  return kind == static_cast<std::uint32_t>(RedoKind::kTransmit)  ? "transmit"
         : kind == static_cast<std::uint32_t>(RedoKind::kForward) ? "forward"
                                                                  : "receive";
}

const char* phase_name(PacketPhase phase) {
  return phase == PacketPhase::kTransmit ? "transmit" : phase == PacketPhase::kReceive ? "receive" : "replay";
}

nlohmann::json suspect_json(const Incident& incident) {
  const auto suspect = decode_suspect(incident.timeline);
  if (!suspect) return nullptr;
  return {{"direction", phase_name(suspect->phase)},
          {"queue_pair", suspect->queue_pair},
          {"deaths", suspect->deaths},
          {"mac", incident.suspect_mac}};
}

nlohmann::json poison_json(const Incident& incident) {
  nlohmann::json list = nlohmann::json::array();
  for (const PoisonRecord& packet : incident.poison)
    list.push_back({{"mac", packet.mac},
                    {"direction", packet.receive ? "receive" : "transmit"},
                    {"queue_pair", packet.queue_pair},
                    {"length", packet.length},
                    {"captured", packet.captured},
                    {"file", packet.file.empty() ? nlohmann::json() : nlohmann::json(packet.file)}});
  return list;
}

}  // namespace

std::optional<SuspectView> decode_suspect(const TakeoverTimeline& timeline) {
  const SuspectView view{static_cast<PacketPhase>(timeline.suspect & 0xffu), timeline.suspect >> 8 & 0xffu,
                         timeline.suspect >> 16};
  const bool known =
      view.phase == PacketPhase::kTransmit || view.phase == PacketPhase::kReceive || view.phase == PacketPhase::kApply;
  return known && view.deaths > 0 && view.queue_pair < kMaxQueuePairs ? std::optional(view) : std::nullopt;
}

std::string signal_name(int signal) {
  const char* name = ::sigabbrev_np(signal);
  return name != nullptr ? std::string("SIG") + name : "signal " + std::to_string(signal);
}

std::string Incident::hang() const { return hang_name(timeline.verdict); }

std::string Incident::cause() const {
  if (planned()) return "planned";
  if (reaped && exit_signal != 0) return signal_name(exit_signal);
  if (reaped) return "exit " + std::to_string(exit_status);
  if (slot.cause == TANDEM_FENCE_SIGNAL) return signal_name(static_cast<int>(slot.signal));
  return slot.cause == TANDEM_FENCE_EXIT ? "exit" : "unknown";
}

nlohmann::json Incident::to_json() const {
  const std::uint64_t zero = planned() ? timeline.requested_ns : timeline.fence_ns;
  nlohmann::json replayed{{"armed", timeline.record_armed != 0}};
  if (timeline.record_armed != 0) {
    replayed["valid"] = timeline.record_valid != 0;
    replayed["direction"] = direction_name(timeline.replayed_kind);
    replayed["packets"] = timeline.replayed_packets;
    replayed["queue_pair"] = timeline.replayed_queue_pair;
  }
  return {{"id", id},
          {"pair", pair},
          {"shard", shard},
          {"time_ms", wall_clock_ms},
          {"kind", kind_name(timeline.kind)},
          {"cause", cause()},
          {"signal", exit_signal != 0 ? exit_signal : static_cast<std::int32_t>(slot.signal)},
          {"thread_signal", slot.signal},
          {planned() ? "former_pid" : "victim_pid", victim_pid},
          {"heir_pid", heir_pid},
          {"epoch", timeline.epoch},
          {"detected_by", planned()                                ? "request"
                          : timeline.verdict == HangVerdict::kNone ? "fence"
                                                                   : "watchdog"},
          {"hang", hang().empty() ? nlohmann::json(nullptr) : nlohmann::json(hang())},
          {"fence_time_ns", timeline.fence_ns},
          {"owner_state", timeline.owner_was_asleep != 0 ? "asleep" : "running"},
          {"timeline_ns",
           {{"last_heartbeat", relative(timeline.last_heartbeat_ns, zero)},
            {"hang_verdict", relative(timeline.verdict_ns, zero)},
            {"requested", relative(timeline.requested_ns, zero)},
            {"granted", relative(timeline.granted_ns, zero)},
            {"fenced", planned() ? nlohmann::json(nullptr) : nlohmann::json(0)},
            {"heir_awake", relative(timeline.awake_ns, zero)},
            {"epoch_taken", relative(timeline.epoch_ns, zero)},
            {"replayed", relative(timeline.replayed_ns, zero)},
            {"first_transaction", relative(timeline.first_transaction_ns, zero)}}},
          {"replayed", std::move(replayed)},
          {"queue_pairs", timeline.queue_pairs},
          {"fallback", fallbacks(timeline)},
          {"suspect", suspect_json(*this)},
          {"poison", poison_json(*this)},
          {"parked", parked_mac.empty() ? nlohmann::json() : nlohmann::json(parked_mac)},
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
    if (entry.path().extension() == ".pcap") {
      log.captures_.insert(id);
      continue;
    }
    std::ifstream file(entry.path());
    auto record = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
    if (record.is_object()) log.earlier_[id] = std::move(record);
  }
  while (log.earlier_.size() > kKept) log.earlier_.erase(log.earlier_.begin());
  return log;
}

Result<std::string> IncidentLog::keep_packet(const Incident& incident, std::span<const std::byte> bytes,
                                             std::uint32_t length) {
  const auto path = [this](std::uint64_t id) { return directory_ + "/" + std::to_string(id) + ".pcap"; };
  if (auto kept = append_to_pcap(path(incident.id), bytes, length, std::chrono::system_clock::now()); !kept)
    return tl::make_unexpected(std::move(kept.error()));
  captures_.insert(incident.id);
  while (captures_.size() > kCapturesKept) {
    std::error_code ignored;
    std::filesystem::remove(path(*captures_.begin()), ignored);
    captures_.erase(captures_.begin());
  }
  return path(incident.id);
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
