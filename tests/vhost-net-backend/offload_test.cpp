// SPDX-License-Identifier: Apache-2.0
// Offload requests: known vectors, hostile headers, and random packets against a slow and plain reference.
#include "vhost-net-backend/offload.hpp"

#include <rapidcheck.h>

#include <algorithm>
#include <bit>
#include <catch2/catch.hpp>
#include <cstring>
#include <functional>
#include <vector>

#include "tests/support/packets.hpp"
#include "tests/support/tcp_packets.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

constexpr OffloadSet kAll{0xf};
constexpr OffloadLimits kLimits{1792, 504};

NetHeader header_of(const NetHeaderBytes& bytes) {
  NetHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  return header;
}

std::optional<Offload> check(const NetHeader& header, const Bytes& packet, OffloadSet allowed = kAll,
                             const OffloadLimits& limits = kLimits) {
  const auto found = check_offload(header, allowed, packet, limits);
  // The two opinions agree about everything.
  CHECK(offload_is_good(header, allowed, packet, limits) == found.has_value());
  return found;
}

std::vector<Bytes> cut(const Offload& offload, const Bytes& packet) {
  std::vector<Bytes> segments;
  for (std::uint32_t n = 0; n < offload.segments; ++n) {
    Bytes segment(segment_length(offload, static_cast<std::uint32_t>(packet.size()), n) + 8, std::byte{0xcc});
    const std::uint32_t length = write_segment(offload, packet, n, segment.data());
    // Nothing behind it is touched.
    REQUIRE(length + 8 == segment.size());
    REQUIRE(std::all_of(segment.end() - 8, segment.end(), [](std::byte b) { return b == std::byte{0xcc}; }));
    segment.resize(length);
    segments.push_back(std::move(segment));
  }
  return segments;
}

}  // namespace

TEST_CASE("offload: known vectors of the Internet checksum") {
  // A UDP datagram "hello" from 10.0.0.1:1234 to 10.0.0.2:80, with the sum of its pseudo header in the field.
  Bytes udp = hex(
      "020000000001 020000000002 0800 4500 0021 0001 0000 4011 66c9 0a000001 0a000002 04d2 0050 000d 1421 68656c6c6f");
  const auto offload = check(header_of(net_header(1, 0, 0, 0, 34, 6)), udp);
  REQUIRE(offload);
  CHECK_FALSE(offload->is_segmented());
  complete_checksum(*offload, udp);
  CHECK(udp[40] == std::byte{0xa2});
  CHECK(udp[41] == std::byte{0xdd});
}

TEST_CASE("offload: a checksum that comes to zero is written as 0xffff") {
  Bytes packet(64);
  packet[60] = packet[61] = std::byte{0xff};
  const auto offload = check(header_of(net_header(1, 0, 0, 0, 34, 6)), packet);
  REQUIRE(offload);
  complete_checksum(*offload, packet);
  CHECK(packet[40] == std::byte{0xff});
  CHECK(packet[41] == std::byte{0xff});
}

TEST_CASE("offload: a TCP packet over IPv4, cut in three, byte by byte") {
  const Bytes packet =
      hex("020000000001 020000000002 0800"
          "4500 0037 fffe 4000 4006 0000 0a000001 0a000002"
          "1f90 0050 fffffffe 00000001 50 99 1000 0000 0000"
          "000102030405060708090a0b0c0d0e");
  const auto offload = check(header_of(net_header(1, 0x81, 54, 6, 34, 16)), packet);
  REQUIRE(offload);
  CHECK(offload->segments == 3);
  const auto segments = cut(*offload, packet);
  // Identification and sequence number wrap; CWR stays with the first, FIN and PSH with the last.
  CHECK(segments[0] == hex("020000000001 020000000002 0800"
                           "4500 002e fffe 4000 4006 26c9 0a000001 0a000002"
                           "1f90 0050 fffffffe 00000001 50 90 1000 6563 0000 000102030405"));
  CHECK(segments[1] == hex("020000000001 020000000002 0800"
                           "4500 002e ffff 4000 4006 26c8 0a000001 0a000002"
                           "1f90 0050 00000004 00000001 50 10 1000 53cc 0000 060708090a0b"));
  CHECK(segments[2] == hex("020000000001 020000000002 0800"
                           "4500 002b 0000 4000 4006 26cb 0a000001 0a000002"
                           "1f90 0050 0000000a 00000001 50 19 1000 51ce 0000 0c0d0e"));
}

