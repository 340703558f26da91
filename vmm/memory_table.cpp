// SPDX-License-Identifier: Apache-2.0
// Range checks of guest memory regions: no sum is formed before it is known not to wrap.
#include "vmm/memory_table.hpp"

#include <algorithm>
#include <limits>
#include <string>

namespace tandem {
namespace {

bool wraps(std::uint64_t start, std::uint64_t size) { return size > std::numeric_limits<std::uint64_t>::max() - start; }

/// Both ranges are known not to wrap.
bool overlap(std::uint64_t a, std::uint64_t a_size, std::uint64_t b, std::uint64_t b_size) {
  return a < b + b_size && b < a + a_size;
}

bool overlap(const MemoryRegion& a, const MemoryRegion& b) {
  return overlap(a.guest_address, a.size, b.guest_address, b.size) ||
         overlap(a.user_address, a.size, b.user_address, b.size);
}

bool same_range(const MemoryRegion& a, const MemoryRegion& b) {
  return a.guest_address == b.guest_address && a.user_address == b.user_address && a.size == b.size;
}

std::string text(const MemoryRegion& region) {
  return "region of " + std::to_string(region.size) + " bytes at guest address " +
         std::to_string(region.guest_address) + ", user address " + std::to_string(region.user_address) +
         ", file offset " + std::to_string(region.mmap_offset);
}

Status check_range(const MemoryRegion& region) {
  if (region.size == 0) return fail(ErrorKind::kInvalid, text(region) + ": it is empty");
  if (wraps(region.guest_address, region.size) || wraps(region.user_address, region.size) ||
      wraps(region.mmap_offset, region.size))
    return fail(ErrorKind::kInvalid, text(region) + ": its end is beyond the 64-bit address space");
  return {};
}

}  // namespace

Status MemoryTable::check(const MemoryRegion& region) const {
  if (auto range = check_range(region); !range) return range;
  if (entries_.size() >= kMaxMemoryRegions)
    return fail(ErrorKind::kInvalid, text(region) + ": more than " + std::to_string(kMaxMemoryRegions) +
                                         " memory regions are not supported");
  for (const Entry& entry : entries_)
    if (overlap(entry.region, region))
      return fail(ErrorKind::kInvalid, text(region) + ": overlaps the " + text(entry.region));
  return {};
}

Result<MemoryTable> MemoryTable::make(std::span<const MemoryRegion> regions, std::vector<UniqueFd> files) {
  if (regions.size() != files.size())
    return fail(ErrorKind::kInvalid, std::to_string(regions.size()) + " regions came with " +
                                         std::to_string(files.size()) + " descriptors, each needs one");
  MemoryTable table;
  for (std::size_t i = 0; i < regions.size(); ++i) {
    // add() takes an exact repetition as done already; within one table it is an overlap like any other.
    if (auto fits = table.check(regions[i]); !fits) return tl::make_unexpected(std::move(fits.error()));
    if (auto added = table.add(regions[i], std::move(files[i])); !added)
      return tl::make_unexpected(std::move(added.error()));
  }
  return table;
}

Status MemoryTable::add(const MemoryRegion& region, UniqueFd file) {
  if (auto range = check_range(region); !range) return range;
  if (auto usable = check_memory_file(file.get(), region.mmap_offset, region.size); !usable)
    return within(text(region), std::move(usable.error()));
  auto identity = file_identity(file.get());
  if (!identity) return tl::make_unexpected(std::move(identity.error()));
  for (const Entry& entry : entries_)
    if (same_range(entry.region, region) && entry.region.mmap_offset == region.mmap_offset &&
        entry.identity == *identity)
      return {};
  if (auto fits = check(region); !fits) return fits;
  entries_.push_back(Entry{region, std::move(file), *identity});
  return {};
}

Status MemoryTable::remove(const MemoryRegion& region) {
  if (auto range = check_range(region); !range) return range;
  const auto found = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& entry) { return same_range(entry.region, region); });
  if (found != entries_.end()) {
    entries_.erase(found);
    return {};
  }
  for (const Entry& entry : entries_)
    if (overlap(entry.region, region))
      return fail(ErrorKind::kInvalid, "remove the " + text(region) + ": it is only part of the " + text(entry.region));
  return {};
}

const MemoryRegion* MemoryTable::find_user_range(std::uint64_t user_address, std::uint64_t size) const noexcept {
  for (const Entry& entry : entries_) {
    const MemoryRegion& region = entry.region;
    if (user_address < region.user_address) continue;
    const std::uint64_t inside = user_address - region.user_address;
    if (inside <= region.size && size <= region.size - inside) return &region;
  }
  return nullptr;
}

bool MemoryTable::same_as(const MemoryTable& other) const noexcept {
  return std::equal(entries_.begin(), entries_.end(), other.entries_.begin(), other.entries_.end(),
                    [](const Entry& a, const Entry& b) {
                      return same_range(a.region, b.region) && a.region.mmap_offset == b.region.mmap_offset &&
                             a.identity == b.identity;
                    });
}

}  // namespace tandem
