// SPDX-License-Identifier: Apache-2.0
// Making and recognizing numbered packets.
#include "tests/support/packets.hpp"

#include <algorithm>
#include <cstring>

namespace tandem::test {

namespace {
constexpr unsigned char kEthernet[14] = {2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5};

// A pattern that repeats neither with any power of two nor with the packet's number.
std::byte payload(std::uint32_t number, std::uint32_t at) {
  return static_cast<std::byte>((at * 7 + number * 131 + at / 23) & 0xffu);
}

void put(std::span<std::byte> to, std::size_t at, std::uint32_t value, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; ++i) to[at + i] = static_cast<std::byte>(value >> 8 * (bytes - 1 - i) & 0xffu);
}
std::uint32_t get(std::span<const std::byte> from, std::size_t at, std::size_t bytes) {
  std::uint32_t value = 0;
  for (std::size_t i = 0; i < bytes; ++i) value = value << 8 | std::to_integer<std::uint32_t>(from[at + i]);
  return value;
}

// Each packet's first byte of payload.
constexpr std::uint32_t kStride = 1u << 16;
constexpr std::uint32_t kIp = 14, kTcp = 34;
constexpr unsigned kFlagsOfMany = 0x99;  // CWR, ACK, PSH, FIN

std::uint32_t pseudo_header_sum(std::span<const std::byte> packet) {
  const auto addresses = ones_complement_sum(packet.subspan(kIp + 12, 8));
  const std::uint32_t sum = addresses + 6 + static_cast<std::uint32_t>(packet.size() - kTcp);
  return (sum & 0xffffu) + (sum >> 16);
}
}  // namespace

std::uint32_t ones_complement_sum(std::span<const std::byte> bytes) {
  std::uint32_t sum = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const auto byte = std::to_integer<std::uint32_t>(bytes[i]);
    sum += i % 2 == 0 ? byte << 8 : byte;
    sum = (sum & 0xffffu) + (sum >> 16);
  }
  return sum;
}

NetHeaderBytes net_header(std::uint8_t flags, std::uint8_t gso_type, std::uint16_t header_length,
                          std::uint16_t gso_size, std::uint16_t checksum_start, std::uint16_t checksum_offset) {
  NetHeaderBytes bytes{static_cast<std::byte>(flags), static_cast<std::byte>(gso_type)};
  const std::uint16_t fields[] = {header_length, gso_size, checksum_start, checksum_offset};
  std::memcpy(bytes.data() + 2, fields, sizeof fields);
  return bytes;
}

NetHeaderBytes PacketFlow::header() const {
  return segments == 1 ? NetHeaderBytes{} : net_header(1, 0x81, kHeaders, kSegment, kTcp, 16);
}

// As a driver leaves them: the IP header finished, in TCP's checksum the sum of the pseudo header.
void PacketFlow::write_headers(std::uint32_t number, std::span<std::byte> packet) const {
  put(packet, 12, 0x0800, 2);
  std::fill(packet.begin() + kIp, packet.begin() + kHeaders, std::byte{0});
  put(packet, kIp, 0x4500, 2);
  put(packet, kIp + 2, static_cast<std::uint32_t>(packet.size() - kIp), 2);
  put(packet, kIp + 4, number * segments, 2);
  put(packet, kIp + 8, 0x4006, 2);
  put(packet, kIp + 12, 0x0a000001, 4);
  put(packet, kIp + 16, 0x0a000002, 4);
  put(packet, kIp + 10, ~ones_complement_sum(packet.subspan(kIp, 20)), 2);
  put(packet, kTcp, 0x1f900050, 4);
  put(packet, kTcp + 4, number * kStride, 4);
  put(packet, kTcp + 12, 0x5000 | kFlagsOfMany, 2);
  put(packet, kTcp + 14, 0xffff, 2);
  put(packet, kTcp + 16, pseudo_header_sum(packet), 2);
}

