// SPDX-License-Identifier: Apache-2.0
// Making, watching and removing uplinks of all kinds.
#include "recovery/uplink/uplink.hpp"

#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "recovery/fence/kernel_version.hpp"
#include "recovery/fence/pins.hpp"
#include "recovery/uplink/null_queue.hpp"
#include "recovery/uplink/uplink_names.hpp"

namespace tandem {
namespace {

constexpr std::uint32_t kNameAttempts = 8;
constexpr int kCarrierTimeoutMs = 2000;
constexpr std::uint32_t kMaxQueues = 64;  // entries of the XSKMAP
constexpr std::uint32_t kNullMtu = 1500;  // of a null= uplink whose NIC has none
/// Of the kernel's own, one kInterruptDelayNs apart, after whoever polls a netdev busily has stopped.
constexpr std::uint32_t kPollsBeforeInterrupts = 2;
/// Transmit offloads of the bridge port leave work to a receiver that would not do it. All of them are of this prefix;
/// the names that are not offloads (tx-lockless) cannot be changed anyway.
const std::vector<std::string> kPortFeaturesOff = {"tx-"};
const std::vector<std::string> kReceiveFeaturesOff = {"rx-gro", "rx-lro", "rx-vlan", "rx-udp-gro"};

std::string mac_bytes(const std::string& mac) {
  std::string bytes;
  for (std::size_t i = 0; i < mac.size(); i += 3) bytes += static_cast<char>(std::stoi(mac.substr(i, 2), nullptr, 16));
  return bytes;
}

/// No link-local address, no router solicitation, no multicast listener report: this end is silent. A kernel without
/// IPv6 has nothing to switch off.
Status silence_ipv6(const std::string& netdev) {
  const std::string path = "/proc/sys/net/ipv6/conf/" + netdev + "/disable_ipv6";
  const UniqueFd file{::open(path.c_str(), O_WRONLY | O_CLOEXEC)};
  if (!file && errno == ENOENT) return {};
  if (!file || ::write(file.get(), "1", 1) != 1)
    return fail_errno("switch IPv6 off in " + path, "/proc must be writable");
  return {};
}

Result<LinkState> existing(Rtnetlink& rtnetlink, const std::string& name) {
  auto link = rtnetlink.find(name);
  if (!link) return tl::make_unexpected(std::move(link.error()));
  if (!*link)
    return fail(ErrorKind::kInvalid,
                "netdev " + name + " does not exist; create it, or name another one in the uplink option");
  return std::move(**link);
}

}  // namespace

Result<Uplink> Uplink::open(const UplinkConfig& config) {
  auto uplink = begin(config);
  for (bool late = false; uplink;) {
    const auto done = uplink->connect(late);
    if (!done) return tl::make_unexpected(done.error());
    if (*done) break;
    late = !uplink->monitor_.wait(kCarrierTimeoutMs);
  }
  return uplink;
}

Result<Uplink> Uplink::begin(const UplinkConfig& config) {
  const bool bridge = config.kind == UplinkKind::kBridge;
  const bool null = is_null(config.kind);
  const std::string doing = std::string{"open uplink "} + (bridge ? "bridge=" : null ? "null=" : "dev=") + config.name;
  if (auto kernel = kernel_is_supported(running_kernel_release()); !kernel)
    return within(doing, std::move(kernel.error()));
  if (config.queue_pairs == 0 || config.queue_pairs > kMaxQueues)
    return fail(ErrorKind::kInvalid, doing + ": " + std::to_string(config.queue_pairs) + " queue pairs; 1 to " +
                                         std::to_string(kMaxQueues) + " are possible");
  auto mac = normalized_mac(config.mac);
  if (!mac) return within(doing, std::move(mac.error()));
  auto rtnetlink = Rtnetlink::open();
  if (!rtnetlink) return within(doing, std::move(rtnetlink.error()));
  Uplink uplink{config, std::move(*rtnetlink)};
  uplink.config_.mac = *mac;
  auto monitor = LinkMonitor::open();
  if (!monitor) return within(doing, std::move(monitor.error()));
  uplink.monitor_ = std::move(*monitor);
  if (auto opened = bridge ? uplink.open_bridge() : null ? uplink.open_null() : uplink.open_dev(); !opened)
    return within(doing, std::move(opened.error()));
  return uplink;
}

Result<Uplink> Uplink::adopt(const UplinkConfig& config, const UplinkRecord& record,
                             std::span<const XskDescription> queues, std::vector<UniqueFd> fds) {
  const std::string doing = "adopt uplink " + config.name + " (" + record.netdev + ")";
  if (fds.size() < kXskFdsPerQueue * queues.size()) return fail(ErrorKind::kInvalid, doing + ": sockets are missing");
  auto mac = normalized_mac(config.mac);
  if (!mac) return within(doing, std::move(mac.error()));
  auto rtnetlink = Rtnetlink::open();
  if (!rtnetlink) return within(doing, std::move(rtnetlink.error()));
  auto monitor = LinkMonitor::open();
  if (!monitor) return within(doing, std::move(monitor.error()));
  Uplink uplink{config, std::move(*rtnetlink)};
  uplink.config_.mac = *mac;
  uplink.monitor_ = std::move(*monitor);
  const bool bridge = config.kind == UplinkKind::kBridge;
  const std::string& above = bridge ? config.name : record.netdev;
  if (!is_null(config.kind)) {
    for (auto [state, name] : {std::pair{&uplink.ours_, &record.netdev}, std::pair{&uplink.above_, &above},
                               std::pair{&uplink.port_, bridge ? &record.port : &record.netdev}}) {
      auto found = existing(uplink.rtnetlink_, *name);
      if (!found) return within(doing, std::move(found.error()));
      *state = std::move(*found);
    }
    auto redirect = XdpRedirect::adopt(config.pin_dir + "/" + pin_name(record.netdev));
    if (!redirect) return within(doing, std::move(redirect.error()));
    uplink.redirect_ = std::move(*redirect);
  }
  for (std::size_t i = 0; i < queues.size(); ++i)
    uplink.queues_.emplace_back(queues[i], std::move(fds[2 * i]), std::move(fds[2 * i + 1]));
  if (fds.size() > 2 * queues.size()) uplink.membership_ = std::move(fds[2 * queues.size()]);
  uplink.mtu_ = record.mtu;
  uplink.was_down_ = record.was_down;
  uplink.channels_changed_ = record.channels_changed;
  uplink.channels_before_ = record.channels_before;
  uplink.features_before_ = record.features_before;
  uplink.deferral_before_ = record.deferral_before;
  // Its maker may have died before the port carried.
  uplink.connected_ = !bridge || uplink.port_.master == uplink.above_.ifindex;
  uplink.owned_.set();
  return uplink;
}

UplinkRecord Uplink::record() const {
  return {ours_.name,       port_.name,      mtu_, was_down_, channels_changed_, channels_before_,
          features_before_, deferral_before_};
}

Uplink::~Uplink() { (void)close(); }

Status Uplink::set_mtu(std::uint32_t available) {
  mtu_ = config_.mtu != 0 ? config_.mtu : available;
  if (mtu_ <= available) return {};
  return fail(ErrorKind::kInvalid, "the NIC's MTU " + std::to_string(mtu_) + " is larger than that of " + config_.name +
                                       " (" + std::to_string(available) + "); raise the latter or lower the former");
}

Status Uplink::open_bridge() {
  auto bridge = existing(rtnetlink_, config_.name);
  if (!bridge) return tl::make_unexpected(std::move(bridge.error()));
  above_ = std::move(*bridge);
  if (above_.kind != "bridge")
    return fail(ErrorKind::kInvalid, config_.name + " is not a bridge; use dev= to give the NIC the whole netdev");
  if (!above_.up) notes_.push_back("bridge " + config_.name + " is down: nothing passes until it is set up");
  Status step = set_mtu(above_.mtu);
  if (step) step = add_veth();
  if (step) step = prepare_veth_ends();
  if (step) step = open_queues(false);
  if (step) step = set_up_ends();
  return step;
}

Status Uplink::set_up_ends() {
  for (const LinkState* end : {&ours_, &port_})
    if (auto up = rtnetlink_.change(end->ifindex, {true, {}, {}}); !up) return up;
  return {};
}

/// The last step, so that the first frame that arrives finds its socket. A bridge enables a port at once only if the
/// port carries when it is added, and the carrier of a veth comes from a kernel work item some time after both ends are
/// up. Waiting for it first means that frames pass from then on (spanning tree apart).
Result<bool> Uplink::connect(bool late) {
  if (connected_) return true;
  const std::string doing = "connect " + port_.name + " to bridge " + config_.name;
  monitor_.drain();
  const auto port = rtnetlink_.find(port_.ifindex);
  if (!port) return within(doing, port.error());
  if (!*port) return fail(ErrorKind::kGone, doing + ": it was removed while it was being set up");
  if (!(*port)->carrying && !late) return false;
  if (!(*port)->carrying) notes_.push_back(port_.name + " has no carrier yet: the first frames may be lost");
  if (auto joined = rtnetlink_.change(port_.ifindex, {{}, above_.ifindex, {}}); !joined)
    return within(doing, joined.error());
  connected_ = true;
  return true;
}

Status Uplink::add_veth() {
  const std::string alias = uplink_alias(config_.instance, config_.mac);
  for (std::uint32_t attempt = 0; attempt < kNameAttempts; ++attempt) {
    VethPlan plan;
    plan.name = veth_name(config_.mac, attempt, 'a');
    plan.peer = veth_name(config_.mac, attempt, 'b');
    plan.queues = config_.queue_pairs;
    plan.mtu = above_.mtu;  // the bridge's, not the guest's: a port with a smaller one would shrink the bridge's
    auto taken = rtnetlink_.find(plan.name);
    if (!taken) return tl::make_unexpected(std::move(taken.error()));
    if (*taken && (*taken)->alias == alias)
      return fail(ErrorKind::kInvalid, "veth " + plan.name + " of a NIC with this MAC exists in instance " +
                                           config_.instance +
                                           "; give each NIC its own MAC, or restart tandemd to remove leftovers");
    if (auto added = rtnetlink_.add_veth(plan); !added) {
      if (added.error().kind == ErrorKind::kInvalid) continue;  // another one's netdev has that name
      return added;
    }
    owned_.set();
    for (auto [state, name] : {std::pair{&ours_, &plan.name}, std::pair{&port_, &plan.peer}}) {
      auto end = existing(rtnetlink_, *name);
      if (!end) return tl::make_unexpected(std::move(end.error()));
      *state = std::move(*end);
      if (auto named = rtnetlink_.change(state->ifindex, {{}, {}, alias}); !named) return named;
    }
    return {};
  }
  return fail(ErrorKind::kInvalid, "every name for its veth pair is taken, " + veth_name(config_.mac, 0, 'a') +
                                       " first; remove stray netdevs named tdm*");
}

Status Uplink::prepare_veth_ends() {
  for (const LinkState* end : {&ours_, &port_})
    if (auto silent = silence_ipv6(end->name); !silent) return silent;
  if (auto off = switch_features_off(ours_.name, kReceiveFeaturesOff); !off)
    return tl::make_unexpected(std::move(off.error()));
  if (auto off = switch_features_off(port_.name, kPortFeaturesOff); !off)
    return tl::make_unexpected(std::move(off.error()));
  const auto features = netdev_features(port_.name);
  if (!features) return tl::make_unexpected(features.error());
  for (const NetdevFeature& feature : *features)
    if (feature.active && feature.changeable && feature.name.starts_with(kPortFeaturesOff.front()))
      return fail(ErrorKind::kUnsupported, "switch " + feature.name + " of " + port_.name +
                                               " off: the kernel keeps it on, frames would reach the guest unfinished");
  keep_order();
  return {};
}

// The host queues the frames that a veth receives per CPU of the sender (net/core/dev.c, netif_rx). An heir mostly runs
// on another CPU than the dead owner did, and its first frames could overtake the owner's last ones. Receive packet
// steering to one CPU per queue keeps each queue in one line.
void Uplink::keep_order() {
  const long cpus = std::max(1L, ::sysconf(_SC_NPROCESSORS_ONLN));
  for (std::uint32_t queue = 0; queue < config_.queue_pairs; ++queue) {
    const std::string path = "/sys/class/net/" + port_.name + "/queues/rx-" + std::to_string(queue) + "/rps_cpus";
    const auto cpu = static_cast<unsigned>(queue % cpus);
    char mask[16];
    std::snprintf(mask, sizeof mask, "%x", 1u << (cpu % 32));
    std::string words = mask;
    for (unsigned word = 0; word < cpu / 32; ++word) words += ",00000000";
    std::ofstream file(path);
    file << words << std::flush;
    if (file) continue;
    notes_.push_back("steer frames of " + port_.name + " to one CPU per queue (" + path +
                     "): not possible here; after a failover the bridge may see frames out of order. The kernel needs "
                     "CONFIG_RPS, and /sys must show the network namespace that tandemd runs in");
    return;
  }
}

Status Uplink::open_dev() {
  auto dev = existing(rtnetlink_, config_.name);
  if (!dev) return tl::make_unexpected(std::move(dev.error()));
  ours_ = std::move(*dev);
  const auto refuse = [](std::string why) { return fail(ErrorKind::kInvalid, std::move(why)); };
  if (ours_.loopback) return refuse("the loopback netdev cannot be an uplink");
  if (ours_.kind == "bridge") return refuse(config_.name + " is a bridge; use bridge=");
  if (ours_.master != 0)
    return refuse(config_.name + " is a port of a bridge or bond; take it out first (ip link set " + config_.name +
                  " nomaster), or use bridge= with its bridge");
  const auto has_address = rtnetlink_.has_address(ours_.ifindex);
  if (!has_address) return tl::make_unexpected(has_address.error());
  if (*has_address && !config_.pass_host_traffic)
    return refuse(config_.name +
                  " has an address, and the host would lose its traffic; remove the address, or use bridge=");
  Status step = set_mtu(ours_.mtu);
  owned_.set();
  if (step) step = match_channels();
  if (step) {
    auto off = switch_features_off(ours_.name, kReceiveFeaturesOff);
    if (off) features_before_ = std::move(*off);
    if (!off) step = tl::make_unexpected(std::move(off.error()));
  }
  if (step) step = open_queues(config_.pass_host_traffic);
  if (step) step = receive_everything();
  if (step) step = set_up_dev();
  connected_ = true;
  return step;
}

Status Uplink::set_up_dev() {
  if (ours_.up || was_down_) return {};
  was_down_ = true;
  return rtnetlink_.change(ours_.ifindex, {true, {}, {}});
}

Status Uplink::open_null() {
  mtu_ = config_.mtu != 0 ? config_.mtu : kNullMtu;
  const auto frame_size = XskQueue::frame_size_for(mtu_);
  if (!frame_size) return tl::make_unexpected(frame_size.error());
  owned_.set();
  NullQueuePlan plan{*frame_size, 0, 0, mac_bytes(config_.mac)};
  if (config_.kind == UplinkKind::kSource) plan.flags = XskDescription::kSource;
  if (config_.kind == UplinkKind::kLoopback) plan.flags = XskDescription::kLoopback;
  if (config_.kind == UplinkKind::kSource) plan.source_length = config_.frame_length;
  for (std::uint32_t queue = 0; queue < config_.queue_pairs; ++queue) {
    auto made = make_null_queue(queue, plan);
    if (!made) return tl::make_unexpected(std::move(made.error()));
    queues_.push_back(std::move(*made));
  }
  connected_ = true;
  notes_.push_back("null=" + config_.name + " leads nowhere: it is for measurement only");
  return {};
}

Status Uplink::match_channels() {
  auto before = channels(ours_.name);
  if (!before) return tl::make_unexpected(std::move(before.error()));
  channels_before_ = *before;
  const std::uint32_t wanted = config_.queue_pairs;
  const bool controllable = before->max_combined + before->max_rx != 0;
  const std::uint32_t have = controllable ? before->rx_queues() : std::max(ours_.rx_queues, 1u);
  if (have == wanted && (!controllable || before->tx_queues() == wanted)) return {};
  Channels target = *before;
  target.combined = before->max_combined != 0 ? wanted : 0;
  target.rx = target.tx = before->max_combined != 0 ? 0 : wanted;
  if (controllable && wanted <= std::max(before->max_combined, std::min(before->max_rx, before->max_tx))) {
    if (auto set = set_channels(ours_.name, target); !set) return set;
    channels_changed_ = true;
    return {};
  }
  return fail(ErrorKind::kInvalid, ours_.name + " has " + std::to_string(have) + " receive queues and cannot have " +
                                       std::to_string(wanted) + "; give the interface queues='" + std::to_string(have) +
                                       "'");
}

Status Uplink::receive_everything() {
  // Protocol 0: the socket receives nothing itself. The kernel takes the membership back when its last holder closes
  // it.
  membership_ = UniqueFd{::socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0)};
  if (!membership_) return fail_errno("set the receive filter of " + ours_.name);
  std::vector<packet_mreq> requests(config_.promiscuous ? 1 : 2);
  for (packet_mreq& request : requests) request.mr_ifindex = static_cast<int>(ours_.ifindex);
  requests.front().mr_type = config_.promiscuous ? PACKET_MR_PROMISC : PACKET_MR_ALLMULTI;
  if (!config_.promiscuous) {
    const std::string bytes = mac_bytes(config_.mac);
    requests.back().mr_type = PACKET_MR_UNICAST;
    requests.back().mr_alen = static_cast<unsigned short>(bytes.size());
    std::copy(bytes.begin(), bytes.end(), requests.back().mr_address);
  }
  for (const packet_mreq& request : requests)
    if (::setsockopt(membership_.get(), SOL_PACKET, PACKET_ADD_MEMBERSHIP, &request, sizeof request) != 0)
      return fail_errno("set the receive filter of " + ours_.name);
  return {};
}

