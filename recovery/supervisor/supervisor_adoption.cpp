// SPDX-License-Identifier: Apache-2.0
// How a new tandemd goes on from what a dead one left in the vault, and what the vault keeps for that.
//
// Items, by key:
//   pair/NAME             segment and watchdog timers
//   member/NAME/PID       pidfd and control channel; threads, tags, wake rings once it is armed
//   nic/MAC               the option, indices in the pair, what the uplink must put back
//   ports/MAC             XskDescriptions; sockets and UMEMs, then what else keeps the uplink alive
//   device/MAC/N          vhost-user state (vmm/vhost_user_device.hpp, SavedItem)
// The fence is adopted from its pins. If anything needed is missing or of another version, nothing is adopted: the
// predecessor's processes and devices are removed, and its guests reconnect to NICs that a next start of their domain
// provides.
#include <spdlog/spdlog.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <filesystem>

#include "recovery/supervisor/probe.hpp"
#include "recovery/supervisor/supervisor.hpp"

namespace tandem {

namespace {

using nlohmann::json;

std::span<const std::byte> as_blob(const std::string& text) { return std::as_bytes(std::span(text)); }

json parse_blob(const VaultItem& item) {
  return json::parse(std::string(reinterpret_cast<const char*>(item.blob.data()), item.blob.size()), nullptr, false);
}

std::string after_slash(const std::string& key) { return key.substr(key.find('/') + 1); }

VaultItem* find_item(std::vector<VaultItem>& items, const std::string& key) {
  for (VaultItem& item : items)
    if (item.key == key) return &item;
  return nullptr;
}

json channels_to_json(const Channels& channels) { return {channels.rx, channels.tx, channels.combined}; }

json deferral_to_json(const std::optional<InterruptDeferral>& deferral) {
  return deferral ? json{deferral->polls, deferral->timeout_ns} : json{};
}

// Null, or no such entry: a tandemd of a version that did not know it.
std::optional<InterruptDeferral> deferral_from_json(const json& list) {
  if (list.is_null()) return std::nullopt;
  return InterruptDeferral{list.at(0).get<std::uint32_t>(), list.at(1).get<std::uint64_t>()};
}

Channels channels_from_json(const json& list) {
  Channels channels;
  channels.rx = list.at(0).get<std::uint32_t>();
  channels.tx = list.at(1).get<std::uint32_t>();
  channels.combined = list.at(2).get<std::uint32_t>();
  return channels;
}

}  // namespace

void Supervisor::save_pair(const Pair& pair) {
  if (auto put = vault_->put("pair/" + pair.name(), as_blob("{}"), pair.keep_fds()); !put)
    spdlog::error("pair {}: keep it in the vault: {}", pair.name(), put.error().text);
}

void Supervisor::on_member_change(Pair& pair, Member& member) {
  const int fds[] = {member.pidfd(), member.channel().fd()};
  const json record{{"pid", member.pid()}, {"threads", member.threads}, {"tags", member.tags}, {"rings", member.rings}};
  if (auto put = vault_->put("member/" + pair.name() + "/" + std::to_string(member.pid()), as_blob(record.dump()), fds);
      !put)
    spdlog::error("pair {}: keep backend {} in the vault: {}", pair.name(), member.pid(), put.error().text);
  TANDEM_SUPERVISOR_PROBE(kMemberKept);
}

// After the device's state: a NIC whose record is there is there as a whole.
Status Supervisor::keep_nic(Nic& nic) {
  const UplinkRecord uplink = nic.uplink->record();
  const json record{{"mac", nic.option.mac},
                    {"pair", nic.option.pair},
                    {"uplink_kind", static_cast<int>(nic.option.uplink.kind)},
                    {"uplink_name", nic.option.uplink.name},
                    {"uplink_frame", nic.option.uplink.frame_length},
                    {"uplink_direct", nic.option.uplink.direct},
                    {"group", nic.group},
                    {"spin_ns", nic.option.watchdog.spin.count()},
                    {"blocked_ns", nic.option.watchdog.blocked.count()},
                    {"queues", nic.option.queues},
                    {"socket_path", nic.option.socket_path},
                    {"domain", nic.domain},
                    {"uuid", nic.domain_uuid},
                    {"device_index", nic.device_index},
                    {"first_queue_pair", nic.first_queue_pair},
                    {"netdev", uplink.netdev},
                    {"port", uplink.port},
                    {"mtu", uplink.mtu},
                    {"was_down", uplink.was_down},
                    {"channels_changed", uplink.channels_changed},
                    {"channels_before", channels_to_json(uplink.channels_before)},
                    {"features_before", uplink.features_before},
                    {"deferral_before", deferral_to_json(uplink.deferral_before)},
                    {"disabled", disabled_status(nic)}};
  const std::vector<XskDescription> ports = nic.uplink->descriptions();
  std::vector<int> fds = nic.uplink->descriptors();
  for (const int fd : nic.uplink->keep_fds()) fds.push_back(fd);
  // The record last: a NIC without one was never finished, and is not adopted.
  if (auto put = vault_->put("ports/" + nic.option.mac, std::as_bytes(std::span(ports)), fds); !put) return put;
  return vault_->put("nic/" + nic.option.mac, as_blob(record.dump()));
}

Status Supervisor::take_over_from_predecessor() {
  auto items = vault_->fetch_all();
  if (!items) return within("read the vault", std::move(items.error()));
  TANDEM_SUPERVISOR_PROBE(kItemsFetched);
  if (!items->empty()) {
    const Status adopted = adopt(*items);
    TANDEM_SUPERVISOR_PROBE(kAdopted);
    if (adopted) return {};
    spdlog::error(
        "adopt what an earlier tandemd left: {}; removing it. Its guests' links stay down until they are started anew",
        adopted.error().text);
    nics_.clear();
    pairs_.clear();
    fence_.reset();
  }
  if (auto cleaned = clean_up(*items); !cleaned) return cleaned;
  auto fence = Fence::load(config_.pin_dir);
  if (!fence) return within("load the fence", std::move(fence.error()));
  fence_ = std::move(*fence);
  return {};
}

// Ends the backends (by pidfd) and removes the network devices of a predecessor, and forgets its items.
Status Supervisor::clean_up(std::vector<VaultItem>& items) {
  for (const VaultItem& item : items) {
    if (item.key.starts_with("member/") && !item.fds.empty() && item.fds[0]) {
      ::syscall(SYS_pidfd_send_signal, item.fds[0].get(), SIGKILL, nullptr, 0);
      spdlog::warn("ended a backend of a dead tandemd ({})", item.key);
    }
    if (item.key.starts_with("nic/")) static_cast<void>(vault_->unlisten(after_slash(item.key)));
  }
  static_cast<void>(vault_->del_prefix(""));
  // Nobody answers there any more.
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(config_.nic_socket_dir(), ignored))
    if (entry.is_socket(ignored)) std::filesystem::remove(entry.path(), ignored);
  auto removed = Uplink::remove_stale(config_.instance, config_.pin_dir + "/uplink");
  if (!removed) return within("remove uplinks of a dead tandemd", std::move(removed.error()));
  for (const std::string& what : *removed) spdlog::warn("removed {} of a dead tandemd", what);
  return {};
}

