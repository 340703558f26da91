// SPDX-License-Identifier: Apache-2.0
// Start and end of tandemd, its NICs, and the vhost-user messages that the vault hands over.
#include "recovery/supervisor/supervisor.hpp"

#include <arpa/inet.h>
#include <grp.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <pwd.h>
#include <spdlog/spdlog.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <ctime>
#include <filesystem>

#include "recovery/fence/kernel_version.hpp"
#include "recovery/supervisor/journal.hpp"

namespace tandem {

namespace {

using namespace std::chrono_literals;

// A thread that waits for a CPU is starved, not hung; nobody waits longer than this without an alarm.
constexpr std::uint64_t kAlarmNs = 1'000'000'000;
// An incident is closed this long after its takeover even if no packet came; that of a handover waits for nothing else.
constexpr auto kIncidentOpen = 2s;
constexpr auto kHandoverOpen = 200ms;
constexpr std::uint64_t kVaultLimitNs = 30'000'000'000;

std::uint64_t now_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<std::uint64_t>(now.tv_nsec);
}

std::string socket_name(const std::string& mac) {
  std::string name = mac;
  for (char& character : name)
    if (character == ':') character = '-';
  return name + ".sock";
}

std::string device_key(const std::string& mac, std::uint32_t item) {
  return "device/" + mac + "/" + std::to_string(item);
}

}  // namespace

Result<std::unique_ptr<Supervisor>> Supervisor::start(Config config, EventLoop& loop) {
  if (::geteuid() != 0)
    return fail(ErrorKind::kInvalid, "start tandemd: it makes network devices and loads BPF programs; run it as root");
  if (auto supported = kernel_is_supported(running_kernel_release()); !supported)
    return within("start tandemd", std::move(supported.error()));
  std::unique_ptr<Supervisor> self{new Supervisor(std::move(config), loop)};
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
  if (auto dispatched = vault_->dispatch(*this); !dispatched) {
    spdlog::critical("talk to tandem-vault: {}; every QEMU has lost its connection and will reconnect",
                     dispatched.error().text);
    vault_watch_.reset();
    vault_lost_ns_ = now_ns();
    find_new_vault();
  }
}

