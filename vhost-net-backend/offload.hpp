// SPDX-License-Identifier: Apache-2.0
// Offloads: what a guest's driver asks of its device for one packet (checksum, TCP segmentation), checked, and done in
// software for whoever cannot take the packet as it is.
//
// A driver writes struct virtio_net_hdr in front of each packet. It is as hostile as everything else in guest memory:
// it is copied once, and check_offload() holds it against the packet's own headers before anybody acts upon it. What
// comes out says where each byte goes; nothing is looked up in the packet again.
//
// Segmentation is our own and not librte_gso's: that one takes mbufs and returns chains of mbufs, which would have to
// be made for every packet, from a pool of their own, and then be copied into frames all the same. Here the packet lies
// in one private buffer, and write_segment() writes headers and payload of any one segment to where it is to be, which
// is a frame of the uplink or a buffer that another guest gets. The second copy is paid for by the checksum, which has
// to read every byte anyway.
//
// Packets without a request (an all-zero header, nearly all of them without TCP) cost one comparison:
// asks_for_offload(). Pure, any thread, no allocation. Source: Virtio 1.2, 5.1.6; RFC 791, 8200, 9293, 3168.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>

namespace tandem {

/// struct virtio_net_hdr, little endian as on every host that Tandem runs on; num_buffers, which may follow, means
/// something only to a receiver.
struct NetHeader {
  std::uint8_t flags = 0;
  std::uint8_t gso_type = 0;
  std::uint16_t header_length = 0;  ///< a hint; devices may not rely on it
  std::uint16_t gso_size = 0;       ///< bytes of payload in each segment
  std::uint16_t checksum_start = 0;
  std::uint16_t checksum_offset = 0;  ///< of the 16-bit field, from checksum_start on
};
static_assert(sizeof(NetHeader) == 10);

inline constexpr std::uint8_t kNeedsChecksum = 1;
inline constexpr std::uint8_t kGsoNone = 0, kGsoTcp4 = 1, kGsoTcp6 = 4;
inline constexpr std::uint8_t kGsoEcn = 0x80;

/// Longest packet that a guest may hand over to be segmented: what a 16-bit IP length can say, an Ethernet header and
/// two VLAN tags.
inline constexpr std::uint32_t kLargestPacket = 65535 + 14 + 2 * 4;
/// Room for such a packet.
inline constexpr std::uint32_t kLargestPacketRoom = 65600;

/// Offloads that a guest's driver may ask for, or that it takes.
struct OffloadSet {
  static constexpr std::uint32_t kChecksum = 1u << 0;
  static constexpr std::uint32_t kTcp4 = 1u << 1;
  static constexpr std::uint32_t kTcp6 = 1u << 2;
  static constexpr std::uint32_t kEcn = 1u << 3;  ///< of TCP segmentation: packets with CWR set
  std::uint32_t bits = 0;

  /// From the virtio feature bits that a driver acknowledged (Virtio 1.2, 5.1.3): CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN.
  static OffloadSet asked_by_guest(std::uint64_t features);
  /// GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN.
  static OffloadSet taken_by_guest(std::uint64_t features);
  [[nodiscard]] bool has_all(OffloadSet needed) const { return (needed.bits & ~bits) == 0; }
};

/// Whether there is something in the header to look at.
inline bool asks_for_offload(const NetHeader& header) {
  std::uint16_t word = 0;
  std::memcpy(&word, &header, sizeof word);
  constexpr std::uint16_t kAny = kNeedsChecksum | 0xff00;
  return (word & kAny) != 0;
}

/// A request that was found to fit its packet. Offsets are bytes from the Ethernet header on.
struct Offload {
  OffloadSet needed;  ///< what a receiver must take to get the packet as it is
  bool ipv6 = false;
  std::uint16_t checksum_start = 0;
  std::uint16_t checksum_offset = 0;  ///< from checksum_start
  std::uint16_t network = 0;          ///< segmentation: where the IP header begins
  std::uint16_t headers = 0;          ///< segmentation: bytes up to the payload, which each segment repeats
  std::uint16_t segment_payload = 0;  ///< segmentation: bytes in each but the last
  std::uint32_t segments = 1;

  [[nodiscard]] bool is_segmented() const { return headers != 0; }
};

/// What an uplink, and one transaction, can carry.
struct OffloadLimits {
  std::uint32_t frame = 0;     ///< bytes of a frame on the uplink, Ethernet header included
  std::uint32_t segments = 0;  ///< of one packet
};

/// The request in `header` for `packet`, of which both are our own copies; `allowed`: what was negotiated. Nothing if
/// it cannot be honoured: an offload that was not negotiated, a checksum outside the packet, a segmentation of
/// something that is no TCP packet of the kind it says, of a fragment, in the middle of a handshake, into pieces of no
/// size, too long ones, or too many. IPv6: hop-by-hop and destination options may precede TCP; a routing header may
/// not, because the checksum would be that of another address.
std::optional<Offload> check_offload(const NetHeader& header, OffloadSet allowed, std::span<const std::byte> packet,
                                     const OffloadLimits& limits);

/// Fills in the checksum of a packet that is not to be segmented.
void complete_checksum(const Offload& offload, std::span<std::byte> packet);

/// Bytes of segment `n`.
std::uint32_t segment_length(const Offload& offload, std::uint32_t packet_length, std::uint32_t n);
/// Writes segment `n` with all its checksums to `to`, which has room for segment_length(); returns that.
std::uint32_t write_segment(const Offload& offload, std::span<const std::byte> packet, std::uint32_t n, std::byte* to);

/// What a receiver is told that takes the packet as it is. From the checked request alone: nothing of what the sender
/// had written goes through unseen.
NetHeader header_for_receiver(const Offload& offload, const NetHeader& asked);

/// The second opinion (second_opinion.hpp) on what check_offload() refused: plain, and sharing no code with it.
bool offload_is_good(const NetHeader& header, OffloadSet allowed, std::span<const std::byte> packet,
                     const OffloadLimits& limits);

}  // namespace tandem
