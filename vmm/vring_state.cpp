// SPDX-License-Identifier: Apache-2.0
// Rules of one vring.
#include "vmm/vring_state.hpp"

#include <array>
#include <bit>
#include <string>

namespace tandem {
namespace {

struct Part {
  const char* name;
  std::uint64_t user_address;
  std::uint64_t alignment;
  std::uint64_t size;
};

/// Virtio 1.2, 2.7: 16 bytes a descriptor; avail: flags, idx, ring, used_event; used: flags, idx, ring, avail_event.
/// The event fields are part of the layout whether they are negotiated or not.
std::array<Part, 3> parts(const VringRecord& vring) {
  const std::uint64_t entries = vring.size;
  return {{{"descriptor table", vring.descriptor_user_address, 16, 16 * entries},
           {"avail ring", vring.avail_user_address, 2, 6 + 2 * entries},
           {"used ring", vring.used_user_address, 4, 6 + 8 * entries}}};
}

}  // namespace

void VringState::stop() noexcept {
  record.started = 0;
  kick.reset();
}

void VringState::start(UniqueFd new_kick) noexcept {
  if (record.started == 0 && record.ran != 0) {
    record.base = 0;
    record.ran = 0;
  }
  record.started = 1;
  kick = std::move(new_kick);
}

Status check_vring_size(std::uint32_t size) {
  if (size == 0 || size > kMaxVringSize || !std::has_single_bit(size))
    return fail(ErrorKind::kInvalid, "a vring of " + std::to_string(size) +
                                         " entries; a split vring has a power of two, 1 to " +
                                         std::to_string(kMaxVringSize));
  return {};
}

Status check_vring_alignment(const VringRecord& vring) {
  for (const Part& part : parts(vring))
    if (part.user_address % part.alignment != 0)
      return fail(ErrorKind::kInvalid, std::string{part.name} + " at " + std::to_string(part.user_address) +
                                           " is not aligned to " + std::to_string(part.alignment) + " bytes");
  return {};
}

Status check_vring_inside(const VringRecord& vring, const MemoryTable& memory) {
  for (const Part& part : parts(vring)) {
    const MemoryRegion* region = memory.find_user_range(part.user_address, part.size);
    if (region == nullptr)
      return fail(ErrorKind::kInvalid, std::string{part.name} + " at user address " +
                                           std::to_string(part.user_address) + ", " + std::to_string(part.size) +
                                           " bytes, is not inside one memory region");
    if ((region->mmap_offset + (part.user_address - region->user_address)) % part.alignment != 0)
      return fail(ErrorKind::kInvalid, std::string{part.name} + " at user address " +
                                           std::to_string(part.user_address) +
                                           " is not aligned in its memory file, because of the region's offset " +
                                           std::to_string(region->mmap_offset));
  }
  return {};
}

bool vring_runs(const VringRecord& vring, const MemoryTable& memory, bool enabled_by_default) {
  const bool enabled =
      vring.enable == VringRecord::kEnabled || (vring.enable == VringRecord::kUnset && enabled_by_default);
  return vring.started != 0 && enabled && vring.size != 0 && vring.has_addresses != 0 &&
         check_vring_inside(vring, memory).has_value();
}

}  // namespace tandem