Status Supervisor::adopt(std::vector<VaultItem>& items) {
  auto fence = Fence::adopt(config_.pin_dir);
  if (!fence) return tl::make_unexpected(std::move(fence.error()));
  fence_ = std::move(*fence);
  tags_.begin_after(static_cast<std::uint32_t>(fence_->highest_tag()));
  try {
    if (auto adopted = adopt_pairs(items); !adopted) return adopted;
    for (VaultItem& item : items) {
      if (!item.key.starts_with("nic/")) continue;
      if (auto adopted = adopt_nic(item, items); !adopted) return adopted;
    }
  } catch (const std::exception& error) {  // json's own, and std::stoul's
    return fail(ErrorKind::kUnsupported, std::string("an item in the vault is of another version: ") + error.what());
  }
  // From here on nothing can fail: the pairs come to life.
  for (auto& [name, pair] : pairs_) {
    set_hang_limits(*pair);
    pair->resume();
  }
  for (auto& [mac, nic] : nics_) {
    if (nic.disabled) {
      begin_disable(nic);  // our predecessor may not have come to its end
      watch_uplink(nic);
      spdlog::warn("NIC {} of domain {}: adopted; it is disabled: {}", mac, nic.domain, nic.disabled->reason);
      continue;
    }
    save(nic);
    describe(nic);  // its generation is new: our predecessor may have died before it told everyone of the last one
    watch_uplink(nic);
    not_listening_.insert(mac);
    spdlog::info("NIC {} of domain {}: adopted", mac, nic.domain);
  }
  sweep(items);
  std::vector<std::string> unused;
  for (const auto& [name, pair] : pairs_) unused.push_back(name);
  for (const std::string& name : unused) stop_pair_if_unused(name);
  return {};
}

