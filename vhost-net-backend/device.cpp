// SPDX-License-Identifier: Apache-2.0
// From a description and its descriptors to mapped memory and bound virtqueues.
#include "vhost-net-backend/device.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace tandem {

namespace {

std::vector<std::uint64_t> identify_files(const DeviceDescription& description, std::span<const UniqueFd> fds) {
  std::vector<std::uint64_t> identity;
  for (std::uint32_t i = 0; i < description.region_count; ++i) {
    struct stat status {};
    ::fstat(fds[i].get(), &status);
    identity.push_back(status.st_dev);
    identity.push_back(status.st_ino);
  }
  return identity;
}

bool same_regions(const DeviceDescription& a, const DeviceDescription& b) {
  return a.region_count == b.region_count &&
         std::memcmp(a.regions, b.regions, a.region_count * sizeof(MemoryRegion)) == 0;
}

// The most of a device's buffers whose pages are warmed, shared out among its rings, and of each so many bytes: it is
// about the first moments after a takeover, and buffers that do not adjoin cost a system call each.
constexpr std::uint32_t kWarmBuffers = 65536;
constexpr std::uint64_t kWarmBytes = 2048;

// Has the page tables filled for a ring, and for the buffers that its descriptors name, whatever these are just now:
// the driver of a ring that runs mostly goes on with the same ones. Otherwise a fresh heir's first packets wait for a
// page fault each.
void warm_vring(const GuestMemory& memory, const VringDescription& vring, bool packed, bool writable,
                std::uint32_t most) {
  const WindowOpen window;
  const std::uint64_t table_bytes = std::uint64_t{vring.size} * sizeof(vring_desc);
  const std::uint64_t driver_bytes = packed ? 4 : 4 + 2 * std::uint64_t{vring.size} + 2;
  const std::uint64_t device_bytes = packed ? 4 : 4 + 8 * std::uint64_t{vring.size} + 2;
  memory.warm_ring(vring.descriptor_user_address, table_bytes);
  memory.warm_ring(vring.avail_user_address, driver_bytes);
  memory.warm_ring(vring.used_user_address, device_bytes);
  const std::byte* table = memory.view_user(vring.descriptor_user_address, table_bytes);
  if (table == nullptr) return;
  // Address and length stand in the same places in both layouts.
  static_assert(sizeof(vring_desc) == sizeof(vring_packed_desc) && offsetof(vring_packed_desc, len) == 8);
  std::vector<std::uint64_t> pages;
  for (std::uint32_t i = 0; i < std::min(vring.size, most); ++i) {
    const vring_desc descriptor = read_descriptor_once(table + i * sizeof(vring_desc));
    if (descriptor.len == 0) continue;
    const std::uint64_t first = descriptor.addr / kPage;
    const std::uint64_t last = (descriptor.addr + std::min<std::uint64_t>(descriptor.len, kWarmBytes) - 1) / kPage;
    pages.push_back(first);
    if (last != first) pages.push_back(last);
  }
  std::sort(pages.begin(), pages.end());
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
  for (auto first = pages.begin(); first != pages.end();) {
    auto end = first + 1;
    while (end != pages.end() && *end == *(end - 1) + 1) ++end;
    memory.warm_buffers(*first * kPage, static_cast<std::uint64_t>(end - first) * kPage, writable);
    first = end;
  }
}

}  // namespace

void Device::warm(std::uint32_t vring) const {
  warm_vring(*memory_, description_.vrings[vring], (description_.features & kFeatureRingPacked) != 0, vring % 2 == 0,
             kWarmBuffers / (2 * description_.queue_pairs));
}

void Device::warm() const {
  for (std::uint32_t i = 0; i < vrings_.size(); ++i)
    if (vrings_[i].queue.bound()) warm(i);
}

Result<std::shared_ptr<const Device>> Device::make(const DeviceDescription& description, std::vector<UniqueFd> fds,
                                                   const Device* previous, std::vector<std::string>& problems) {
  const std::string what =
      "device " + std::to_string(description.device) + ", generation " + std::to_string(description.generation);
  if (description.version != kDeviceDescriptionVersion || description.region_count > kMaxMemoryRegions ||
      description.queue_pairs > kMaxQueuePairsPerDevice)
    return fail(ErrorKind::kInvalid, what + ": the description is malformed or of another version");
  std::size_t wanted = description.region_count;
  for (std::uint32_t i = 0; i < 2 * description.queue_pairs; ++i) {
    wanted += (description.vrings[i].flags & VringDescription::kHasKick) != 0;
    wanted += (description.vrings[i].flags & VringDescription::kHasCall) != 0;
  }
  if (fds.size() != wanted)
    return fail(ErrorKind::kInvalid, what + ": came with " + std::to_string(fds.size()) + " descriptors instead of " +
                                         std::to_string(wanted));

  std::shared_ptr<Device> device{new Device};
  device->description_ = description;
  device->region_files_ = identify_files(description, fds);
  if (previous != nullptr && same_regions(description, previous->description_) &&
      device->region_files_ == previous->region_files_) {
    device->memory_ = previous->memory_;
  } else {
    auto memory = GuestMemory::map(description, fds);
    if (!memory) return within(what, std::move(memory.error()));
    device->memory_ = std::move(*memory);
  }
  std::size_t next_fd = description.region_count;
  for (std::uint32_t i = 0; i < 2 * description.queue_pairs; ++i) {
    const VringDescription& vring = description.vrings[i];
    BoundQueue bound;
    bound.start_count = vring.start_count;
    if ((vring.flags & VringDescription::kHasKick) != 0) bound.kick_fd = fds[next_fd++].get();
    if ((vring.flags & VringDescription::kHasCall) != 0) bound.call_fd = fds[next_fd++].get();
    if ((vring.flags & VringDescription::kRunning) != 0) {
      auto queue = Virtqueue::bind(*device->memory_, vring, description.features);
      if (queue) {
        bound.queue = *queue;
        // Every start of a ring is a generation of its own: only what it started.
        const bool known = previous != nullptr && device->memory_ == previous->memory_ &&
                           i < previous->vrings_.size() && previous->vrings_[i].queue.bound() &&
                           previous->vrings_[i].start_count == vring.start_count;
        if (!known) device->warm(i);
      } else {
        problems.push_back(what + ", vring " + std::to_string(i) + ": " + queue.error().text);
      }
    }
    device->vrings_.push_back(bound);
  }
  device->fds_ = std::move(fds);
  return std::shared_ptr<const Device>(std::move(device));
}

}  // namespace tandem
