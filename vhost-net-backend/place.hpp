// SPDX-License-Identifier: Apache-2.0
// To a guest: packets placed into the buffers of a receive virtqueue, one or several each. Part of queue_pair.cpp,
// which alone includes it. Needs WindowOpen. Thread: the shard's owner.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "vhost-net-backend/burst.hpp"
#include "vhost-net-backend/descriptor_chain.hpp"
#include "vhost-net-backend/offload.hpp"
#include "vhost-net-backend/protection.hpp"
#include "vhost-net-backend/queue_pair.hpp"
#include "vhost-net-backend/second_opinion.hpp"

namespace tandem {

// struct virtio_net_hdr_mrg_rxbuf (Virtio 1.2, 5.1.6; linux/virtio_net.h is C only): num_buffers follows a NetHeader.
inline constexpr std::uint32_t kLongHeader = 12;
inline constexpr std::uint32_t kBuffersAt = sizeof(NetHeader);
inline constexpr NetHeader kNoOffload{};

// Writes header and packet into one receive chain's buffers, as far as they go. Returns bytes written (header
// included).
template <class Queue>
class Scatter {
 public:
  Scatter(const GuestMemory& memory, const Queue& queue, std::uint16_t position, std::uint32_t taken)
      : memory_(memory), chain_(memory, queue, position, /*writable=*/true, taken) {}
  // For giving it back.
  [[nodiscard]] typename Queue::Chain& chain() { return chain_; }

  // Appends `size` bytes; returns how many found room.
  std::size_t write(const std::byte* data, std::size_t size) {
    std::size_t done = 0;
    while (done < size) {
      if (span_.size() == used_ && !advance()) break;
      const std::size_t copy = std::min(size - done, span_.size() - used_);
      copy_packet(span_.data() + used_, data + done, copy);
      used_ += copy;
      done += copy;
    }
    return done;
  }
  [[nodiscard]] ChainFault fault() const { return fault_ != ChainFault::kNone ? fault_ : chain_.fault(); }
  // The next `size` bytes, to be written by the caller, if they are in one piece.
  [[nodiscard]] std::byte* take_whole(std::size_t size) {
    if ((span_.size() == used_ && !advance()) || span_.size() - used_ < size) return nullptr;
    used_ += size;
    return span_.data() + used_ - size;
  }
  // Where the next byte would go; for the header of which one field is patched later.
  [[nodiscard]] std::byte* position() {
    if (span_.size() == used_ && !advance()) return nullptr;
    return span_.data() + used_;
  }

 private:
  bool advance() {
    if (left_ == 0) {
      std::uint32_t length = 0;
      if (!chain_.next(address_, length)) return false;
      left_ = length;
    }
    span_ = memory_.authorize_some(address_, left_);
    used_ = 0;
    if (span_.size() == 0) {
      fault_ = ChainFault::kAddress;
      return false;
    }
    must_hold(memory_.is_window_of(span_.data(), address_));
    address_ += span_.size();
    left_ -= span_.size();
    return true;
  }