// What a predecessor had begun to make, or to remove, and did not finish: no NIC's record names it.
void Supervisor::sweep(const std::vector<VaultItem>& items) {
  for (const VaultItem& item : items) {
    const std::string rest = after_slash(item.key);
    const std::string mac = rest.substr(0, rest.find('/'));
    if ((item.key.starts_with("ports/") || item.key.starts_with("device/")) && !nics_.contains(mac))
      static_cast<void>(vault_->del(item.key));
  }
  std::set<std::string> sockets;
  for (const auto& [mac, nic] : nics_) sockets.insert(socket_name(mac));
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(config_.nic_socket_dir(), ignored))
    if (entry.is_socket(ignored) && !sockets.contains(entry.path().filename().string()))
      std::filesystem::remove(entry.path(), ignored);
  std::vector<std::string> in_use;
  for (const auto& [mac, nic] : nics_) {
    const UplinkRecord uplink = nic.uplink->record();
    if (!uplink.netdev.empty()) in_use.push_back(uplink.netdev);
    if (!uplink.port.empty()) in_use.push_back(uplink.port);
  }
  const auto removed = Uplink::remove_stale(config_.instance, config_.pin_dir + "/uplink", in_use);
  if (!removed) spdlog::error("remove unfinished uplinks of a dead tandemd: {}", removed.error().text);
  for (const std::string& what : removed ? *removed : std::vector<std::string>{})
    spdlog::warn("removed {}, which a dead tandemd had not finished", what);
}

Status Supervisor::adopt_pairs(std::vector<VaultItem>& items) {
  auto backend = find_backend();
  if (!backend) return tl::make_unexpected(std::move(backend.error()));
  for (VaultItem& item : items) {
    if (!item.key.starts_with("pair/")) continue;
    const std::string name = after_slash(item.key);
    auto pair = Pair::adopt(name, std::move(item.fds), config_, *backend, loop_, *fence_, tags_, *this);
    if (!pair) return tl::make_unexpected(std::move(pair.error()));
    pairs_[name] = std::move(*pair);
  }
  for (VaultItem& item : items) {
    if (!item.key.starts_with("member/")) continue;
    const json record = parse_blob(item);
    const std::string rest = after_slash(item.key);
    const auto pair = pairs_.find(rest.substr(0, rest.rfind('/')));
    if (pair == pairs_.end() || item.fds.size() != 2)
      return fail(ErrorKind::kInvalid, item.key + ": its pair is missing");
    pair->second->adopt_member(record.at("pid").get<pid_t>(), item.fds[0].duplicate(), item.fds[1].duplicate(),
                               record.at("threads").get<std::vector<pid_t>>(),
                               record.at("tags").get<std::vector<std::uint32_t>>(),
                               record.at("rings").get<std::vector<std::uint32_t>>());
  }
  return {};
}

