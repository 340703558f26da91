// SPDX-License-Identifier: Apache-2.0
// PackedQueue: a packed virtqueue (Virtio 1.2, section 2.8) as its device sees it.
//
// One ring of descriptors serves both sides: the driver makes a descriptor available by the AVAIL and USED bits in its
// flags, the device gives a chain back by overwriting the slot at its used position. A position is a slot index with
// the wrap counter in bit 15, as vhost-user's ring base has it; a chain of n descriptors moves both positions by n and
// gives back one descriptor. Reads go to the read-only view of guest memory, the ring and the device's event area are
// written through the window. Positions are not kept here: they live in the pair segment. Thread: the shard's owner.
// Lifetime: a view into a GuestMemory that the caller keeps alive.
#pragma once

// The header's legacy part is C only; its structures are what we want.
#define VIRTIO_RING_NO_LEGACY
#include <linux/virtio_ring.h>

#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <span>

#include "common/layout/device_description.hpp"
#include "common/layout/segment.hpp"
#include "common/result.hpp"
#include "vhost-net-backend/guest_memory.hpp"
#include "vhost-net-backend/seal.hpp"

namespace tandem {

/// A private copy of a descriptor that the guest may be changing, as read_descriptor_once().
inline vring_packed_desc read_packed_descriptor_once(const void* from) {
  struct Words {
    std::uint64_t low, high;
  } words;
  std::memcpy(&words, from, sizeof words);
  asm volatile("" : "+r"(words.low), "+r"(words.high));
  return std::bit_cast<vring_packed_desc>(words);
}

class PackedChain;

class PackedQueue {
 public:
  using Chain = PackedChain;
  static constexpr QueueFault kImplausible = QueueFault::kRecordInvalid;

  static constexpr std::uint16_t kWrap = 1u << 15;

  /// `vring` must be running; its three areas must lie inside `memory`, its base inside its ring.
  static Result<PackedQueue> bind(const GuestMemory& memory, const VringDescription& vring, std::uint64_t features);

  [[nodiscard]] std::uint32_t size() const { return size_; }
  [[nodiscard]] std::uint16_t next(std::uint16_t position, std::uint32_t slots) const {
    const std::uint32_t index = (position & ~kWrap & 0xffffu) + slots;  // slots <= size
    return static_cast<std::uint16_t>(index < size_ ? index | (position & kWrap)
                                                    : (index - size_) | ((position & kWrap) ^ kWrap));
  }
  /// Slots from one position to another, in the two rounds after which positions repeat.
  [[nodiscard]] std::uint32_t distance(std::uint16_t from, std::uint16_t to) const {
    return (in_two_rounds(to) + 2 * size_ - in_two_rounds(from)) % (2 * size_);
  }
  /// Whether `position` is one: cursors come from a segment that a dying owner may have damaged.
  [[nodiscard]] bool is_position(std::uint16_t position) const { return index(position) < size_; }
  /// Whether `count` chains can have taken `slots` slots in one burst.
  [[nodiscard]] bool is_extent(std::uint32_t count, std::uint32_t slots) const {
    return slots >= count && slots <= size_;
  }

  /// What the driver has made available, seen from within one burst.
  class Supply {
   public:
    /// False: the position read from the segment is none.
    [[nodiscard]] bool plausible() const { return plausible_; }
    /// Whether a chain begins at `position`, when `taken` slots were taken in this burst: never more than the ring has,
    /// or the burst would give back a slot twice.
    [[nodiscard]] bool has(std::uint16_t position, std::uint32_t taken) const {
      return taken < queue_->size() && queue_->available(position);
    }

   private:
    friend class PackedQueue;
    Supply(const PackedQueue& queue, bool plausible) : queue_(&queue), plausible_(plausible) {}
    const PackedQueue* queue_;
    bool plausible_;
  };
  [[nodiscard]] Supply supply(std::uint16_t next_avail, std::uint16_t next_used) const {
    return {*this, is_position(next_avail) && is_position(next_used)};
  }
  /// Whether the driver has made something available at `position`, whatever that is.
  [[nodiscard]] bool offers(std::uint16_t position) const { return is_position(position) && available(position); }
  /// Whether `flags` in the slot at `position` make it available.
  [[nodiscard]] static constexpr bool is_available(std::uint16_t flags, std::uint16_t position) {
    return (flags & (kAvail | kUsed)) == ((position & kWrap) != 0 ? kAvail : kUsed);
  }
  /// A private copy of the descriptor in slot `slot`, which must be < size().
  [[nodiscard]] vring_packed_desc descriptor(std::uint32_t slot) const {
    return read_packed_descriptor_once(&view_[slot]);
  }
  [[nodiscard]] static constexpr std::uint32_t index(std::uint16_t position) { return position & ~kWrap & 0xffffu; }

  /// Address of the first buffer, or table, of the chain at `position`, whatever that is just now: for prefetching
  /// only.
  [[nodiscard]] std::uint64_t glance(std::uint16_t position) const {
    return std::atomic_ref<__le64>(const_cast<__le64&>(view_[index(position)].addr)).load(std::memory_order_relaxed);
  }

