// SPDX-License-Identifier: Apache-2.0
// Numbered packets whose every byte follows from their number, and a ledger that says what became of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tandem::test {

/// Shortest packet: an Ethernet header and the number.
inline constexpr std::uint32_t kShortestPacket = 18;

/// The addresses in every packet, as mac_word().
inline constexpr std::uint64_t kReceiverMac = 0x010000000002, kSenderMac = 0x020000000002;

/// Lengths of a flow: packet n has a length in [shortest, longest] that follows from n; all different for 2 * 97
/// packets.
struct PacketFlow {
  std::uint32_t shortest = kShortestPacket;
  std::uint32_t longest = 150;

  [[nodiscard]] std::uint32_t length(std::uint32_t number) const {
    return shortest + number * 97 % (longest - shortest + 1);
  }
  /// Writes packet `number` into `room`, which must be long enough; returns its length.
  std::uint32_t write(std::uint32_t number, std::span<std::byte> room) const;
  /// The number in a packet, and whether all its bytes are as written.
  [[nodiscard]] bool intact(std::span<const std::byte> packet, std::uint32_t& number) const;
};

/// What happened to a flow; all zero is exactly once, in order, byte exact.
struct Tally {
  std::uint64_t lost = 0, duplicated = 0, reordered = 0, corrupt = 0;

  Tally& operator+=(const Tally& other);
  [[nodiscard]] bool clean() const { return lost == 0 && duplicated == 0 && reordered == 0 && corrupt == 0; }
};

class Ledger {
 public:
  explicit Ledger(const PacketFlow& flow) : flow_(flow) {}
  void note(std::span<const std::byte> packet);
  /// Numbers [0, sent) were sent. A number never sent counts as corrupt.
  [[nodiscard]] Tally finish(std::uint32_t sent) const;
  [[nodiscard]] std::uint32_t arrived() const { return arrived_; }

 private:
  PacketFlow flow_;
  std::vector<std::uint8_t> seen_;
  std::uint32_t next_ = 0;
  std::uint32_t arrived_ = 0;
  Tally tally_;
};

}  // namespace tandem::test
