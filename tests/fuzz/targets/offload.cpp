// SPDX-License-Identifier: Apache-2.0
// A hostile virtio header in front of a hostile packet. Input: what was negotiated (1), bytes of a frame (2), segments
// a transaction has (2), the header (10), the packet.
//
// The two opinions must agree about every pair, and whatever they accept must be done within the packet and within the
// segment's own room, to frames with right checksums that together are the packet.
#include "vhost-net-backend/offload.hpp"

#include <algorithm>
#include <vector>

#include "tests/fuzz/targets/input.hpp"

using namespace tandem;
using namespace tandem::fuzz;

namespace {

// Every segment in memory of its exact size: the sanitizer sees a byte too many.
void cut(const Offload& offload, std::span<const std::byte> packet) {
  const auto length = static_cast<std::uint32_t>(packet.size());
  std::size_t payload = 0;
  for (std::uint32_t n = 0; n < offload.segments; ++n) {
    std::vector<std::byte> segment(segment_length(offload, length, n));
    must_hold(write_segment(offload, packet, n, segment.data()) == segment.size(), "a segment has its length");
    const auto rest = std::span<const std::byte>(segment).subspan(offload.headers);
    must_hold(
        std::equal(rest.begin(), rest.end(), packet.begin() + offload.headers + static_cast<std::ptrdiff_t>(payload)),
        "a segment's payload is the packet's next");
    payload += rest.size();
  }
  must_hold(payload + offload.headers == packet.size(), "the segments are the packet");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input{data, size};
  const OffloadSet allowed{input.u8() & 0xfu};
  const std::uint32_t frame = input.u16(), segments = input.u16();
  const OffloadLimits limits{frame, segments};
  const auto header = input.next<NetHeader>();
  const auto bytes = input.take(input.left());
  std::vector<std::byte> packet(bytes.begin(), bytes.end());
  const auto found = check_offload(header, allowed, packet, limits);
  must_hold(offload_is_good(header, allowed, packet, limits) == found.has_value(), "both opinions agree");
  if (!found) return 0;
  must_hold(asks_for_offload(header), "what is accepted was asked for");
  must_hold(allowed.has_all(found->needed), "nothing that was not negotiated");
  if (found->is_segmented())
    cut(*found, packet);
  else
    complete_checksum(*found, packet);
  return 0;
}
