// SPDX-License-Identifier: Apache-2.0
// Handlers of vhost-user requests: each validates everything before it changes anything.
#include "vmm/vhost_user_device.hpp"

#include <algorithm>

#include "vmm/fd_check.hpp"

namespace tandem {

std::uint64_t default_virtio_features() noexcept {
  namespace vf = virtio_feature;
  return vf::kVersion1 | vf::kEventIdx | vf::kIndirectDesc | vf::kMrgRxbuf | vf::kMq | vf::kCtrlVq | vf::kMtu |
         vf::kStatus | vf::kGuestAnnounce | vf::kRingPacked | vf::kInOrder | vf::kCsum | vf::kHostTso4 | vf::kHostTso6 |
         vf::kHostEcn | vf::kGuestCsum | vf::kGuestTso4 | vf::kGuestTso6 | vf::kGuestEcn | kVhostUserFProtocolFeatures;
}

std::uint64_t default_protocol_features() noexcept {
  namespace pf = protocol_feature;
  return pf::kMq | pf::kReplyAck | pf::kNetMtu | pf::kRarp | pf::kStatus | pf::kConfigureMemSlots;
}

VhostUserDevice::VhostUserDevice(const VhostUserDeviceConfig& config)
    : config_(config), vrings_(2 * static_cast<std::size_t>(config.max_queue_pairs)) {
  for (VringState& vring : vrings_) vring.record.start_count = config.first_start_count;
  description_ = derive();
  description_.generation = config.first_generation;
  device_dirty_ = true;
}

Result<VhostUserDevice> VhostUserDevice::create(const VhostUserDeviceConfig& config) {
  const std::string doing = "set up vhost-user device " + std::to_string(config.device) + ": ";
  if (config.max_queue_pairs == 0 || config.max_queue_pairs > kMaxQueuePairsPerDevice)
    return fail(ErrorKind::kInvalid, doing + std::to_string(config.max_queue_pairs) + " queue pairs, 1 to " +
                                         std::to_string(kMaxQueuePairsPerDevice) + " are possible");
  if (config.mtu != 0 && (config.mtu < kMinMtu || config.mtu > kMaxMtu))
    return fail(ErrorKind::kInvalid, doing + "MTU " + std::to_string(config.mtu) + " is outside " +
                                         std::to_string(kMinMtu) + " to " + std::to_string(kMaxMtu));
  if ((config.virtio_features & ~default_virtio_features()) != 0 ||
      (config.protocol_features & ~default_protocol_features()) != 0)
    return fail(ErrorKind::kUnsupported, doing + "it would offer features that nothing here implements");
  return VhostUserDevice{config};
}

// ---- one message ----

Result<Outcome> VhostUserDevice::handle(std::span<const std::byte> bytes, std::vector<UniqueFd> fds) {
  auto frame = parse_frame(bytes, fds.size());
  if (!frame) return tl::make_unexpected(std::move(frame.error()));
  if (frame->info == nullptr || !frame->info->supported) return refuse(*frame, "it is not supported");
  if (auto allowed = check_allowed(*frame, fds); !allowed)
    return within("handle " + std::string{frame->info->name}, std::move(allowed.error()));

  Outcome outcome;
  outcome.wait_for_owners = takes_away(*frame);
  Request request{frame->info->request, frame->payload, fds, outcome};
  if (auto done = dispatch(request); !done)
    return within("handle " + std::string{frame->info->name}, std::move(done.error()));
  if (!outcome.refusal.empty()) return refuse(*frame, outcome.refusal);
  outcome.description_changed = publish();
  if (frame->info->reply == ReplyRule::kOnRequest && frame->needs_reply() && acknowledged(protocol_feature::kReplyAck))
    outcome.reply = make_vhost_user_reply(frame->info->request, std::uint64_t{0});
  return outcome;
}

/// A request that we cannot honour and that harms nobody: "no" if the front end listens, else the connection ends,
/// because it would go on in the belief that we agreed.
Result<Outcome> VhostUserDevice::refuse(const VhostUserFrame& frame, const std::string& reason) const {
  const std::string text = "refuse " + vhost_user_message_name(frame.header.request) + ": " + reason;
  const bool has_own_answer = frame.info != nullptr && frame.info->reply == ReplyRule::kAlways;
  if (has_own_answer || !frame.needs_reply() || !acknowledged(protocol_feature::kReplyAck))
    return fail(ErrorKind::kUnsupported, text);
  Outcome outcome;
  outcome.reply = make_vhost_user_reply(static_cast<VhostUserRequest>(frame.header.request), std::uint64_t{1});
  outcome.refusal = text;
  return outcome;
}

Status VhostUserDevice::check_allowed(const VhostUserFrame& frame, const std::vector<UniqueFd>& fds) const {
  const std::uint64_t needed = frame.info->protocol_feature;
  if (needed != 0 && !acknowledged(needed))
    return fail(ErrorKind::kInvalid, "the protocol feature it belongs to was not negotiated");
  for (const UniqueFd& fd : fds) {
    if (!fd) return fail(ErrorKind::kInvalid, "one of its descriptors is missing");
    if (frame.info->fd_kind != FdKind::kEvent) continue;
    if (auto eventfd = check_eventfd(fd.get()); !eventfd) return eventfd;
  }
  return {};
}

bool VhostUserDevice::takes_away(const VhostUserFrame& frame) const {
  switch (frame.info->takes_away) {
    case TakesAway::kNever:
      return false;
    case TakesAway::kAlways:
      return true;
    case TakesAway::kWhenZero:
      return frame.info->request == VhostUserRequest::kSetVringEnable
                 ? load_wire<VhostUserVringState>(frame.payload).num == 0
                 : load_wire<std::uint64_t>(frame.payload) == 0;
    case TakesAway::kWhenRunning:
      // "Started", not "running": the same before and after the request, so the same when it is repeated.
      if (frame.info->request == VhostUserRequest::kSetFeatures) return any_started();
      return is_started(load_wire<std::uint64_t>(frame.payload) & kVringFileIndexMask);
  }
  return true;
}

Status VhostUserDevice::dispatch(Request& request) {
  const auto reply_u64 = [&](std::uint64_t value) -> Status {
    request.outcome.reply = make_vhost_user_reply(request.request, value);
    return {};
  };
  switch (request.request) {
    case VhostUserRequest::kGetFeatures:
      return reply_u64(config_.virtio_features);
    case VhostUserRequest::kSetFeatures:
      return set_features(request);
    case VhostUserRequest::kSetOwner:
      return {};
    case VhostUserRequest::kResetOwner:
      reset_owner();
      return {};
    case VhostUserRequest::kSetMemTable:
      return set_memory_table(request);
    case VhostUserRequest::kSetVringNum:
      return set_vring_num(request);
    case VhostUserRequest::kSetVringAddr:
      return set_vring_addr(request);
    case VhostUserRequest::kSetVringBase:
      return set_vring_base(request);
    case VhostUserRequest::kGetVringBase:
      return get_vring_base(request);
    case VhostUserRequest::kSetVringKick:
      return set_vring_kick(request);
    case VhostUserRequest::kSetVringCall:
      return set_vring_call(request);
    case VhostUserRequest::kSetVringErr:
      return set_vring_err(request);
    case VhostUserRequest::kGetProtocolFeatures:
      return reply_u64(config_.protocol_features);
    case VhostUserRequest::kSetProtocolFeatures:
      return set_protocol_features(request);
    case VhostUserRequest::kGetQueueNum:
      // Queue pairs, not vrings: QEMU compares it with "queues=" of its netdev, DPDK's librte_vhost answers pairs too.
      return reply_u64(config_.max_queue_pairs);
    case VhostUserRequest::kSetVringEnable:
      return set_vring_enable(request);
    case VhostUserRequest::kSendRarp:
      return send_rarp(request);
    case VhostUserRequest::kNetSetMtu:
      return set_mtu(request);
    case VhostUserRequest::kGetMaxMemSlots:
      return reply_u64(kMaxMemoryRegions);
    case VhostUserRequest::kAddMemReg:
      return add_memory_region(request);
    case VhostUserRequest::kRemMemReg:
      return remove_memory_region(request);
    case VhostUserRequest::kSetStatus:
      return set_status(request);
    case VhostUserRequest::kGetStatus:
      return reply_u64(status_);
    default:
      return fail(ErrorKind::kUnsupported, "the message table says supported, but there is no handler");
  }
}

// ---- negotiation ----

Status VhostUserDevice::set_features(Request& request) {
  const auto wanted = load_wire<std::uint64_t>(request.payload);
  if ((wanted & ~config_.virtio_features) != 0)
    return fail(ErrorKind::kInvalid, "features " + std::to_string(wanted) + " were acknowledged, only " +
                                         std::to_string(config_.virtio_features) + " were offered");
  const bool layout_changes = features_set_ && ((wanted ^ features_) & virtio_feature::kRingPacked) != 0;
  if (layout_changes && any_started())
    return fail(ErrorKind::kInvalid,
                "rings would become packed or split while one runs; stop them with GET_VRING_BASE first");
  // Indices of the other layout mean nothing; a front end sends new ones before it starts a ring.
  if (layout_changes)
    for (std::uint32_t i = 0; i < vrings_.size(); ++i) {
      vrings_[i].forget_base();
      touch(i);
    }
  features_ = wanted;
  features_set_ = true;
  device_dirty_ = true;
  return {};
}

Status VhostUserDevice::set_protocol_features(Request& request) {
  const auto wanted = load_wire<std::uint64_t>(request.payload);
  if ((wanted & ~config_.protocol_features) != 0)
    return fail(ErrorKind::kInvalid, "protocol features " + std::to_string(wanted) + " were acknowledged, only " +
                                         std::to_string(config_.protocol_features) + " were offered");
  protocol_features_ = wanted;
  device_dirty_ = true;
  return {};
}

Status VhostUserDevice::set_status(Request& request) {
  const auto status = load_wire<std::uint64_t>(request.payload);
  if (status > 0xff)
    return fail(ErrorKind::kInvalid, "device status " + std::to_string(status) + " has more than 8 bits");
  status_ = static_cast<std::uint8_t>(status);
  device_dirty_ = true;
  // Reset stops the vrings and keeps memory, features, enable bits and avail indices: QEMU 7.2 sends it at every stop,
  // before GET_VRING_BASE, and sends memory slots again only if they changed.
  if (status == 0) stop_all();
  return {};
}

void VhostUserDevice::reset_owner() {
  stop_all();
  for (VringState& vring : vrings_) vring.record.enable = VringRecord::kUnset;
}

Status VhostUserDevice::set_mtu(Request& request) {
  const auto mtu = load_wire<std::uint64_t>(request.payload);
  const std::uint64_t limit = config_.mtu != 0 ? config_.mtu : kMaxMtu;
  if (mtu < kMinMtu || mtu > limit) {
    request.outcome.refusal = "MTU " + std::to_string(mtu) + " is outside " + std::to_string(kMinMtu) + " to " +
                              std::to_string(limit) + ", which is what the uplink carries";
    return {};
  }
  mtu_ = static_cast<std::uint32_t>(mtu);
  device_dirty_ = true;
  return {};
}

Status VhostUserDevice::send_rarp(Request& request) {
  request.outcome.rarp_mac = load_wire<std::array<std::uint8_t, 6>>(request.payload);
  return {};
}

// ---- memory ----

namespace {

MemoryRegion from_wire(const VhostUserMemoryRegion& wire) {
  return MemoryRegion{wire.guest_address, wire.size, wire.user_address, wire.mmap_offset};
}

}  // namespace

Status VhostUserDevice::require_features(std::string_view what) const {
  if (features_set_) return {};
  return fail(ErrorKind::kInvalid, std::string{what} + " came before SET_FEATURES");
}

Status VhostUserDevice::set_memory_table(Request& request) {
  if (auto order = require_features("guest memory"); !order) return order;
  const auto header = load_wire<VhostUserMemoryHeader>(request.payload);
  const std::size_t expected = sizeof header + std::size_t{header.count} * sizeof(VhostUserMemoryRegion);
  if (header.count == 0 || request.payload.size() != expected)
    return fail(ErrorKind::kInvalid, "announces " + std::to_string(header.count) + " regions in " +
                                         std::to_string(request.payload.size()) + " bytes of payload");
  std::vector<MemoryRegion> regions;
  for (std::size_t i = 0; i < header.count; ++i)
    regions.push_back(from_wire(
        load_wire<VhostUserMemoryRegion>(request.payload, sizeof header + i * sizeof(VhostUserMemoryRegion))));
  auto table = MemoryTable::make(regions, std::move(request.fds));
  if (!table) return tl::make_unexpected(std::move(table.error()));
  if (table->same_as(memory_)) return {};  // front ends send the same table at every start: keep files and mappings
  fds_replaced_ = true;
  memory_ = std::move(*table);
  device_dirty_ = true;
  return {};
}

Status VhostUserDevice::add_memory_region(Request& request) {
  if (auto order = require_features("guest memory"); !order) return order;
  const auto wire = load_wire<VhostUserSingleRegion>(request.payload);
  if (auto added = memory_.add(from_wire(wire.region), std::move(request.fds.front())); !added) return added;
  device_dirty_ = true;
  return {};
}

Status VhostUserDevice::remove_memory_region(Request& request) {
  const auto wire = load_wire<VhostUserSingleRegion>(request.payload);
  if (auto removed = memory_.remove(from_wire(wire.region)); !removed) return removed;
  device_dirty_ = true;
  return {};
}

// ---- vrings ----

Status VhostUserDevice::check_vring_index(std::uint32_t index) const {
  if (index < vrings_.size()) return {};
  return fail(ErrorKind::kInvalid,
              "vring " + std::to_string(index) + " does not exist, the device has " + std::to_string(vrings_.size()));
}

bool VhostUserDevice::is_running(std::uint32_t vring) const noexcept {
  return (description_.vrings[vring].flags & VringDescription::kRunning) != 0;
}

bool VhostUserDevice::is_started(std::uint64_t vring) const noexcept {
  return vring < vrings_.size() && vrings_[vring].record.started != 0;
}

bool VhostUserDevice::any_started() const noexcept {
  return std::any_of(vrings_.begin(), vrings_.end(), [](const VringState& v) { return v.record.started != 0; });
}

void VhostUserDevice::stop_all() {
  for (std::uint32_t i = 0; i < vrings_.size(); ++i) {
    vrings_[i].stop();
    touch(i);
  }
}

Status VhostUserDevice::set_vring_num(Request& request) {
  const auto state = load_wire<VhostUserVringState>(request.payload);
  if (auto order = require_features("a vring size"); !order) return order;
  if (auto index = check_vring_index(state.index); !index) return index;
  if (auto size = check_vring_size(state.num, packed()); !size) return size;
  VringRecord& vring = vrings_[state.index].record;
  if (vring.started != 0 && vring.ran != 0 && vring.size != state.num)
    return fail(ErrorKind::kInvalid,
                "vring " + std::to_string(state.index) + " runs; stop it with GET_VRING_BASE first");
  vring.size = state.num;
  touch(state.index);
  return {};
}

Status VhostUserDevice::set_vring_addr(Request& request) {
  const auto wire = load_wire<VhostUserVringAddress>(request.payload);
  if (auto order = require_features("a vring address"); !order) return order;
  if (auto index = check_vring_index(wire.index); !index) return index;
  if (wire.flags != 0)
    return fail(ErrorKind::kInvalid, "vring flags " + std::to_string(wire.flags) + ": logging was not negotiated");
  VringRecord vring = vrings_[wire.index].record;
  vring.descriptor_user_address = wire.descriptor_user_address;
  vring.avail_user_address = wire.avail_user_address;
  vring.used_user_address = wire.used_user_address;
  vring.has_addresses = 1;
  if (auto aligned = check_vring_alignment(vring, packed()); !aligned) return aligned;
  if (vring.size != 0 && !memory_.empty())
    if (auto inside = check_vring_inside(vring, packed(), memory_); !inside) return inside;
  const VringRecord& old = vrings_[wire.index].record;
  const bool moved = old.descriptor_user_address != vring.descriptor_user_address ||
                     old.avail_user_address != vring.avail_user_address ||
                     old.used_user_address != vring.used_user_address;
  if (old.started != 0 && old.ran != 0 && moved)
    return fail(ErrorKind::kInvalid,
                "vring " + std::to_string(wire.index) + " runs; stop it with GET_VRING_BASE first");
  vrings_[wire.index].record = vring;
  touch(wire.index);
  return {};
}

Status VhostUserDevice::set_vring_base(Request& request) {
  const auto state = load_wire<VhostUserVringState>(request.payload);
  if (auto order = require_features("a vring base"); !order) return order;
  if (auto index = check_vring_index(state.index); !index) return index;
  if (!packed() && state.num > 0xffff)
    return fail(ErrorKind::kInvalid, "avail index " + std::to_string(state.num) + " has more than 16 bits");
  VringRecord& vring = vrings_[state.index].record;
  if (vring.started != 0 && vring.ran != 0)
    return fail(ErrorKind::kInvalid,
                "vring " + std::to_string(state.index) + " runs; stop it with GET_VRING_BASE first");
  vring.base = packed() ? complete_packed_base(state.num) : state.num;
  vring.has_base = 1;
  vring.ran = 0;
  touch(state.index);
  return {};
}

Status VhostUserDevice::get_vring_base(Request& request) {
  const auto state = load_wire<VhostUserVringState>(request.payload);
  if (auto index = check_vring_index(state.index); !index) return index;
  VringState& vring = vrings_[state.index];
  vring.stop();
  touch(state.index);
  if (vring.record.ran != 0)
    request.outcome.vring_base_index = state.index;
  else
    request.outcome.reply =
        make_vhost_user_reply(request.request, VhostUserVringState{state.index, vring_start(vring.record, packed())});
  return {};
}

std::vector<std::byte> VhostUserDevice::vring_base_reply(std::uint32_t vring, std::uint32_t base) {
  VringRecord& record = vrings_.at(vring).record;
  record.base = base;
  record.has_base = 1;
  record.ran = 0;
  touch(vring);
  return make_vhost_user_reply(VhostUserRequest::kGetVringBase, VhostUserVringState{vring, base});
}

/// Index from the payload of KICK, CALL and ERR; the "no descriptor" bit must agree with what came.
Result<std::uint32_t> VhostUserDevice::vring_file_index(const Request& request) const {
  const auto value = load_wire<std::uint64_t>(request.payload);
  if ((value & ~(kVringFileIndexMask | kVringFileNoFd)) != 0)
    return fail(ErrorKind::kInvalid, "payload " + std::to_string(value) + " has bits set that mean nothing");
  const bool announced = (value & kVringFileNoFd) == 0;
  if (announced != !request.fds.empty())
    return fail(ErrorKind::kInvalid,
                announced ? "its descriptor is missing" : "it says that it has no descriptor, but one came");
  const auto index = static_cast<std::uint32_t>(value & kVringFileIndexMask);
  if (auto valid = check_vring_index(index); !valid) return tl::make_unexpected(std::move(valid.error()));
  return index;
}

namespace {

UniqueFd take_fd(std::vector<UniqueFd>& fds) { return fds.empty() ? UniqueFd{} : std::move(fds.front()); }

bool same_event(const UniqueFd& a, const UniqueFd& b) {
  if (!a || !b) return !a && !b;
  return same_eventfd(a.get(), b.get());
}

}  // namespace

Status VhostUserDevice::set_vring_kick(Request& request) {
  if (auto order = require_features("a kick descriptor"); !order) return order;
  const auto index = vring_file_index(request);
  if (!index) return tl::make_unexpected(index.error());
  VringState& vring = vrings_[*index];
  const VringRecord& record = vring.record;
  if (record.size != 0 && record.has_addresses != 0) {
    if (auto size = check_vring_size(record.size, packed()); !size) return size;
    if (auto aligned = check_vring_alignment(record, packed()); !aligned) return aligned;
    if (auto inside = check_vring_inside(record, packed(), memory_); !inside) return inside;
    if (record.ran == 0)
      if (auto start = check_vring_start(record, packed()); !start) return start;
  }
  UniqueFd kick = take_fd(request.fds);
  if (record.started != 0 && same_event(vring.kick, kick)) return {};
  if (is_running(*index)) fds_replaced_ = true;
  vring.start(std::move(kick));
  touch(*index);
  return {};
}

Status VhostUserDevice::set_vring_call(Request& request) {
  const auto index = vring_file_index(request);
  if (!index) return tl::make_unexpected(index.error());
  VringState& vring = vrings_[*index];
  UniqueFd call = take_fd(request.fds);
  if (same_event(vring.call, call)) return {};
  if (is_running(*index)) fds_replaced_ = true;
  vring.call = std::move(call);
  touch(*index);
  return {};
}

Status VhostUserDevice::set_vring_err(Request& request) {
  const auto index = vring_file_index(request);
  if (!index) return tl::make_unexpected(index.error());
  return {};
}

Status VhostUserDevice::set_vring_enable(Request& request) {
  const auto state = load_wire<VhostUserVringState>(request.payload);
  if (auto index = check_vring_index(state.index); !index) return index;
  if (state.num > 1)
    return fail(ErrorKind::kInvalid, "vring can be enabled (1) or disabled (0), not " + std::to_string(state.num));
  vrings_[state.index].record.enable = state.num == 1 ? VringRecord::kEnabled : VringRecord::kDisabled;
  touch(state.index);
  return {};
}

}  // namespace tandem
