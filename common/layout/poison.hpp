// SPDX-License-Identifier: Apache-2.0
// Poison: which packet an owner has in hand, and which packets owners have died on (docs/fence.md, "Poison").
//
// Both live in the pair segment, so that they outlive successive owners. Each is one 64-bit word that is stored whole:
// a thread may die between any two stores. The owner writes its cursor before it touches a packet; an heir that finds
// its predecessor dead by its own fault counts that against the packet. What is found here after a death is hostile:
// vhost-net-backend/poison.cpp validates it.
#pragma once

#include <atomic>
#include <cstdint>

namespace tandem {

/// Deaths on one packet, of owners by their own fault, after which the next owner drops it.
inline constexpr std::uint32_t kPoisonDeaths = 2;

/// What an owner was doing with what it had in hand.
enum class PacketPhase : std::uint32_t {
  kNone = 0,
  kTransmit = 1,  ///< reading a transmit chain. Position: start count (low 16 bits) << 16 | avail index
  kReceive = 2,   ///< placing a received packet. Position: its index in the uplink's RX ring
  kApply = 3,     ///< applying the armed record, or replaying it. Position: the record's epoch
};

/// Bits of the owner's tag that the words below keep: enough to name a slot of the fence, and to tell apart the tags
/// that may use it.
inline constexpr unsigned kShortTagBits = 22;
inline constexpr std::uint32_t kShortTagMask = (1u << kShortTagBits) - 1;

/// ShardState::in_hand: short tag << 42 | phase << 40 | queue pair << 32 | position. 0: nothing.
struct PacketCursor {
  std::uint32_t tag = 0;  ///< low bits
  PacketPhase phase = PacketPhase::kNone;
  std::uint32_t queue_pair = 0;  ///< index in the segment, below 256
  std::uint32_t position = 0;

  [[nodiscard]] constexpr std::uint64_t word() const {
    return std::uint64_t{tag & kShortTagMask} << 42 | std::uint64_t{static_cast<std::uint32_t>(phase) & 3u} << 40 |
           std::uint64_t{queue_pair & 0xffu} << 32 | position;
  }
  static constexpr PacketCursor from(std::uint64_t word) {
    return {static_cast<std::uint32_t>(word >> 42), static_cast<PacketPhase>(word >> 40 & 3u),
            static_cast<std::uint32_t>(word >> 32 & 0xffu), static_cast<std::uint32_t>(word)};
  }
};

/// What owners died on: short tag of the last of them << 42 | deaths << 32 | position. 0: nothing.
struct Suspect {
  std::uint32_t tag = 0;     ///< whose death was counted last: no death counts twice
  std::uint32_t deaths = 0;  ///< at most 1023
  std::uint32_t position = 0;

  [[nodiscard]] constexpr std::uint64_t word() const {
    return std::uint64_t{tag & kShortTagMask} << 42 | std::uint64_t{deaths & 0x3ffu} << 32 | position;
  }
  static constexpr Suspect from(std::uint64_t word) {
    return {static_cast<std::uint32_t>(word >> 42), static_cast<std::uint32_t>(word >> 32 & 0x3ffu),
            static_cast<std::uint32_t>(word)};
  }
};

/// Of one direction of a queue pair; in QueuePairState, written by the shard's owner only.
struct Suspicion {
  std::atomic<std::uint64_t> suspect;  ///< Suspect::word()
  std::uint32_t poisoned;              ///< packets dropped because they killed; each also counts in `dropped`
  std::uint32_t poisoned_after;        ///< `poisoned` once the drop that is being staged or armed is applied
};

static_assert(sizeof(Suspicion) == 16);

}  // namespace tandem
