// SPDX-License-Identifier: Apache-2.0
// The pair segment: all datapath state of a pair that lives neither in the guest's memory nor in the kernel's rings.
//
// A memfd, made and held by the supervisor and the vault, mapped writable by both backends. Its content is hostile to
// whoever takes it over: a crashed owner may have damaged it. Nothing in it is a pointer.
//
// Who writes: a shard's fields, its record, and its queue pairs' states only the thread that owns the shard. The owner
// word an heir, with compare-and-swap, after it has seen the owner's fence slot dead (recovery/fence), and the owner
// itself when it lets go in a planned handover (docs/handover.md).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/layout/poison.hpp"
#include "common/layout/redo_record.hpp"

namespace tandem {

inline constexpr std::uint64_t kSegmentMagic = 0x314d45444e4154ull;  // "TANDEM1"
inline constexpr std::uint32_t kSegmentVersion = 4;
inline constexpr std::uint32_t kMaxShards = 8;
inline constexpr std::uint32_t kMaxDevices = 64;
inline constexpr std::uint32_t kMaxQueuePairs = 256;
/// Transmit frames per queue pair; one bit each in QueuePairState::transmit_busy.
inline constexpr std::uint32_t kTransmitFrames = 2048;

inline constexpr std::uint32_t kStarvedMark = 1u << 16;

/// Why a virtqueue was stopped by its backend; the guest has to reset the device, or the front end to reconnect.
enum class QueueFault : std::uint32_t {
  kNone = 0,
  kAvailJump = 1,      ///< avail.idx ran ahead by more than the ring's size
  kMemoryFault = 2,    ///< SIGBUS: the front end took pages of guest memory away
  kRecordInvalid = 3,  ///< takeover found a damaged redo record or cursor for this queue
  kEndlessChain = 4,   ///< packed: a chain that does not end, so nobody knows where the next one begins
};

/// Cursors and counters of one virtqueue; one cache line.
struct alignas(64) VringCursors {
  /// Positions. Split: free-running indices. Packed: a slot, with the wrap counter in bit 15 (Virtio 1.2, 2.8.1).
  std::uint16_t next_avail;   ///< next avail entry, or first descriptor of the next chain, to take
  std::uint16_t next_used;    ///< used.idx as published, or where the next used descriptor goes
  std::uint32_t start_count;  ///< which start of the ring these cursors belong to
  std::uint64_t packets, bytes;
  std::uint64_t dropped;  ///< bad chains, runts, packets without room: counted, never silently
  std::atomic<QueueFault> fault;
  /// Receive: kStarvedMark | the position from which on the guest had no buffers when packets waited; 0 otherwise.
  std::uint32_t starved;
  std::uint64_t overflow;  ///< receive: packets from other NICs of the pair for which the guest had no buffers
  /// position_word() twice more, the second time inverted. Of three, two outvote one that a wild store hit.
  std::uint64_t copies[2];
};

struct alignas(64) QueuePairState {
  /// Generation of the device description in force for this queue pair. Stored with release order by the owner when its
  /// record is empty: a reader that sees N knows that nothing is written to guest memory under N-1 any more.
  std::atomic<std::uint64_t> generation;
  Suspicion receive_suspicion, transmit_suspicion;
  std::atomic<std::uint64_t> record_suspect;  ///< Suspect::word() of a record that kills whoever applies it
  std::atomic<std::uint64_t> kills;           ///< owners that died, by their own fault, on what came through this pair
  /// ~generation, stored before it: where the two differ, the one whose description is held is right.
  std::atomic<std::uint64_t> generation_inverted;
  VringCursors receive, transmit;
  std::uint64_t transmit_busy[kTransmitFrames / 64];  ///< UMEM frames handed to the kernel and not yet completed
};

/// Why an heir ended a living owner (vhost-net-backend/watchdog.hpp).
enum class HangVerdict : std::uint32_t {
  kNone = 0,
  kSpinning = 1,        ///< uses its CPU, and its heartbeat stands still
  kBlocked = 2,         ///< sleeps, is stopped or frozen, without having marked itself asleep
  kAsleepWithWork = 3,  ///< marked itself asleep and sleeps through work
  kStarved = 4,         ///< got no CPU for so long that waiting on makes no sense
  kNoProgress = 5,      ///< its loop turns and beats, and passes work by
};

/// How a shard changed hands.
enum class TakeoverKind : std::uint32_t {
  kFailover = 0,   ///< the owner is dead, or there never was one
  kHandover = 1,   ///< the owner let go, for the heir that had asked
  kTakenBack = 2,  ///< the owner had let go, the heir did not come in time: it owns again
};

/// How a shard came to its present owner; times are CLOCK_MONOTONIC ns, 0 for "did not happen (yet)".
struct TakeoverTimeline {
  std::uint64_t previous_tag;
  std::uint64_t tag;
  std::uint32_t epoch;
  std::uint32_t owner_was_asleep;  ///< the dead owner had marked itself asleep: its last heartbeat says nothing
  std::uint64_t last_heartbeat_ns;
  std::uint64_t fence_ns;
  std::uint64_t awake_ns;
  std::uint64_t epoch_ns;
  std::uint64_t replayed_ns;
  std::uint64_t first_transaction_ns;
  /// What the dead owner had in hand, if it died by its own fault: PacketPhase | deaths on it so far << 8 | queue pair
  /// << 16.
  std::uint32_t suspect;
  std::uint16_t record_armed;   ///< 1 if a record was found armed
  std::uint16_t record_valid;   ///< 1 if it passed validation and was replayed
  std::uint32_t replayed_kind;  ///< RedoKind
  std::uint32_t replayed_packets;
  std::uint32_t replayed_queue_pair;
  std::uint32_t queue_pairs;  ///< running queue pairs taken over
  HangVerdict verdict;        ///< kNone: it died by itself
  TakeoverKind kind;
  std::uint64_t verdict_ns;
  std::uint64_t requested_ns;  ///< handover: when the heir asked, and when the owner let go
  std::uint64_t granted_ns;
};

/// A planned handover, in the making or the last one (docs/handover.md).
struct Handover {
  /// epoch << 32 | nonce: an heir asks the owner of this epoch to let go. Written by the heir, last; 0: nobody asks.
  std::atomic<std::uint64_t> request;
  /// The request that was granted, echoed by the owner before it lets go of the owner word.
  std::atomic<std::uint64_t> grant;
  std::atomic<std::uint32_t> heir_tag;   ///< who asks
  std::atomic<std::uint32_t> owner_tag;  ///< who granted
  std::atomic<std::uint64_t> requested_ns;
  std::atomic<std::uint64_t> granted_ns;
};

struct alignas(64) ShardState {
  /// epoch << 32 | low 32 bits of the owner's fence tag. Tag 0: nobody owns, any armed heir may take it; with epoch 0
  /// nobody ever has, with another one its owner has let go.
  std::atomic<std::uint64_t> owner;
  Handover handover;
  /// Written by the heir, at least every 100 ms: CLOCK_MONOTONIC ns when it last looked for its owner.
  std::atomic<std::uint64_t> heir_beat_ns;
  /// ~owner. Stored after a takeover and before a letting go, so that within one epoch the two differ only in the
  /// moment of a letting go, or where a wild store hit one of them.
  std::atomic<std::uint64_t> owner_inverted;
  /// Written by the supervisor: how long an owner may stand still, in ns (the smallest limits of the NICs it serves).
  alignas(64) std::atomic<std::uint64_t> spin_limit_ns;
  std::atomic<std::uint64_t> blocked_limit_ns;
  std::uint64_t reserved2[6];
  /// Written by the owner in every round of its poll loop: TSC, and 1 while it sleeps in epoll.
  alignas(64) std::atomic<std::uint64_t> heartbeat_tsc;
  std::atomic<std::uint32_t> asleep;
  std::uint32_t reserved1;
  std::atomic<std::uint64_t> transactions;
  std::atomic<std::uint64_t> in_hand;  ///< PacketCursor::word()
  alignas(64) TakeoverTimeline takeover;
  RedoRecord record;
};

struct Segment {
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t shard_count;
  std::uint64_t size;
  std::uint64_t reserved[5];
  ShardState shards[kMaxShards];
  QueuePairState queue_pairs[kMaxQueuePairs];
};

/// What a front end calls the base of a ring with these cursors (vhost-user: GET_VRING_BASE).
constexpr std::uint32_t vring_base(const VringCursors& cursors, bool packed) {
  return packed ? std::uint32_t{cursors.next_used} << 16 | cursors.next_avail : cursors.next_avail;
}

/// What the copies in VringCursors are copies of.
constexpr std::uint64_t position_word(const VringCursors& cursors) {
  return std::uint64_t{cursors.next_avail} | std::uint64_t{cursors.next_used} << 16 |
         std::uint64_t{cursors.start_count} << 32;
}
constexpr void copy_positions(VringCursors& cursors, std::uint64_t word) {
  cursors.copies[0] = word;
  cursors.copies[1] = ~word;
}

/// By an heir, before it uses cursors of a dead owner. False: three different words, of which nobody knows which is
/// right, if any. All copies agree afterwards in either case.
inline bool repair_positions(VringCursors& cursors) {
  const std::uint64_t word = position_word(cursors), copy = cursors.copies[0], inverted = ~cursors.copies[1];
  if (copy == inverted) {
    cursors.next_avail = static_cast<std::uint16_t>(copy);
    cursors.next_used = static_cast<std::uint16_t>(copy >> 16);
    cursors.start_count = static_cast<std::uint32_t>(copy >> 32);
    return true;
  }
  copy_positions(cursors, word);
  return word == copy || word == inverted;
}

constexpr std::uint64_t owner_word(std::uint32_t epoch, std::uint32_t tag) { return std::uint64_t{epoch} << 32 | tag; }
constexpr std::uint32_t owner_epoch(std::uint64_t word) { return static_cast<std::uint32_t>(word >> 32); }
constexpr std::uint32_t owner_tag(std::uint64_t word) { return static_cast<std::uint32_t>(word); }

static_assert(sizeof(VringCursors) == 64 && sizeof(QueuePairState) == 3 * 64 + kTransmitFrames / 8);
static_assert(sizeof(TakeoverTimeline) <= 128 && sizeof(Handover) == 40);
static_assert(offsetof(ShardState, heartbeat_tsc) == 128 && offsetof(ShardState, takeover) == 192);
static_assert(offsetof(ShardState, record) == 320);
static_assert(std::is_standard_layout_v<Segment>);

}  // namespace tandem