// Against what the packet was made of, and by no code of the engine's.
bool PacketFlow::segment_intact(std::span<const std::byte> packet, std::uint32_t& number) const {
  if (packet.size() <= kHeaders) return false;
  const std::uint32_t sequence = get(packet, kTcp + 4, 4);
  const std::uint32_t nth = sequence / kStride, part = sequence % kStride / kSegment;
  number = nth * segments + part;
  if (sequence % kStride % kSegment != 0 || part >= segments) return false;
  const std::uint32_t from = kHeaders + part * kSegment;
  const std::uint32_t size = std::min(kSegment, length(nth) - from);
  if (packet.size() != kHeaders + size) return false;
  std::vector<std::byte> expected(length(nth));
  write(nth, expected);
  std::memmove(expected.data() + kHeaders, expected.data() + from, size);
  expected.resize(packet.size());
  const std::span<std::byte> made(expected);
  put(made, kIp + 2, kHeaders - kIp + size, 2);
  put(made, kIp + 4, number, 2);
  put(made, kIp + 10, 0, 2);
  put(made, kIp + 10, ~ones_complement_sum(made.subspan(kIp, 20)), 2);
  put(made, kTcp + 4, sequence, 4);
  put(made, kTcp + 13, kFlagsOfMany & (part == 0 ? 0xffu : 0x7fu) & (part + 1 == segments ? 0xffu : 0xf6u), 1);
  put(made, kTcp + 16, 0, 2);
  const std::uint32_t sum = pseudo_header_sum(made) + ones_complement_sum(made.subspan(kTcp));
  put(made, kTcp + 16, ~((sum & 0xffffu) + (sum >> 16)), 2);
  return std::equal(expected.begin(), expected.end(), packet.begin(), packet.end());
}

std::uint32_t PacketFlow::write(std::uint32_t number, std::span<std::byte> room) const {
  const std::uint32_t size = length(number);
  std::memcpy(room.data(), kEthernet, sizeof kEthernet);
  std::memcpy(room.data() + sizeof kEthernet, &number, sizeof number);
  for (std::uint32_t i = kShortestPacket; i < size; ++i) room[i] = payload(number, i);
  if (segments > 1) write_headers(number, room.first(size));
  return size;
}

bool PacketFlow::intact(std::span<const std::byte> packet, std::uint32_t& number) const {
  if (segments > 1 && !whole) return segment_intact(packet, number);
  if (segments > 1) {
    if (packet.size() < kHeaders) return false;
    number = get(packet, kTcp + 4, 4) / kStride;
    if (number >= kStride) return false;
    std::vector<std::byte> expected(length(number));
    write(number, expected);
    return std::equal(expected.begin(), expected.end(), packet.begin(), packet.end());
  }
  if (packet.size() < kShortestPacket) return false;
  std::memcpy(&number, packet.data() + sizeof kEthernet, sizeof number);
  if (packet.size() != length(number) || std::memcmp(packet.data(), kEthernet, sizeof kEthernet) != 0) return false;
  for (std::uint32_t i = kShortestPacket; i < packet.size(); ++i)
    if (packet[i] != payload(number, i)) return false;
  return true;
}

Tally& Tally::operator+=(const Tally& other) {
  lost += other.lost;
  duplicated += other.duplicated;
  reordered += other.reordered;
  corrupt += other.corrupt;
  return *this;
}

void Ledger::note(std::span<const std::byte> packet) {
  ++arrived_;
  std::uint32_t number = 0;
  if (!flow_.intact(packet, number)) {
    ++tally_.corrupt;
    return;
  }
  constexpr std::uint32_t kMost = 1u << 24;  // a bound against nonsense
  if (number >= kMost) {
    ++tally_.corrupt;
    return;
  }
  if (seen_.size() <= number) seen_.resize(number + 1);
  if (seen_[number] != 0)
    ++tally_.duplicated;
  else if (number < next_)
    ++tally_.reordered;
  seen_[number] = 1;
  if (number >= next_) next_ = number + 1;
}

Tally Ledger::finish(std::uint32_t sent) const {
  Tally tally = tally_;
  const std::uint32_t expected = sent * flow_.arrivals();
  for (std::uint32_t i = 0; i < expected; ++i)
    if (i >= seen_.size() || seen_[i] == 0) ++tally.lost;
  for (std::size_t i = expected; i < seen_.size(); ++i)
    if (seen_[i] != 0) ++tally.corrupt;
  return tally;
}

}  // namespace tandem::test
