// SPDX-License-Identifier: Apache-2.0
// From a guest: packets of a transmit virtqueue, gathered from their chains into memory of our own, with what their
// driver asks for checked and done. Part of queue_pair.cpp, which alone includes it; what refuses a packet asks for a
// second opinion first. Thread: the shard's owner.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>

#include "vhost-net-backend/burst.hpp"
#include "vhost-net-backend/descriptor_chain.hpp"
#include "vhost-net-backend/offload.hpp"
#include "vhost-net-backend/protection.hpp"
#include "vhost-net-backend/queue_pair.hpp"
#include "vhost-net-backend/second_opinion.hpp"

namespace tandem {

// Hands out transmit frames that are neither busy nor given out in this burst, the lowest first: those that came back a
// moment ago, which are in the cache. It passes over each word of the bitmap once, so that a frame staged but not yet
// marked is never met again.
class FramePicker {
 public:
  explicit FramePicker(const QueuePair& pair)
      : busy_(pair.state->transmit_busy), words_(pair.port->description().tx_frames / 64) {}
  /// A free frame, or kTransmitFrames if there is none. The frame counts as given out only after take().
  std::uint32_t peek() {
    for (; word_ < words_; ++word_, taken_ = 0) {
      const std::uint64_t free = ~(busy_[word_] | taken_);
      if (free != 0) return word_ * 64 + static_cast<std::uint32_t>(std::countr_zero(free));
    }
    return kTransmitFrames;
  }
  void take(std::uint32_t frame) { taken_ |= std::uint64_t{1} << (frame % 64); }

