// SPDX-License-Identifier: Apache-2.0
// GuestNic: a guest's virtio-net driver, one queue pair of it: sends and receives packets through GuestQueues.
//
// Buffers are slots of a fixed size, one per ring entry, used in turn. How a packet is laid out over descriptors is a
// choice of the test (ChainStyle, cuts). Copyable and movable to a copy of the memory, like the queues. Thread: one at
// a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "tests/support/guest_rings.hpp"
#include "tests/support/packets.hpp"

namespace tandem::test {

enum class ChainStyle { kDirect, kChained, kIndirect };

struct NicShape {
  std::uint32_t queue_size = 64;
  std::uint32_t slot_size = 256;        ///< bytes of each buffer, virtio header included
  std::uint32_t receive_slot_size = 0;  ///< of each receive buffer, if it differs
  std::uint64_t features = 0;           ///< virtio feature bits, as negotiated
  ChainStyle transmit = ChainStyle::kDirect;
  ChainStyle receive = ChainStyle::kDirect;
  /// Where a chained or indirect buffer is cut into descriptors: byte offsets from its beginning, ascending. At most 7.
  std::vector<std::uint32_t> cuts = {7, 40};
  std::uint16_t first_index = 0;  ///< where avail and used indices begin, as GuestQueue::begin_at()

  [[nodiscard]] bool has(unsigned bit) const { return (features >> bit & 1u) != 0; }
  /// Virtio 1.2, 5.1.6: 12 bytes with VERSION_1 or MRG_RXBUF, else 10.
  [[nodiscard]] std::uint32_t header_size() const;
  [[nodiscard]] bool mergeable() const;
  [[nodiscard]] std::uint32_t receive_slot_bytes() const {
    return receive_slot_size != 0 ? receive_slot_size : slot_size;
  }
};

class GuestNic {
 public:
  /// Bytes of guest memory that a NIC of this shape takes.
  static std::uint64_t bytes(const NicShape& shape);
  GuestNic(const GuestSpace& space, std::uint64_t address, const NicShape& shape);
  void rebase(const GuestSpace& space);

  /// Queues a packet for sending; false when the ring is full. Not visible before transmit.publish(). `header`: what is
  /// asked of the device.
  bool send(std::span<const std::byte> packet, const NetHeaderBytes& header = {});
  /// Takes back what the device has sent. Returns the number of chains.
  std::uint32_t reap();
  /// Posts up to `most` receive buffers and publishes them; returns how many.
  std::uint32_t post(std::uint32_t most = ~0u);
  /// The next received packet, without its header, in `packet`. False when there is none. A chain that came back empty
  /// is counted and skipped.
  bool take(std::vector<std::byte>& packet);

  /// Of chains that are made from now on.
  void set_styles(ChainStyle transmit_style, ChainStyle receive_style) {
    shape_.transmit = transmit_style;
    shape_.receive = receive_style;
  }

  GuestQueue receive, transmit;

  /// Of the packet that take() gave last, without num_buffers.
  [[nodiscard]] const NetHeaderBytes& taken_header() const { return taken_header_; }
  [[nodiscard]] std::uint32_t empty_returns() const { return empty_returns_; }
  /// Headers or lengths that no device may write: num_buffers wrong, offload fields set that the driver
  /// does not take, longer than the buffer.
  [[nodiscard]] std::uint32_t protocol_errors() const { return protocol_errors_; }
  [[nodiscard]] std::uint64_t receive_slot(std::uint32_t slot) const {
    return receive_slots_ + slot * shape_.receive_slot_bytes();
  }
  [[nodiscard]] std::uint64_t transmit_slot(std::uint32_t slot) const {
    return transmit_slots_ + slot * shape_.slot_size;
  }
  [[nodiscard]] const NicShape& shape() const { return shape_; }

 private:
  std::vector<Piece>& cut(std::uint64_t address, std::uint32_t length, bool writable, ChainStyle style);
  std::optional<std::uint16_t> add(GuestQueue& queue, std::uint64_t slot, std::uint32_t length, bool writable,
                                   ChainStyle style, std::uint64_t table);
  void append(std::vector<std::byte>& packet, std::uint64_t slot, std::uint32_t skip, std::uint32_t length);

  NicShape shape_;
  const GuestSpace* space_;
  std::uint64_t receive_slots_, transmit_slots_, receive_tables_, transmit_tables_;
  std::uint32_t sent_ = 0;
  std::uint32_t posted_ = 0;
  std::vector<std::uint32_t> slot_of_;  // receive: by head
  std::vector<Piece> pieces_;
  std::uint32_t empty_returns_ = 0;
  std::uint32_t protocol_errors_ = 0;
  NetHeaderBytes taken_header_{};
};

}  // namespace tandem::test