Status Uplink::open_queues(bool pass_host_traffic) {
  // The netdev's own MTU counts: the guest's may be lower, but frames as long as the netdev's arrive.
  const auto frame_size = XskQueue::frame_size_for(config_.kind == UplinkKind::kBridge ? above_.mtu : ours_.mtu);
  if (!frame_size) return within("for " + config_.name, frame_size.error());
  auto redirect = XdpRedirect::attach(ours_.ifindex, pass_host_traffic, config_.pin_dir + "/" + pin_name(ours_.name));
  if (!redirect) return tl::make_unexpected(std::move(redirect.error()));
  redirect_ = std::move(*redirect);
  if (redirect_.generic()) notes_.push_back(ours_.name + " has no native XDP at this MTU: generic mode, slower");
  // A driver tells which NAPI serves a queue when it is set up, and a socket asks when it is bound.
  if (config_.busy_poll != 0 && config_.kind == UplinkKind::kDev)
    if (auto up = set_up_dev(); !up) return up;
  // Frames that come by generic XDP belong to no NAPI that a socket could poll.
  const XskMode mode{config_.zero_copy, redirect_.generic() ? std::uint16_t{0} : config_.busy_poll};
  for (std::uint32_t queue = 0; queue < config_.queue_pairs; ++queue) {
    auto made = XskQueue::open(ours_.ifindex, queue, *frame_size, mode);
    if (!made) return tl::make_unexpected(std::move(made.error()));
    if (auto added = redirect_.add(queue, made->socket_fd()); !added) return added;
    queues_.push_back(std::move(*made));
  }
  if (config_.busy_poll != 0) defer_interrupts();
  return {};
}

