// SPDX-License-Identifier: Apache-2.0
// TCP packets as drivers hand them over to be segmented, and what has to become of them: a slow and plain reference
// that shares nothing with the engine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "vhost-net-backend/offload.hpp"

namespace tandem::test {

using Bytes = std::vector<std::byte>;

/// From "0a 0b0c"; blanks mean nothing.
Bytes hex(const std::string& text);

struct TcpShape {
  bool ipv6 = false;
  std::uint32_t vlan_tags = 0;    ///< 0 to 2
  std::uint32_t ip_options = 0;   ///< words of IPv4 options, 0 to 10; of IPv6 the number of extension headers, 0 to 4
  std::uint32_t tcp_options = 0;  ///< words, 0 to 10
  std::uint32_t payload = 100;    ///< bytes
  std::uint16_t segment = 40;     ///< bytes of payload in each segment
  std::uint8_t flags = 0x10;      ///< of TCP
  std::uint32_t sequence = 1000;
  std::uint16_t identification = 1;
  std::uint32_t seed = 1;  ///< of addresses, ports, options and payload
};

struct TcpPacket {
  explicit TcpPacket(const TcpShape& shape);

  Bytes bytes;
  NetHeader net;                        ///< what its driver asks for
  std::uint32_t network, tcp, headers;  ///< where IP and TCP begin, and the payload

  void set8(std::uint32_t at, std::uint32_t value) { bytes.at(at) = static_cast<std::byte>(value); }
  void set16(std::uint32_t at, std::uint32_t value) {
    set8(at, value >> 8 & 0xffu);
    set8(at + 1, value & 0xffu);
  }
  /// Puts bytes in front of offset `at`; moves nothing else.
  void insert(std::uint32_t at, const std::string& text);
};

/// The frames that have to come out.
std::vector<Bytes> reference_cut(const TcpPacket& packet);
/// Whether IPv4's header checksum, if there is one, and TCP's are right.
bool checksums_are_right(const TcpPacket& shape, std::span<const std::byte> frame);

}  // namespace tandem::test
