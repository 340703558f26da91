// SPDX-License-Identifier: Apache-2.0
// RedoRecord: one burst that is being moved between rings, written before it happens so that an heir can finish it.
//
// Life of a record, all by the shard's owner: filled while `arm` is 0 (Stage); `arm` set with release order (the commit
// point); every effect applied, each by setting a recorded value, so that doing it again changes nothing (Apply); `arm`
// set to 0 with release order. An heir that finds `arm` not 0 checks version and CRC and applies it once more.
//
// The record lives in the pair segment: whatever a killed thread had stored before its last instruction is in it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace tandem {

inline constexpr std::uint32_t kRedoVersion = 4;
/// Packets in one burst at the most.
inline constexpr std::uint32_t kBurstPackets = 32;
/// Used elements in one burst at the most: a mergeable packet takes several receive buffers.
inline constexpr std::uint32_t kBurstUsed = 128;
/// Frames in one burst at the most, or used elements that a forward gives its receiver. A packet that is segmented here
/// enters the record as a whole, so this is also how many segments it may have: 64 KiB with 131 bytes each, which is
/// less than any maximum segment size in use. With it, frames or destination fill 4 KiB.
inline constexpr std::uint32_t kBurstFrames = 504;

enum class RedoKind : std::uint16_t {
  kTransmit = 1,  ///< guest's transmit virtqueue -> uplink
  kReceive = 2,   ///< uplink -> guest's receive virtqueue
  kForward = 3,   ///< guest's transmit virtqueue -> receive virtqueue of another NIC of the pair
};

/// A frame of the uplink's UMEM. Transmit: what to send. Receive: what goes back to the fill ring (length unused).
struct alignas(8) RedoFrame {
  std::uint32_t address;  ///< byte offset in the UMEM
  std::uint32_t length;   ///< bytes
};

/// A chain that goes back to the guest, host byte order; little endian on the wire. Or, where the driver takes that,
/// all chains of the burst: the last one's id, and slots of all.
struct alignas(8) RedoUsed {
  std::uint16_t id;     ///< split: the chain's head; packed: its buffer id
  std::uint16_t slots;  ///< by which positions move: split 1; packed the number of descriptors in the ring
  std::uint32_t length;
};

/// Forward: the receive virtqueue that the burst goes to. The record's own fields are those of the transmit virtqueue.
struct RedoDestination {
  std::uint64_t generation;  ///< of its device's description
  std::uint32_t queue_pair;  ///< index in the segment
  std::uint16_t used_count;  ///< 0: nothing found room
  std::uint16_t reserved;
  std::uint16_t avail_before, avail_after;
  std::uint16_t used_before, used_after;
  std::uint64_t packets_after, bytes_after, dropped_after, overflow_after;
  RedoUsed used[kBurstFrames];
};

struct alignas(64) RedoRecord {
  /// 0: empty. Otherwise epoch << 32 | redo_checksum(): of everything from `version` to the last used element, and of
  /// the frames, or of a forward's destination to its last used element.
  std::atomic<std::uint64_t> arm;

  std::uint32_t version;
  RedoKind kind;
  std::uint16_t used_count;  ///< elements; not packets, where several go back as one
  std::uint16_t frame_count;
  std::uint16_t avail_before, avail_after;  ///< VringCursors::next_avail
  std::uint16_t used_before, used_after;    ///< VringCursors::next_used
  std::uint32_t queue_pair;                 ///< index in the segment
  std::uint32_t epoch;
  std::uint32_t poisoned;    ///< 1: the burst is one packet, and drops it because owners died on it
  std::uint64_t generation;  ///< of the device description the burst was staged under
  std::uint32_t consumer_before, consumer_after;  ///< receive: the RX ring's consumer
  std::uint32_t producer_before, producer_after;  ///< transmit: TX ring's producer; receive: fill ring's producer
  std::uint64_t packets_after, bytes_after, dropped_after;  ///< the queue's counters once applied
  RedoUsed used[kBurstUsed];
  union {
    RedoFrame frames[kBurstFrames];  ///< transmit and receive
    RedoDestination destination;     ///< forward
  };
};

static_assert(sizeof(RedoFrame) == 8 && sizeof(RedoUsed) == 8);
static_assert(offsetof(RedoRecord, version) == 8);
static_assert(offsetof(RedoRecord, generation) == 40);
static_assert(offsetof(RedoRecord, used) == 88);
static_assert(offsetof(RedoRecord, frames) == 88 + 128 * 8 && offsetof(RedoRecord, destination) == 88 + 128 * 8);
static_assert(offsetof(RedoDestination, used) == 56 && sizeof(RedoDestination) == 4096 - 8);
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

}  // namespace tandem
