// SPDX-License-Identifier: Apache-2.0
// The matrix of bursts in which a poll thread is made to die: one row per way in which packets can cross.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/support/engine_world.hpp"

namespace tandem::test {

/// Of what, inside the burst. A packed ring has no index to wrap: its wrap counter goes to 0 or to 1.
enum class Wrap { kNone, kRing, kIndex };

/// What is special about the burst.
enum class Situation {
  kPlain,
  kStarved,   ///< fewer receive buffers than packets
  kFull,      ///< fewer places on the TX ring than packets
  kBadChain,  ///< a chain in the middle that has to be dropped
  kPoison,    ///< a packet in the middle that owners have died on: it has to be dropped
  kRestart,   ///< no burst: the owner puts a new start of both rings in force
  kHandover,  ///< an heir has asked for the shard: the owner lets go after the burst
};

struct MatrixRow {
  std::string name;
  bool transmit = false, receive = false;
  bool forward = false;     ///< what is transmitted is for another NIC of the pair
  std::uint32_t burst = 1;  ///< packets in each direction
  Wrap wrap = Wrap::kNone;
  Situation situation = Situation::kPlain;
  bool nested = false;  ///< a second crash at every instruction of the takeover too
  bool quick = false;   ///< part of the short run
  WorldShape shape;     ///< its first indices are set by the trial, which knows what the warm-up uses
  PacketFlow flow{18, 120};
};

/// Packets that cross each way before the burst, so that nothing is at its beginning.
inline constexpr std::uint32_t kWarmUp = 3;

std::vector<MatrixRow> matrix();

}  // namespace tandem::test
