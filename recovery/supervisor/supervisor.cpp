// SPDX-License-Identifier: Apache-2.0
// Start and end of tandemd, the vault it talks to, and what pairs report.
#include "recovery/supervisor/supervisor.hpp"

#include <poll.h>
#include <spdlog/spdlog.h>
#include <sys/file.h>
#include <unistd.h>

#include <ctime>
#include <filesystem>

#include "common/monotonic_clock.hpp"
#include "common/thread_priority.hpp"
#include "recovery/fence/kernel_version.hpp"
#include "recovery/supervisor/journal.hpp"
#include "recovery/supervisor/probe.hpp"

namespace tandem {

namespace {

using namespace std::chrono_literals;

// An incident is closed this long after its takeover even if no packet came; that of a handover waits for nothing else.
constexpr auto kIncidentOpen = 2s;
constexpr auto kHandoverOpen = 200ms;
constexpr std::uint64_t kLockLimitNs = 1'000'000'000;
constexpr std::uint64_t kVaultLimitNs = 30'000'000'000;

}  // namespace

Result<std::unique_ptr<Supervisor>> Supervisor::start(Config config, EventLoop& loop) {
  if (::geteuid() != 0)
    return fail(ErrorKind::kInvalid, "start tandemd: it makes network devices and loads BPF programs; run it as root");
  if (auto supported = kernel_is_supported(running_kernel_release()); !supported)
    return within("start tandemd", std::move(supported.error()));
  std::unique_ptr<Supervisor> self{new Supervisor(std::move(config), loop)};
  // And so do the backends' control threads, which are started from here.
  if (auto kept = self->config_.cpus.empty() ? Status{} : keep_off(self->config_.cpus); !kept) {
    if (kept.error().kind != ErrorKind::kUnsupported)
      return within("start tandemd: pair.cpus", std::move(kept.error()));
    spdlog::warn("pair.cpus: {}", kept.error().text);
  }
  if (auto prepared = self->prepare_directories(); !prepared)
    return within("start tandemd", std::move(prepared.error()));
  auto vault = VaultClient::connect(self->config_.vault_socket());
  if (!vault)
    return within(
        "start tandemd: attach to tandem-vault (start it first: systemctl start tandem-vault, or start both with "
        "tandem-vault --supervise)",
        std::move(vault.error()));
  self->vault_ = std::move(*vault);
  auto incidents = IncidentLog::open(self->config_.incident_dir);
  if (!incidents) return within("start tandemd", std::move(incidents.error()));
  self->incidents_ = std::move(*incidents);
  if (auto taken = self->take_over_from_predecessor(); !taken) return within("start tandemd", std::move(taken.error()));
  auto watch = loop.watch(self->vault_->fd(), [raw = self.get()] { raw->dispatch_vault(); });
  if (!watch) return tl::make_unexpected(std::move(watch.error()));
  self->vault_watch_ = std::move(*watch);
  auto server =
      ControlServer::listen(self->config_.control_socket(), loop,
                            [raw = self.get()](const nlohmann::json& request, const ControlServer::Answer& answer) {
                              raw->on_request(request, answer);
                            });
  if (!server) return within("start tandemd", std::move(server.error()));
  self->server_ = std::move(*server);
  spdlog::info("tandemd is ready, instance {}, control socket {}", self->config_.instance,
               self->config_.control_socket());
  return self;
}

Supervisor::~Supervisor() = default;

Status Supervisor::prepare_directories() {
  std::error_code error;
  std::filesystem::create_directories(config_.nic_socket_dir(), error);
  if (error) return fail(ErrorKind::kSystem, "make " + config_.nic_socket_dir() + ": " + error.message());
  // QEMU must be able to walk to its sockets; who may connect is decided by each socket's own mode.
  std::filesystem::permissions(config_.run_dir, std::filesystem::perms(0755), error);
  std::filesystem::permissions(config_.nic_socket_dir(), std::filesystem::perms(0755), error);
  const std::string path = config_.run_dir + "/tandemd.lock";
  lock_ = UniqueFd{::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)};
  if (!lock_) return fail_errno("open " + path);
  // A predecessor that was just killed may still be on its way out.
  const std::uint64_t deadline = monotonic_ns() + kLockLimitNs;
  while (::flock(lock_.get(), LOCK_EX | LOCK_NB) != 0 && monotonic_ns() < deadline) ::poll(nullptr, 0, 10);
  if (::flock(lock_.get(), LOCK_EX | LOCK_NB) != 0)
    return fail(ErrorKind::kInvalid, "lock " + path + ": another tandemd serves " + config_.run_dir +
                                         "; stop it first, or give this one another run_dir and instance");
  return {};
}

