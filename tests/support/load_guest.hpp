// SPDX-License-Identifier: Apache-2.0
// LoadGuest: a guest at full speed: several queue pairs of a ScriptedFrontEnd, driven without a test framework in the
// way.
//
// Setting up and taking down are the front end's and fail as Catch2's assertions do (main thread); send(), receive()
// and publish() may run in another thread, one at a time, and only count what is wrong.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "tests/support/guest_rings.hpp"
#include "tests/support/scripted_front_end.hpp"

namespace tandem::test {

class LoadGuest {
 public:
  /// Each buffer has a page of its own, so that pages can be taken from under single buffers.
  static constexpr std::uint32_t kSlotBytes = 4096;
  static constexpr std::uint32_t kRingSize = 512;
  static constexpr std::uint32_t kSlots = 256;

  /// Connects to a NIC's socket, starts the device, with packed rings (in order) or split ones, and posts receive buffers.
  LoadGuest(const std::string& socket, std::uint32_t queue_pairs, bool packed = false);

  /// Queues a frame that `write` puts into the room it is given; false: no room. Visible after publish().
  bool send(std::uint32_t pair, const std::function<std::size_t(std::span<std::byte>)>& write);
  /// Makes what was queued visible and kicks if the device wants it.
  void publish(std::uint32_t pair);
  /// Hands all frames that arrived to `take` and gives their buffers back to the device.
  std::size_t receive(std::uint32_t pair, const std::function<void(std::span<const std::byte>)>& take);

  /// While set, the page of a receive buffer is given back to the kernel before the device gets the buffer again: the
  /// device is then the first to touch it, and is charged for it.
  void return_pages(bool on) { return_pages_.store(on, std::memory_order_relaxed); }

  [[nodiscard]] std::uint32_t queue_pairs() const { return static_cast<std::uint32_t>(pairs_.size()); }
  [[nodiscard]] bool packed() const { return front_end_.packed(); }
  /// Used entries that named no chain of ours, impossible lengths, chains returned empty.
  [[nodiscard]] std::uint64_t ring_errors() const { return ring_errors_.load(std::memory_order_relaxed); }
  [[nodiscard]] ScriptedFrontEnd& front_end() { return front_end_; }
  /// Bytes that nobody but the driver may write and that are not as it left them: descriptors, avail rings, the room
  /// between and behind buffers, and packets it had sent. Of packed rings, where the device gives a chain back by
  /// overwriting a descriptor, not the descriptors. Not beside send() and receive().
  std::uint64_t damaged_bytes();
  /// How the rings stand, in words.
  [[nodiscard]] std::string describe();
  /// Guest address of a buffer.
  [[nodiscard]] static std::uint64_t slot_address(std::uint32_t vring, std::uint32_t slot);

 private:
  struct Pair {
    Pair(const GuestSpace& space, std::uint32_t index, bool packed);
    GuestQueue receive, transmit;
    std::uint32_t index;
    std::uint32_t receive_bytes;                               // of each receive buffer
    std::vector<std::uint16_t> receive_slot_of, send_slot_of;  // by head
    std::vector<std::uint16_t> free_send_slots;
    std::vector<std::uint32_t> sent_crc;  // by send slot: of what the device is to read
    std::vector<std::uint32_t> sent_length;
  };
  // The driver's private copy of what it wrote into one split ring.
  struct Shadow {
    std::vector<vring_desc> descriptors;
    std::vector<std::uint16_t> avail;
  };
  void remember(const GuestQueue& queue, std::uint32_t vring, std::uint16_t head);
  void fill_canaries();
  template <class Visitor>
  void for_each_canary(Visitor visit);
  void post(Pair& pair, std::uint16_t slot);
  void reclaim(Pair& pair);
  void kick(std::uint32_t vring);
  void count_error() { ring_errors_.fetch_add(1, std::memory_order_relaxed); }

  ScriptedFrontEnd front_end_;
  GuestSpace space_;
  std::vector<Pair> pairs_;
  std::vector<Shadow> shadows_;  // by vring
  std::uint64_t damaged_packets_ = 0;
  std::vector<std::byte> joined_;  // a frame out of several buffers
  std::atomic<bool> return_pages_{false};
  std::atomic<std::uint64_t> ring_errors_{0};
};

}  // namespace tandem::test
