// SPDX-License-Identifier: Apache-2.0
// MemoryTable: the guest memory regions of one device and the files behind them, always valid as a whole.
//
// Invariant: every region is non-empty; guest, user and file ranges do not wrap; no two overlap in guest or in user
// space; each file was large enough when it came. A failed change leaves the table as it was. Units are bytes. Not
// thread-safe.
//
// For consumers: the protocol does not promise that mmap_offset is a multiple of the page size (huge pages!). Map the
// file from offset 0, or from mmap_offset rounded down to the file's st_blksize, and add the difference.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/layout/device_description.hpp"
#include "common/result.hpp"
#include "common/unique_fd.hpp"
#include "vmm/fd_check.hpp"

namespace tandem {

class MemoryTable {
 public:
  struct Entry {
    MemoryRegion region;
    UniqueFd file;
    FileIdentity identity;
  };

  /// A table of `regions`, files[i] behind regions[i].
  static Result<MemoryTable> make(std::span<const MemoryRegion> regions, std::vector<UniqueFd> files);

  /// Adds a region. Adding exactly what is there already changes nothing and succeeds.
  Status add(const MemoryRegion& region, UniqueFd file);

  /// Removes the region with the same guest address, user address and size (the offset is ignored). Removing what
  /// overlaps nothing changes nothing and succeeds; a range that cuts a region in two is an error.
  Status remove(const MemoryRegion& region);

  void clear() noexcept { entries_.clear(); }

  /// The region that contains all of [user_address, user_address + size); nullptr if none does.
  [[nodiscard]] const MemoryRegion* find_user_range(std::uint64_t user_address, std::uint64_t size) const noexcept;

  [[nodiscard]] const std::vector<Entry>& entries() const noexcept { return entries_; }
  [[nodiscard]] bool empty() const noexcept { return entries_.empty(); }

  /// Same regions in the same order, backed by the same files.
  [[nodiscard]] bool same_as(const MemoryTable& other) const noexcept;

 private:
  [[nodiscard]] Status check(const MemoryRegion& region) const;

  std::vector<Entry> entries_;
};

}  // namespace tandem
