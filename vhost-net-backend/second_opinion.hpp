// SPDX-License-Identifier: Apache-2.0
// Second opinion: before a chain is refused, other code looks at it.
//
// A bit that flips in the code that walks chains seldom crashes: it makes good chains look bad, and a backend that
// drops them, counted as the guest's fault, harms longer than one that dies. So a refusal, which is rare, is checked by
// a second walker, slow, plain, and sharing no instruction with the first. If the two disagree, and go on disagreeing,
// this backend is broken and says so by dying: its heir has whole code, and nothing was committed.
//
// The guest may change its memory between two looks, and must not be able to end a backend by it: one look in which
// both agree settles the matter as a refusal, and the times of the looks are not the guest's to know.
//
// Thread: the shard's owner.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "vhost-net-backend/guest_memory.hpp"

namespace tandem {

/// What a chain has to offer to be good.
struct ChainNeed {
  bool writable = false;
  std::uint64_t least = 0;  ///< bytes it must hold
  std::uint64_t most = 0;   ///< bytes it may hold
  std::uint64_t look = 0;   ///< bytes from which on the rest of the chain does not matter
};

/// Whether the chain at `position`, with `taken` ring slots taken before it in this burst, is good; reads every
/// descriptor once. SplitQueue or PackedQueue.
template <class Queue>
bool chain_is_good(const GuestMemory& memory, const Queue& queue, std::uint16_t position, std::uint32_t taken,
                   const ChainNeed& need);
/// Whether what the driver has made available at `next_avail` can be true.
template <class Queue>
bool supply_is_plausible(const Queue& queue, std::uint16_t next_avail, std::uint16_t next_used);

/// Some cycles of which the guest does not know how many.
void wait_a_moment();

/// Returns if the refusal stands. `refused` asks the first opinion again, `good` the second.
template <class Refused, class Good>
void confirm_refusal(Refused refused, Good good) {
  constexpr int kLooks = 64;
  for (int i = 0; i < kLooks; ++i) {
    if (!good()) return;
    wait_a_moment();
    if (!refused()) return;  // the guest has changed it since; the refusal stands, for it was bad then
    wait_a_moment();
  }
  std::abort();
}

}  // namespace tandem
