// SPDX-License-Identifier: Apache-2.0
// The kernel's side of rings that no kernel serves: uplinks for measurement, played by the owner of the rings.
//
// A take from one ring is a put on another, so their indices move in lockstep: TX consumer with completion producer,
// fill consumer with RX producer, and with kLoopback all four. One of them (`begin` below) says how far all are, and
// the others are set to it. An owner that dies in between leaves them apart. The next one begins with this function, as
// notify_all() and every round of the poll loop do: it makes the same entries once more, from TX and fill entries that
// nobody could change since, and sets the same indices. So these uplinks neither lose nor repeat a frame either.
#include <algorithm>
#include <cstring>

#include "vhost-net-backend/xsk_port.hpp"

namespace tandem {

void XskPort::play_kernel() const {
  if ((description_.flags & XskDescription::kLoopback) != 0) return play_loopback();
  play_transmit();
  if ((description_.flags & XskDescription::kSource) != 0) play_source();
}

void XskPort::play_transmit() const {
  const std::uint32_t begin = completion.producer();
  // More than a ring holds means that the index was damaged.
  const std::uint32_t end = begin + std::min(tx.producer() - begin, tx.size());
  for (std::uint32_t i = begin; i != end; ++i) completion.at(i) = tx.at(i).addr;
  if (begin != end) completion.publish(end);
  if (tx.consumer() != end) tx.consume(end);
}

void XskPort::play_source() const {
  const std::uint32_t begin = rx.producer();
  const std::uint32_t end = begin + std::min(fill.producer() - begin, fill.size());
  for (std::uint32_t i = begin; i != end; ++i)
    rx.at(i) = {frame_start(fill.at(i)) + kXskKernelHeadroom, description_.source_length, 0};
  if (begin != end) rx.publish(end);
  if (fill.consumer() != end) fill.consume(end);
}

void XskPort::play_loopback() const {
  const std::uint32_t begin = completion.producer();
  const std::uint32_t sent = std::min(tx.producer() - begin, tx.size());
  const std::uint32_t end = begin + std::min({sent, fill.producer() - begin, fill.size()});
  for (std::uint32_t i = begin; i != end; ++i) {
    const xdp_desc& from = tx.at(i);
    const std::uint64_t to = frame_start(fill.at(i)) + kXskKernelHeadroom;
    const std::byte* packet = frame(from.addr, from.len);
    std::byte* room = frame(to, description_.max_packet);
    // A damaged entry still takes its place, or the indices would part: a frame of no length, which is dropped.
    const bool good = packet != nullptr && room != nullptr && from.len <= description_.max_packet;
    if (good) std::memcpy(room, packet, from.len);
    rx.at(i) = {to, good ? from.len : 0, 0};
    completion.at(i) = from.addr;
  }
  if (begin != end) {
    rx.publish(end);
    completion.publish(end);
  }
  if (fill.consumer() != end) fill.consume(end);
  if (tx.consumer() != end) tx.consume(end);
}

}  // namespace tandem
