// SPDX-License-Identifier: Apache-2.0
// The numbered datagram: its layout, how its bytes follow from its number, and how a receiver judges one.
//
// Length and payload are functions of the sequence number alone, so that a receiver compares every byte without having
// seen the sender. Lengths and payloads repeat with prime periods: a buffer that is off by one entry never looks right
// by chance.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace tandem::traffic {

/// Little-endian on the wire as in memory; both ends are x86-64 or arm64. Followed by the payload.
struct DatagramHeader {
  std::uint32_t magic = 0;
  std::uint32_t flow = 0;
  std::uint64_t sequence = 0;
  std::uint64_t sent_ns = 0;   ///< sender's CLOCK_MONOTONIC
  std::uint32_t length = 0;    ///< bytes of header and payload
  std::uint32_t checksum = 0;  ///< CRC-32 of everything, this field being zero
};
static_assert(sizeof(DatagramHeader) == 32);

inline constexpr std::uint32_t kDatagramMagic = 0x54444d31;  // "TDM1"
inline constexpr std::uint32_t kLengthPeriod = 1409;         ///< prime; payloads are 0 to 1408 bytes
inline constexpr std::size_t kMaxDatagram = sizeof(DatagramHeader) + kLengthPeriod - 1;

/// CRC-32 (IEEE 802.3, reflected), continued from `crc`; 0 begins.
std::uint32_t crc32(std::uint32_t crc, std::span<const std::byte> bytes);

/// Writes datagram `sequence` of `flow` into `buffer` (at least kMaxDatagram bytes) and returns its length.
std::size_t compose(std::span<std::byte> buffer, std::uint32_t flow, std::uint64_t sequence, std::uint64_t sent_ns);

/// The header of an intact datagram of `flow`; nothing when a single byte, the length or the flow is not as it was
/// sent.
std::optional<DatagramHeader> inspect(std::span<const std::byte> bytes, std::uint32_t flow);

}  // namespace tandem::traffic
