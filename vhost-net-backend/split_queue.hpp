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

#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>

#include "common/layout/device_description.hpp"
#include "common/result.hpp"
#include "vhost-net-backend/guest_memory.hpp"

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

class SplitQueue {
 public:
  SplitQueue() = default;
  /// `vring` must be running; its three rings must lie inside `memory`.
  static Result<SplitQueue> bind(const GuestMemory& memory, const VringDescription& vring, std::uint64_t features);

  [[nodiscard]] bool bound() const { return desc_ != nullptr; }
  [[nodiscard]] std::uint32_t size() const { return mask_ + 1; }

  /// avail.idx; acquire: ring entries and descriptors published before it are visible.
  [[nodiscard]] std::uint16_t avail_index() const { return load(&avail_->idx, std::memory_order_acquire); }
  [[nodiscard]] std::uint16_t avail_head(std::uint16_t index) const {
    return load(&avail_->ring[index & mask_], std::memory_order_relaxed);
  }
  /// A private copy of descriptor `index`, which must be < size().
  [[nodiscard]] vring_desc descriptor(std::uint16_t index) const { return read_descriptor_once(&desc_[index]); }

  /// Used ring; all need WindowOpen.
  void write_used(std::uint16_t index, std::uint32_t id, std::uint32_t length) const {
    vring_used_elem& element = used_->ring[index & mask_];
    element.id = id;
    element.len = length;
  }
  void publish_used(std::uint16_t index) const {
    // Release: payload and elements first.
    std::atomic_ref<std::uint16_t>(used_->idx).store(index, std::memory_order_release);
  }
  [[nodiscard]] std::uint16_t used_index() const { return load(&used_view_->idx, std::memory_order_acquire); }

  /// Asks the driver to kick when it makes entry `next_avail` available. Followed by a full fence: look at
  /// avail_index() again before sleeping. Needs WindowOpen.
  void enable_kicks(std::uint16_t next_avail) const;
  /// Asks the driver not to kick. With EVENT_IDX there is nothing to write: an event index in the past does it. Needs
  /// WindowOpen.
  void disable_kicks() const;

  /// Whether the driver wants an interrupt for used.idx moving from `before` to `after` (already published).
  [[nodiscard]] bool wants_call(std::uint16_t before, std::uint16_t after) const;

  [[nodiscard]] bool indirect_allowed() const { return indirect_; }

 private:
  static std::uint16_t load(const __virtio16* field, std::memory_order order) {
    // atomic_ref wants a non-const object; the view is read-only memory and the load does not write.
    return std::atomic_ref<std::uint16_t>(*const_cast<std::uint16_t*>(field)).load(order);
  }

  const vring_desc* desc_ = nullptr;
  const vring_avail* avail_ = nullptr;
  const vring_used* used_view_ = nullptr;
  vring_used* used_ = nullptr;
  std::uint32_t mask_ = 0;
  bool event_index_ = false;
  bool indirect_ = false;
};

}  // namespace tandem
