// SPDX-License-Identifier: Apache-2.0
// NICs of tandemd: their uplink, socket, device and place in a pair, from a domain's start to its end.
#include <grp.h>
#include <net/if.h>
#include <pwd.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "recovery/supervisor/probe.hpp"
#include "recovery/supervisor/supervisor.hpp"

namespace tandem {

namespace {

using namespace std::chrono_literals;

// A bridge port that has no carrier by then joins without.
constexpr auto kCarrierLimit = 2s;

}  // namespace

std::string Supervisor::socket_name(const std::string& mac) {
  std::string name = mac;
  for (char& character : name)
    if (character == ':') character = '-';
  return name + ".sock";
}

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

std::uint32_t direct_group(const NicOption& option) {
  if (option.uplink.kind != UplinkOption::Kind::kBridge || !option.uplink.direct) return 0;
  // A bridge that filters VLANs decides by more than addresses. One that cannot be looked at counts as filtering; where
  // only the file is missing, the kernel filters none (CONFIG_BRIDGE_VLAN_FILTERING).
  const std::string bridge = "/sys/class/net/" + option.uplink.name + "/bridge";
  std::error_code ignored;
  if (!std::filesystem::is_directory(bridge, ignored)) return 0;
  if (std::ifstream filtering(bridge + "/vlan_filtering"); filtering)
    if (int on = 1; !(filtering >> on) || on != 0) return 0;
  return ::if_nametoindex(option.uplink.name.c_str());
}

std::uint64_t mac_number(const std::string& mac) {
  std::uint64_t number = 0;
  for (std::size_t i = 0; i < 6; ++i)
    number |= std::uint64_t{static_cast<std::uint8_t>(std::stoul(mac.substr(3 * i, 2), nullptr, 16))} << 8 * i;
  return number;
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
  uplink.busy_poll = config_.busy_poll;
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
  TANDEM_SUPERVISOR_PROBE(kPairMade);
  Nic made;
  made.option = option;
  made.domain = domain.name;
  made.domain_uuid = domain.uuid;
  made.pair = *pair;
  auto socket = open_nic_socket(option.mac);
  if (!socket) return within(doing, std::move(socket.error()));
  auto opened = Uplink::begin(uplink_config(option));
  if (!opened) return within(doing, std::move(opened.error()));
  made.uplink.emplace(std::move(*opened));
  TANDEM_SUPERVISOR_PROBE(kUplinkOpened);

  VhostUserDeviceConfig device;
  device.max_queue_pairs = option.queues;
  device.virtio_features = default_virtio_features();
  device.protocol_features = default_protocol_features();
  device.mtu = static_cast<std::uint16_t>(made.uplink->mtu());
  if (auto reserved = (*pair)->reserve(option.queues, made.device_index, made.first_queue_pair); !reserved)
    return within(doing, std::move(reserved.error()));
  device.device = made.device_index;
  auto created = VhostUserDevice::create(device);
  if (!created) return within(doing, std::move(created.error()));
  made.device.emplace(std::move(*created));

  // From here on release() undoes what was done, whatever that is.
  Nic& nic = nics_.emplace(option.mac, std::move(made)).first->second;
  std::vector<UniqueFd> fds;
  for (const int fd : nic.uplink->descriptors()) fds.emplace_back(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  nic.group = direct_group(option);
  (*pair)->attach(nic.device_index, nic.first_queue_pair, nic.uplink->descriptions(), std::move(fds),
                  {nic.group, mac_number(option.mac)});
  TANDEM_SUPERVISOR_PROBE(kNicAttached);
  // The empty description: a generation is in force from the beginning, so every later wait has something to wait for.
  save(nic);
  Status done = keep_nic(nic);
  TANDEM_SUPERVISOR_PROBE(kNicKept);
  if (done) done = vault_->listen(option.mac, socket->get());
  TANDEM_SUPERVISOR_PROBE(kListening);
  if (!done) {
    release(option.mac, [] {});
    return within(doing, std::move(done.error()));
  }
  watch_uplink(nic);
  describe(nic);
  set_hang_limits(**pair);
  (*pair)->start();
  TANDEM_SUPERVISOR_PROBE(kNicDescribed);
  spdlog::info("NIC {} of domain {}: uplink {} ({}), {} queue pairs, pair {}, group {}", option.mac, domain.name,
               option.uplink.name, nic.uplink->netdev(), option.queues, option.pair, nic.group);
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
    if (found->second.uplink->connected()) return check_uplink(found->second);
    connect_uplink(found->second, false);
  });
  if (watch) nic.uplink_watch = std::move(*watch);
  nic.carrier_limit = loop_.after(kCarrierLimit, [this, mac] {
    if (const auto found = nics_.find(mac); found != nics_.end()) connect_uplink(found->second, true);
  });
  connect_uplink(nic, false);
}

// Waits for the carrier without making others wait: what links do is an event like any other.
void Supervisor::connect_uplink(Nic& nic, bool late) {
  auto connected = nic.uplink->connect(late);
  if (connected && !*connected) return;
  nic.carrier_limit.reset();
  if (connected) {
    for (const std::string& note : nic.uplink->notes()) spdlog::info("NIC {}: {}", nic.option.mac, note);
  } else {
    nic.start_failure = nic.uplink_problem = connected.error().text;
    spdlog::error("NIC {} of domain {}: {}", nic.option.mac, nic.domain, nic.uplink_problem);
  }
  soon_["provisioning"] = loop_.soon([this] { check_provisioning(); });
}

void Supervisor::check_uplink(Nic& nic) {
  const Status checked = nic.uplink->check();
  const std::string problem = checked ? "" : checked.error().text;
  if (problem == nic.uplink_problem) return;
  nic.uplink_problem = problem;
  if (problem.empty())
    spdlog::info("NIC {}: its uplink works again", nic.option.mac);
  else
    spdlog::error("NIC {} of domain {}: {}", nic.option.mac, nic.domain, problem);
}

// A backend cannot map the uplink: too little memory or too few descriptors for it. It goes on with what it has; this
// NIC cannot be served, so its domain does not start.
void Supervisor::on_cannot_attach(Pair& pair, std::uint32_t device, const std::string& why) {
  Nic* nic = find_nic(pair, device);
  if (nic == nullptr) return;
  nic->start_failure = "a backend cannot serve NIC " + nic->option.mac + ": " + why;
  spdlog::error("pair {}: {}", pair.name(), nic->start_failure);
  soon_["provisioning"] = loop_.soon([this] { check_provisioning(); });
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
  TANDEM_SUPERVISOR_PROBE(kUnlistened);
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
  TANDEM_SUPERVISOR_PROBE(kDetached);
  nic.uplink_watch.reset();
  nic.pair->release(nic.device_index);
  set_hang_limits(*nic.pair);
  static_cast<void>(vault_->del("nic/" + mac));
  static_cast<void>(vault_->del("ports/" + mac));
  static_cast<void>(vault_->del_prefix("device/" + mac + "/"));
  TANDEM_SUPERVISOR_PROBE(kNicForgotten);
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

}  // namespace tandem