// The vault is gone, and with it QEMU's connections. Pairs and uplinks are whole: give a new vault everything, and let
// QEMU in again.
void Supervisor::find_new_vault() {
  auto vault = VaultClient::connect(config_.vault_socket(), std::chrono::milliseconds(20));
  if (!vault) {
    if (now_ns() - vault_lost_ns_ > kVaultLimitNs) {
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
    if (!nic.disabled) nic.pending.reset();
    nic.connected = false;
    nic.device->disconnect();
    describe(nic);
    Status told = save_nic(nic);
    for (const SavedItem& item : nic.device->save())
      if (told) told = vault_->put(device_key(mac, item.item), item.bytes, item.fds);
    if (nic.disabled) continue;
    auto socket = open_nic_socket(mac);
    if (told && socket) told = vault_->listen(mac, socket->get());
    if (!told || !socket)
      spdlog::error("NIC {}: let QEMU connect again: {}", mac, socket ? told.error().text : socket.error().text);
  }
  spdlog::warn("attached to a new tandem-vault; {} NICs wait for QEMU to reconnect", nics_.size());
}

// ---- NICs ----

Result<std::string> Supervisor::find_backend() const {
  std::vector<std::string> candidates;
  if (!config_.backend_path.empty()) {
    candidates.push_back(config_.backend_path);
  } else {
    std::error_code error;
    const auto here = std::filesystem::read_symlink("/proc/self/exe", error).parent_path();
    candidates = {(here / "tandem-backend").string(),
                  (here / "../../vhost-net-backend/tandem-backend").lexically_normal().string(),
                  (here / "../libexec/tandem/tandem-backend").lexically_normal().string(),
                  "/usr/libexec/tandem/tandem-backend"};
  }
  for (const std::string& path : candidates)
    if (::access(path.c_str(), X_OK) == 0) return path;
  return fail(ErrorKind::kInvalid, "find the program tandem-backend: not at " + candidates.front() +
                                       "; set backend.path in the configuration");
}

Result<Pair*> Supervisor::pair_for(const std::string& name) {
  const auto found = pairs_.find(name);
  if (found != pairs_.end()) return found->second.get();
  auto backend = find_backend();
  if (!backend) return tl::make_unexpected(std::move(backend.error()));
  auto pair = Pair::make(name, config_, *backend, loop_, *fence_, tags_, *this);
  if (!pair) return tl::make_unexpected(std::move(pair.error()));
  save_pair(**pair);
  return (pairs_[name] = std::move(*pair)).get();
}

UplinkConfig Supervisor::uplink_config(const NicOption& option) const {
  UplinkConfig uplink;
  static const std::map<UplinkOption::Kind, UplinkKind> kKinds{{UplinkOption::Kind::kBridge, UplinkKind::kBridge},
                                                               {UplinkOption::Kind::kDevice, UplinkKind::kDev},
                                                               {UplinkOption::Kind::kSink, UplinkKind::kSink},
                                                               {UplinkOption::Kind::kSource, UplinkKind::kSource},
                                                               {UplinkOption::Kind::kLoopback, UplinkKind::kLoopback}};
  uplink.kind = kKinds.at(option.uplink.kind);
  uplink.name = option.uplink.name;
  uplink.frame_length = option.uplink.frame_length;
  uplink.mac = option.mac;
  uplink.queue_pairs = option.queues;
  uplink.instance = config_.instance;
  uplink.pin_dir = config_.pin_dir + "/uplink";
  return uplink;
}

std::string Supervisor::nic_socket_path(const std::string& mac) const {
  return config_.nic_socket_dir() + "/" + socket_name(mac);
}

// The socket that QEMU connects to; the account QEMU runs as owns it, so that nobody else connects.
Result<UniqueFd> Supervisor::open_nic_socket(const std::string& mac) const {
  const passwd* user = config_.socket_user.empty() ? nullptr : ::getpwnam(config_.socket_user.c_str());
  const group* group = config_.socket_group.empty() ? nullptr : ::getgrnam(config_.socket_group.c_str());
  if (!config_.socket_user.empty() && user == nullptr)
    return fail(ErrorKind::kInvalid, "there is no account \"" + config_.socket_user +
                                         "\" to own its socket; set qemu.socket_user to the account that QEMU runs as");
  return listen_unix(nic_socket_path(mac), 0660, user == nullptr ? 0 : static_cast<int>(user->pw_uid),
                     group == nullptr ? -1 : static_cast<int>(group->gr_gid));
}

Status Supervisor::provision(const DomainOption& domain, const NicOption& option) {
  Status provided = try_provision(domain, option);
  if (!provided) stop_pair_if_unused(option.pair);
  return provided;
}

Status Supervisor::try_provision(const DomainOption& domain, const NicOption& option) {
  const std::string doing = "provide NIC " + option.mac + " of domain " + domain.name;
  if (const auto other = nics_.find(option.mac); other != nics_.end())
    return fail(ErrorKind::kInvalid, doing + ": this MAC is served already, for domain " + other->second.domain +
                                         "; give one of them another MAC");
  auto pair = pair_for(option.pair);
  if (!pair) return within(doing, std::move(pair.error()));
  Nic nic;
  nic.option = option;
  nic.domain = domain.name;
  nic.domain_uuid = domain.uuid;
  nic.pair = *pair;
  const UplinkConfig uplink = uplink_config(option);
  auto opened = Uplink::open(uplink);
  if (!opened) return within(doing, std::move(opened.error()));
  nic.uplink.emplace(std::move(*opened));
  for (const std::string& note : nic.uplink->notes()) spdlog::info("NIC {}: {}", option.mac, note);

  auto socket = open_nic_socket(option.mac);
  if (!socket) return within(doing, std::move(socket.error()));
  VhostUserDeviceConfig device;
  device.max_queue_pairs = option.queues;
  device.virtio_features = default_virtio_features();
  device.protocol_features = default_protocol_features();
  device.mtu = static_cast<std::uint16_t>(nic.uplink->mtu());
  if (auto reserved = (*pair)->reserve(option.queues, nic.device_index, nic.first_queue_pair); !reserved)
    return within(doing, std::move(reserved.error()));
  device.device = nic.device_index;
  auto made = VhostUserDevice::create(device);
  if (!made) return within(doing, std::move(made.error()));
  nic.device.emplace(std::move(*made));

  std::vector<UniqueFd> fds;
  for (const int fd : nic.uplink->descriptors()) fds.emplace_back(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  (*pair)->attach(nic.device_index, nic.first_queue_pair, nic.uplink->descriptions(), std::move(fds));
  if (auto saved = save_nic(nic); !saved) return within(doing, std::move(saved.error()));
  if (auto listening = vault_->listen(option.mac, socket->get()); !listening)
    return within(doing, std::move(listening.error()));
  Nic& stored = nics_.emplace(option.mac, std::move(nic)).first->second;
  watch_uplink(stored);
  // The empty description: a generation is in force from the beginning, so every later wait has something to wait for.
  save(stored);
  describe(stored);
  set_hang_limits(**pair);
  (*pair)->start();
  spdlog::info("NIC {} of domain {}: uplink {} ({}), {} queue pairs, pair {}", option.mac, domain.name,
               option.uplink.name, stored.uplink->netdev(), option.queues, option.pair);
  return {};
}

// The strictest limits of the NICs that a pair serves.
void Supervisor::set_hang_limits(Pair& pair) {
  WatchdogOption limits{std::chrono::nanoseconds::max(), std::chrono::nanoseconds::max()};
  bool any = false;
  for (const auto& [mac, nic] : nics_) {
    if (nic.pair != &pair) continue;
    any = true;
    limits.spin = std::min(limits.spin, nic.option.watchdog.spin);
    limits.blocked = std::min(limits.blocked, nic.option.watchdog.blocked);
  }
  if (any) pair.set_hang_limits(limits.spin, limits.blocked);
}

void Supervisor::watch_uplink(Nic& nic) {
  const std::string mac = nic.option.mac;
  auto watch = loop_.watch(nic.uplink->monitor_fd(), [this, mac] {
    const auto found = nics_.find(mac);
    if (found == nics_.end()) return;
    const Status checked = found->second.uplink->check();
    const std::string problem = checked ? "" : checked.error().text;
    if (problem == found->second.uplink_problem) return;
    found->second.uplink_problem = problem;
    if (problem.empty())
      spdlog::info("NIC {}: its uplink works again", mac);
    else
      spdlog::error("NIC {} of domain {}: {}", mac, found->second.domain, problem);
  });
  if (watch) nic.uplink_watch = std::move(*watch);
}

void Supervisor::release(const std::string& mac, std::function<void()> done) {
  const auto found = nics_.find(mac);
  if (found == nics_.end()) return done();
  Nic& nic = found->second;
  nic.when_released.push_back(std::move(done));
  if (nic.releasing) return;
  nic.releasing = true;
  nic.pending.reset();
  static_cast<void>(vault_->unlisten(mac));
  std::error_code ignored;
  std::filesystem::remove(nic_socket_path(mac), ignored);
  nic.pair->detach(nic.device_index);
}

void Supervisor::on_detached(Pair& pair, std::uint32_t device) {
  if (const Nic* nic = find_nic(pair, device); nic != nullptr) finish_release(nic->option.mac);
}

// By value: what names the NIC goes with it.
void Supervisor::finish_release(std::string mac) {
  const auto found = nics_.find(mac);
  if (found == nics_.end()) return;
  Nic nic = std::move(found->second);
  nics_.erase(found);
  nic.uplink_watch.reset();
  nic.pair->release(nic.device_index);
  set_hang_limits(*nic.pair);
  static_cast<void>(vault_->del("nic/" + mac));
  static_cast<void>(vault_->del("ports/" + mac));
  static_cast<void>(vault_->del_prefix("device/" + mac + "/"));
  if (auto closed = nic.uplink->close(); !closed) spdlog::warn("NIC {}: {}", mac, closed.error().text);
  spdlog::info("NIC {} of domain {}: released", mac, nic.domain);
  const std::string pair = nic.pair->name();
  stop_pair_if_unused(pair);
  // The answer to libvirt comes when the pair's processes are gone too, so that nothing is left behind.
  for (auto& done : nic.when_released) {
    if (pairs_.contains(pair) && pairs_[pair]->state() == PairState::kStopped)
      when_stopped_[pair].push_back(std::move(done));
    else
      done();
  }
}

void Supervisor::stop_pair_if_unused(const std::string& name) {
  const auto found = pairs_.find(name);
  if (found == pairs_.end()) return;
  for (const auto& [mac, nic] : nics_)
    if (nic.pair == found->second.get()) return;
  if (!found->second->empty()) return found->second->stop();
  found->second->stop();
  soon_[name] = loop_.soon([this, name] { on_pair_empty(name); });
}

void Supervisor::on_pair_empty(const std::string& name) {
  const auto found = pairs_.find(name);
  if (found != pairs_.end() && found->second->empty() && found->second->state() == PairState::kStopped) {
    static_cast<void>(vault_->del("pair/" + name));
    pairs_.erase(found);
  }
  for (auto& done : std::exchange(when_stopped_[name], {})) done();
}

Nic* Supervisor::find_nic(const Pair& pair, std::uint32_t device) {
  for (auto& [mac, nic] : nics_)
    if (nic.pair == &pair && nic.device_index == device) return &nic;
  return nullptr;
}

// ---- what pairs report ----

void Supervisor::on_in_force(Pair& pair, std::uint32_t device) {
  Nic* nic = find_nic(pair, device);
  if (nic != nullptr && nic->pending && pair.in_force(device) >= nic->pending->generation) finish_request(*nic);
}

void Supervisor::on_takeover(Pair& pair, std::uint32_t shard, const TakeoverTimeline& timeline, pid_t victim,
                             pid_t heir) {
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
  if (const auto exit = exits_.find(victim); exit != exits_.end() && !incident.planned()) {
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
  static_cast<void>(vault_->del("member/" + pair.name() + "/" + std::to_string(pid)));
  exits_[pid] = status;
  count_kills(pair);
  if (exits_.size() > 16) exits_.erase(exits_.begin());
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

// ---- vhost-user ----

void Supervisor::on_listening(const std::string& nic) {
  // One that a dead predecessor had begun to provide or to release.
  const auto found = nics_.find(nic);
  if (found == nics_.end() || found->second.disabled) static_cast<void>(vault_->unlisten(nic));
}

void Supervisor::on_connected(const std::string& mac, std::uint64_t connection) {
  const auto found = nics_.find(mac);
  if (found == nics_.end() || found->second.disabled) return;
  found->second.connected = true;
  found->second.connection = connection;
  spdlog::info("NIC {}: QEMU connected", mac);
}

void Supervisor::on_error(const std::string& text) { spdlog::error("tandem-vault refused a request: {}", text); }

void Supervisor::on_message(RelayedMessage message) {
  const auto found = nics_.find(message.nic);
  if (found == nics_.end() || found->second.releasing || found->second.disabled) return;
  Nic& nic = found->second;
  if (nic.pending) {
    // The vault hands out one at a time; what comes again after its own restart is the one that waits already.
    nic.pending->sequence = message.sequence;
    return;
  }
  auto outcome = nic.device->handle(message.frame, std::move(message.fds));
  if (!outcome) return drop_connection(nic, outcome.error().text);
  if (!outcome->refusal.empty()) spdlog::warn("NIC {}: refused a request: {}", nic.option.mac, outcome->refusal);
  PendingRequest pending;
  pending.sequence = message.sequence;
  pending.outcome = std::move(*outcome);
  pending.since_ns = now_ns();
  const bool changed = pending.outcome.description_changed;
  const bool wait = pending.outcome.wait_for_owners;
  nic.pending = std::move(pending);
  save(nic);
  if (changed) describe(nic);
  if (wait)
    wait_for_owners(nic);
  else
    finish_request(nic);
}

void Supervisor::on_disconnected(const std::string& mac, std::uint64_t, std::uint64_t sequence) {
  const auto found = nics_.find(mac);
  if (found == nics_.end()) {
    static_cast<void>(vault_->applied(mac, sequence));
    return;
  }
  Nic& nic = found->second;
  if (nic.releasing || nic.disabled) return;
  spdlog::info("NIC {}: QEMU disconnected", mac);
  nic.connected = false;
  nic.device->disconnect();
  PendingRequest pending;
  pending.sequence = sequence;
  pending.disconnect = true;
  pending.since_ns = now_ns();
  nic.pending = std::move(pending);
  save(nic);
  describe(nic);
  wait_for_owners(nic);
}

void Supervisor::save(Nic& nic) {
  for (const SavedItem& item : nic.device->save_changed())
    if (auto put = vault_->put(device_key(nic.option.mac, item.item), item.bytes, item.fds); !put)
      spdlog::error("NIC {}: keep its state in the vault: {}", nic.option.mac, put.error().text);
}

void Supervisor::describe(Nic& nic) {
  if (auto told = nic.pair->describe(nic.device->description(), nic.device->description_fds()); !told)
    spdlog::error("NIC {}: {}", nic.option.mac, told.error().text);
}

std::chrono::nanoseconds Supervisor::hang_limit(const Nic& nic) const {
  return std::min(nic.option.watchdog.spin, nic.option.watchdog.blocked);
}

void Supervisor::wait_for_owners(Nic& nic) {
  nic.pending->generation = nic.device->description().generation;
  if (nic.pair->in_force(nic.device_index) >= nic.pending->generation) return finish_request(nic);
  const std::string mac = nic.option.mac;
  nic.pending->limit = loop_.after(hang_limit(nic), [this, mac] { on_wait_limit(mac); });
}

void Supervisor::on_wait_limit(const std::string& mac) {
  const auto found = nics_.find(mac);
  if (found == nics_.end() || !found->second.pending) return;
  Nic& nic = found->second;
  if (nic.pair->in_force(nic.device_index) >= nic.pending->generation) return finish_request(nic);
  nic.pair->kill_if_hung("it did not let go of NIC " + mac + " within its limit");
  if (!nic.pending->alarmed && now_ns() - nic.pending->since_ns > kAlarmNs) {
    nic.pending->alarmed = true;
    spdlog::critical(
        "NIC {}: QEMU has been waiting for 1 s for backends that neither let go nor die; look at their "
        "state with virt-tandem status and in /proc",
        mac);
  }
  nic.pending->limit = loop_.after(hang_limit(nic), [this, mac] { on_wait_limit(mac); });
}

void Supervisor::finish_request(Nic& nic) {
  PendingRequest pending = std::move(*nic.pending);
  nic.pending.reset();
  if (pending.disable) return finish_disable(nic);
  std::vector<std::byte> reply;
  if (pending.outcome.reply) reply = std::move(*pending.outcome.reply);
  if (pending.outcome.vring_base_index) {
    const std::uint32_t vring = *pending.outcome.vring_base_index;
    const QueuePairState& state = nic.pair->segment().queue_pairs[nic.first_queue_pair + vring / 2];
    reply = nic.device->vring_base_reply(vring, (vring % 2 == 0 ? state.receive : state.transmit).next_avail);
    save(nic);
  }
  if (pending.outcome.rarp_mac) announce(nic, *pending.outcome.rarp_mac);
  if (auto applied = vault_->applied(nic.option.mac, pending.sequence, reply); !applied)
    spdlog::error("NIC {}: answer QEMU: {}", nic.option.mac, applied.error().text);
}

void Supervisor::drop_connection(Nic& nic, const std::string& why) {
  spdlog::error("NIC {} of domain {}: closing QEMU's connection: {}", nic.option.mac, nic.domain, why);
  static_cast<void>(vault_->close(nic.option.mac, nic.connection));
}

// RARP (RFC 903) request for the guest's own address, as QEMU's announcement does: bridges learn where the MAC is now.
void Supervisor::announce(const Nic& nic, const std::array<std::uint8_t, 6>& mac) {
  if (nic.uplink->netdev().empty()) return;  // nobody is there to hear it
  std::array<std::uint8_t, 60> frame{};
  std::fill_n(frame.begin(), 6, std::uint8_t{0xff});
  std::copy(mac.begin(), mac.end(), frame.begin() + 6);
  constexpr std::uint8_t kRest[] = {0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3};
  std::copy(std::begin(kRest), std::end(kRest), frame.begin() + 12);
  std::copy(mac.begin(), mac.end(), frame.begin() + 22);
  std::copy(mac.begin(), mac.end(), frame.begin() + 32);
  const UniqueFd socket{::socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0)};
  sockaddr_ll address{};
  address.sll_family = AF_PACKET;
  address.sll_ifindex = static_cast<int>(::if_nametoindex(nic.uplink->netdev().c_str()));
  if (!socket || ::sendto(socket.get(), frame.data(), frame.size(), 0, reinterpret_cast<const sockaddr*>(&address),
                          sizeof address) < 0)
    spdlog::warn("NIC {}: announce its address on {}: {}", nic.option.mac, nic.uplink->netdev(), std::strerror(errno));
}

}  // namespace tandem
