// SPDX-License-Identifier: Apache-2.0
// GuestQueue: the driver's side of a split virtqueue (Virtio 1.2, section 2.7), for tests, soak and measurements.
//
// What a driver keeps in private memory (free descriptors, the next index on either side) is in the object, everything
// else in memory that the device shares. The object can be copied and moved to a copy of that memory: a snapshot of a
// guest. It checks what the device does to it: every chain comes back exactly once. Hostile drivers write the rings by
// hand. Thread: one at a time.
#pragma once

#define VIRTIO_RING_NO_LEGACY
#include <linux/virtio_ring.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace tandem::test {

/// Guest-physical addresses and where the test has them mapped.
class GuestSpace {
 public:
  void add(std::uint64_t guest_address, std::uint64_t size, std::byte* memory);
  /// Where `address` is mapped; aborts if it is nowhere, for that is a mistake in the test.
  [[nodiscard]] std::byte* at(std::uint64_t address) const;

 private:
  struct Part {
    std::uint64_t guest_address, size;
    std::byte* memory;
  };
  std::vector<Part> parts_;
};

/// The three areas of one ring, guest-physical.
struct RingPlace {
  std::uint32_t size = 0;  ///< entries, a power of two
  std::uint64_t descriptors = 0, avail = 0, used = 0;

  /// Packs the areas from `address` on, aligned as Virtio requires.
  static RingPlace at(std::uint64_t address, std::uint32_t size);
  /// Bytes that at() needs for `size` entries, a multiple of 64.
  static std::uint64_t bytes(std::uint32_t size);
};

/// One buffer of a chain.
struct Piece {
  std::uint64_t address = 0;
  std::uint32_t length = 0;
  bool writable = false;
};

struct UsedEntry {
  std::uint32_t id = 0;
  std::uint32_t length = 0;
  bool expected = false;  ///< names the head of a chain that the device holds
};

class GuestQueue {
 public:
  /// Formats the ring: no buffers, indices 0. `space` must outlive the object.
  GuestQueue(const GuestSpace& space, const RingPlace& place, bool event_index);
  /// Continues on another copy of the same memory.
  void rebase(const GuestSpace& space);
  /// Starts (or restarts, with nothing outstanding) both indices at `index`, to reach a wrap soon.
  void begin_at(std::uint16_t index);

  /// Takes descriptors for a chain, links them and offers it; publish() makes it visible. The head, or nothing when
  /// descriptors have run out.
  std::optional<std::uint16_t> add(std::span<const Piece> pieces);
  /// The same through an indirect table that is written at `table`.
  std::optional<std::uint16_t> add_indirect(std::span<const Piece> pieces, std::uint64_t table);
  void publish();
  /// The next chain that came back, if any.
  std::optional<UsedEntry> take_used();

  /// Whether the device asked to be kicked for what was published since the last call of this function.
  bool kick_wanted();
  /// Asks to be interrupted once the device has used entry `index` (EVENT_IDX), or always, or never (flags).
  void call_at(std::uint16_t index);
  void calls_off(bool off);

  [[nodiscard]] std::uint32_t size() const { return place_.size; }
  [[nodiscard]] std::uint32_t free_descriptors() const { return static_cast<std::uint32_t>(free_.size()); }
  [[nodiscard]] std::uint32_t outstanding() const { return outstanding_; }
  [[nodiscard]] std::uint16_t avail_index() const { return avail_index_; }
  [[nodiscard]] std::uint16_t used_taken() const { return used_taken_; }
  /// used.idx as the device published it.
  [[nodiscard]] std::uint16_t used_index() const;
  [[nodiscard]] const RingPlace& place() const { return place_; }
  /// Entries that named a chain the device did not hold: returned twice, or never given.
  [[nodiscard]] std::uint32_t wrong_returns() const { return wrong_returns_; }

  // For hostile drivers.
  [[nodiscard]] vring_desc& descriptor(std::uint32_t index) const { return descriptors_[index]; }
  /// Offers `head` as it is, whatever it names.
  void offer(std::uint16_t head);
  void publish_index(std::uint16_t index);

 private:
  void attach(const GuestSpace& space);

  RingPlace place_;
  bool event_index_;
  vring_desc* descriptors_ = nullptr;
  vring_avail* avail_ = nullptr;
  vring_used* used_ = nullptr;
  const GuestSpace* space_ = nullptr;

  std::vector<std::uint16_t> free_;          // a stack
  std::vector<std::uint16_t> chain_length_;  // by head; 0: not with the device
  std::uint32_t outstanding_ = 0;
  std::uint16_t avail_index_ = 0;
  std::uint16_t used_taken_ = 0;
  std::uint16_t kicked_ = 0;
  std::uint32_t wrong_returns_ = 0;
};

}  // namespace tandem::test
