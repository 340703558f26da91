// SPDX-License-Identifier: Apache-2.0
// SplitQueue: a split virtqueue (Virtio 1.2, section 2.7) as its device sees it.
//
// Reads go to the read-only view of guest memory, the used ring and avail_event are written through the window. The
// guest may change its half at any time: each field is read once, atomically, and validated before use. Cursors are not
// kept here: they live in the pair segment. Thread: the shard's owner. Lifetime: a view into a GuestMemory that the
// caller keeps alive.
#pragma once

// The header's legacy part is C only; its structures are what we want.
#define VIRTIO_RING_NO_LEGACY
#include <linux/virtio_ring.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "common/layout/device_description.hpp"
#include "common/layout/segment.hpp"
#include "common/result.hpp"
#include "vhost-net-backend/guest_memory.hpp"
#include "vhost-net-backend/seal.hpp"

namespace tandem {

/// A private copy of a descriptor that the guest may be changing. The compiler may not go back to the original: what
/// was checked is what is used.
inline vring_desc read_descriptor_once(const void* from) {
  struct Words {
    std::uint64_t low, high;
  } words;
  std::memcpy(&words, from, sizeof words);
  asm volatile("" : "+r"(words.low), "+r"(words.high));
  return std::bit_cast<vring_desc>(words);
}

class SplitChain;

class SplitQueue {
 public:
  using Chain = SplitChain;
  static constexpr QueueFault kImplausible = QueueFault::kAvailJump;

  /// `vring` must be running; its three rings must lie inside `memory`.
  static Result<SplitQueue> bind(const GuestMemory& memory, const VringDescription& vring, std::uint64_t features);

  [[nodiscard]] std::uint32_t size() const { return mask_ + 1; }
  /// Positions are the free-running indices; a chain takes one entry, whatever its length.
  [[nodiscard]] static std::uint16_t next(std::uint16_t position, std::uint32_t slots) {
    return static_cast<std::uint16_t>(position + slots);
  }
  [[nodiscard]] static std::uint32_t distance(std::uint16_t from, std::uint16_t to) {
    return static_cast<std::uint16_t>(to - from);
  }
  [[nodiscard]] static bool is_position(std::uint16_t) { return true; }
  [[nodiscard]] bool is_extent(std::uint32_t count, std::uint32_t slots) const {
    return slots == count && slots <= size();
  }

  /// What the driver has made available, as read once at the beginning of a burst.
  class Supply {
   public:
    /// False: avail.idx claims more than the ring holds.
    [[nodiscard]] bool plausible() const { return plausible_; }
    [[nodiscard]] bool has(std::uint16_t position, std::uint32_t) const { return position != end_; }

   private:
    friend class SplitQueue;
    Supply(std::uint16_t end, bool plausible) : end_(end), plausible_(plausible) {}
    std::uint16_t end_;
    bool plausible_;
  };
  [[nodiscard]] Supply supply(std::uint16_t next_avail, std::uint16_t) const {
    const std::uint16_t end = avail_index();
    return {end, static_cast<std::uint16_t>(end - next_avail) <= size()};
  }
  /// Whether the driver has made something available at `position`, whatever that is.
  [[nodiscard]] bool offers(std::uint16_t position) const { return avail_index() != position; }

  /// avail.idx; acquire: ring entries and descriptors published before it are visible.
  [[nodiscard]] std::uint16_t avail_index() const { return load(&avail_->idx, std::memory_order_acquire); }
  [[nodiscard]] std::uint16_t avail_head(std::uint16_t index) const {
    return load(&avail_->ring[index & mask_], std::memory_order_relaxed);
  }
  /// A private copy of descriptor `index`, which must be < size().
  [[nodiscard]] vring_desc descriptor(std::uint16_t index) const { return read_descriptor_once(&desc_[index]); }

  /// Address of the first buffer, or table, of the chain at `position`, whatever that is just now: for prefetching
  /// only.
  [[nodiscard]] std::uint64_t glance(std::uint16_t position) const {
    return load_word(&desc_[avail_head(position) & mask_].addr);
  }