  /// Giving back. The slot at `before` is written last, for it publishes all: the driver looks at one slot only, the
  /// one after the last it took. write_used() writes all other slots, publish_used() that one. Both need WindowOpen,
  /// and neither may be called again once is_published(before, ...), for then the driver may have taken everything and
  /// made any of these slots available anew.
  void write_used(std::span<const RedoUsed> used, std::uint16_t before) const;
  void publish_used(std::span<const RedoUsed> used, std::uint16_t before, std::uint16_t after) const;
  /// Whether what write_used() wrote stands where it belongs; the driver may have overwritten it.
  [[nodiscard]] bool used_stands(std::span<const RedoUsed> used, std::uint16_t before) const;
  /// Whether a burst that gives back from `before` on has been published. Until it has been, the driver's descriptor
  /// stands there, whose USED bit differs from the wrap counter. Published, the bit equals it, and does so too once the
  /// driver has made the slot available in the next round; further it cannot go, for no one gives back more.
  [[nodiscard]] bool is_published(std::uint16_t before) const {
    return ((flags(index(before)) & kUsed) != 0) == ((before & kWrap) != 0);
  }
  /// Whether the ring shows that a burst at `next_used` was begun to be given back, or wholly: without its record,
  /// nobody can go on from there.
  [[nodiscard]] bool is_half_published(std::uint16_t next_used) const;

  /// Where the used position stands at a start with `base` (VringDescription::base).
  [[nodiscard]] std::uint16_t first_used(std::uint32_t base) const { return static_cast<std::uint16_t>(base >> 16); }

  /// Asks the driver to kick when it makes the slot at `next_avail` available. Followed by a full fence: look at
  /// offers() again before sleeping. Needs WindowOpen.
  void enable_kicks(std::uint16_t next_avail) const;
  /// Whether enable_kicks() stands as it was asked for; the guest can overwrite it.
  [[nodiscard]] bool kicks_stand(std::uint16_t next_avail) const;
  /// Asks the driver not to kick. Needs WindowOpen.
  void disable_kicks() const;
  /// Whether the driver wants an interrupt for the used position moving from `before` to `after` (already published).
  [[nodiscard]] bool wants_call(std::uint16_t before, std::uint16_t after) const;

  /// Whether the driver takes one used descriptor for several chains in a row, with the id of the last one (Virtio 1.2,
  /// 2.8.8, In-order use of descriptors). To the ring they are one chain of as many slots.
  [[nodiscard]] bool gives_back_as_one() const { return in_order_ != 0; }
  [[nodiscard]] bool indirect_allowed() const { return indirect_ != 0; }
  /// False: what bind() has set was changed since (seal.hpp).
  [[nodiscard]] bool is_whole() const { return fold(*this) == 0; }

 private:
  static constexpr std::uint16_t kAvail = 1u << VRING_PACKED_DESC_F_AVAIL;
  static constexpr std::uint16_t kUsed = 1u << VRING_PACKED_DESC_F_USED;

  // Acquire: once a descriptor is seen available, it and the rest of its chain are visible (2.8.10: the driver writes
  // the flags of a chain's first descriptor last).
  [[nodiscard]] std::uint16_t flags(std::uint32_t slot) const {
    // atomic_ref wants a non-const object; the view is read-only memory and the load does not write.
    return std::atomic_ref<std::uint16_t>(const_cast<std::uint16_t&>(view_[slot].flags))
        .load(std::memory_order_acquire);
  }
  [[nodiscard]] bool available(std::uint16_t position) const { return is_available(flags(index(position)), position); }
  // What enable_kicks() writes.
  [[nodiscard]] std::uint32_t kick_wish(std::uint16_t next_avail) const;
  // Where `position` stands in two rounds of the ring.
  [[nodiscard]] std::uint32_t in_two_rounds(std::uint16_t position) const {
    return index(position) + ((position & kWrap) != 0 ? 0 : size_);
  }
  // The second half of a used descriptor at `position`: length, id and flags in one word, so that nobody ever sees part
  // of it.
  [[nodiscard]] static std::uint64_t used_word(const RedoUsed& used, std::uint16_t position) {
    const unsigned round = (position & kWrap) != 0 ? unsigned{kAvail} | kUsed : 0u;
    const unsigned flags = round | (used.length != 0 ? VRING_DESC_F_WRITE : 0u);
    return std::uint64_t{flags} << 48 | std::uint64_t{used.id} << 32 | used.length;
  }
  [[nodiscard]] std::atomic_ref<std::uint64_t> word(std::uint16_t position) const {
    return std::atomic_ref<std::uint64_t>(window_[2 * std::size_t{index(position)} + 1]);
  }

  const vring_packed_desc* view_ = nullptr;
  std::uint64_t* window_ = nullptr;              // two words a slot: address; length, id and flags
  const std::uint32_t* driver_event_ = nullptr;  // struct vring_packed_desc_event as one word, as drivers read it
  std::uint32_t* device_event_ = nullptr;
  std::uint32_t size_ = 0;
  std::uint8_t event_index_ = 0;  // bool, without padding
  std::uint8_t indirect_ = 0;
  std::uint16_t in_order_ = 0;
  std::uint64_t seal_ = 0;
};

}  // namespace tandem
