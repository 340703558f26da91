// SPDX-License-Identifier: Apache-2.0
// What staging a burst takes, whichever way it goes: where in a ring it stands, what it calls into the cache, how it
// copies, and its list of used elements. Part of queue_pair.cpp, which alone includes it. Thread: the shard's owner.
#pragma once

#include <rte_memcpy.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/layout/redo_record.hpp"
#include "vhost-net-backend/guest_memory.hpp"

namespace tandem {

inline constexpr std::uint32_t kShortestFrame = 14;  // an Ethernet header; less is no packet

// How far a burst has come in a ring.
struct Progress {
  std::uint16_t position;   ///< where the next chain begins
  std::uint32_t slots = 0;  ///< taken since the burst began
};

// The C library's is better for long ones, and its call costs more than a short one.
template <std::size_t kLongestInline = 256>
[[gnu::always_inline]] inline void copy_packet(std::byte* to, const std::byte* from, std::size_t size) {
  if (size <= kLongestInline) [[likely]]
    rte_memcpy(to, from, size);
  else
    std::memcpy(to, from, size);
}

// So many chains ahead of the one in hand, buffers are called into the cache: they come from the guest's CPU.
inline constexpr std::uint32_t kAhead = 4;

// For each chain of a burst, before it is read.
template <class Queue>
class Lookahead {
 public:
  /// The burst begins at `position`; all references are kept.
  Lookahead(const GuestMemory& memory, const Queue& queue, const typename Queue::Supply& supply, bool writable,
            std::uint16_t position)
      : memory_(memory), queue_(queue), supply_(supply), writable_(writable), ahead_{position} {}
  // The burst is at `at`. A chain takes one slot or more, so a chain of several is looked at too late rather than
  // twice.
  void at(const Progress& at) {
    while (ahead_.slots < at.slots + kAhead) {
      if (ahead_.slots < at.slots) ahead_ = at;
      if (!supply_.has(ahead_.position, ahead_.slots)) return;
      const std::uint64_t address = queue_.glance(ahead_.position);
      if (writable_)
        memory_.prefetch_window(address);
      else
        memory_.prefetch_view(address);
      ahead_ = {queue_.next(ahead_.position, 1), ahead_.slots + 1};
    }
  }

 private:
  const GuestMemory& memory_;
  const Queue& queue_;
  const typename Queue::Supply& supply_;
  bool writable_;
  Progress ahead_;
};

// A chain that was walked, as far as giving it back goes.
struct Walked {
  std::uint16_t id;
  std::uint16_t slots;
  bool ended;  ///< false: it has no end, so nobody knows where the next one begins
};

template <class Chain>
Walked walk_to_end(Chain& chain) {
  const bool ended = chain.finish();
  return {chain.id(), chain.slots(), ended};
}

// Made as one word, for one store: the checksum reads it back in one load right afterwards, which would wait for
// several smaller stores.
inline RedoUsed used_element(const Walked& chain, std::uint32_t length) {
  return std::bit_cast<RedoUsed>(std::uint64_t{chain.id} | std::uint64_t{chain.slots} << 16 |
                                 std::uint64_t{length} << 32);
}
// `record`: a RedoRecord, or the RedoDestination in it.
template <class Record>
void add_used(Record& record, const Walked& chain, std::uint32_t length) {
  record.used[record.used_count++] = used_element(chain, length);
}

}  // namespace tandem