  /// Giving back: write_used() the elements, publish_used() the index; both need WindowOpen and may be repeated.
  void write_used(std::span<const RedoUsed> used, std::uint16_t before) const {
    // As locals: the stores might change the members, as far as the compiler knows.
    vring_used_elem* const ring = used_->ring;
    const std::uint32_t mask = mask_;
    for (const RedoUsed& entry : used) {
      const std::uint64_t element = element_of(entry);
      std::memcpy(&ring[before++ & mask], &element, sizeof element);
    }
  }
  /// Whether the elements stand where write_used() puts them; the driver may have overwritten them.
  [[nodiscard]] bool used_stands(std::span<const RedoUsed> used, std::uint16_t before) const {
    std::uint64_t differs = 0;
    for (const RedoUsed& entry : used) {
      std::uint64_t element = 0;
      std::memcpy(&element, &used_->ring[before++ & mask_], sizeof element);
      differs |= element ^ element_of(entry);
    }
    return differs == 0;
  }
  void publish_used(std::span<const RedoUsed>, std::uint16_t, std::uint16_t after) const {
    // Release: payload and elements first.
    std::atomic_ref<std::uint16_t>(used_->idx).store(after, std::memory_order_release);
  }
  /// Elements have a ring of their own, eight to a cache line: one for a whole burst (IN_ORDER) would save little.
  [[nodiscard]] static constexpr bool gives_back_as_one() { return false; }
  /// False: what stands in the used ring does not say whether giving back may be repeated, and it always may.
  [[nodiscard]] static constexpr bool is_published(std::uint16_t) { return false; }
  [[nodiscard]] std::uint16_t used_index() const { return load(&used_view_->idx, std::memory_order_acquire); }
  /// Whether the guest was shown more than `next_used`: without its record, nobody can go on from there.
  [[nodiscard]] bool is_half_published(std::uint16_t next_used) const { return used_index() != next_used; }

  /// Where the used position stands at a start: the front end tells the other one only.
  [[nodiscard]] std::uint16_t first_used(std::uint32_t) const { return used_index(); }

  /// Asks the driver to kick when it makes entry `next_avail` available. Followed by a full fence: look at
  /// avail_index() again before sleeping. Needs WindowOpen.
  void enable_kicks(std::uint16_t next_avail) const;
  /// Whether enable_kicks() stands as it was asked for; the guest can overwrite it.
  [[nodiscard]] bool kicks_stand(std::uint16_t next_avail) const {
    return event_index_ != 0 ? load(kick_event<const __virtio16>(used_view_), std::memory_order_relaxed) == next_avail
                             : load(&used_view_->flags, std::memory_order_relaxed) == 0;
  }
  /// Asks the driver not to kick. With EVENT_IDX there is nothing to write: an event index in the past does it. Needs
  /// WindowOpen.
  void disable_kicks() const;

  /// Whether the driver wants an interrupt for used.idx moving from `before` to `after` (already published).
  [[nodiscard]] bool wants_call(std::uint16_t before, std::uint16_t after) const;

  [[nodiscard]] bool indirect_allowed() const { return indirect_ != 0; }
  /// False: what bind() has set was changed since (seal.hpp).
  [[nodiscard]] bool is_whole() const { return fold(*this) == 0; }

 private:
  // struct vring_used_elem, id and length, little-endian as everything here: the record's entry without its slots.
  static std::uint64_t element_of(const RedoUsed& entry) {
    static_assert(offsetof(RedoUsed, id) == 0 && offsetof(RedoUsed, slots) == 2 && offsetof(RedoUsed, length) == 4);
    static_assert(sizeof(RedoUsed) == sizeof(vring_used_elem));
    return std::bit_cast<std::uint64_t>(entry) & ~std::uint64_t{0xffff0000};
  }

  static std::uint16_t load(const __virtio16* field, std::memory_order order) {
    // atomic_ref wants a non-const object; the view is read-only memory and the load does not write.
    return std::atomic_ref<std::uint16_t>(*const_cast<std::uint16_t*>(field)).load(order);
  }

  static std::uint64_t load_word(const __virtio64* field) {
    return std::atomic_ref<__virtio64>(*const_cast<__virtio64*>(field)).load(std::memory_order_relaxed);
  }

  // avail_event, behind the used ring's last element (2.7.10).
  template <class Event, class Used>
  [[nodiscard]] Event* kick_event(Used* used) const {
    return reinterpret_cast<Event*>(&used->ring[mask_ + 1]);
  }

  const vring_desc* desc_ = nullptr;
  const vring_avail* avail_ = nullptr;
  const vring_used* used_view_ = nullptr;
  vring_used* used_ = nullptr;
  std::uint32_t mask_ = 0;
  std::uint16_t event_index_ = 0;  // bool, without padding
  std::uint16_t indirect_ = 0;
  std::uint64_t seal_ = 0;
};

}  // namespace tandem