Status Supervisor::adopt_nic(VaultItem& item, std::vector<VaultItem>& items) {
  const json record = parse_blob(item);
  Nic nic;
  nic.option.mac = record.at("mac").get<std::string>();
  nic.option.pair = record.at("pair").get<std::string>();
  nic.option.uplink.kind = static_cast<UplinkOption::Kind>(record.at("uplink_kind").get<int>());
  nic.option.uplink.name = record.at("uplink_name").get<std::string>();
  nic.option.uplink.frame_length = record.at("uplink_frame").get<std::uint32_t>();
  nic.option.uplink.direct = record.at("uplink_direct").get<bool>();
  nic.group = record.at("group").get<std::uint32_t>();
  nic.option.watchdog.spin = std::chrono::nanoseconds(record.at("spin_ns").get<std::int64_t>());
  nic.option.watchdog.blocked = std::chrono::nanoseconds(record.at("blocked_ns").get<std::int64_t>());
  nic.option.queues = record.at("queues").get<std::uint32_t>();
  nic.option.socket_path = record.at("socket_path").get<std::string>();
  nic.domain = record.at("domain").get<std::string>();
  nic.domain_uuid = record.at("uuid").get<std::string>();
  nic.device_index = record.at("device_index").get<std::uint32_t>();
  nic.first_queue_pair = record.at("first_queue_pair").get<std::uint32_t>();
  if (const json disabled = record.value("disabled", json()); disabled.is_object())
    nic.disabled = Disabled{disabled.at("by") == "tandem", disabled.at("reason").get<std::string>(),
                            disabled.at("since_ms").get<std::int64_t>()};
  const std::string what = "NIC " + nic.option.mac;
  const auto pair = pairs_.find(nic.option.pair);
  VaultItem* ports = find_item(items, "ports/" + nic.option.mac);
  if (pair == pairs_.end() || ports == nullptr || ports->blob.size() != nic.option.queues * sizeof(XskDescription) ||
      ports->fds.size() < 2 * nic.option.queues || nic.device_index >= kMaxDevices ||
      nic.first_queue_pair + nic.option.queues > kMaxQueuePairs)
    return fail(ErrorKind::kInvalid, what + ": its record is incomplete");
  nic.pair = pair->second.get();
  std::vector<XskDescription> descriptions(nic.option.queues);
  std::memcpy(descriptions.data(), ports->blob.data(), ports->blob.size());
  std::vector<UniqueFd> for_members;
  for (std::size_t i = 0; i < 2 * descriptions.size(); ++i) for_members.push_back(ports->fds[i].duplicate());

  UplinkRecord uplink{record.at("netdev").get<std::string>(),
                      record.at("port").get<std::string>(),
                      record.at("mtu").get<std::uint32_t>(),
                      record.at("was_down").get<bool>(),
                      record.at("channels_changed").get<bool>(),
                      channels_from_json(record.at("channels_before")),
                      record.at("features_before").get<std::vector<std::string>>(),
                      deferral_from_json(record.value("deferral_before", json{}))};
  auto adopted = Uplink::adopt(uplink_config(nic.option), uplink, descriptions, std::move(ports->fds));
  if (!adopted) return within(what, std::move(adopted.error()));
  nic.uplink.emplace(std::move(*adopted));

  std::vector<RestoredItem> state;
  const std::string prefix = "device/" + nic.option.mac + "/";
  for (VaultItem& piece : items) {
    if (!piece.key.starts_with(prefix)) continue;
    state.push_back({static_cast<std::uint32_t>(std::stoul(piece.key.substr(prefix.size()))), std::move(piece.blob),
                     std::move(piece.fds)});
  }
  auto device = VhostUserDevice::restore(std::move(state));
  if (!device) return within(what, std::move(device.error()));
  nic.device.emplace(std::move(*device));
  nic.kills_seen = kills_of(nic);
  nic.pair->adopt_device(nic.device_index, nic.first_queue_pair, std::move(descriptions), std::move(for_members),
                         {nic.group, mac_number(nic.option.mac)});
  nics_.emplace(nic.option.mac, std::move(nic));
  return {};
}

}  // namespace tandem