  const GuestMemory& memory_;
  typename Queue::Chain chain_;
  WritableSpan span_;
  std::size_t used_ = 0;
  std::uint64_t address_ = 0;
  std::uint64_t left_ = 0;
  ChainFault fault_ = ChainFault::kNone;
};

// One receive chain with as much of a packet as found room.
template <class Queue>
struct Filled {
  // `header`: what the packet begins with; nullptr: this chain goes on with it.
  Filled(QueuePair& pair, const Queue& queue, const Progress& at, const NetHeader* header, const std::byte* packet,
         std::uint32_t length)
      : scatter(*pair.memory, queue, at.position, at.slots) {
    std::byte* whole = header != nullptr ? scatter.take_whole(std::size_t{pair.header_size} + length) : nullptr;
    if (whole != nullptr) [[likely]] {
      std::memcpy(whole, header, sizeof *header);
      if (pair.header_size == kLongHeader) std::memset(whole + kBuffersAt, 0, kLongHeader - kBuffersAt);
      buffers_field = {whole + kBuffersAt, whole + kBuffersAt + 1};
      copy_packet(whole + pair.header_size, packet, length);
      written = pair.header_size;
      copied = length;
    } else if (header != nullptr) {
      // num_buffers, the last two bytes of 12, is known only at the end.
      written = static_cast<std::uint32_t>(scatter.write(reinterpret_cast<const std::byte*>(header), sizeof *header));
      for (std::uint32_t i = kBuffersAt; i < pair.header_size && written == i; ++i) {
        static constexpr std::byte kZero{};
        buffers_field[i - kBuffersAt] = scatter.position();
        written += static_cast<std::uint32_t>(scatter.write(&kZero, 1));
      }
      complete = written == pair.header_size;
    }
    if (complete && whole == nullptr) copied = static_cast<std::uint32_t>(scatter.write(packet, length));
    written += copied;
    ended = scatter.chain().finish();
  }
  // Nothing of it can be used; a chain that holds nothing is no help to a packet that needs room.
  [[nodiscard]] bool bad() const { return !complete || scatter.fault() != ChainFault::kNone || written == 0; }

