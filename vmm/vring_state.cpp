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
/// The event fields are part of the layout whether they are negotiated or not. 2.8: a ring of descriptors, and an event
/// suppression structure of 4 bytes for each side.
std::array<Part, 3> parts(const VringRecord& vring, bool packed) {
  const std::uint64_t entries = vring.size;
  if (packed)
    return {{{"descriptor ring", vring.descriptor_user_address, 16, 16 * entries},
             {"driver event area", vring.avail_user_address, 4, 4},
             {"device event area", vring.used_user_address, 4, 4}}};
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
  if (record.started == 0 && record.ran != 0) forget_base();
  record.started = 1;
  kick = std::move(new_kick);
}

void VringState::forget_base() noexcept {
  record.base = 0;
  record.has_base = 0;
  record.ran = 0;
}

Status check_vring_size(std::uint32_t size, bool packed) {
  if (size == 0 || size > kMaxVringSize || (!packed && !std::has_single_bit(size)))
    return fail(ErrorKind::kInvalid, "a vring of " + std::to_string(size) + " entries; a " +
                                         (packed ? "packed vring has 1 to " : "split vring has a power of two, 1 to ") +
                                         std::to_string(kMaxVringSize));
  return {};
}

Status check_vring_alignment(const VringRecord& vring, bool packed) {
  for (const Part& part : parts(vring, packed))
    if (part.user_address % part.alignment != 0)
      return fail(ErrorKind::kInvalid, std::string{part.name} + " at " + std::to_string(part.user_address) +
                                           " is not aligned to " + std::to_string(part.alignment) + " bytes");
  return {};
}

Status check_vring_inside(const VringRecord& vring, bool packed, const MemoryTable& memory) {
  for (const Part& part : parts(vring, packed)) {
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

std::uint32_t vring_start(const VringRecord& vring, bool packed) {
  return packed && vring.has_base == 0 ? kPackedStartBase : vring.base;
}

Status check_vring_start(const VringRecord& vring, bool packed) {
  if (!packed) return {};
  const std::uint32_t start = vring_start(vring, packed);
  const auto slot = [start](unsigned shift) { return start >> shift & 0x7fffu; };
  // Both positions on the scale of two rounds; wrap counters are 1 in the first.
  const auto at = [&](unsigned shift) { return slot(shift) + ((start >> shift & 0x8000u) != 0 ? 0 : vring.size); };
  const std::uint32_t in_flight = (at(0) + 2 * vring.size - at(16)) % (2 * vring.size);
  if (slot(0) >= vring.size || slot(16) >= vring.size || in_flight > vring.size)
    return fail(ErrorKind::kInvalid, "base " + std::to_string(start) +
                                         " is no pair of positions in a packed vring of " + std::to_string(vring.size) +
                                         " entries");
  return {};
}

std::uint32_t complete_packed_base(std::uint32_t told) {
  const bool says_used = told >> 16 != 0 || (told & 0x8000u) == 0;
  return says_used ? told : told << 16 | told;
}

bool vring_runs(const VringRecord& vring, bool packed, const MemoryTable& memory, bool enabled_by_default) {
  const bool enabled =
      vring.enable == VringRecord::kEnabled || (vring.enable == VringRecord::kUnset && enabled_by_default);
  return vring.started != 0 && enabled && vring.size != 0 && vring.has_addresses != 0 &&
         check_vring_size(vring.size, packed).has_value() && check_vring_alignment(vring, packed).has_value() &&
         check_vring_inside(vring, packed, memory).has_value() &&
         (vring.ran != 0 || check_vring_start(vring, packed).has_value());
}

}  // namespace tandem