TEST_CASE("offload: features that depend on others mean nothing without them") {
  CHECK(OffloadSet::asked_by_guest(0).bits == 0);
  CHECK(OffloadSet::asked_by_guest(1u << 11 | 1u << 12).bits == 0);
  CHECK(OffloadSet::asked_by_guest(1u << 0 | 1u << 13).bits == OffloadSet::kChecksum);
  CHECK(OffloadSet::asked_by_guest(1u << 0 | 1u << 11).bits == (OffloadSet::kChecksum | OffloadSet::kTcp4));
  CHECK(OffloadSet::asked_by_guest(1u << 0 | 1u << 11 | 1u << 12 | 1u << 13).bits == 0xf);
  CHECK(OffloadSet::taken_by_guest(1u << 7 | 1u << 8).bits == 0);
  CHECK(OffloadSet::taken_by_guest(1u << 1 | 1u << 7 | 1u << 8 | 1u << 9).bits == 0xf);
  CHECK(OffloadSet::taken_by_guest(1u << 0 | 1u << 11).bits == 0);
}

namespace {

struct Hostile {
  const char* what;
  std::function<void(TcpPacket&)> how;
  bool refused = true;
};

std::vector<Hostile> hostile_table() {
  return {
      {"nothing wrong", [](TcpPacket&) {}, false},
      {"header length of nonsense", [](TcpPacket& p) { p.net.header_length = 0xffff; }, false},
      {"flag bits of another meaning", [](TcpPacket& p) { p.net.flags |= 0xfe; }, false},
      {"IP length of nonsense", [](TcpPacket& p) { p.set16(p.network + 2, 0); }, false},
      {"segmentation without checksum", [](TcpPacket& p) { p.net.flags = 0; }},
      {"unknown segmentation", [](TcpPacket& p) { p.net.gso_type = 2; }},
      {"UDP fragmentation", [](TcpPacket& p) { p.net.gso_type = 3; }},
      {"UDP segmentation", [](TcpPacket& p) { p.net.gso_type = 5; }},
      {"ECN of nothing", [](TcpPacket& p) { p.net.gso_type = 0x80; }},
      {"the other IP version", [](TcpPacket& p) { p.net.gso_type ^= 5; }},
      {"size 0", [](TcpPacket& p) { p.net.gso_size = 0; }},
      {"more than a frame", [](TcpPacket& p) { p.net.gso_size = static_cast<std::uint16_t>(1793 - p.headers); }},
      {"exactly a frame", [](TcpPacket& p) { p.net.gso_size = static_cast<std::uint16_t>(1792 - p.headers); }, false},
      {"a frame of 64 KiB", [](TcpPacket& p) { p.net.gso_size = 0xffff; }},
      {"more segments than a transaction has", [](TcpPacket& p) { p.net.gso_size = 1; }},
      {"checksum before TCP", [](TcpPacket& p) { --p.net.checksum_start; }},
      {"checksum behind TCP's start", [](TcpPacket& p) { p.net.checksum_start += 2; }},
      {"checksum in the Ethernet header", [](TcpPacket& p) { p.net.checksum_start = 12; }},
      {"checksum past the packet", [](TcpPacket& p) { p.net.checksum_start = 0xffff; }},
      {"checksum offset past the packet", [](TcpPacket& p) { p.net.checksum_offset = 0xfffe; }},
      {"start and offset wrap together", [](TcpPacket& p) { p.net.checksum_start = p.net.checksum_offset = 0xfffe; }},
      {"UDP's checksum offset", [](TcpPacket& p) { p.net.checksum_offset = 6; }},
      {"odd checksum offset", [](TcpPacket& p) { p.net.checksum_offset = 17; }},
      {"another EtherType", [](TcpPacket& p) { p.set16(p.network - 2, 0x0806); }},
      {"one VLAN tag too many", [](TcpPacket& p) { p.insert(12, "81000001 81000002 81000003"); }},
      {"wrong IP version", [](TcpPacket& p) { p.set8(p.network, 0x55); }},
      {"TCP header too short", [](TcpPacket& p) { p.set8(p.tcp + 12, 0x40); }},
      {"TCP header past the packet",
       [](TcpPacket& p) {
         p.set8(p.tcp + 12, 0xf0);
         p.bytes.resize(p.tcp + 40);
       }},
      {"no payload", [](TcpPacket& p) { p.bytes.resize(p.headers); }},
      {"cut in the TCP header", [](TcpPacket& p) { p.bytes.resize(p.tcp + 19); }},
      {"cut in the IP header", [](TcpPacket& p) { p.bytes.resize(p.network + 19); }},
      {"cut in the Ethernet header", [](TcpPacket& p) { p.bytes.resize(13); }},
      {"SYN", [](TcpPacket& p) { p.set8(p.tcp + 13, 0x02); }},
      {"RST", [](TcpPacket& p) { p.set8(p.tcp + 13, 0x04); }},
      {"URG", [](TcpPacket& p) { p.set8(p.tcp + 13, 0x20); }},
      {"longer than IP can be", [](TcpPacket& p) { p.bytes.resize(kLargestPacket + 1); }},
  };
}

const std::vector<Hostile> kOfIpv4 = {
    {"fragments allowed", [](TcpPacket& p) { p.set16(p.network + 6, 0); }, false},
    {"reserved flag", [](TcpPacket& p) { p.set16(p.network + 6, 0x8000); }, false},
    {"more fragments", [](TcpPacket& p) { p.set16(p.network + 6, 0x2000); }},
    {"a later fragment", [](TcpPacket& p) { p.set16(p.network + 6, 1); }},
    {"header length of 16", [](TcpPacket& p) { p.set8(p.network, 0x44); }},
    {"header length of 0", [](TcpPacket& p) { p.set8(p.network, 0x40); }},
    {"header past the packet",
     [](TcpPacket& p) {
       p.set8(p.network, 0x4f);
       p.bytes.resize(p.network + 59);
     }},
    {"header into TCP", [](TcpPacket& p) { p.set8(p.network, 0x46); }},
    {"UDP", [](TcpPacket& p) { p.set8(p.network + 9, 17); }},
};
const std::vector<Hostile> kOfIpv6 = {
    {"a routing header", [](TcpPacket& p) { p.set8(p.network + 6, 43); }},
    {"a fragment header", [](TcpPacket& p) { p.set8(p.network + 6, 44); }},
    {"an authentication header", [](TcpPacket& p) { p.set8(p.network + 6, 51); }},
    {"UDP", [](TcpPacket& p) { p.set8(p.network + 6, 17); }},
    {"TCP where options are", [](TcpPacket& p) { p.set8(p.network + 6, p.tcp == p.network + 40 ? 0 : 6); }},
    {"five option headers", [](TcpPacket& p) { p = TcpPacket({.ipv6 = true, .ip_options = 5}); }},
    {"an option header past the packet",
     [](TcpPacket& p) {
       p.set8(p.network + 6, 60);
       p.set8(p.network + 41, 0xff);
     }},
};

void try_all(const TcpShape& shape, const std::vector<Hostile>& table) {
  for (const Hostile& one : table) {
    TcpPacket packet(shape);
    one.how(packet);
    INFO(one.what << (shape.ipv6 ? ", IPv6" : ", IPv4") << ", " << shape.vlan_tags << " tags, options "
                  << shape.ip_options);
    CHECK(check(packet.net, packet.bytes).has_value() != one.refused);
  }
}

}  // namespace

