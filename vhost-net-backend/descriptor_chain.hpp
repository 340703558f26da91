// SPDX-License-Identifier: Apache-2.0
// SplitChain, PackedChain: read one descriptor chain of a hostile guest, each descriptor exactly once, into private
// memory.
//
// Checks, per Virtio 1.2, 2.7.5 and 2.8: indices inside the table, no more descriptors than the table has entries
// (which ends loops), one direction, no zero length, INDIRECT only if negotiated, not combined with NEXT, not nested,
// table length a multiple of 16.
//
// Both offer the same: next() for the buffers, and then, also after a fault, finish(), id() and slots() to give the
// chain back. Where a packed chain ends is known only from walking it, so a chain without an end leaves nobody knowing
// where the next one begins: finish() says so.
#pragma once

#include <cstdint>
#include <optional>

#include "vhost-net-backend/guest_memory.hpp"
#include "vhost-net-backend/packed_queue.hpp"
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
  kPoison,
  kOffload  ///< asks for what cannot be done to its packet (offload.hpp)
};

/// A chain of one direct descriptor.
struct SingleBuffer {
  std::uint64_t address;
  std::uint32_t length;
  std::uint16_t id;  ///< as the chain's id()
};

class SplitChain {
 public:
  /// The chain at `position` if it is one direct descriptor and good as far as that tells; what it is otherwise, only a
  /// SplitChain finds out, which reads everything anew.
  static std::optional<SingleBuffer> single(const SplitQueue& queue, std::uint16_t position, bool writable) {
    const std::uint16_t head = queue.avail_head(position);
    if (head >= queue.size()) return std::nullopt;
    const vring_desc descriptor = queue.descriptor(head);
    constexpr std::uint32_t kKinds = VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE;
    if ((descriptor.flags & kKinds) != (writable ? VRING_DESC_F_WRITE : 0u)) return std::nullopt;
    return SingleBuffer{descriptor.addr, descriptor.len, head};
  }

  /// The chain at `position`. `writable`: the direction every descriptor must have (true on a receive queue).
  SplitChain(const GuestMemory& memory, const SplitQueue& queue, std::uint16_t position, bool writable, std::uint32_t)
      : memory_(memory), queue_(queue), head_(queue.avail_head(position)), limit_(queue.size()), writable_(writable) {
    next_ = head_;
    more_ = head_ < queue.size();
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

  /// Whether the buffer that next() gave was the last one.
  [[nodiscard]] bool ended() const { return !more_; }
  [[nodiscard]] ChainFault fault() const { return fault_; }
  [[nodiscard]] static bool finish() { return true; }
  [[nodiscard]] std::uint16_t id() const { return head_; }
  [[nodiscard]] static std::uint16_t slots() { return 1; }

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
  std::uint16_t head_, next_;
  std::uint32_t limit_;
  bool writable_;
  bool more_;
  ChainFault fault_ = ChainFault::kNone;
};

class PackedChain {
 public:
  /// As SplitChain::single().
  static std::optional<SingleBuffer> single(const PackedQueue& queue, std::uint16_t position, bool writable) {
    const vring_packed_desc descriptor = queue.descriptor(PackedQueue::index(position));
    constexpr std::uint32_t kKinds = VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE;
    if (!PackedQueue::is_available(descriptor.flags, position) ||
        (descriptor.flags & kKinds) != (writable ? VRING_DESC_F_WRITE : 0u))
      return std::nullopt;
    return SingleBuffer{descriptor.addr, descriptor.len, descriptor.id};
  }

  /// The chain at `position`, which must be available; `taken` slots were taken in this burst before it.
  PackedChain(const GuestMemory& memory, const PackedQueue& queue, std::uint16_t position, bool writable,
              std::uint32_t taken)
      : memory_(memory), queue_(queue), position_(position), limit_(queue.size() - taken), writable_(writable) {}

  bool next(std::uint64_t& address, std::uint32_t& length) {
    if (fault_ != ChainFault::kNone) return false;
    vring_packed_desc descriptor;
    if (table_left_ == 0) {
      if (!more_ || !step(descriptor)) return false;
      if ((descriptor.flags & VRING_DESC_F_INDIRECT) != 0 && !enter_indirect(descriptor)) return false;
    }
    if (table_left_ != 0 && !read_table(descriptor)) return false;
    if (((descriptor.flags & VRING_DESC_F_WRITE) != 0) != writable_) return fail(ChainFault::kDirection);
    if (descriptor.len == 0) return fail(ChainFault::kZeroLength);
    address = descriptor.addr;
    length = descriptor.len;
    return true;
  }

  [[nodiscard]] bool ended() const { return !more_ && table_left_ == 0; }
  [[nodiscard]] ChainFault fault() const { return fault_; }
  /// Walks to the end of the chain. False: it has none within what the driver made available.
  [[nodiscard]] bool finish() {
    vring_packed_desc descriptor;
    while (more_)
      if (!step(descriptor)) return false;
    return !endless_;
  }
  /// Of the chain's last descriptor. The driver's own: it goes back as it came, nothing here is indexed by it.
  [[nodiscard]] std::uint16_t id() const { return id_; }
  [[nodiscard]] std::uint16_t slots() const { return static_cast<std::uint16_t>(slots_); }

 private:
  // The next descriptor in the ring.
  bool step(vring_packed_desc& descriptor) {
    if (slots_ != limit_) descriptor = queue_.descriptor(PackedQueue::index(position_));
    // Every descriptor of a chain bears the marks of its round (2.8.1): a chain that goes on where nothing was made
    // available has no end either.
    if (slots_ == limit_ || !PackedQueue::is_available(descriptor.flags, position_)) {
      more_ = false;
      endless_ = true;
      return fail(ChainFault::kLoop);
    }
    position_ = queue_.next(position_, 1);
    ++slots_;
    id_ = descriptor.id;
    more_ = (descriptor.flags & VRING_DESC_F_NEXT) != 0;
    return true;
  }

  // Entries of an indirect table follow each other; of their flags only WRITE means something (2.8.7). INDIRECT is
  // forbidden there, and refused rather than ignored.
  bool read_table(vring_packed_desc& descriptor) {
    const std::byte* entry = memory_.view(table_, sizeof descriptor);
    if (entry == nullptr) return fail(ChainFault::kAddress);
    descriptor = read_packed_descriptor_once(entry);
    if ((descriptor.flags & VRING_DESC_F_INDIRECT) != 0) return fail(ChainFault::kIndirect);
    table_ += sizeof descriptor;
    --table_left_;
    return true;
  }

  bool enter_indirect(const vring_packed_desc& descriptor) {
    const std::uint32_t entries = descriptor.len / sizeof descriptor;
    if (!queue_.indirect_allowed() || slots_ != 1 || more_ || descriptor.len % sizeof descriptor != 0 || entries == 0 ||
        entries > kMaxVringSize)
      return fail(ChainFault::kIndirect);
    if (descriptor.addr + descriptor.len < descriptor.addr) return fail(ChainFault::kAddress);
    table_ = descriptor.addr;
    table_left_ = entries;
    return true;
  }

  bool fail(ChainFault fault) {
    fault_ = fault;
    return false;
  }

  const GuestMemory& memory_;
  const PackedQueue& queue_;
  std::uint64_t table_ = 0;
  std::uint32_t table_left_ = 0;
  std::uint16_t position_;
  std::uint32_t slots_ = 0;
  std::uint32_t limit_;
  std::uint16_t id_ = 0;
  bool writable_;
  bool more_ = true;
  bool endless_ = false;
  ChainFault fault_ = ChainFault::kNone;
};

}  // namespace tandem