  Scatter<Queue> scatter;
  std::array<std::byte*, sizeof(std::uint16_t)> buffers_field{};  ///< of the header
  std::uint32_t written = 0;                                      ///< bytes, header included
  std::uint32_t copied = 0;                                       ///< bytes of the packet
  bool complete = true;                                           ///< the header is in, if this chain was to have it
  bool ended = false;                                             ///< the chain has an end
};

// Before a receive chain is refused: as bad, or, with `all`, as one that does not hold the whole packet.
template <class Queue>
void confirm_bad_receive(QueuePair& pair, const Queue& queue, const Progress& at, const NetHeader* net,
                         const std::byte* packet, std::uint32_t length, bool all) {
  const std::uint64_t header = net != nullptr ? pair.header_size : 0;
  constexpr std::uint64_t kAny = ~std::uint64_t{0};
  const ChainNeed need{.writable = true,
                       .least = all ? header + length : std::max<std::uint64_t>(header, 1),
                       .most = kAny,
                       .look = header + length};
  confirm_refusal(
      [&] {
        const Filled<Queue> again(pair, queue, at, net, packet, length);
        return !again.ended || again.bad() || (all && again.copied < length);
      },
      [&] { return !pair.memory->faulted() && chain_is_good(*pair.memory, queue, at.position, at.slots, need); });
}

enum class Placed { kDone, kNoBuffers, kNoRecordRoom, kBadChain, kTooLarge, kEndless };

// Into as many chains as the packet takes: the general way of place().
template <class Queue, class Record>
[[gnu::noinline]] Placed place_in_chains(QueuePair& pair, Record& record, const Queue& queue,
                                         const typename Queue::Supply& supply, const NetHeader& header,
                                         const std::byte* packet, std::uint32_t length, Progress& at) {
  const std::uint16_t first_used = record.used_count;
  const Progress begin = at;
  // The packet is given up, and what it had taken goes back empty: partly written, and the ring's order must be kept.
  const auto give_back_empty = [&record, first_used] {
    for (std::uint32_t i = first_used; i < record.used_count; ++i) record.used[i].length = 0;
  };
  std::array<std::byte*, sizeof(std::uint16_t)> buffers_field{};
  std::uint32_t buffers = 0;
  std::uint32_t done = 0;
  do {
    if (buffers > 0 && !pair.mergeable) {
      confirm_bad_receive(pair, queue, begin, &header, packet, length, true);
      give_back_empty();
      return Placed::kTooLarge;
    }
    if (!supply.has(at.position, at.slots)) {
      record.used_count = first_used;
      return Placed::kNoBuffers;
    }
    if (record.used_count == std::size(record.used)) {
      record.used_count = first_used;
      at = begin;
      return first_used == 0 ? Placed::kTooLarge : Placed::kNoRecordRoom;
    }
    const NetHeader* const net = buffers == 0 ? &header : nullptr;
    Filled<Queue> filled(pair, queue, at, net, packet + done, length - done);
    if (!filled.ended || filled.bad()) [[unlikely]]
      confirm_bad_receive(pair, queue, at, net, packet + done, length - done, false);
    if (buffers == 0) buffers_field = filled.buffers_field;
    done += filled.copied;
    if (!filled.ended) {
      record.used_count = first_used;
      at = begin;
      return Placed::kEndless;
    }
    const auto& chain = filled.scatter.chain();
    add_used(record, {chain.id(), chain.slots(), true}, filled.written);
    at = {queue.next(at.position, chain.slots()), at.slots + chain.slots()};
    if (filled.bad()) {
      give_back_empty();
      return Placed::kBadChain;
    }
    ++buffers;
  } while (done < length);
  if (pair.header_size == kLongHeader) {
    // num_buffers, little endian with VERSION_1; guest-endian before, which is little endian on every host Tandem runs
    // on.
    *buffers_field[0] = static_cast<std::byte>(buffers & 0xffu);
    *buffers_field[1] = static_cast<std::byte>(buffers >> 8);
  }
  return Placed::kDone;
}

// A packet that takes one buffer, with its header of `size` bytes in front, to where the buffer is.
[[gnu::always_inline]] inline void write_whole(std::byte* to, std::uint32_t size, const NetHeader& header,
                                               const std::byte* packet, std::uint32_t length) {
  std::memcpy(to, &header, sizeof header);
  if (size == kLongHeader) {
    static constexpr std::array<std::byte, sizeof(std::uint16_t)> kOneBuffer{std::byte{1}};  // little endian, see above
    std::memcpy(to + kBuffersAt, kOneBuffer.data(), sizeof kOneBuffer);
  }
  copy_packet(to + size, packet, length);
}

// Header and packet into one buffer that lies in one region, which is what mostly happens. False if it is not so, or
// not good, or there is none: then the general way finds out.
template <class Queue, class Record>
[[gnu::always_inline]] inline bool place_whole(const QueuePair& pair, Record& record, const Queue& queue,
                                               const typename Queue::Supply& supply, const NetHeader& header,
                                               const std::byte* packet, std::uint32_t length, Progress& at) {
  if (!supply.has(at.position, at.slots) || record.used_count == std::size(record.used)) return false;
  const auto buffer = Queue::Chain::single(queue, at.position, /*writable=*/true);
  const std::uint32_t whole = pair.header_size + length;
  if (!buffer || buffer->length < whole) return false;
  const WritableSpan window = pair.memory->authorize_some(buffer->address, whole);
  if (window.size() < whole) return false;
  must_hold(pair.memory->is_window_of(window.data(), buffer->address));
  write_whole(window.data(), pair.header_size, header, packet, length);
  add_used(record, {buffer->id, 1, true}, whole);
  at = {queue.next(at.position, 1), at.slots + 1};
  return true;
}

// Places one packet into receive buffers from `at` on, and adds used elements to the record. Moves `at` past what was
// used up, whatever the result; after kNoBuffers it stands where there were none. `record`: a RedoRecord, or the
// RedoDestination in it.
template <class Queue, class Record>
[[gnu::always_inline]] inline Placed place(QueuePair& pair, Record& record, const Queue& queue,
                                           const typename Queue::Supply& supply, const NetHeader& header,
                                           const std::byte* packet, std::uint32_t length, Progress& at) {
  if (place_whole(pair, record, queue, supply, header, packet, length, at)) [[likely]]
    return Placed::kDone;
  return place_in_chains(pair, record, queue, supply, header, packet, length, at);
}

}  // namespace tandem
