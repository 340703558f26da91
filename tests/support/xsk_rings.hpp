// SPDX-License-Identifier: Apache-2.0
// KernelXsk: the kernel's side of an AF_XDP socket over plain shared memory, for XskPort::over_memory().
//
// Plays what net/xdp does: sends from TX, completes, takes frames from fill, receives on RX; and accounts for every
// frame. Thread: one at a time. Copyable, and movable to a copy of the memory: a snapshot of the kernel.
#pragma once

#include <linux/if_xdp.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "common/layout/xsk_description.hpp"

namespace tandem::test {

/// Sizes of a made-up socket. Small ones keep snapshots small; real ones are in layout/xsk_description.hpp.
struct XskShape {
  std::uint32_t frame_size = 2048;  ///< a power of two
  std::uint32_t headroom = 256;     ///< in front of received packets
  std::uint32_t rx_frames = 64;
  std::uint32_t tx_frames = 64;   ///< a multiple of 64, at most 2048
  std::uint32_t tx_entries = 64;  ///< of the TX ring; completion takes tx_frames or more
};

/// A description of such a socket; ring offsets are from the beginning of its ring memory.
XskDescription describe_xsk(const XskShape& shape);
/// Bytes of ring memory, a multiple of 64; frames take description.umem_size.
std::uint64_t xsk_ring_bytes(const XskDescription& description);

/// Frames that are nowhere or in more than one place.
struct FrameAudit {
  std::uint32_t leaked = 0, doubled = 0;
  [[nodiscard]] bool clean() const { return leaked == 0 && doubled == 0; }
};

class KernelXsk {
 public:
  /// Both areas are zero or whatever reset() finds.
  KernelXsk(const XskDescription& description, std::byte* rings, std::byte* frames);
  void rebase(std::byte* rings, std::byte* frames);
  /// As the supervisor leaves a new socket: rings empty, every RX frame posted on fill. `index` is where all rings
  /// begin.
  void reset(std::uint32_t index = 0);

  /// Takes the next packet from TX; it is in flight until complete(). Nothing when TX is empty. A descriptor outside
  /// the TX frames counts in bad_descriptors() and is skipped, as the kernel does.
  std::optional<std::span<const std::byte>> send();
  /// Completes up to `most` packets in flight; returns how many.
  std::uint32_t complete(std::uint32_t most = ~0u);

  /// A packet arrives. False if it was dropped: no frame on fill, RX full, or longer than a frame.
  bool receive(std::span<const std::byte> packet);

  [[nodiscard]] std::uint32_t transmit_waiting() const;
  [[nodiscard]] std::uint32_t receive_waiting() const;
  [[nodiscard]] std::uint32_t in_flight() const { return static_cast<std::uint32_t>(in_flight_.size()); }
  [[nodiscard]] std::uint32_t bad_descriptors() const { return bad_descriptors_; }

  /// Where every frame is: RX frames on fill, on RX or in the kernel's hands; TX frames busy (`transmit_busy`, one bit
  /// each) exactly if they are on TX, in flight, or on completion.
  [[nodiscard]] FrameAudit audit(std::span<const std::uint64_t> transmit_busy) const;

  // For damaged rings.
  [[nodiscard]] std::uint32_t& word(std::uint64_t offset) const {
    return *reinterpret_cast<std::uint32_t*>(rings_ + offset);
  }
  [[nodiscard]] xdp_desc& rx_entry(std::uint32_t index) const;
  [[nodiscard]] const XskDescription& description() const { return description_; }

 private:
  template <class Entry>
  [[nodiscard]] Entry& entry(const XskRing& ring, std::uint32_t index) const;
  [[nodiscard]] std::uint32_t load(const XskRing& ring, std::uint64_t field) const;
  void store(const XskRing& ring, std::uint64_t field, std::uint32_t value) const;
  [[nodiscard]] std::uint32_t filled(const XskRing& ring) const;

  XskDescription description_;
  std::byte* rings_;
  std::byte* frames_;
  std::deque<std::uint64_t> in_flight_;
  std::uint32_t bad_descriptors_ = 0;
};

}  // namespace tandem::test