void Supervisor::shut_down() {
  if (stopping_) return;
  stopping_ = true;
  if (nics_.empty()) {
    static_cast<void>(vault_->del_prefix(""));
    while (vault_->queued() > 0 && vault_->dispatch(*this)) {
    }
    if (auto unpinned = fence_->unpin_all(); !unpinned) spdlog::warn("{}", unpinned.error().text);
    std::error_code ignored;
    std::filesystem::remove(config_.run_dir + "/tandemd.lock", ignored);
    std::filesystem::remove(config_.nic_socket_dir(), ignored);
    std::filesystem::remove_all(config_.dpdk_dir(), ignored);
    spdlog::info("tandemd ends; nothing is left behind");
  } else {
    for (auto& [mac, nic] : nics_)
      if (nic.uplink) nic.uplink->leave_in_place();
    spdlog::warn("tandemd ends while {} NICs are served: their pairs go on without it, a new one adopts them",
                 nics_.size());
    // Pairs kill their members when they go; these must not.
    for (auto& [name, pair] : pairs_) static_cast<void>(pair.release());
    pairs_.clear();
  }
  loop_.quit();
}

void Supervisor::dispatch_vault() {
  TANDEM_SUPERVISOR_PROBE(kReading);
  if (auto dispatched = vault_->dispatch(*this); !dispatched) {
    spdlog::critical("talk to tandem-vault: {}; every QEMU has lost its connection and will reconnect",
                     dispatched.error().text);
    vault_watch_.reset();
    vault_lost_ns_ = monotonic_ns();
    let_go_of_front_ends();
    find_new_vault();
  }
}

// QEMU takes its rings' positions from guest memory in the moment it sees its connection end. We hold the connections
// that the vault held: they end when no owner writes to those rings any more, or it would take what is not the last.
void Supervisor::let_go_of_front_ends() {
  for (auto& [mac, nic] : nics_) {
    if (nic.releasing || nic.disabled) continue;
    nic.connected = false;
    nic.device->disconnect();
    PendingRequest pending;
    pending.disconnect = pending.vault_lost = true;
    pending.since_ns = monotonic_ns();
    nic.pending = std::move(pending);
    describe(nic);
    wait_for_owners(nic);
  }
}

// The vault is gone, and with it QEMU's connections. Pairs and uplinks are whole: give a new vault everything, and let
// QEMU in again.
void Supervisor::find_new_vault() {
  auto vault = VaultClient::connect(config_.vault_socket(), std::chrono::milliseconds(20));
  if (!vault) {
    if (monotonic_ns() - vault_lost_ns_ > kVaultLimitNs) {
      spdlog::critical("no new tandem-vault within 30 s: {}; tandemd ends, start both again", vault.error().text);
      return loop_.quit(1);
    }
    soon_["vault"] = loop_.after(50ms, [this] { find_new_vault(); });
    return;
  }
  vault_ = std::move(*vault);
  auto watch = loop_.watch(vault_->fd(), [this] { dispatch_vault(); });
  if (!watch) {
    spdlog::critical("{}", watch.error().text);
    return loop_.quit(1);
  }
  vault_watch_ = std::move(*watch);
  for (auto& [name, pair] : pairs_) {
    save_pair(*pair);
    pair->each_member([&](Member& member) { on_member_change(*pair, member); });
  }
  for (auto& [mac, nic] : nics_) {
    if (nic.releasing) continue;
    if (!nic.disabled && nic.pending && !nic.pending->vault_lost) nic.pending.reset();
    nic.connected = false;
    nic.device->disconnect();
    describe(nic);
    Status told;
    for (const SavedItem& item : nic.device->save())
      if (told) told = vault_->put(device_key(mac, item.item), item.bytes, item.fds);
    if (told) told = keep_nic(nic);
    if (nic.disabled) continue;
    auto socket = open_nic_socket(mac);
    if (told && socket) told = vault_->listen(mac, socket->get());
    if (!told || !socket)
      spdlog::error("NIC {}: let QEMU connect again: {}", mac, socket ? told.error().text : socket.error().text);
  }
  spdlog::warn("attached to a new tandem-vault; {} NICs wait for QEMU to reconnect", nics_.size());
}

// ---- what pairs report ----

