// SPDX-License-Identifier: Apache-2.0
// From a description and its descriptors to mapped memory and bound virtqueues.
#include "vhost-net-backend/device.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

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

constexpr std::uint64_t kPage = 4096;
// Of so many of a virtqueue's buffers, and of each of so many bytes, the pages are warmed: it is about the first
// moments after a takeover, and where buffers do not adjoin each page takes two system calls.
constexpr std::uint32_t kWarmBuffers = 4096;
constexpr std::uint64_t kWarmBytes = 2048;

std::uint64_t table_bytes(const VringDescription& vring) { return std::uint64_t{vring.size} * sizeof(vring_desc); }

void warm_ring(const GuestMemory& memory, const VringDescription& vring, bool packed) {
  const WindowOpen window;
  memory.warm_ring(vring.descriptor_user_address, table_bytes(vring));
  memory.warm_ring(vring.avail_user_address, packed ? 4 : 4 + 2 * std::uint64_t{vring.size} + 2);
  memory.warm_ring(vring.used_user_address, packed ? 4 : 4 + 8 * std::uint64_t{vring.size} + 2);
}

// Numbers of the pages that a virtqueue's descriptors name, in order, whether they are offered just now or not.
std::vector<std::uint64_t> buffer_pages(const std::byte* table, std::uint32_t size) {
  // Address and length stand in the same places in both layouts.
  static_assert(sizeof(vring_desc) == sizeof(vring_packed_desc) && offsetof(vring_packed_desc, len) == 8);
  std::vector<std::uint64_t> pages;
  for (std::uint32_t i = 0; i < std::min(size, kWarmBuffers); ++i) {
    const vring_desc descriptor = read_descriptor_once(table + i * sizeof(vring_desc));
    if (descriptor.len == 0) continue;
    const std::uint64_t first = descriptor.addr / kPage;
    const std::uint64_t last = (descriptor.addr + std::min<std::uint64_t>(descriptor.len, kWarmBytes) - 1) / kPage;
    pages.push_back(first);
    if (last != first) pages.push_back(last);
  }
  std::sort(pages.begin(), pages.end());
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
  return pages;
}

// FNV-1a (Fowler, Noll, Vo) over whole words; never 0.
std::uint64_t digest(const std::vector<std::uint64_t>& pages) {
  std::uint64_t value = 0xcbf29ce484222325;
  for (const std::uint64_t page : pages) value = (value ^ page) * 0x100000001b3;
  return value == 0 ? 1 : value;
}

}  // namespace

bool Device::warm_buffers(std::uint32_t vring, std::uint64_t& warmed) const {
  if (vring >= vrings_.size() || !vrings_[vring].queue.bound()) return false;
  const VringDescription& description = description_.vrings[vring];
  const std::byte* table = memory_->view_user(description.descriptor_user_address, table_bytes(description));
  if (table == nullptr) return false;
  const bool writable = vring % 2 == 0;
  const std::vector<std::uint64_t> pages = buffer_pages(table, description.size);
  const std::uint64_t before = std::exchange(warmed, digest(pages));
  if (warmed == before) return true;
  bool all = true;
  for (auto first = pages.begin(); first != pages.end();) {
    auto end = first + 1;
    while (end != pages.end() && *end == *(end - 1) + 1) ++end;
    all &= memory_->warm_buffers(*first * kPage, static_cast<std::uint64_t>(end - first) * kPage, writable);
    first = end;
  }
  if (!all) warmed = 0;
  return true;
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
        if (!known) warm_ring(*device->memory_, vring, (description.features & kFeatureRingPacked) != 0);
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
