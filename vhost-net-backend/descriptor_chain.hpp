// SPDX-License-Identifier: Apache-2.0
// ChainWalker: reads one descriptor chain of a hostile guest, each descriptor exactly once, into private memory.
//
// Checks, per Virtio 1.2, 2.7.5: indices inside the table, no more descriptors than the table has entries (which ends
// loops), one direction, no zero length, INDIRECT only if negotiated, not combined with NEXT, not nested, table length
// a multiple of 16.
#pragma once

#include <cstdint>

#include "vhost-net-backend/guest_memory.hpp"
#include "vhost-net-backend/split_queue.hpp"

namespace tandem {

/// Why a chain was refused; the packet is dropped and counted, the chain goes back to the guest with length 0.
enum class ChainFault {
  kNone,
  kIndex,
  kLoop,
  kDirection,
  kZeroLength,
  kIndirect,
  kAddress,
  kTooShort,
  kTooLong,
  kPoison
};

class ChainWalker {
 public:
  /// `writable`: the direction every descriptor must have (true on a receive queue).
  ChainWalker(const GuestMemory& memory, const SplitQueue& queue, std::uint16_t head, bool writable)
      : memory_(memory), queue_(queue), next_(head), limit_(queue.size()), writable_(writable) {
    more_ = head < queue.size();
    if (!more_) fault_ = ChainFault::kIndex;
  }

  /// The next buffer of the chain. False at its end or at a fault.
  bool next(std::uint64_t& address, std::uint32_t& length) {
    while (more_) {
      if (limit_-- == 0) return fail(ChainFault::kLoop);
      vring_desc descriptor;
      if (!read(descriptor)) return false;
      if ((descriptor.flags & VRING_DESC_F_INDIRECT) != 0) {
        if (!enter_indirect(descriptor)) return false;
        continue;
      }
      if (((descriptor.flags & VRING_DESC_F_WRITE) != 0) != writable_) return fail(ChainFault::kDirection);
      if (descriptor.len == 0) return fail(ChainFault::kZeroLength);
      more_ = (descriptor.flags & VRING_DESC_F_NEXT) != 0;
      next_ = descriptor.next;
      if (more_ && next_ >= table_size()) return fail(ChainFault::kIndex);
      address = descriptor.addr;
      length = descriptor.len;
      return true;
    }
    return false;
  }

  [[nodiscard]] ChainFault fault() const { return fault_; }

 private:
  [[nodiscard]] std::uint32_t table_size() const { return indirect_entries_ != 0 ? indirect_entries_ : queue_.size(); }

  bool read(vring_desc& descriptor) {
    if (indirect_entries_ == 0) {
      descriptor = queue_.descriptor(next_);
      return true;
    }
    const std::byte* entry =
        memory_.view(indirect_address_ + std::uint64_t{next_} * sizeof descriptor, sizeof descriptor);
    if (entry == nullptr) return fail(ChainFault::kAddress);
    descriptor = read_descriptor_once(entry);
    return true;
  }

  bool enter_indirect(const vring_desc& descriptor) {
    const std::uint32_t entries = descriptor.len / sizeof(vring_desc);
    if (!queue_.indirect_allowed() || indirect_entries_ != 0 || (descriptor.flags & VRING_DESC_F_NEXT) != 0 ||
        descriptor.len % sizeof(vring_desc) != 0 || entries == 0 || entries > kMaxVringSize)
      return fail(ChainFault::kIndirect);
    if (descriptor.addr + descriptor.len < descriptor.addr) return fail(ChainFault::kAddress);
    indirect_address_ = descriptor.addr;
    indirect_entries_ = entries;
    limit_ = entries;
    next_ = 0;
    return true;
  }

  bool fail(ChainFault fault) {
    fault_ = fault;
    more_ = false;
    return false;
  }

  const GuestMemory& memory_;
  const SplitQueue& queue_;
  std::uint64_t indirect_address_ = 0;
  std::uint32_t indirect_entries_ = 0;
  std::uint16_t next_;
  std::uint32_t limit_;
  bool writable_;
  bool more_;
  ChainFault fault_ = ChainFault::kNone;
};

}  // namespace tandem
