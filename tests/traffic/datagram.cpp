// SPDX-License-Identifier: Apache-2.0
// Composing and inspecting numbered datagrams.
#include "tests/traffic/datagram.hpp"

#include <algorithm>
#include <array>
#include <cstring>

namespace tandem::traffic {
namespace {

constexpr std::size_t kPayloadPeriod = 251;  // prime

constexpr auto kCrcTable = [] {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < table.size(); ++i) {
    std::uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? 0xedb88320u : 0u);
    table[i] = value;
  }
  return table;
}();

// One period more than the longest payload, so that every payload is one contiguous stretch of it.
constexpr auto kPattern = [] {
  std::array<std::byte, kLengthPeriod + kPayloadPeriod> pattern{};
  for (std::size_t i = 0; i < pattern.size(); ++i) pattern[i] = static_cast<std::byte>((i % kPayloadPeriod) * 167 + 13);
  return pattern;
}();

std::span<const std::byte> payload_of(std::uint64_t sequence) {
  const std::size_t length = sequence * 757 % kLengthPeriod;
  return std::span{kPattern}.subspan(sequence % kPayloadPeriod, length);
}

std::uint32_t checksum_of(DatagramHeader header, std::span<const std::byte> payload) {
  header.checksum = 0;
  return crc32(crc32(0, std::as_bytes(std::span{&header, 1})), payload);
}

}  // namespace

std::uint32_t crc32(std::uint32_t crc, std::span<const std::byte> bytes) {
  crc = ~crc;
  for (const std::byte byte : bytes) crc = (crc >> 8) ^ kCrcTable[(crc ^ std::to_integer<std::uint32_t>(byte)) & 0xff];
  return ~crc;
}

std::size_t compose(std::span<std::byte> buffer, std::uint32_t flow, std::uint64_t sequence, std::uint64_t sent_ns) {
  const auto payload = payload_of(sequence);
  DatagramHeader header{kDatagramMagic, flow, sequence, sent_ns, 0, 0};
  header.length = static_cast<std::uint32_t>(sizeof header + payload.size());
  header.checksum = checksum_of(header, payload);
  std::memcpy(buffer.data(), &header, sizeof header);
  std::ranges::copy(payload, buffer.begin() + sizeof header);
  return header.length;
}

std::optional<DatagramHeader> inspect(std::span<const std::byte> bytes, std::uint32_t flow) {
  DatagramHeader header;
  if (bytes.size() < sizeof header) return std::nullopt;
  std::memcpy(&header, bytes.data(), sizeof header);
  const auto payload = bytes.subspan(sizeof header);
  const bool intact = header.magic == kDatagramMagic && header.flow == flow && header.length == bytes.size() &&
                      std::ranges::equal(payload, payload_of(header.sequence)) &&
                      header.checksum == checksum_of(header, payload);
  if (!intact) return std::nullopt;
  return header;
}

}  // namespace tandem::traffic
