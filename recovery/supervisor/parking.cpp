// SPDX-License-Identifier: Apache-2.0
// What killed backends: blaming NICs, keeping poison packets, and NICs that are disabled until an operator enables
// them.
//
// A disabled NIC keeps its uplink and its place in the pair. Its description is emptied first; when no owner writes to
// the guest any more, the vault closes QEMU's connection and its listening socket, and the guest sees its link down.
// That it is disabled is part of the NIC's record in the vault, written before anything else, so that a new tandemd
// goes on with it.
#include <spdlog/spdlog.h>

#include <algorithm>
#include <ctime>
#include <filesystem>

#include "common/monotonic_clock.hpp"
#include "recovery/supervisor/supervisor.hpp"

namespace tandem {

namespace {

constexpr std::size_t kLongestReason = 200;
constexpr std::uint64_t kMostKillsAtOnce = 1000;  // as many as the configuration can ask for

std::int64_t wall_clock_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// Operators' words end in logs and tables: one line, not too long.
bool is_presentable(const std::string& reason) {
  return reason.size() <= kLongestReason && std::none_of(reason.begin(), reason.end(), [](unsigned char character) {
           return character < 0x20 || character == 0x7f;
         });
}

std::string text_of(const nlohmann::json& request, const char* key) {
  const auto found = request.find(key);
  return found != request.end() && found->is_string() ? found->get<std::string>() : std::string{};
}

}  // namespace

// ---- blame ----

Nic* Supervisor::find_nic_of_queue_pair(const Pair& pair, std::uint32_t queue_pair) {
  for (auto& [mac, nic] : nics_)
    if (nic.pair == &pair && queue_pair >= nic.first_queue_pair &&
        queue_pair - nic.first_queue_pair < nic.option.queues)
      return &nic;
  return nullptr;
}

// Says in the incident whose packet the dead owner had in hand.
void Supervisor::blame(const Pair& pair, Incident& incident) {
  const auto suspect = decode_suspect(incident.timeline);
  const Nic* nic = suspect ? find_nic_of_queue_pair(pair, suspect->queue_pair) : nullptr;
  if (nic == nullptr) return;
  incident.suspect_mac = nic->option.mac;
  // Parked already, when its kills were found in the segment before this report came.
  if (nic->disabled && nic->disabled->by_tandem) incident.parked_mac = nic->option.mac;
}

std::uint64_t Supervisor::kills_of(const Nic& nic) {
  std::uint64_t sum = 0;
  for (std::uint32_t i = 0; i < nic.option.queues; ++i)
    sum += nic.pair->segment().queue_pairs[nic.first_queue_pair + i].kills.load(std::memory_order_relaxed);
  return sum;
}

// Looks in the segment, because a backend that dies soon after its takeover never comes to report it. Disables NICs
// that have killed too often.
void Supervisor::count_kills(const Pair& pair) {
  const std::uint64_t now = monotonic_ns();
  const std::uint64_t window = std::uint64_t{config_.parking_window_s} * 1'000'000'000u;
  for (auto& [mac, nic] : nics_) {
    if (nic.pair != &pair) continue;
    const std::uint64_t kills = kills_of(nic);
    // A damaged counter may say anything.
    const std::uint64_t more = std::min<std::uint64_t>(kills - std::exchange(nic.kills_seen, kills), kMostKillsAtOnce);
    nic.kills.insert(nic.kills.end(), more, now);
    while (!nic.kills.empty() && now - nic.kills.front() > window) nic.kills.pop_front();
    if (more == 0 || config_.parking_kills == 0 || nic.kills.size() < config_.parking_kills || nic.disabled) continue;
    const std::string reason = "its packets killed " + std::to_string(nic.kills.size()) + " backends within " +
                               std::to_string(config_.parking_window_s) + " s";
    // Not from inside the pair's own call.
    soon_["park/" + mac] = loop_.soon([this, name = mac, reason] { park(name, reason); });
  }
}

void Supervisor::park(const std::string& mac, const std::string& reason) {
  const auto found = nics_.find(mac);
  if (found == nics_.end() || found->second.disabled || found->second.releasing) return;
  auto& recent = incidents_->recent();
  const auto last = std::find_if(recent.rbegin(), recent.rend(),
                                 [&](const Incident& incident) { return incident.pair == found->second.pair->name(); });
  if (last != recent.rend()) {
    last->parked_mac = mac;
    save_incident(*last);
  }
  disable(found->second, {true, reason, wall_clock_ms()}, [](const nlohmann::json&) {});
}

void Supervisor::on_poison(Pair& pair, const PoisonBody& poison, std::span<const std::byte> bytes) {
  Nic* nic = find_nic_of_queue_pair(pair, poison.queue_pair);
  const std::string mac = nic == nullptr ? "" : nic->option.mac;
  Incident* incident = nullptr;
  for (Incident& recent : incidents_->recent())
    if (recent.pair == pair.name() && recent.shard == poison.shard && recent.timeline.epoch == poison.epoch)
      incident = &recent;
  if (incident == nullptr) {
    // Its takeover was reported to a tandemd that is gone.
    Incident late;
    late.pair = pair.name();
    late.shard = poison.shard;
    late.wall_clock_ms = wall_clock_ms();
    late.timeline.epoch = poison.epoch;
    late.closed = true;
    incident = &incidents_->add(std::move(late));
  }
  PoisonRecord record;
  record.mac = mac;
  record.receive = poison.direction == PacketPhase::kReceive;
  record.queue_pair = poison.queue_pair;
  record.length = poison.length;
  record.captured = static_cast<std::uint32_t>(bytes.size());
  if (!bytes.empty()) {
    auto kept = incidents_->keep_packet(*incident, bytes, poison.length);
    if (kept)
      record.file = *kept;
    else
      spdlog::error("{}", kept.error().text);
  }
  spdlog::error("NIC {}: dropped a poison packet of {} bytes ({}, queue pair {}): {} backends died on it; {}", mac,
                poison.length, record.receive ? "receive" : "transmit", poison.queue_pair, poison.deaths,
                record.file.empty() ? "its bytes could not be kept" : "it is in " + record.file);
  incident->poison.push_back(std::move(record));
  save_incident(*incident);
  count_kills(pair);
}

// ---- disabled NICs ----

void Supervisor::disable(Nic& nic, Disabled how, ControlServer::Answer done) {
  spdlog::warn("NIC {} of domain {}: {}: {}; its link is down until virt-tandem nic enable {}", nic.option.mac,
               nic.domain, how.by_tandem ? "parked" : "disabled", how.reason, nic.option.mac);
  nic.disabled = std::move(how);
  nic.when_disabled.push_back(std::move(done));
  begin_disable(nic);
}

void Supervisor::begin_disable(Nic& nic) {
  if (auto saved = keep_nic(nic); !saved)
    spdlog::error("NIC {}: keep in the vault that it is disabled: {}", nic.option.mac, saved.error().text);
  nic.connected = false;
  nic.device->disconnect();
  PendingRequest pending;
  pending.disable = true;
  pending.since_ns = monotonic_ns();
  nic.pending = std::move(pending);
  save(nic);
  describe(nic);
  wait_for_owners(nic);
}

// Nobody writes to the guest's memory any more: QEMU may know.
void Supervisor::finish_disable(Nic& nic) {
  static_cast<void>(vault_->unlisten(nic.option.mac));
  nic.held.reset();
  std::error_code ignored;
  std::filesystem::remove(nic_socket_path(nic.option.mac), ignored);
  for (const auto& done : std::exchange(nic.when_disabled, {})) done({{"ok", true}, {"mac", nic.option.mac}});
}

Status Supervisor::enable(Nic& nic) {
  const std::string doing = "enable NIC " + nic.option.mac;
  if (!nic.disabled) return fail(ErrorKind::kInvalid, doing + ": it is not disabled");
  if (nic.releasing || nic.pending)
    return fail(ErrorKind::kInvalid, doing + ": its backends have not let go of it yet; try again");
  auto socket = open_nic_socket(nic.option.mac);
  if (!socket) return within(doing, std::move(socket.error()));
  const Disabled before = *std::exchange(nic.disabled, std::nullopt);
  nic.kills.clear();
  Status enabled = keep_nic(nic);
  if (enabled) enabled = vault_->listen(nic.option.mac, socket->get());
  if (!enabled) {
    nic.disabled = before;
    return within(doing, std::move(enabled.error()));
  }
  spdlog::info("NIC {} of domain {}: enabled again, waiting for QEMU", nic.option.mac, nic.domain);
  return {};
}

void Supervisor::on_nic_request(const nlohmann::json& request, const ControlServer::Answer& answer) {
  const std::string action = text_of(request, "action"), mac = text_of(request, "mac");
  const auto found = nics_.find(mac);
  if (found == nics_.end())
    return answer(refusal("nic " + action + ": no NIC \"" + mac + "\" is served; virt-tandem status lists them"));
  Nic& nic = found->second;
  if (action == "enable") {
    const Status enabled = enable(nic);
    return answer(enabled ? nlohmann::json{{"ok", true}, {"mac", mac}} : refusal(enabled.error().text));
  }
  if (action != "disable") return answer(refusal("nic: the action must be disable or enable"));
  std::string reason = text_of(request, "reason");
  if (!is_presentable(reason)) return answer(refusal("nic disable: the reason must be one line of at most 200 bytes"));
  if (nic.releasing) return answer(refusal("nic disable: NIC " + mac + " is being released"));
  if (nic.disabled) return answer(refusal("nic disable: NIC " + mac + " is disabled already: " + nic.disabled->reason));
  if (reason.empty()) reason = "by an operator";
  disable(nic, {false, std::move(reason), wall_clock_ms()}, answer);
}

nlohmann::json Supervisor::disabled_status(const Nic& nic) {
  if (!nic.disabled) return nullptr;
  return {{"by", nic.disabled->by_tandem ? "tandem" : "operator"},
          {"reason", nic.disabled->reason},
          {"since_ms", nic.disabled->since_ms}};
}

}  // namespace tandem
