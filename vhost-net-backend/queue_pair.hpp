// SPDX-License-Identifier: Apache-2.0
// QueuePair: moves packets between one pair of virtqueues and one uplink queue, each burst a transaction
// (docs/transactions.md).
//
// What is here can be thrown away at any instruction: cursors are in the pair segment, ring indices in shared rings.
// Thread: the shard's owner only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "common/layout/segment.hpp"
#include "vhost-net-backend/guest_memory.hpp"
#include "vhost-net-backend/offload.hpp"
#include "vhost-net-backend/virtqueue.hpp"
#include "vhost-net-backend/xsk_port.hpp"

namespace tandem {

/// One virtqueue of a queue pair with its two eventfds (not owned here; -1: none).
struct BoundQueue {
  Virtqueue queue;
  int kick_fd = -1;
  int call_fd = -1;
  std::uint32_t start_count = 0;
};

struct PoisonPacket;

/// Private half of a suspicion (poison.hpp): how the next bursts have to go about a packet that owners died on.
struct Suspected {
  static constexpr std::uint64_t kNobody = ~std::uint64_t{0};
  std::uint64_t condemned = kNobody;  ///< position of the packet that no burst may touch
  std::shared_ptr<PoisonPacket>
      packet;  ///< once it is the next one: what is known of it. A burst may then drop it alone

  [[nodiscard]] bool is_condemned(std::uint32_t position) const { return position == condemned; }
};

struct QueuePair;

/// Another NIC on the same bridge, to whose receive virtqueue this queue pair's packets go directly.
struct Neighbour {
  std::uint64_t mac = 0;  ///< as mac_word()
  QueuePair* pair = nullptr;
};
/// The first six bytes of a frame, or a MAC address, as a number.
inline std::uint64_t mac_word(const std::byte* bytes) {
  std::uint64_t word = 0;
  std::memcpy(&word, bytes, 6);
  return word;
}

struct QueuePair {
  std::uint32_t index = 0;  ///< in Segment::queue_pairs
  QueuePairState* state = nullptr;
  ShardState* shard = nullptr;
  std::uint32_t epoch = 0;
  std::uint64_t generation = 0;
  const GuestMemory* memory = nullptr;
  XskPort* port = nullptr;
  std::uint32_t header_size = 12;  ///< 12 with VERSION_1 or MRG_RXBUF, else 10 (Virtio 1.2, 5.1.6)
  bool mergeable = false;
  OffloadSet asked;  ///< what the guest's driver may ask for; without kChecksum its requests are not looked at
  OffloadSet taken;  ///< what it takes of other guests
  BoundQueue receive, transmit;
  bool transmit_pending = false;  ///< the kernel has not taken everything from the TX ring yet
  /// CLOCK_MONOTONIC ns; not 0: the bitmap of busy frames is damaged, nothing is sent until the kernel has given all
  /// back, or until then. kNotLookedAt: whether it is has to be found out first.
  static constexpr std::uint64_t kNotLookedAt = ~std::uint64_t{0};
  std::uint64_t settling_until_ns = 0;
  bool receive_starved = false;  ///< packets wait and the guest has no buffers: wait for its kick, not for the socket
  std::uint16_t starved_avail = 0;  ///< the position from which on there were none
  std::uint64_t cursor = 0;         ///< PacketCursor::word() of this thread and queue pair, without phase and position
  /// Of one shard, all served by its thread; the pointers are good until the queue pairs are built anew. Empty:
  /// everything goes to the uplink.
  std::vector<Neighbour> neighbours;
  /// Private: room for one packet of kLargestPacket, and behind it, from kLargestPacketRoom on, for one segment. For
  /// what goes to a neighbour, and for what is to be segmented.
  std::byte* staging = nullptr;
  bool has_suspects = false;  ///< a packet waits, or may wait, that owners died on
  Suspected receive_suspect, transmit_suspect;
  std::uint64_t seal = 0;  ///< checksum(), once everything that it covers is set

  [[nodiscard]] bool can_transmit() const {
    return transmit.queue.bound() && settling_until_ns == 0 &&
           state->transmit.fault.load(std::memory_order_relaxed) == QueueFault::kNone;
  }
  /// Over what leads to the rings and to the guest (seal.hpp).
  [[nodiscard]] std::uint64_t checksum() const {
    return fold(state) ^ fold(shard) ^ fold(memory) ^ fold(port) ^ generation ^ (std::uint64_t{index} << 32 | epoch) ^
           (std::uint64_t{header_size} << 1 | std::uint64_t{mergeable} | std::uint64_t{asked.bits} << 32 |
            std::uint64_t{taken.bits} << 48) ^
           fold(staging) ^
           (std::uint64_t{static_cast<std::uint32_t>(receive.call_fd)} << 32 |
            static_cast<std::uint32_t>(transmit.call_fd));
  }
  /// Whether the wiring is still what it was made as, but for the virtqueues.
  [[nodiscard]] bool is_wired() const { return seal == checksum() && port->is_whole() && memory->is_whole(); }
  /// With them.
  [[nodiscard]] bool is_whole() const { return is_wired() && receive.queue.is_whole() && transmit.queue.is_whole(); }
  [[nodiscard]] bool can_receive() const {
    return receive.queue.bound() && state->receive.fault.load(std::memory_order_relaxed) == QueueFault::kNone;
  }
};

/// Segments that a packet may have: what a record holds, and the uplink at a time; more would wait for ever.
inline std::uint32_t most_segments(const XskPort& port) {
  return std::min({kBurstFrames, port.description().tx_frames, port.tx.size()});
}

/// Guest -> uplink or another guest, uplink -> guest: one burst of at most kBurstPackets. Returns the number of ring
/// entries moved, 0 when there was nothing to do or no room. The record is disarmed on return.
std::uint32_t transmit_burst(QueuePair& pair);
std::uint32_t receive_burst(QueuePair& pair);

/// Frees transmit frames that the kernel has completed. Never between arm and disarm.
void drain_completions(QueuePair& pair);

/// Takes what the kernel has given back. Then, if nobody has looked yet (kNotLookedAt): whether as many frames are
/// marked busy as the kernel still has; if not, that has to settle. Only while the record is empty. Else: ends the
/// settling if the kernel has no frame left, or it is too late for that at `now_ns`; what it then still has is left to
/// it.
void settle(QueuePair& pair, std::uint64_t now_ns);

/// Interrupts the guest for both queues and lets the kernel transmit: after a takeover, whatever the dead owner had
/// told them.
void notify_all(QueuePair& pair);

/// Outcome of looking at a record that a dead owner left.
enum class ReplayResult {
  kEmpty,     ///< not armed: nothing had been promised
  kReplayed,  ///< applied and disarmed
  kInvalid,   ///< cursors or frames do not match: disarmed, that queue stopped with QueueFault::kRecordInvalid
};

/// True if `record` is armed and its version, counts and CRC are right.
bool record_is_valid(const RedoRecord& record);
/// Replays `pair.shard->record`, which must be valid and name this queue pair and its generation. `destination`: the
/// one that a forward names, and its generation; nullptr if it is gone, then the burst only leaves its source.
ReplayResult replay(QueuePair& pair, QueuePair* destination = nullptr);

/// Whether there is work: entries or packets waiting that could be moved.
bool has_work(const QueuePair& pair);

}  // namespace tandem