 private:
  const std::uint64_t* busy_;
  std::uint32_t words_;
  std::uint32_t word_ = 0;
  std::uint64_t taken_ = 0;
};

// A packet that leaves a guest: our own copy of it, and of what its driver asks for.
struct Outgoing {
  std::byte* bytes = nullptr;  ///< room for one frame; once gathered, the packet: there, or in staging if it is large
  std::uint32_t length = 0;
  NetHeader header{};
  bool large = false;  ///< its driver wants it to be segmented, so it may be longer than a frame
};

// Takes `size` bytes of the virtio header, of which `seen` were taken before. Once it is whole, it decides where the
// packet goes. Returns how many bytes the packet may have.
inline std::uint32_t take_header(const QueuePair& pair, Outgoing& packet, const std::byte* from, std::uint32_t seen,
                                 std::uint32_t size) {
  if (seen == 0 && size >= sizeof packet.header) [[likely]]
    std::memcpy(&packet.header, from, sizeof packet.header);
  else if (seen < sizeof packet.header)
    std::memcpy(reinterpret_cast<std::byte*>(&packet.header) + seen, from,
                std::min<std::size_t>(size, sizeof packet.header - seen));
  if (seen + size == pair.header_size && packet.header.gso_type != kGsoNone && pair.asked.bits != 0) [[unlikely]] {
    packet.large = true;
    packet.bytes = pair.staging;
    return kLargestPacket;
  }
  return pair.port->description().max_packet;
}

// Header and packet in one buffer, and that in one region, and not to be segmented: what today's drivers mostly do.
// False if it is not so, or not good: then the general way, below, finds out.
[[gnu::always_inline]] inline bool gather_whole(const QueuePair& pair, std::uint64_t address, std::uint32_t length,
                                                Outgoing& packet) {
  const std::uint32_t header = pair.header_size;
  if (length < header + kShortestFrame || length - header > pair.port->description().max_packet) return false;
  const std::byte* piece = pair.memory->view(address, length);
  if (piece == nullptr) return false;
  must_hold(pair.memory->is_view_of(piece, address));
  std::memcpy(&packet.header, piece, sizeof packet.header);
  if (packet.header.gso_type != kGsoNone) [[unlikely]]
    return false;
  packet.length = length - header;
  copy_packet(packet.bytes, piece + header, packet.length);
  return true;
}

// Copies a transmit chain's packet to where `packet` says, and its header. Sets `fault` if it is refused, and no
// length.
template <class Chain>
void gather(QueuePair& pair, Chain& chain, Outgoing& packet, ChainFault& fault) {
  std::uint32_t room = 0;
  std::uint32_t header = 0;  // bytes of it seen; it may span several descriptors
  std::uint32_t filled = 0;
  std::uint64_t address = 0;
  std::uint32_t length = 0;
  fault = ChainFault::kNone;
  while (chain.next(address, length)) {
    // A chain is good or bad as a whole: also what is not copied must lie in memory.
    std::uint64_t at = address;
    std::uint64_t left = length;
    while (left > 0) {
      const std::span<const std::byte> piece = pair.memory->view_some(at, left);
      if (piece.empty()) {
        fault = ChainFault::kAddress;
        return;
      }
      must_hold(pair.memory->is_view_of(piece.data(), at));
      std::size_t jump = 0;
      if (header < pair.header_size) {
        jump = std::min<std::size_t>(pair.header_size - header, piece.size());
        room = take_header(pair, packet, piece.data(), header, static_cast<std::uint32_t>(jump));
        header += static_cast<std::uint32_t>(jump);
      }
      const std::size_t copy = piece.size() - jump;
      if (copy > room - filled) {
        fault = ChainFault::kTooLong;
        return;
      }
      copy_packet(packet.bytes + filled, piece.data() + jump, copy);
      filled += static_cast<std::uint32_t>(copy);
      at += piece.size();
      left -= piece.size();
    }
  }
  fault = chain.fault();
  if (fault == ChainFault::kNone && (header < pair.header_size || filled < kShortestFrame))
    fault = ChainFault::kTooShort;
  if (fault == ChainFault::kNone) packet.length = filled;
}

// Whatever the chain at `at` is like: the general way of gather_next().
template <class Queue>
[[gnu::noinline]] Walked gather_chain(QueuePair& pair, const Queue& queue, const Progress& at, Outgoing& packet,
                                      ChainFault& fault) {
  typename Queue::Chain chain(*pair.memory, queue, at.position, /*writable=*/false, at.slots);
  gather(pair, chain, packet, fault);
  return walk_to_end(chain);
}

// Gathers the packet at `at`, as gather() does.
template <class Queue>
[[gnu::always_inline]] inline Walked gather_next(QueuePair& pair, const Queue& queue, const Progress& at,
                                                 Outgoing& packet, ChainFault& fault) {
  const auto buffer = Queue::Chain::single(queue, at.position, /*writable=*/false);
  if (buffer && gather_whole(pair, buffer->address, buffer->length, packet)) [[likely]] {
    fault = ChainFault::kNone;
    return {buffer->id, 1, true};
  }
  return gather_chain(pair, queue, at, packet, fault);
}

// The chain at `at`, whose packet nobody looks at.
template <class Queue>
[[gnu::noinline]] Walked pass_over(const QueuePair& pair, const Queue& queue, const Progress& at) {
  typename Queue::Chain chain(*pair.memory, queue, at.position, /*writable=*/false, at.slots);
  return walk_to_end(chain);
}

// Whether there is something to do about a packet that was gathered.
inline bool wants_offload(const QueuePair& pair, const Outgoing& packet) {
  return asks_for_offload(packet.header) && pair.asked.bits != 0;
}

// The neighbour that a packet goes to. `packet` is our own copy: what is looked at here is what is delivered.
inline QueuePair* find_neighbour(const QueuePair& pair, const std::byte* packet) {
  const std::uint64_t mac = mac_word(packet);
  for (const Neighbour& neighbour : pair.neighbours)
    if (neighbour.mac == mac) return neighbour.pair;
  return nullptr;
}

// Before a transmit chain is refused. `large`: of the packet that was gathered.
template <class Queue>
void confirm_bad_transmit(QueuePair& pair, const Queue& queue, const Progress& at, std::uint32_t frame, bool large) {
  const std::uint64_t header = pair.header_size;
  std::byte* bytes = pair.port->frame(pair.port->transmit_address(frame), pair.port->description().frame_size);
  confirm_refusal(
      [&] {
        ChainFault fault = ChainFault::kNone;
        typename Queue::Chain again(*pair.memory, queue, at.position, /*writable=*/false, at.slots);
        Outgoing packet{bytes};
        gather(pair, again, packet, fault);
        large = packet.large;  // or a guest that changes its mind would make the two disagree
        return !again.finish() || fault != ChainFault::kNone;
      },
      [&] {
        const std::uint64_t most = header + (large ? kLargestPacket : pair.port->description().max_packet);
        const ChainNeed need{.writable = false, .least = header + kShortestFrame, .most = most, .look = most + 1};
        return !pair.memory->faulted() && chain_is_good(*pair.memory, queue, at.position, at.slots, need);
      });
}

// What a packet of this pair may ask for, whoever it is for.
inline OffloadLimits limits_of(const QueuePair& pair) {
  return {pair.port->description().max_packet, most_segments(*pair.port)};
}

// The request of a packet; nothing, confirmed, if it cannot be honoured. Both opinions look at our own copy, so a guest
// cannot make them disagree.
inline std::optional<Offload> find_offload(const QueuePair& pair, const Outgoing& packet) {
  const std::span<const std::byte> bytes{packet.bytes, packet.length};
  std::optional<Offload> found = check_offload(packet.header, pair.asked, bytes, limits_of(pair));
  if (!found) [[unlikely]]
    confirm_refusal([&] { return !check_offload(packet.header, pair.asked, bytes, limits_of(pair)); },
                    [&] { return offload_is_good(packet.header, pair.asked, bytes, limits_of(pair)); });
  return found;
}

// Cuts a packet into frames and adds them to the record, all or none. False: there are not enough of them now. `room`:
// entries that the TX ring and the record have for this burst.
inline bool stage_segments(QueuePair& pair, FramePicker& frames, std::uint32_t room, const Outgoing& packet,
                           const Offload& offload) {
  RedoRecord& record = pair.shard->record;
  XskPort& port = *pair.port;
  if (offload.segments > room - record.frame_count) return false;
  RedoFrame* const first = record.frames + record.frame_count;
  for (std::uint32_t n = 0; n < offload.segments; ++n) {
    const std::uint32_t frame = frames.peek();
    if (frame == kTransmitFrames) return false;
    frames.take(frame);
    first[n] = {static_cast<std::uint32_t>(port.transmit_address(frame)), segment_length(offload, packet.length, n)};
  }
  for (std::uint32_t n = 0; n < offload.segments; ++n)
    write_segment(offload, {packet.bytes, packet.length}, n, port.frame(first[n].address, first[n].length));
  record.frame_count = static_cast<std::uint16_t>(record.frame_count + offload.segments);
  return true;
}

}  // namespace tandem
