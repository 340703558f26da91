// SPDX-License-Identifier: Apache-2.0
// Building and cutting TCP packets, byte by byte.
#include "tests/support/tcp_packets.hpp"

#include <algorithm>
#include <random>

#include "tests/support/packets.hpp"

namespace tandem::test {

namespace {

unsigned at(std::span<const std::byte> bytes, std::size_t i) { return std::to_integer<unsigned>(bytes[i]); }

void append(Bytes& to, std::uint32_t value, int bytes) {
  for (int i = bytes - 1; i >= 0; --i) to.push_back(static_cast<std::byte>(value >> 8 * i & 0xffu));
}
void set16(Bytes& to, std::size_t where, std::uint32_t value) {
  to[where] = static_cast<std::byte>(value >> 8 & 0xffu);
  to[where + 1] = static_cast<std::byte>(value & 0xffu);
}

// Pseudo header and what lies in the frame from TCP on.
std::uint32_t tcp_sum(const TcpPacket& packet, std::span<const std::byte> frame) {
  Bytes summed;
  const bool ipv6 = at(frame, packet.network) >> 4 == 6;
  const std::size_t addresses = packet.network + (ipv6 ? 8u : 12u), size = ipv6 ? 32 : 8;
  summed.insert(summed.end(), frame.begin() + static_cast<std::ptrdiff_t>(addresses),
                frame.begin() + static_cast<std::ptrdiff_t>(addresses + size));
  append(summed, static_cast<std::uint32_t>(frame.size() - packet.tcp), 4);
  append(summed, 6, 4);
  summed.insert(summed.end(), frame.begin() + packet.tcp, frame.end());
  return ones_complement_sum(summed);
}

}  // namespace

Bytes hex(const std::string& text) {
  Bytes bytes;
  std::string digits;
  std::copy_if(text.begin(), text.end(), std::back_inserter(digits), [](char c) { return c != ' '; });
  for (std::size_t i = 0; i + 1 < digits.size(); i += 2)
    bytes.push_back(static_cast<std::byte>(std::stoi(digits.substr(i, 2), nullptr, 16)));
  return bytes;
}

TcpPacket::TcpPacket(const TcpShape& shape) {
  std::mt19937 random(shape.seed);
  bytes = hex("020000000001 020000000002");
  for (std::uint32_t i = 0; i < shape.vlan_tags; ++i)
    append(bytes, i == 0 && shape.vlan_tags == 2 ? 0x88a80007 : 0x81000064, 4);
  append(bytes, shape.ipv6 ? 0x86dd : 0x0800, 2);
  network = static_cast<std::uint32_t>(bytes.size());
  const std::uint32_t tcp_bytes = 20 + 4 * shape.tcp_options + shape.payload;
  if (shape.ipv6) {
    append(bytes, 0x6abcdef0, 4);
    append(bytes, tcp_bytes + 16 * shape.ip_options, 2);
    append(bytes, shape.ip_options > 0 ? 0 : 6, 1);
    append(bytes, 64, 1);
    for (int i = 0; i < 8; ++i) append(bytes, static_cast<std::uint32_t>(random()), 4);
    // Hop-by-hop first, destination options behind it; 16 bytes each, of padding.
    for (std::uint32_t i = 0; i < shape.ip_options; ++i) {
      append(bytes, i + 1 == shape.ip_options ? 6 : 60, 1);
      append(bytes, 1, 1);
      append(bytes, 0x010c, 2);
      for (int k = 0; k < 3; ++k) append(bytes, 0, 4);
    }
  } else {
    append(bytes, (0x45 + shape.ip_options) << 8, 2);
    append(bytes, 20 + 4 * shape.ip_options + tcp_bytes, 2);
    append(bytes, shape.identification, 2);
    append(bytes, 0x4000, 2);
    append(bytes, 0x4006, 2);
    append(bytes, 0, 2);
    for (std::uint32_t i = 0; i < 2 + shape.ip_options; ++i) append(bytes, static_cast<std::uint32_t>(random()), 4);
  }
  tcp = static_cast<std::uint32_t>(bytes.size());
  if (!shape.ipv6) set16(network + 10, ~ones_complement_sum(std::span<const std::byte>(bytes).subspan(network)));
  append(bytes, static_cast<std::uint32_t>(random()), 4);
  append(bytes, shape.sequence, 4);
  append(bytes, static_cast<std::uint32_t>(random()), 4);
  append(bytes, (5 + shape.tcp_options) << 12 | shape.flags, 2);
  append(bytes, 0x1234, 2);
  append(bytes, 0, 4);
  for (std::uint32_t i = 0; i < shape.tcp_options; ++i) append(bytes, static_cast<std::uint32_t>(random()), 4);
  headers = static_cast<std::uint32_t>(bytes.size());
  for (std::uint32_t i = 0; i < shape.payload; ++i) bytes.push_back(static_cast<std::byte>(random() & 0xffu));
  // What the checksum field holds is not to be relied on; drivers leave this there.
  std::uint32_t sum =
      tcp_sum(*this, std::span<const std::byte>(bytes).first(tcp)) + shape.payload + 20 + 4 * shape.tcp_options;
  sum = (sum & 0xffffu) + (sum >> 16);
  set16(tcp + 16, sum);
  net.flags = 1;
  net.gso_type = static_cast<std::uint8_t>((shape.ipv6 ? 4 : 1) | ((shape.flags & 0x80u) != 0 ? 0x80 : 0));
  net.header_length = static_cast<std::uint16_t>(headers);
  net.gso_size = shape.segment;
  net.checksum_start = static_cast<std::uint16_t>(tcp);
  net.checksum_offset = 16;
}

void TcpPacket::insert(std::uint32_t where, const std::string& text) {
  const Bytes more = hex(text);
  bytes.insert(bytes.begin() + where, more.begin(), more.end());
}

std::vector<Bytes> reference_cut(const TcpPacket& packet) {
  std::vector<Bytes> frames;
  const bool ipv6 = at(packet.bytes, packet.network) >> 4 == 6;
  std::uint32_t sequence = 0;
  for (int i = 0; i < 4; ++i)
    sequence = sequence << 8 | at(packet.bytes, packet.tcp + 4 + static_cast<std::uint32_t>(i));
  const unsigned identification = at(packet.bytes, packet.network + 4) << 8 | at(packet.bytes, packet.network + 5);
  for (std::size_t from = packet.headers; from < packet.bytes.size(); from += packet.net.gso_size) {
    const std::size_t to = std::min(packet.bytes.size(), from + packet.net.gso_size);
    Bytes frame(packet.bytes.begin(), packet.bytes.begin() + packet.headers);
    frame.insert(frame.end(), packet.bytes.begin() + static_cast<std::ptrdiff_t>(from),
                 packet.bytes.begin() + static_cast<std::ptrdiff_t>(to));
    if (ipv6) {
      set16(frame, packet.network + 4, static_cast<std::uint32_t>(frame.size()) - packet.network - 40);
    } else {
      set16(frame, packet.network + 2, static_cast<std::uint32_t>(frame.size()) - packet.network);
      set16(frame, packet.network + 4, identification + static_cast<unsigned>(frames.size()));
      set16(frame, packet.network + 10, 0);
      set16(
          frame, packet.network + 10,
          ~ones_complement_sum(std::span<const std::byte>(frame).subspan(packet.network, packet.tcp - packet.network)));
    }
    const auto offset = static_cast<std::uint32_t>(from - packet.headers);
    set16(frame, packet.tcp + 4, (sequence + offset) >> 16);
    set16(frame, packet.tcp + 6, (sequence + offset) & 0xffffu);
    unsigned flags = at(frame, packet.tcp + 13);
    if (from != packet.headers) flags &= 0x7fu;
    if (to != packet.bytes.size()) flags &= 0xf6u;
    frame[packet.tcp + 13] = static_cast<std::byte>(flags);
    set16(frame, packet.tcp + 16, 0);
    set16(frame, packet.tcp + 16, ~tcp_sum(packet, frame));
    frames.push_back(std::move(frame));
  }
  return frames;
}

bool checksums_are_right(const TcpPacket& packet, std::span<const std::byte> frame) {
  const bool ipv6 = at(frame, packet.network) >> 4 == 6;
  return tcp_sum(packet, frame) == 0xffff &&
         (ipv6 || ones_complement_sum(frame.subspan(packet.network, packet.tcp - packet.network)) == 0xffff);
}

}  // namespace tandem::test
