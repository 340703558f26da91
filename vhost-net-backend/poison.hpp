// SPDX-License-Identifier: Apache-2.0
// Poison: packets that kill whoever touches them, from the cursor that an owner leaves to the drop (docs/fence.md).
//
// The hot path pays one store a packet: take_in_hand(). Everything else happens in a takeover, or while a suspect waits
// in a queue. Thread: the shard's owner only.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "common/fence_view.hpp"
#include "common/layout/segment.hpp"
#include "vhost-net-backend/protection.hpp"
#include "vhost-net-backend/queue_pair.hpp"

namespace tandem {

/// Says in the segment what this thread is about to touch.
inline void take_in_hand(const QueuePair& pair, PacketPhase phase, std::uint32_t position) {
  if constexpr (!kProtected) return;
  pair.shard->in_hand.store(pair.cursor | std::uint64_t{static_cast<std::uint32_t>(phase)} << 40 | position,
                            std::memory_order_relaxed);
  // Only this thread's own death reads it back, so no fence for other CPUs; but the compiler may not move what touches
  // the packet to before the store.
  std::atomic_signal_fence(std::memory_order_seq_cst);
}
inline void let_go(const QueuePair& pair) {
  std::atomic_signal_fence(std::memory_order_seq_cst);
  pair.shard->in_hand.store(0, std::memory_order_relaxed);
}
/// Position of a transmit chain; restarted rings are other rings.
inline std::uint32_t transmit_position(const QueuePair& pair, std::uint16_t avail) {
  return pair.transmit.start_count << 16 | avail;
}

/// Whether a thread's death was its own fault: a synchronous fault, an abort, or a verdict that it span or made no
/// progress. SIGKILL, SIGSTOP and whatever else comes from outside is not, nor is leaving by exit.
bool own_fault(const tandem_fence_slot& slot, HangVerdict verdict);

/// What an heir takes into account when it weighs its predecessor's death.
struct Death {
  std::uint32_t owner;  ///< tag in the owner word before the heir took it
  HangVerdict verdict;  ///< the heir's own, of that owner
};
/// Counts the death against what was in hand. To be called right after the owner word is taken, before anything in the
/// segment changes; a second time changes nothing. Returns TakeoverTimeline::suspect: 0 if nothing can be blamed.
std::uint32_t weigh_death(Segment& segment, std::uint32_t shard, const FenceView& fence, const Death& death);

/// True if applying the armed record, which is valid, has killed so often that it must not be tried again.
bool record_is_poison(const Segment& segment, const RedoRecord& record);
/// Gives that record up: what concerns only the uplink's rings is made whole, the queue is stopped with kRecordInvalid.
/// Not more than one burst is lost, or published and not counted. `destination` as in replay().
void abandon_record(QueuePair& pair, QueuePair* destination = nullptr);

/// A packet that is about to be dropped, for the operator.
struct PoisonPacket {
  std::uint32_t queue_pair = 0;
  PacketPhase direction{};
  std::uint32_t deaths = 0;
  std::uint32_t length = 0;      ///< bytes without the virtio header, as far as its descriptors tell
  std::vector<std::byte> bytes;  ///< those that can be read, at most kMaxPoisonBytes
};

/// Loads what the segment suspects of this queue pair, when it is bound.
void load_suspects(QueuePair& pair);
/// Before and after a round of a queue pair with suspects: forgets those that have passed, condemns those that killed
/// too often, so that a burst ends before them and then drops exactly one. Packets whose drop has been applied are
/// added to `dropped`.
void meet_suspects(QueuePair& pair, std::vector<PoisonPacket>& dropped);

}  // namespace tandem