TEST_CASE("offload: hostile headers are refused, odd but harmless ones are not") {
  for (const bool ipv6 : {false, true})
    for (const std::uint32_t tags : {0u, 1u, 2u})
      for (const std::uint32_t options : {0u, 2u}) {
        const TcpShape shape{.ipv6 = ipv6, .vlan_tags = tags, .ip_options = options, .payload = 600, .segment = 100};
        try_all(shape, hostile_table());
        try_all(shape, ipv6 ? kOfIpv6 : kOfIpv4);
      }
}

TEST_CASE("offload: nothing is done that was not negotiated") {
  for (const bool ipv6 : {false, true})
    for (const std::uint8_t flags : {std::uint8_t{0x10}, std::uint8_t{0x90}})
      for (std::uint32_t bits = 0; bits < 16; ++bits) {
        const TcpPacket packet({.ipv6 = ipv6, .flags = flags});
        const std::uint32_t needed = OffloadSet::kChecksum | (ipv6 ? OffloadSet::kTcp6 : OffloadSet::kTcp4) |
                                     ((flags & 0x80u) != 0 ? OffloadSet::kEcn : 0);
        const auto found = check(packet.net, packet.bytes, OffloadSet{bits});
        CHECK(found.has_value() == ((needed & ~bits) == 0));
        if (found) CHECK(found->needed.bits == needed);
      }
}

TEST_CASE("offload: checksums in packets of every length, at every place") {
  for (std::uint32_t length = 14; length < 80; ++length)
    for (std::uint32_t start = 0; start < 82; ++start)
      for (std::uint32_t offset = 0; offset < 20; ++offset) {
        Bytes packet(length);
        for (std::uint32_t i = 0; i < length; ++i) packet[i] = static_cast<std::byte>(i * 37 + 11);
        const bool good = start >= 14 && offset % 2 == 0 && start + offset + 2 <= length;
        const auto found = check(
            header_of(net_header(1, 0, 0, 0, static_cast<std::uint16_t>(start), static_cast<std::uint16_t>(offset))),
            packet);
        REQUIRE(found.has_value() == good);
        if (!found) continue;
        Bytes expected = packet;
        const std::uint32_t sum = ~ones_complement_sum(std::span<const std::byte>(packet).subspan(start)) & 0xffffu;
        const std::uint32_t field = sum == 0 ? 0xffff : sum;
        expected[start + offset] = static_cast<std::byte>(field >> 8);
        expected[start + offset + 1] = static_cast<std::byte>(field & 0xffu);
        complete_checksum(*found, packet);
        REQUIRE(packet == expected);
      }
}

