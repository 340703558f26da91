// SPDX-License-Identifier: Apache-2.0
// A run of plain packets: each in one direct descriptor, whole in one region of guest memory, with nothing asked of us
// but to carry it. That is what today's drivers mostly send and offer, so a burst takes as many of them as come first,
// in stages over all of them instead of packet by packet: descriptors are read and buffers called into the cache, then
// payload is copied while nothing waits for memory. The first packet that is not plain ends the run, whatever is wrong
// with it: the general way (gather.hpp, place.hpp) begins there, in the same burst, and finds out.
//
// Only for a queue pair without suspects. Part of queue_pair.cpp, which alone includes it. Thread: the shard's owner.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vhost-net-backend/burst.hpp"
#include "vhost-net-backend/descriptor_chain.hpp"
#include "vhost-net-backend/gather.hpp"
#include "vhost-net-backend/place.hpp"
#include "vhost-net-backend/poison.hpp"
#include "vhost-net-backend/probe.hpp"
#include "vhost-net-backend/protection.hpp"
#include "vhost-net-backend/queue_pair.hpp"

namespace tandem {

// Where one packet is, or is to go: one buffer of the guest.
template <class Byte>
struct PlainBuffer {
  Byte* bytes;
  std::uint64_t address;  ///< that the guest gave for it
  std::uint32_t length;
  std::uint16_t id;
};

// The buffer at `position`, if it is plain and has `least` bytes at least.
template <class Queue, class Translator>
[[gnu::always_inline]] inline bool find_plain(const Queue& queue, Translator& translator, std::uint16_t position,
                                              std::uint32_t least, bool writable, auto& found) {
  const auto buffer = Queue::Chain::single(queue, position, writable);
  if (!buffer || buffer->length < least) return false;
  // Of a buffer to be written, what is written; of one to be read, all of it.
  const std::uint32_t length = writable ? least : buffer->length;
  found = {translator.find(buffer->address, length), buffer->address, length, buffer->id};
  return found.bytes != nullptr;
}

// Whether each address was translated rightly, worked out once more.
template <class Byte, class Translator>
[[gnu::always_inline]] inline bool are_translated(PlainBuffer<Byte>* buffers, std::uint32_t count,
                                                  const Translator& translator) {
  bool right = true;
  for (std::uint32_t i = 0; i < count; ++i) right &= translator.confirms(buffers[i].bytes, buffers[i].address);
  return right;
}

// Of buffer `n`, if a run of `count` has it: calls what lies between its first line and its last into the cache. Two
// packets before it is copied (the first two of a run go without); more at a time only wait for each other (measured
// with 1, 2, 3, 4 and 32). To be read: as far as the CPU's own prefetching, which has to see a few lines first, comes
// too late. To be written: all, for each line has to be had for itself, from a guest's CPU, and nothing else asks for
// it in time.
inline constexpr std::uint32_t kAheadInRun = 2;
inline constexpr std::uint32_t kAheadToRead = 640;
template <class Byte>
[[gnu::always_inline]] inline void call_middle(const PlainBuffer<Byte>* buffers, std::uint32_t count, std::uint32_t n) {
  if (n >= count) return;
  const std::byte* const bytes = buffers[n].bytes;
  if constexpr (std::is_const_v<Byte>) {
    const std::uint32_t end = std::min(buffers[n].length, kAheadToRead);
    for (std::uint32_t at = 64; at < end; at += 64) __builtin_prefetch(bytes + at);
  } else {
    for (std::uint32_t at = 64; at < buffers[n].length; at += 64) GuestMemory::prefetch_to_write(bytes + at);
  }
}

// What a guest has to send: plain buffers from one position on.
struct SourceRun {
  PlainBuffer<const std::byte> buffers[kBurstPackets];
  std::uint32_t count = 0;
};

// Fills `run` from `at` on, with `most` buffers at most, and calls them into the cache.
template <class Queue>
[[gnu::always_inline]] inline void find_source_run(const QueuePair& pair, const Queue& queue,
                                                   const typename Queue::Supply& supply, Progress at,
                                                   std::uint32_t most, SourceRun& run) {
  const std::uint32_t header = pair.header_size, longest = header + pair.port->description().max_packet;
  GuestMemory::Reader reader(*pair.memory);
  for (; run.count < most && supply.has(at.position, at.slots); ++run.count) {
    take_in_hand(pair, PacketPhase::kTransmit, transmit_position(pair, at.position));
    PlainBuffer<const std::byte>& buffer = run.buffers[run.count];
    if (!find_plain(queue, reader, at.position, header + kShortestFrame, /*writable=*/false, buffer) ||
        buffer.length > longest)
      break;
    __builtin_prefetch(buffer.bytes);
    __builtin_prefetch(buffer.bytes + buffer.length - 1);
    at = {queue.next(at.position, 1), at.slots + 1};
  }
  must_hold(are_translated(run.buffers, run.count, reader));
}

// Whether its driver asks for more than that the packet be carried. Read once, from the guest's memory.
inline bool asks_for_more(const PlainBuffer<const std::byte>& buffer) {
  NetHeader wish;
  std::memcpy(&wish, buffer.bytes, sizeof wish);
  return asks_for_offload(wish);
}

// What is called into the cache in this way is copied faster without a call to the C library, up to a full frame.
inline constexpr std::size_t kLongestInlineCopy = 2048;

// Adds to the record what can be sent of the run that begins at `at`; `room` frames at most. Moves `at` past it.
// `kNeighbours`: as in transmit_from().
template <bool kNeighbours, class Queue>
void stage_plain_transmit(QueuePair& pair, const Queue& queue, const typename Queue::Supply& supply,
                          FramePicker& frames, std::uint32_t room, Progress& at) {
  const XskPort& port = *pair.port;
  const XskFrames numbers = port.transmit_frames();
  const std::uint32_t header = pair.header_size, frame_size = port.description().frame_size;
  SourceRun run;
  find_source_run(pair, queue, supply, at, std::min(room, kBurstPackets), run);
  RedoRecord& record = pair.shard->record;
  std::uint64_t bytes = 0;
  std::uint32_t done = 0;
  for (; done < run.count; ++done) {
    const PlainBuffer<const std::byte>& buffer = run.buffers[done];
    const std::uint32_t frame = frames.peek();
    if (frame == kTransmitFrames || asks_for_more(buffer)) [[unlikely]]
      break;
    take_in_hand(pair, PacketPhase::kTransmit, transmit_position(pair, queue.next(at.position, done)));
    const std::uint64_t address = numbers.address(frame);
    const std::uint32_t length = buffer.length - header;
    std::byte* const packet = port.frame(address, frame_size);
    call_middle(run.buffers, run.count, done + kAheadInRun);
    copy_packet<kLongestInlineCopy>(packet, buffer.bytes + header, length);
    TANDEM_PROBE_PACKET(packet, length);
    if constexpr (kNeighbours)
      if (done != 0 && find_neighbour(pair, packet) != nullptr) break;
    frames.take(frame);
    record.used[done] = used_element({buffer.id, 1, true}, 0);
    record.frames[done] = {static_cast<std::uint32_t>(address), length};
    bytes += length;
  }
  record.used_count = record.frame_count = static_cast<std::uint16_t>(done);
  record.packets_after += done;
  record.bytes_after += bytes;
  at = {queue.next(at.position, done), at.slots + done};
}

// Places what can be placed of the run that begins at `at` in the receive virtqueue of `to`, from `to_at` on, as long
// as its packets are for `to`, and adds it to both halves of the record. Straight from one guest to the other, but for
// where a packet goes: that is read once, and what was read is what is delivered. Moves `at` and `to_at` past it.
// Returns how many packets that were. Needs WindowOpen.
template <class Queue, class ToQueue>
std::uint32_t stage_plain_forward(QueuePair& pair, const Queue& queue, const typename Queue::Supply& supply,
                                  Progress& at, QueuePair& to, const ToQueue& to_queue,
                                  const typename ToQueue::Supply& buffers, Progress& to_at) {
  const std::uint32_t header = pair.header_size, to_header = to.header_size;
  SourceRun run;
  find_source_run(pair, queue, supply, at, kBurstPackets, run);
  PlainBuffer<std::byte> rooms[kBurstPackets];
  GuestMemory::Writer writer(*to.memory);
  std::uint32_t count = 0;
  for (Progress next = to_at; count < run.count && buffers.has(next.position, next.slots); ++count) {
    take_in_hand(pair, PacketPhase::kTransmit, transmit_position(pair, queue.next(at.position, count)));
    const std::uint32_t whole = run.buffers[count].length - header + to_header;
    if (!find_plain(to_queue, writer, next.position, whole, /*writable=*/true, rooms[count])) break;
    GuestMemory::prefetch_to_write(rooms[count].bytes);
    GuestMemory::prefetch_to_write(rooms[count].bytes + whole - 1);
    next = {to_queue.next(next.position, 1), next.slots + 1};
  }
  must_hold(are_translated(rooms, count, writer));
  RedoRecord& record = pair.shard->record;
  std::uint64_t bytes = 0;
  std::uint32_t done = 0;
  for (; done < count; ++done) {
    const PlainBuffer<const std::byte>& buffer = run.buffers[done];
    take_in_hand(pair, PacketPhase::kTransmit, transmit_position(pair, queue.next(at.position, done)));
    const std::byte* const packet = buffer.bytes + header;
    std::uint64_t first = 0;
    std::memcpy(&first, packet, sizeof first);
    asm volatile("" : "+r"(first));
    if (asks_for_more(buffer) || find_neighbour(pair, reinterpret_cast<const std::byte*>(&first)) != &to) break;
    const std::uint32_t length = buffer.length - header;
    std::byte* const room = rooms[done].bytes;
    call_middle(run.buffers, count, done + kAheadInRun);
    call_middle(rooms, count, done + kAheadInRun);
    write_whole(room, to_header, kNoOffload, packet, length);
    std::memcpy(room + to_header, &first, sizeof first);
    TANDEM_PROBE_PACKET(room + to_header, length);
    record.used[done] = used_element({buffer.id, 1, true}, 0);
    record.destination.used[done] = used_element({rooms[done].id, 1, true}, rooms[done].length);
    bytes += length;
  }
  RedoDestination& destination = record.destination;
  record.used_count = destination.used_count = static_cast<std::uint16_t>(done);
  record.packets_after += done;
  record.bytes_after += bytes;
  destination.packets_after += done;
  destination.bytes_after += bytes;
  at = {queue.next(at.position, done), at.slots + done};
  to_at = {to_queue.next(to_at.position, done), to_at.slots + done};
  return done;
}

// Places what can be placed of the `waiting` packets of the RX ring from `consumer` on, and adds it to the record.
// Moves `at` past it. Returns how many packets that were. Needs WindowOpen.
template <class Queue>
std::uint32_t stage_plain_receive(QueuePair& pair, const Queue& queue, const typename Queue::Supply& supply,
                                  std::uint32_t consumer, std::uint32_t waiting, Progress& at) {
  const XskPort& port = *pair.port;
  const XskRingView<xdp_desc> rx = port.rx;
  const std::uint32_t header = pair.header_size;
  RedoRecord& record = pair.shard->record;
  PlainBuffer<std::byte> run[kBurstPackets];
  const std::byte* packets[kBurstPackets];
  GuestMemory::Writer writer(*pair.memory);
  std::uint64_t bytes = 0;
  std::uint32_t count = 0;
  for (Progress next = at; count < waiting && supply.has(next.position, next.slots); ++count) {
    take_in_hand(pair, PacketPhase::kReceive, consumer + count);
    const xdp_desc& entry = rx.at(consumer + count);
    const std::uint32_t length = entry.len;
    const std::byte* packet = packets[count] = port.frame(entry.addr, length);
    PlainBuffer<std::byte>& buffer = run[count];
    if (packet == nullptr || length == 0 || !port.is_receive_frame(entry.addr) ||
        !find_plain(queue, writer, next.position, header + length, /*writable=*/true, buffer))
      break;
    GuestMemory::prefetch_to_write(buffer.bytes);
    GuestMemory::prefetch_to_write(buffer.bytes + buffer.length - 1);
    __builtin_prefetch(packet);
    record.used[count] = used_element({buffer.id, 1, true}, buffer.length);
    record.frames[count] = {static_cast<std::uint32_t>(port.frame_start(entry.addr)), 0};
    bytes += length;
    next = {queue.next(next.position, 1), next.slots + 1};
  }
  must_hold(are_translated(run, count, writer));
  for (std::uint32_t i = 0; i < count; ++i) {
    take_in_hand(pair, PacketPhase::kReceive, consumer + i);
    call_middle(run, count, i + kAheadInRun);
    const std::uint32_t length = run[i].length - header;
    TANDEM_PROBE_PACKET(packets[i], length);
    write_whole(run[i].bytes, header, kNoOffload, packets[i], length);
  }
  record.used_count = record.frame_count = static_cast<std::uint16_t>(count);
  record.packets_after += count;
  record.bytes_after += bytes;
  at = {queue.next(at.position, count), at.slots + count};
  return count;
}

}  // namespace tandem