void Supervisor::on_held(Pair&, std::uint32_t) {
  if (!provisioning_.empty()) soon_["provisioning"] = loop_.soon([this] { check_provisioning(); });
}

void Supervisor::on_in_force(Pair& pair, std::uint32_t device) {
  on_held(pair, device);
  Nic* nic = find_nic(pair, device);
  if (nic != nullptr && nic->pending && pair.in_force(device) >= nic->pending->generation) finish_request(*nic);
}

void Supervisor::on_takeover(Pair& pair, std::uint32_t shard, const TakeoverTimeline& timeline, pid_t victim,
                             pid_t heir) {
  TANDEM_SUPERVISOR_PROBE(kTookOver);
  Incident incident;
  incident.pair = pair.name();
  incident.shard = shard;
  incident.wall_clock_ms =
      std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::system_clock::now().time_since_epoch())
          .count();
  incident.slot = fence_->read_slot(timeline.previous_tag);
  incident.timeline = timeline;
  incident.victim_pid = victim;
  incident.heir_pid = heir;
  const auto exit =
      std::find_if(exits_.begin(), exits_.end(), [victim](const auto& one) { return one.first == victim; });
  if (exit != exits_.end() && !incident.planned()) {
    incident.reaped = exit->second.known;
    incident.exit_signal = exit->second.signal;
    incident.exit_status = exit->second.status;
  }
  blame(pair, incident);
  const std::uint64_t id = incidents_->add(incident).id;
  incident_limits_[id] =
      loop_.after(incident.planned() ? kHandoverOpen : kIncidentOpen, [this, id] { close_incident(id); });
  save_incident(*incidents_->find(id));
  count_kills(pair);
}

void Supervisor::on_first_transaction(Pair& pair, std::uint32_t shard, const TakeoverTimeline& timeline) {
  for (Incident& incident : incidents_->recent()) {
    if (incident.pair != pair.name() || incident.shard != shard || incident.timeline.epoch != timeline.epoch) continue;
    incident.timeline.first_transaction_ns = timeline.first_transaction_ns;
    if ((incident.reaped || incident.planned()) && !incident.closed) close_incident(incident.id);
  }
}

void Supervisor::on_member_exit(Pair& pair, pid_t pid, ExitStatus status) {
  TANDEM_SUPERVISOR_PROBE(kMemberGone);
  static_cast<void>(vault_->del("member/" + pair.name() + "/" + std::to_string(pid)));
  exits_.emplace_front(pid, status);
  count_kills(pair);
  if (exits_.size() > 16) exits_.pop_back();
  for (Incident& incident : incidents_->recent()) {
    if (incident.victim_pid != pid || incident.reaped || incident.planned()) continue;
    incident.reaped = status.known;
    incident.exit_signal = status.signal;
    incident.exit_status = status.status;
    if (incident.timeline.first_transaction_ns != 0) close_incident(incident.id);
  }
}

void Supervisor::on_state(Pair& pair) {
  const std::string name = pair.name();
  // Not from inside the pair's own call: its members and itself may go.
  soon_[name] = loop_.soon([this, name] {
    const auto found = pairs_.find(name);
    if (found == pairs_.end()) return;
    if (found->second->state() == PairState::kStopped && found->second->empty()) return on_pair_empty(name);
    for (auto& [mac, nic] : nics_)
      if (nic.pair == found->second.get()) on_in_force(*nic.pair, nic.device_index);
    // Started again before its old processes were gone: whoever waits for the end of its last NIC waits no longer.
    if (found->second->state() != PairState::kStopped)
      for (auto& done : std::exchange(when_stopped_[name], {})) done();
    check_provisioning();
    check_awaited();
  });
}

void Supervisor::close_incident(std::uint64_t id) {
  Incident* incident = incidents_->find(id);
  incident_limits_.erase(id);
  if (incident == nullptr || incident->closed) return;
  incident->closed = true;
  save_incident(*incident);
  const auto& timeline = incident->timeline;
  if (incident->planned())
    spdlog::info("pair {}: {} {}: backend {} owns {} us after the request", incident->pair,
                 timeline.kind == TakeoverKind::kHandover ? "handover" : "handover taken back:", id, incident->heir_pid,
                 (timeline.replayed_ns - timeline.requested_ns) / 1000);
  else
    log_failover(*incident);
  soon_["awaited"] = loop_.soon([this] { check_awaited(); });
}

void Supervisor::save_incident(const Incident& incident) {
  if (auto saved = incidents_->save(incident); !saved) spdlog::error("{}", saved.error().text);
}

}  // namespace tandem