// Without it the netdev's interrupts race with whoever polls, and both do half of the work twice.
void Uplink::defer_interrupts() {
  const std::string without = "pair.busy_poll has no effect on " + ours_.name + ": ";
  if (redirect_.generic()) {
    notes_.push_back(without + "generic XDP has no queue that could be polled");
    return;
  }
  if (!is_polled_by_owner()) {
    notes_.push_back(without +
                     "the kernel does not know which NAPI serves its queues (drivers tell with netif_queue_set_napi(), "
                     "veth's does not from Linux 6.13 on), or has no busy polling (CONFIG_NET_RX_BUSY_POLL); use "
                     "another NIC or kernel, or set pair.busy_poll = 0");
    return;
  }
  auto before = interrupt_deferral(ours_.name);
  Status deferred = before ? set_interrupt_deferral(ours_.name, {kPollsBeforeInterrupts, kInterruptDelayNs})
                           : tl::make_unexpected(before.error());
  if (before) deferral_before_ = *before;
  if (!deferred) notes_.push_back(ours_.name + " is polled while its interrupts go on: " + deferred.error().text);
}

std::vector<XskDescription> Uplink::descriptions() const {
  std::vector<XskDescription> all;
  for (const XskQueue& queue : queues_) all.push_back(queue.description());
  return all;
}

