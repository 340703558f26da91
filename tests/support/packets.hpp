// SPDX-License-Identifier: Apache-2.0
// Numbered packets whose every byte follows from their number, and a ledger that says what became of them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tandem::test {

/// Shortest packet: an Ethernet header and the number.
inline constexpr std::uint32_t kShortestPacket = 18;

/// The addresses in every packet, as mac_word().
inline constexpr std::uint64_t kReceiverMac = 0x010000000002, kSenderMac = 0x020000000002;

/// RFC 1071, the slow and plain way: not inverted, in [0, 0xffff].
std::uint32_t ones_complement_sum(std::span<const std::byte> bytes);

/// struct virtio_net_hdr, as it lies in guest memory.
using NetHeaderBytes = std::array<std::byte, 10>;
NetHeaderBytes net_header(std::uint8_t flags, std::uint8_t gso_type, std::uint16_t header_length,
                          std::uint16_t gso_size, std::uint16_t checksum_start, std::uint16_t checksum_offset);

/// Lengths of a flow: packet n has a length in [shortest, longest] that follows from n; all different for 2 * 97
/// packets. With `segments`, these are IPv4 TCP packets that their sender asks to be cut into so many, and a ledger
/// counts segments.
struct PacketFlow {
  std::uint32_t shortest = kShortestPacket;
  std::uint32_t longest = 150;
  std::uint32_t segments = 1;
  bool whole = false;  ///< where these arrive, they arrive uncut, with their checksum unfinished

  /// With segments: bytes of headers, and of payload in each but the last, which has less.
  static constexpr std::uint32_t kHeaders = 14 + 20 + 20, kSegment = 40;
  static PacketFlow to_cut(std::uint32_t segments, bool whole = false) {
    return {kHeaders + (segments - 1) * kSegment + 1, kHeaders + segments * kSegment, segments, whole};
  }

  [[nodiscard]] std::uint32_t length(std::uint32_t number) const {
    return shortest + number * 97 % (longest - shortest + 1);
  }
  /// What its sender asks for.
  [[nodiscard]] NetHeaderBytes header() const;
  /// Packets that come out for one that goes in.
  [[nodiscard]] std::uint32_t arrivals() const { return whole ? 1 : segments; }
  /// Writes packet `number` into `room`, which must be long enough; returns its length.
  std::uint32_t write(std::uint32_t number, std::span<std::byte> room) const;
  /// The number in a packet, or that of a segment, and whether all its bytes are as they have to be.
  [[nodiscard]] bool intact(std::span<const std::byte> packet, std::uint32_t& number) const;

 private:
  void write_headers(std::uint32_t number, std::span<std::byte> packet) const;
  [[nodiscard]] bool segment_intact(std::span<const std::byte> packet, std::uint32_t& number) const;
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
  /// Packets [0, sent) were sent. A number never sent counts as corrupt.
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
