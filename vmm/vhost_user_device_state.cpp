// SPDX-License-Identifier: Apache-2.0
// From state to device description, and from state to saved items and back.
#include <algorithm>
#include <cstring>

#include "vmm/vhost_user_device.hpp"

namespace tandem {
namespace {

/// Raise it when SavedDevice or VringRecord change their meaning or shape: a supervisor refuses items it does not know.
constexpr std::uint32_t kSavedVersion = 1;
constexpr std::uint32_t kSavedMagic = 0x56554454;  // "TDUV"

struct SavedHeader {
  std::uint32_t magic = kSavedMagic;
  std::uint32_t version = kSavedVersion;
};

struct SavedDevice {
  SavedHeader header;
  VhostUserDeviceConfig config;
  std::uint64_t generation = 0;
  std::uint64_t features = 0;
  std::uint64_t protocol_features = 0;
  std::uint32_t features_set = 0;
  std::uint32_t mtu = 0;
  std::uint32_t status = 0;
  std::uint32_t region_count = 0;
  MemoryRegion regions[kMaxMemoryRegions];
};
static_assert(std::is_trivially_copyable_v<SavedDevice>);

struct SavedVring {
  static constexpr std::uint32_t kKick = 1u << 0;
  static constexpr std::uint32_t kCall = 1u << 1;
  SavedHeader header;
  std::uint32_t fds = 0;
  std::uint32_t reserved = 0;
  VringRecord record;
};
static_assert(std::is_trivially_copyable_v<SavedVring> && sizeof(SavedVring) == 72);

template <class T>
std::vector<std::byte> to_bytes(const T& value) {
  std::vector<std::byte> bytes(sizeof value);
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

template <class T>
Result<T> from_bytes(const RestoredItem& item) {
  const std::string doing = "restore saved item " + std::to_string(item.item) + ": ";
  if (item.bytes.size() != sizeof(T))
    return fail(ErrorKind::kUnsupported, doing + "it has " + std::to_string(item.bytes.size()) + " bytes instead of " +
                                             std::to_string(sizeof(T)) + "; another version of tandemd wrote it");
  const T value = load_wire<T>(item.bytes);
  if (value.header.magic != kSavedMagic || value.header.version != kSavedVersion)
    return fail(ErrorKind::kUnsupported, doing + "version " + std::to_string(value.header.version) +
                                             ", this tandemd knows " + std::to_string(kSavedVersion));
  return value;
}

}  // namespace

// ---- description ----

DeviceDescription VhostUserDevice::derive() {
  DeviceDescription next;
  next.device = config_.device;
  next.features = features_ & ~kVhostUserFProtocolFeatures;  // that bit is the transport's, no virtio feature
  next.mtu = mtu_ != 0 ? mtu_ : config_.mtu;
  next.queue_pairs = config_.max_queue_pairs;
  for (const MemoryTable::Entry& entry : memory_.entries()) next.regions[next.region_count++] = entry.region;
  const bool enabled_by_default = (features_ & kVhostUserFProtocolFeatures) == 0;
  for (std::uint32_t i = 0; i < vrings_.size(); ++i) {
    VringRecord& record = vrings_[i].record;
    VringDescription& shown = next.vrings[i];
    if (features_set_ && vring_runs(record, packed(), memory_, enabled_by_default)) {
      if (record.ran == 0) {
        record.ran = 1;
        ++record.start_count;
        touch(i);
      }
      shown.flags = VringDescription::kRunning | (vrings_[i].kick ? VringDescription::kHasKick : 0) |
                    (vrings_[i].call ? VringDescription::kHasCall : 0);
      shown.size = record.size;
      shown.base = vring_start(record, packed());
      shown.descriptor_user_address = record.descriptor_user_address;
      shown.avail_user_address = record.avail_user_address;
      shown.used_user_address = record.used_user_address;
    }
    shown.start_count = record.start_count;
  }
  return next;
}

bool VhostUserDevice::publish() {
  DeviceDescription next = derive();
  next.generation = description_.generation;
  // No padding in the structure (static_asserts in its header), so equal content is equal bytes.
  if (!fds_replaced_ && std::memcmp(&next, &description_, sizeof next) == 0) return false;
  ++next.generation;
  description_ = next;
  fds_replaced_ = false;
  device_dirty_ = true;
  return true;
}

std::vector<int> VhostUserDevice::description_fds() const {
  std::vector<int> fds;
  for (const MemoryTable::Entry& entry : memory_.entries()) fds.push_back(entry.file.get());
  for (std::uint32_t i = 0; i < vrings_.size(); ++i) {
    const std::uint32_t flags = description_.vrings[i].flags;
    if ((flags & VringDescription::kHasKick) != 0) fds.push_back(vrings_[i].kick.get());
    if ((flags & VringDescription::kHasCall) != 0) fds.push_back(vrings_[i].call.get());
  }
  return fds;
}

std::uint32_t VhostUserDevice::highest_start_count() const noexcept {
  std::uint32_t highest = 0;
  for (const VringState& vring : vrings_) highest = std::max(highest, vring.record.start_count);
  return highest;
}

void VhostUserDevice::disconnect() {
  features_set_ = false;
  features_ = 0;
  protocol_features_ = 0;
  mtu_ = 0;
  status_ = 0;
  memory_.clear();
  for (std::uint32_t i = 0; i < vrings_.size(); ++i) {
    const std::uint32_t start_count = vrings_[i].record.start_count;
    vrings_[i] = VringState{};
    vrings_[i].record.start_count = start_count;
    touch(i);
  }
  fds_replaced_ = true;  // a new generation even if there was nothing to take away: owners acknowledge it all the same
  publish();
}

// ---- saved items ----

SavedItem VhostUserDevice::save_device() const {
  SavedDevice saved;
  saved.config = config_;
  saved.generation = description_.generation;
  saved.features = features_;
  saved.protocol_features = protocol_features_;
  saved.features_set = features_set_ ? 1 : 0;
  saved.mtu = mtu_;
  saved.status = status_;
  SavedItem item;
  for (const MemoryTable::Entry& entry : memory_.entries()) {
    saved.regions[saved.region_count++] = entry.region;
    item.fds.push_back(entry.file.get());
  }
  item.bytes = to_bytes(saved);
  return item;
}

SavedItem VhostUserDevice::save_vring(std::uint32_t index) const {
  const VringState& vring = vrings_[index];
  SavedVring saved;
  saved.record = vring.record;
  SavedItem item;
  item.item = index + 1;
  if (vring.kick) {
    saved.fds |= SavedVring::kKick;
    item.fds.push_back(vring.kick.get());
  }
  if (vring.call) {
    saved.fds |= SavedVring::kCall;
    item.fds.push_back(vring.call.get());
  }
  item.bytes = to_bytes(saved);
  return item;
}

std::vector<SavedItem> VhostUserDevice::save() {
  for (std::uint32_t i = 0; i < vrings_.size(); ++i) touch(i);
  device_dirty_ = true;
  return save_changed();
}

std::vector<SavedItem> VhostUserDevice::save_changed() {
  std::vector<SavedItem> items;
  for (std::uint32_t i = 0; i < vrings_.size(); ++i)
    if (vring_dirty_.test(i)) items.push_back(save_vring(i));
  if (device_dirty_) items.push_back(save_device());
  vring_dirty_.reset();
  device_dirty_ = false;
  return items;
}

Status VhostUserDevice::restore_device(RestoredItem& item) {
  const auto saved = from_bytes<SavedDevice>(item);
  if (!saved) return tl::make_unexpected(saved.error());
  if (saved->region_count > kMaxMemoryRegions)
    return fail(ErrorKind::kInvalid, "restore saved device: " + std::to_string(saved->region_count) + " regions");
  features_set_ = saved->features_set != 0;
  features_ = saved->features;
  protocol_features_ = saved->protocol_features;
  mtu_ = saved->mtu;
  status_ = static_cast<std::uint8_t>(saved->status);
  auto memory = MemoryTable::make(std::span{saved->regions}.first(saved->region_count), std::move(item.fds));
  if (!memory) return within("restore saved device", std::move(memory.error()));
  memory_ = std::move(*memory);
  description_.generation = saved->generation;
  return {};
}

Status VhostUserDevice::restore_vring(RestoredItem& item) {
  const auto saved = from_bytes<SavedVring>(item);
  if (!saved) return tl::make_unexpected(saved.error());
  const std::uint32_t index = item.item - 1;
  const bool kick = (saved->fds & SavedVring::kKick) != 0;
  const bool call = (saved->fds & SavedVring::kCall) != 0;
  const std::size_t expected = (kick ? 1u : 0u) + (call ? 1u : 0u);
  if (index >= vrings_.size() || item.fds.size() != expected)
    return fail(ErrorKind::kInvalid, "restore saved item " + std::to_string(item.item) + ": no such vring, or " +
                                         std::to_string(item.fds.size()) + " descriptors instead of " +
                                         std::to_string(expected));
  VringState& vring = vrings_[index];
  vring.record = saved->record;
  if (kick) vring.kick = std::move(item.fds.front());
  if (call) vring.call = std::move(item.fds.back());
  return {};
}

Result<VhostUserDevice> VhostUserDevice::restore(std::vector<RestoredItem> items) {
  const auto device_item =
      std::find_if(items.begin(), items.end(), [](const RestoredItem& item) { return item.item == 0; });
  if (device_item == items.end()) return fail(ErrorKind::kInvalid, "restore saved device: its first item is missing");
  const auto saved = from_bytes<SavedDevice>(*device_item);
  if (!saved) return tl::make_unexpected(saved.error());
  auto device = create(saved->config);
  if (!device) return device;
  for (RestoredItem& item : items) {
    auto restored = item.item == 0 ? device->restore_device(item) : device->restore_vring(item);
    if (!restored) return tl::make_unexpected(std::move(restored.error()));
  }
  device->fds_replaced_ = true;
  device->publish();
  return device;
}

}  // namespace tandem