std::vector<int> Uplink::descriptors() const {
  std::vector<int> all;
  for (const XskQueue& queue : queues_) all.insert(all.end(), {queue.socket_fd(), queue.umem_fd()});
  return all;
}

std::vector<int> Uplink::keep_fds() const {
  return membership_ ? std::vector<int>{membership_.get()} : std::vector<int>{};
}

Result<std::vector<XskStatistics>> Uplink::statistics() const {
  std::vector<XskStatistics> all;
  if (is_null(config_.kind)) return std::vector<XskStatistics>(queues_.size());
  for (const XskQueue& queue : queues_) {
    auto one = xsk_statistics(queue.socket_fd());
    if (!one) return within("read statistics of uplink " + config_.name, std::move(one.error()));
    all.push_back(*one);
  }
  return all;
}

Status Uplink::check() {
  monitor_.drain();
  if (is_null(config_.kind)) return {};
  const auto gone = [this](const std::string& what, const std::string& remedy) {
    return fail(ErrorKind::kGone, "uplink " + config_.name + " of NIC " + config_.mac + ": " + what + "; " + remedy);
  };
  const std::string restart = "then start its domain again";
  const auto ours = rtnetlink_.find(ours_.ifindex);
  if (!ours) return tl::make_unexpected(ours.error());
  if (!*ours) return gone("netdev " + ours_.name + " was removed", "restore it if it is hardware, " + restart);
  if (!(*ours)->up) return gone("netdev " + ours_.name + " was set down", "ip link set " + ours_.name + " up");
  if (config_.kind == UplinkKind::kDev || !connected_) return {};
  const auto bridge = rtnetlink_.find(above_.ifindex);
  if (!bridge) return tl::make_unexpected(bridge.error());
  if (!*bridge) return gone("the bridge was removed", "create it again, " + restart);
  if (!(*bridge)->up) return gone("the bridge was set down", "ip link set " + config_.name + " up");
  const auto port = rtnetlink_.find(port_.ifindex);
  if (!port) return tl::make_unexpected(port.error());
  if (!*port) return gone("its port " + port_.name + " left this network namespace", restart);
  if ((*port)->master != above_.ifindex)
    return gone("its port " + port_.name + " was taken out of the bridge",
                "ip link set " + port_.name + " master " + config_.name);
  if (!(*port)->up) return gone("its port " + port_.name + " was set down", "ip link set " + port_.name + " up");
  return {};
}