TEST_CASE("offload: what a receiver is told is made from what was checked") {
  TcpPacket packet(TcpShape{.flags = 0x90});
  packet.net.flags = 0xff;
  packet.net.header_length = 0xffff;
  const auto offload = check(packet.net, packet.bytes);
  REQUIRE(offload);
  const NetHeader told = header_for_receiver(*offload, packet.net);
  CHECK(told.flags == 1);
  CHECK(told.gso_type == 0x81);
  CHECK(told.gso_size == 40);
  CHECK(told.header_length == packet.headers);
  CHECK(told.checksum_start == packet.tcp);
  CHECK(told.checksum_offset == 16);
  packet.net.gso_type = 0;
  const auto plain = check(packet.net, packet.bytes);
  REQUIRE(plain);
  CHECK(header_for_receiver(*plain, packet.net).gso_size == 0);
}

namespace {

TcpShape random_shape() {
  const auto upto = [](std::uint32_t most) { return *rc::gen::inRange(0u, most + 1); };
  TcpShape shape;
  shape.ipv6 = upto(1) != 0;
  shape.vlan_tags = upto(2);
  shape.ip_options = upto(shape.ipv6 ? 4 : 10);
  shape.tcp_options = upto(10);
  shape.segment = static_cast<std::uint16_t>(1 + upto(1460));
  shape.payload = 1 + upto(std::min<std::uint32_t>(65000, 504 * shape.segment - 1));
  shape.flags = static_cast<std::uint8_t>(upto(255) & ~0x26u);
  shape.sequence = *rc::gen::arbitrary<std::uint32_t>();
  shape.identification = *rc::gen::arbitrary<std::uint16_t>();
  shape.seed = *rc::gen::arbitrary<std::uint32_t>();
  return shape;
}

}  // namespace

TEST_CASE("offload: random TCP packets are cut as the reference cuts them") {
  REQUIRE(rc::check("segments are right", [] {
    const TcpShape shape = random_shape();
    const TcpPacket packet(shape);
    const auto offload = check(packet.net, packet.bytes);
    RC_ASSERT(offload.has_value());
    const auto segments = cut(*offload, packet.bytes);
    const auto expected = reference_cut(packet);
    RC_ASSERT(segments.size() == expected.size());
    Bytes payload;
    for (std::size_t n = 0; n < segments.size(); ++n) {
      RC_ASSERT(segments[n] == expected[n]);
      RC_ASSERT(checksums_are_right(packet, segments[n]));
      payload.insert(payload.end(), segments[n].begin() + packet.headers, segments[n].end());
    }
    RC_ASSERT(std::equal(payload.begin(), payload.end(), packet.bytes.begin() + packet.headers, packet.bytes.end()));
  }));
}

TEST_CASE("offload: random packets get the checksum that the reference computes") {
  REQUIRE(rc::check("the sum over everything is right", [] {
    TcpPacket packet(random_shape());
    packet.net.gso_type = 0;
    const auto offload = check(packet.net, packet.bytes);
    RC_ASSERT(offload.has_value());
    complete_checksum(*offload, packet.bytes);
    RC_ASSERT(checksums_are_right(packet, packet.bytes) || packet.bytes.size() - packet.network > 65535);
  }));
}

TEST_CASE("offload: damaged packets never make the two opinions differ") {
  REQUIRE(rc::check("both refuse or both accept", [] {
    TcpPacket packet(random_shape());
    packet.bytes.resize(std::min<std::size_t>(packet.bytes.size(), 400));
    const auto patches = *rc::gen::inRange(0, 6);
    for (int i = 0; i < patches; ++i)
      packet.bytes[*rc::gen::inRange<std::size_t>(12, std::min<std::size_t>(packet.bytes.size(), packet.headers))] =
          static_cast<std::byte>(*rc::gen::arbitrary<std::uint8_t>());
    packet.bytes.resize(*rc::gen::inRange<std::size_t>(0, packet.bytes.size() + 1));
    auto header = std::bit_cast<NetHeaderBytes>(packet.net);
    if (*rc::gen::inRange(0, 3) == 0)
      header[*rc::gen::inRange(0u, 10u)] ^= static_cast<std::byte>(1u << *rc::gen::inRange(0, 8));
    const auto found = check_offload(header_of(header), kAll, packet.bytes, kLimits);
    RC_ASSERT(found.has_value() == offload_is_good(header_of(header), kAll, packet.bytes, kLimits));
    if (found && found->is_segmented()) cut(*found, packet.bytes);
  }));
}
