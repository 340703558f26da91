// SPDX-License-Identifier: Apache-2.0
// Checking offload requests, Internet checksums (RFC 1071), and TCP segmentation.
#include "vhost-net-backend/offload.hpp"

#include <algorithm>
#include <bit>

#include "vhost-net-backend/protection.hpp"

namespace tandem {

namespace {

static_assert(std::endian::native == std::endian::little, "NetHeader is read as it lies there");

constexpr std::uint32_t kEthernetHeader = 14;
constexpr std::uint32_t kVlanTag = 4;
constexpr std::uint32_t kIpv4Header = 20, kIpv6Header = 40, kTcpHeader = 20;
constexpr std::uint16_t kTypeIpv4 = 0x0800, kTypeIpv6 = 0x86dd, kTypeVlan = 0x8100, kTypeServiceVlan = 0x88a8;
constexpr std::uint8_t kProtocolTcp = 6, kHopByHop = 0, kDestinationOptions = 60;
constexpr std::uint16_t kTcpChecksumAt = 16;
// Offsets in the TCP header, and its flags.
constexpr std::uint32_t kSequenceAt = 4, kDataOffsetAt = 12, kFlagsAt = 13;
constexpr unsigned kFin = 0x01, kSyn = 0x02, kRst = 0x04, kPsh = 0x08, kUrg = 0x20, kCwr = 0x80;

unsigned byte_at(const std::byte* bytes, std::uint32_t at) { return std::to_integer<unsigned>(bytes[at]); }
std::uint16_t load16(const std::byte* bytes, std::uint32_t at) {
  return static_cast<std::uint16_t>(byte_at(bytes, at) << 8 | byte_at(bytes, at + 1));
}
std::uint32_t load32(const std::byte* bytes, std::uint32_t at) {
  return std::uint32_t{load16(bytes, at)} << 16 | load16(bytes, at + 2);
}
void store16(std::byte* bytes, std::uint32_t at, std::uint32_t value) {
  bytes[at] = static_cast<std::byte>(value >> 8 & 0xffu);
  bytes[at + 1] = static_cast<std::byte>(value & 0xffu);
}
void store32(std::byte* bytes, std::uint32_t at, std::uint32_t value) {
  store16(bytes, at, value >> 16);
  store16(bytes, at + 2, value);
}

// One's complement sums are kept as 64 bits in the order of memory, which gives the same checksum as network order does
// (RFC 1071, 2 (B)), and folded at the end.
std::uint64_t add_bytes(std::uint64_t sum, const std::byte* bytes, std::size_t size) {
  // Four accumulators of 32-bit halves, so that no carry ties one addition to the next.
  std::uint64_t low = 0, high = 0, low2 = 0, high2 = 0;
  for (; size >= 16; size -= 16, bytes += 16) {
    std::uint64_t word[2];
    std::memcpy(word, bytes, sizeof word);
    low += word[0] & 0xffff'ffffu;
    high += word[0] >> 32;
    low2 += word[1] & 0xffff'ffffu;
    high2 += word[1] >> 32;
  }
  sum += low + high + low2 + high2;
  for (; size >= 2; size -= 2, bytes += 2) {
    std::uint16_t word = 0;
    std::memcpy(&word, bytes, sizeof word);
    sum += word;
  }
  if (size != 0) sum += std::to_integer<std::uint64_t>(*bytes);  // an odd byte is the first of its pair
  return sum;
}
// A number in network order.
std::uint64_t add16(std::uint64_t sum, std::uint32_t value) {
  return sum + std::uint64_t{(value >> 8 & 0xffu) | (value << 8 & 0xff00u)};
}

// The checksum of a sum, as it is to lie in memory.
std::uint16_t fold_checksum(std::uint64_t sum) {
  sum = (sum & 0xffff'ffffu) + (sum >> 32);
  sum = (sum & 0xffff'ffffu) + (sum >> 32);
  sum = (sum & 0xffffu) + (sum >> 16);
  sum = (sum & 0xffffu) + (sum >> 16);
  sum = (sum & 0xffffu) + (sum >> 16);
  return static_cast<std::uint16_t>(~sum);
}
void store_checksum(std::byte* at, std::uint16_t checksum) { std::memcpy(at, &checksum, sizeof checksum); }

std::uint64_t bit_of(std::uint64_t features, unsigned bit, std::uint32_t meaning) {
  return (features >> bit & 1u) != 0 ? meaning : 0;
}
// Segmentation without checksum, or ECN without segmentation, means nothing (Virtio 1.2, 5.1.3.1).
OffloadSet make_set(std::uint64_t features, unsigned checksum, unsigned tcp4, unsigned tcp6, unsigned ecn) {
  OffloadSet set;
  if ((features >> checksum & 1u) == 0) return set;
  set.bits = static_cast<std::uint32_t>(OffloadSet::kChecksum | bit_of(features, tcp4, OffloadSet::kTcp4) |
                                        bit_of(features, tcp6, OffloadSet::kTcp6));
  if (set.bits != OffloadSet::kChecksum)
    set.bits |= static_cast<std::uint32_t>(bit_of(features, ecn, OffloadSet::kEcn));
  return set;
}

// Where the IP header begins, behind up to two VLAN tags; its EtherType in `type`. 0: the packet ends before.
std::uint32_t find_network(std::span<const std::byte> packet, std::uint16_t& type) {
  std::uint32_t at = kEthernetHeader;
  for (int tags = 0; at <= packet.size(); ++tags, at += kVlanTag) {
    type = load16(packet.data(), at - 2);
    if (tags == 2 || (type != kTypeVlan && type != kTypeServiceVlan)) return at;
  }
  return 0;
}

// Where TCP begins behind the IPv4 header at `at`; 0: it does not.
std::uint32_t find_tcp4(std::span<const std::byte> packet, std::uint32_t at) {
  if (packet.size() - at < kIpv4Header || byte_at(packet.data(), at) >> 4 != 4) return 0;
  const std::uint32_t length = (byte_at(packet.data(), at) & 0xfu) * 4;
  constexpr unsigned kFragment = 0x3fff;  // MF and the offset
  if (length < kIpv4Header || packet.size() - at < length || byte_at(packet.data(), at + 9) != kProtocolTcp ||
      (load16(packet.data(), at + 6) & kFragment) != 0)
    return 0;
  return at + length;
}

// The same behind an IPv6 header and its options.
std::uint32_t find_tcp6(std::span<const std::byte> packet, std::uint32_t at) {
  if (packet.size() - at < kIpv6Header || byte_at(packet.data(), at) >> 4 != 6) return 0;
  unsigned next = byte_at(packet.data(), at + 6);
  at += kIpv6Header;
  constexpr int kMostHeaders = 4;  // what RFC 8200 recommends comes to no more
  for (int i = 0; i < kMostHeaders && next != kProtocolTcp; ++i) {
    if ((next != kHopByHop && next != kDestinationOptions) || packet.size() - at < 8) return 0;
    next = byte_at(packet.data(), at);
    const std::uint32_t length = 8 * (byte_at(packet.data(), at + 1) + 1);
    if (packet.size() - at < length) return 0;
    at += length;
  }
  return next == kProtocolTcp ? at : 0;
}

bool checksum_is_inside(const NetHeader& header, std::size_t packet) {
  // An odd offset would not lie on one of the 16-bit words that are summed.
  return header.checksum_start >= kEthernetHeader && header.checksum_offset % 2 == 0 &&
         std::size_t{header.checksum_start} + header.checksum_offset + 2 <= packet;
}

bool check_segmentation(Offload& offload, const NetHeader& header, std::span<const std::byte> packet,
                        const OffloadLimits& limits) {
  offload.ipv6 = (header.gso_type & ~kGsoEcn) == kGsoTcp6;
  std::uint16_t type = 0;
  const std::uint32_t network = find_network(packet, type);
  if (network == 0 || type != (offload.ipv6 ? kTypeIpv6 : kTypeIpv4)) return false;
  const std::uint32_t tcp = offload.ipv6 ? find_tcp6(packet, network) : find_tcp4(packet, network);
  if (tcp == 0 || tcp != header.checksum_start || header.checksum_offset != kTcpChecksumAt ||
      packet.size() - tcp < kTcpHeader)
    return false;
  const std::uint32_t tcp_header = (byte_at(packet.data(), tcp + kDataOffsetAt) >> 4) * 4;
  const std::uint32_t headers = tcp + tcp_header;
  // No sender segments a handshake, a reset or urgent data: repeated in each segment they would mean something else.
  if (tcp_header < kTcpHeader || packet.size() <= headers ||
      (byte_at(packet.data(), tcp + kFlagsAt) & (kSyn | kRst | kUrg)) != 0)
    return false;
  // What the IP header says it is long, once it is one segment.
  const std::uint32_t longest_ip = headers + header.gso_size - network - (offload.ipv6 ? kIpv6Header : 0);
  const std::uint32_t payload = static_cast<std::uint32_t>(packet.size()) - headers;
  if (header.gso_size == 0 || headers + header.gso_size > limits.frame || longest_ip > 65535) return false;
  offload.network = static_cast<std::uint16_t>(network);
  offload.headers = static_cast<std::uint16_t>(headers);
  offload.segment_payload = header.gso_size;
  offload.segments = (payload + header.gso_size - 1) / header.gso_size;
  return offload.segments <= limits.segments;
}

}  // namespace

OffloadSet OffloadSet::asked_by_guest(std::uint64_t features) { return make_set(features, 0, 11, 12, 13); }
OffloadSet OffloadSet::taken_by_guest(std::uint64_t features) { return make_set(features, 1, 7, 8, 9); }

std::optional<Offload> check_offload(const NetHeader& header, OffloadSet allowed, std::span<const std::byte> packet,
                                     const OffloadLimits& limits) {
  Offload offload;
  offload.needed.bits = OffloadSet::kChecksum;
  switch (header.gso_type) {
    case kGsoNone:
      break;
    case kGsoTcp4:
    case kGsoTcp4 | kGsoEcn:
      offload.needed.bits |= OffloadSet::kTcp4;
      break;
    case kGsoTcp6:
    case kGsoTcp6 | kGsoEcn:
      offload.needed.bits |= OffloadSet::kTcp6;
      break;
    default:
      return std::nullopt;
  }
  if ((header.gso_type & kGsoEcn) != 0) offload.needed.bits |= OffloadSet::kEcn;
  // Segmentation comes with a checksum to be completed, always (Virtio 1.2, 5.1.6.2).
  if (!allowed.has_all(offload.needed) || (header.flags & kNeedsChecksum) == 0 || packet.size() > kLargestPacket ||
      !checksum_is_inside(header, packet.size()))
    return std::nullopt;
  offload.checksum_start = header.checksum_start;
  offload.checksum_offset = header.checksum_offset;
  if (header.gso_type != kGsoNone && !check_segmentation(offload, header, packet, limits)) return std::nullopt;
  return offload;
}

void complete_checksum(const Offload& offload, std::span<std::byte> packet) {
  const std::uint32_t start = offload.checksum_start;
  must_hold(start + offload.checksum_offset + 2 <= packet.size());
  // The driver left the sum of the pseudo header in the field; it is part of what is summed.
  const std::uint16_t checksum = fold_checksum(add_bytes(0, packet.data() + start, packet.size() - start));
  // 0 means "none" to UDP; its other spelling is as good for all (RFC 768).
  store_checksum(packet.data() + start + offload.checksum_offset, checksum == 0 ? 0xffff : checksum);
}

std::uint32_t segment_length(const Offload& offload, std::uint32_t packet_length, std::uint32_t n) {
  const std::uint32_t from = offload.headers + n * offload.segment_payload;
  must_hold(n < offload.segments && from < packet_length);
  return offload.headers + std::min<std::uint32_t>(offload.segment_payload, packet_length - from);
}

std::uint32_t write_segment(const Offload& offload, std::span<const std::byte> packet, std::uint32_t n, std::byte* to) {
  const std::uint32_t length = segment_length(offload, static_cast<std::uint32_t>(packet.size()), n);
  const std::uint32_t done = n * offload.segment_payload;
  std::memcpy(to, packet.data(), offload.headers);
  std::memcpy(to + offload.headers, packet.data() + offload.headers + done, length - offload.headers);

  std::byte* ip = to + offload.network;
  const std::uint32_t ip_length = length - offload.network;
  std::byte* tcp = to + offload.checksum_start;
  const std::uint32_t tcp_length = length - offload.checksum_start;
  std::uint64_t pseudo = add16(add16(0, kProtocolTcp), tcp_length);
  if (offload.ipv6) {
    store16(ip, 4, ip_length - kIpv6Header);
    pseudo = add_bytes(pseudo, ip + 8, 32);
  } else {
    store16(ip, 2, ip_length);
    store16(ip, 4, load16(ip, 4) + n);  // each datagram has an identification of its own
    store16(ip, 10, 0);
    store_checksum(ip + 10, fold_checksum(add_bytes(0, ip, offload.checksum_start - offload.network)));
    pseudo = add_bytes(pseudo, ip + 12, 8);
  }
  // FIN and PSH are about the end of the data, CWR about its beginning (RFC 3168, 6.1.2).
  unsigned flags = byte_at(tcp, kFlagsAt);
  if (n + 1 != offload.segments) flags &= ~(kFin | kPsh);
  if (n != 0) flags &= ~kCwr;
  tcp[kFlagsAt] = static_cast<std::byte>(flags);
  store32(tcp, kSequenceAt, load32(tcp, kSequenceAt) + done);
  store16(tcp, kTcpChecksumAt, 0);
  store_checksum(tcp + kTcpChecksumAt, fold_checksum(add_bytes(pseudo, tcp, tcp_length)));
  return length;
}

NetHeader header_for_receiver(const Offload& offload, const NetHeader& asked) {
  NetHeader header;
  header.flags = kNeedsChecksum;
  header.checksum_start = offload.checksum_start;
  header.checksum_offset = offload.checksum_offset;
  if (!offload.is_segmented()) return header;
  header.gso_type = asked.gso_type;
  header.header_length = offload.headers;
  header.gso_size = offload.segment_payload;
  return header;
}

// ---- The second opinion: a walk with a cursor, byte by byte. ----

namespace {

class Walk {
 public:
  explicit Walk(std::span<const std::byte> packet) : packet_(packet) {}
  [[nodiscard]] std::size_t position() const { return position_; }
  [[nodiscard]] bool whole() const { return position_ <= packet_.size(); }
  // 0 behind the end; whole() tells.
  unsigned number(std::size_t bytes) {
    unsigned value = 0;
    for (std::size_t i = 0; i < bytes; ++i, ++position_)
      value = value << 8 | (position_ < packet_.size() ? std::to_integer<unsigned>(packet_[position_]) : 0u);
    return value;
  }
  void skip(std::size_t bytes) { position_ += bytes; }

 private:
  std::span<const std::byte> packet_;
  std::size_t position_ = 0;
};

// Moves to the TCP header.
bool walk_to_tcp(Walk& walk, bool ipv6) {
  walk.skip(12);
  unsigned type = walk.number(2);
  for (int i = 0; i < 2 && (type == 0x8100 || type == 0x88a8); ++i) {
    walk.skip(2);
    type = walk.number(2);
  }
  if (type != (ipv6 ? 0x86ddu : 0x0800u)) return false;
  if (!ipv6) {
    const unsigned first = walk.number(1);
    walk.skip(5);
    const unsigned fragment = walk.number(2);
    walk.skip(1);
    const unsigned protocol = walk.number(1);
    walk.skip(10);
    if (first < 0x45 || first > 0x4f || (fragment & 0x3fffu) != 0 || protocol != 6) return false;
    walk.skip((first - 0x45) * std::size_t{4});
    return walk.whole();
  }
  if (walk.number(1) >> 4 != 6) return false;
  walk.skip(5);
  unsigned next = walk.number(1);
  walk.skip(33);
  for (int left = 4; next != 6; --left) {
    if (left == 0 || (next != 0 && next != 60)) return false;
    next = walk.number(1);
    const unsigned units = walk.number(1);
    walk.skip(6 + std::size_t{8} * units);
    if (!walk.whole()) return false;
  }
  return walk.whole();
}

bool segmentation_is_good(const NetHeader& header, std::span<const std::byte> packet, const OffloadLimits& limits) {
  Walk walk(packet);
  if (!walk_to_tcp(walk, (header.gso_type & 0x7fu) == 4) || walk.position() != header.checksum_start) return false;
  const std::size_t tcp = walk.position();
  walk.skip(12);
  const unsigned words = walk.number(1) >> 4;
  const unsigned flags = walk.number(1);
  walk.skip(6);
  const std::size_t payload = tcp + std::size_t{4} * words;
  if (!walk.whole() || words < 5 || payload >= packet.size() || (flags & 0x26u) != 0) return false;
  if (header.checksum_offset != 16 || header.gso_size == 0 || payload + header.gso_size > limits.frame) return false;
  std::size_t left = packet.size() - payload, count = 0;
  for (; left > 0; ++count) left -= std::min<std::size_t>(left, header.gso_size);
  // A frame as long as an IP length can say is longer than any uplink has.
  return count <= limits.segments && payload + header.gso_size <= 65535;
}

}  // namespace

bool offload_is_good(const NetHeader& header, OffloadSet allowed, std::span<const std::byte> packet,
                     const OffloadLimits& limits) {
  const bool tcp4 = (header.gso_type & 0x7fu) == 1, tcp6 = (header.gso_type & 0x7fu) == 4;
  const bool ecn = header.gso_type >= 0x80;
  const std::size_t end = std::size_t{2} + header.checksum_start + header.checksum_offset;
  if ((header.flags & 1u) == 0 || (allowed.bits & 1u) == 0 || header.checksum_start < 14 ||
      (header.checksum_offset & 1u) != 0 || end > packet.size() || packet.size() > kLargestPacket)
    return false;
  if (header.gso_type == 0) return true;
  if ((!tcp4 && !tcp6) || (tcp4 && (allowed.bits & 2u) == 0) || (tcp6 && (allowed.bits & 4u) == 0) ||
      (ecn && (allowed.bits & 8u) == 0))
    return false;
  return segmentation_is_good(header, packet, limits);
}

}  // namespace tandem