Status Uplink::close() {
  if (!owned_.take()) return {};
  Status first;
  const auto keep_first = [&first](Status status) {
    if (first && !status) first = std::move(status);
  };
  keep_first(redirect_.unpin());
  redirect_ = {};
  queues_.clear();
  membership_.reset();
  if (is_null(config_.kind)) return first;
  // A netdev that went away by itself has nothing to restore.
  const auto ours = rtnetlink_.find(ours_.ifindex);
  const bool present = ours && *ours && ours_.ifindex != 0;
  if (!present) return first;
  if (config_.kind == UplinkKind::kBridge) {
    keep_first(rtnetlink_.remove(ours_.ifindex));
    return first;
  }
  if (was_down_) keep_first(rtnetlink_.change(ours_.ifindex, {false, {}, {}}));
  if (channels_changed_) keep_first(set_channels(ours_.name, channels_before_));
  if (!features_before_.empty()) keep_first(switch_features_on(ours_.name, features_before_));
  if (deferral_before_) keep_first(set_interrupt_deferral(ours_.name, *deferral_before_));
  return first;
}

Result<std::vector<std::string>> Uplink::remove_stale(const std::string& instance, const std::string& pin_dir,
                                                      const std::vector<std::string>& in_use) {
  std::vector<std::string> removed;
  std::vector<std::string> pins_in_use;
  for (const std::string& netdev : in_use) pins_in_use.push_back(pin_name(netdev));
  const auto contains = [](const std::vector<std::string>& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  namespace fs = std::filesystem;
  std::error_code error;
  std::vector<std::string> directories;
  for (const auto& entry : fs::directory_iterator{pin_dir, error})
    if (entry.is_directory(error) && !contains(pins_in_use, entry.path().filename().string()))
      directories.push_back(entry.path().string());
  for (const std::string& directory : directories) {
    if (auto done = remove_pin_directory(directory); !done) return tl::make_unexpected(std::move(done.error()));
    removed.push_back("pins " + directory);
  }
  auto rtnetlink = Rtnetlink::open();
  if (!rtnetlink) return tl::make_unexpected(std::move(rtnetlink.error()));
  const auto links = rtnetlink->all();
  if (!links) return tl::make_unexpected(links.error());
  for (const LinkState& link : *links) {
    // A pair whose maker died before it could name it has no alias yet and is still down.
    const bool nameless = link.alias.empty() && !link.up && is_veth_name(link.name);
    if (link.kind != "veth" || !(is_alias_of(link.alias, instance) || nameless) || contains(in_use, link.name))
      continue;
    if (auto done = rtnetlink->remove(link.ifindex); !done) return tl::make_unexpected(std::move(done.error()));
    removed.push_back("netdev " + link.name);
  }
  return removed;
}

}  // namespace tandem
