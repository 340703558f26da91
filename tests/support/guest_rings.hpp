// SPDX-License-Identifier: Apache-2.0
// GuestQueue: the driver's side of a virtqueue, split or packed (Virtio 1.2, sections 2.7 and 2.8), for tests, soak and
// measurements.
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
#include <deque>
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
  std::uint32_t size = 0;  ///< entries; of a split ring a power of two
  std::uint64_t descriptors = 0;
  std::uint64_t avail = 0, used = 0;  ///< packed: the driver's and the device's event suppression area
  bool packed = false;

  /// Packs the areas from `address` on, aligned as Virtio requires.
  static RingPlace at(std::uint64_t address, std::uint32_t size, bool packed = false);
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
  bool expected = false;  ///< names a chain that the device holds
};

class GuestQueue {
 public:
  /// Formats the ring: no buffers, indices 0. `space` must outlive the object. `in_order` (packed): IN_ORDER was
  /// negotiated, so chains must come back as they were offered, and one used descriptor may stand for several.
  GuestQueue(const GuestSpace& space, const RingPlace& place, bool event_index, bool in_order = false);
  /// Continues on another copy of the same memory.
  void rebase(const GuestSpace& space);
  /// Starts (or restarts, with nothing outstanding) both indices at `index`, to reach a wrap soon. Packed: at slot
  /// `index` of the first round, or beyond the ring's size of the second one, in which wrap counters are 0.
  void begin_at(std::uint16_t index);
  /// What a front end tells the device about a ring that begins at `index`: VringDescription::base.
  [[nodiscard]] std::uint32_t base_for(std::uint16_t index) const;

  /// Takes descriptors for a chain, links them and offers it; publish() makes it visible. The head (packed: the
  /// buffer id), or nothing when descriptors have run out.
  std::optional<std::uint16_t> add(std::span<const Piece> pieces);
  /// The same through an indirect table that is written at `table`.
  std::optional<std::uint16_t> add_indirect(std::span<const Piece> pieces, std::uint64_t table);
  void publish();
  /// The next chain that came back, if any.
  std::optional<UsedEntry> take_used();

  /// Whether the device asked to be kicked for what was published since the last call of this function.
  bool kick_wanted();
  /// Asks to be interrupted once the device has used entry `index` (EVENT_IDX; packed: slot, counted as for
  /// begin_at()), or always, or never (flags).
  void call_at(std::uint16_t index);
  void calls_off(bool off);

  [[nodiscard]] std::uint32_t size() const { return place_.size; }
  [[nodiscard]] std::uint32_t free_descriptors() const { return place_.packed ? free_slots_ : free_count(); }
  [[nodiscard]] std::uint32_t outstanding() const { return outstanding_; }
  [[nodiscard]] std::uint16_t avail_index() const { return avail_index_; }
  /// Up to where the device's used entries were taken: an index; packed: a slot, with the wrap counter in bit 15.
  [[nodiscard]] std::uint16_t used_taken() const { return used_taken_; }
  /// Ring entries (packed: slots) that came back so far.
  [[nodiscard]] std::uint32_t entries_taken() const { return entries_taken_; }
  /// Ring entries (packed: slots) that the device has given back and nobody has taken yet.
  [[nodiscard]] std::uint32_t published() const;
  /// used.idx as the device published it; split only.
  [[nodiscard]] std::uint16_t used_index() const;
  [[nodiscard]] bool packed() const { return place_.packed; }
  [[nodiscard]] const RingPlace& place() const { return place_; }
  /// Entries that named a chain the device did not hold: returned twice, or never given; in_order: or out of turn.
  [[nodiscard]] std::uint32_t wrong_returns() const { return wrong_returns_; }

  // For hostile drivers of split rings.
  [[nodiscard]] vring_desc& descriptor(std::uint32_t index) const { return descriptors_[index]; }
  /// Offers `head` as it is, whatever it names.
  void offer(std::uint16_t head);
  void publish_index(std::uint16_t index);
  // For hostile drivers of packed rings. A descriptor that the next offer_packed() will make available, `ahead` slots
  // from the next free one.
  [[nodiscard]] vring_packed_desc& packed_descriptor(std::uint32_t ahead) const;
  /// Makes the next `slots` descriptors available as they are, as one chain with buffer id `id`: `flags` but for AVAIL
  /// and USED are theirs.
  void offer_packed(std::uint16_t id, std::uint32_t slots);

 private:
  void attach(const GuestSpace& space);
  [[nodiscard]] std::uint32_t free_count() const { return static_cast<std::uint32_t>(free_.size()); }
  // Packed: positions are slots, with the wrap counter in bit 15.
  [[nodiscard]] std::uint16_t position_of(std::uint32_t in_two_rounds) const;
  [[nodiscard]] std::uint16_t next_position(std::uint16_t position, std::uint32_t slots) const;
  std::optional<std::uint16_t> add_packed(std::span<const Piece> pieces);
  // The used descriptor at `position`, if there is one.
  [[nodiscard]] std::optional<vring_packed_desc> used_at(std::uint16_t position) const;
  std::optional<UsedEntry> take_packed();
  // in_order: how many chains, from the `first` of those with the device on, come back with `id`; 0: none of them has
  // it.
  [[nodiscard]] std::uint32_t batch_up_to(std::uint16_t id, std::uint32_t first) const;
  bool kick_wanted_packed();

  RingPlace place_;
  bool event_index_, in_order_;
  vring_desc* descriptors_ = nullptr;
  vring_packed_desc* slots_ = nullptr;
  vring_packed_desc_event* driver_event_ = nullptr;
  const vring_packed_desc_event* device_event_ = nullptr;
  vring_avail* avail_ = nullptr;
  vring_used* used_ = nullptr;
  const GuestSpace* space_ = nullptr;

  struct Pending {
    std::uint16_t slot, flags;
  };
  std::vector<std::uint16_t> free_;          // a stack: descriptors; packed: buffer ids
  std::vector<std::uint16_t> chain_length_;  // by head or buffer id; 0: not with the device
  std::vector<Pending> pending_;             // packed: first flags of the chains that publish() will show
  std::deque<std::uint16_t> in_flight_;      // in_order: ids with the device, oldest first
  std::uint32_t batch_left_ = 0;             // in_order: of these, came back with the used descriptor last looked at
  std::uint32_t free_slots_ = 0;             // packed
  std::uint32_t entries_taken_ = 0;
  std::uint32_t outstanding_ = 0;
  std::uint16_t avail_index_ = 0;
  std::uint16_t used_taken_ = 0;
  std::uint16_t kicked_ = 0;
  std::uint32_t wrong_returns_ = 0;
};

}  // namespace tandem::test
