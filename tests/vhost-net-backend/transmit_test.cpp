// SPDX-License-Identifier: Apache-2.0
// Guest to uplink: layouts, wraps, shortages, completions.
#include <catch2/catch.hpp>
#include <utility>
#include <vector>

#include "tests/vhost-net-backend/bench.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {
const PacketFlow kFlow{};

void check_rest(Bench& bench) {
  CHECK(bench.nic().transmit.wrong_returns() == 0);
  CHECK(bench.nic().transmit.outstanding() == 0);
  CHECK(bench.kernel().bad_descriptors() == 0);
  CHECK(bench.world.audit().clean());
  CHECK(bench.world.record().arm.load() == 0);
  for (const std::uint64_t word : bench.state().transmit_busy) CHECK(word == 0);
}
}  // namespace

TEST_CASE("transmit: headers of 10 and 12 bytes, all chain styles, header split over descriptors") {
  for (const std::uint64_t features :
       {std::uint64_t{0}, feature::kMergeable, feature::kVersion1, feature::kVersion1 | feature::kPacked})
    for (const ChainStyle style : {ChainStyle::kDirect, ChainStyle::kChained, ChainStyle::kIndirect})
      for (const auto& cuts : {std::vector<std::uint32_t>{10}, {12}, {1, 2, 3}, {7, 40}, {9, 11, 13, 27}, {30, 60}}) {
        WorldShape shape = small_world(features | feature::kIndirect);
        shape.nic.transmit = style;
        shape.nic.cuts = cuts;
        shape.nic.queue_size = 128;
        Bench bench(shape);
        CHECK(bench.pair().header_size == (features == 0 ? 10 : 12));
        Ledger out(kFlow), in(kFlow);
        std::uint32_t sent = 0;
        while (sent < 200) {
          sent += send_from_guest(bench.world, kFlow, sent, 25);
          drain(bench.world, bench.owner, out, in);
        }
        CHECK(out.finish(sent).clean());
        CHECK(bench.state().transmit.packets == sent);
        CHECK(bench.state().transmit.dropped == 0);
        check_rest(bench);
      }
}

TEST_CASE("transmit: ring and index wraps inside a burst, of virtqueue and AF_XDP rings") {
  for (const int first : {0, 50, 65500, 65535, 32760})
    for (const std::uint32_t xsk_first : {0u, 40u, 0xffffffe8u, 0x7ffffff0u}) {
      WorldShape shape = small_world();
      shape.nic.first_index = static_cast<std::uint16_t>(first);
      shape.xsk_index = xsk_first;
      Bench bench(shape);
      Ledger out(kFlow), in(kFlow);
      std::uint32_t sent = 0;
      for (int round = 0; round < 12; ++round) {
        sent += send_from_guest(bench.world, kFlow, sent, 29);
        drain(bench.world, bench.owner, out, in);
      }
      CHECK(sent == 12 * 29);
      CHECK(out.finish(sent).clean());
      CHECK(bench.state().transmit.next_avail == static_cast<std::uint16_t>(first + sent));
      CHECK(bench.nic().transmit.used_index() == static_cast<std::uint16_t>(first + sent));
      check_rest(bench);
    }
}

TEST_CASE("transmit: packed rings of any size and chains of any layout, many times around") {
  const std::uint64_t in_order = GENERATE(std::uint64_t{0}, feature::kInOrder);
  for (const std::uint32_t size : {4u, 5u, 33u, 96u, 100u})
    for (const ChainStyle style : {ChainStyle::kDirect, ChainStyle::kChained, ChainStyle::kIndirect})
      for (const std::uint32_t first : {0u, size - 1, size, 2 * size - 1, 2 * size - 3}) {
        INFO("ring of " << size << ", from " << first << ", style " << static_cast<int>(style)
                        << (in_order != 0 ? ", in order" : ""));
        WorldShape shape = small_world(feature::kVersion1 | feature::kIndirect | feature::kPacked | in_order);
        shape.nic.queue_size = size;
        shape.nic.transmit = style;
        shape.nic.first_index = static_cast<std::uint16_t>(first);
        Bench bench(shape);
        Ledger out(kFlow), in(kFlow);
        std::uint32_t sent = 0;
        for (int round = 0; round < 40; ++round) {
          sent += send_from_guest(bench.world, kFlow, sent, 1 + static_cast<std::uint32_t>(round) % 35);
          drain(bench.world, bench.owner, out, in);
        }
        CHECK(sent >= 40);
        CHECK(out.finish(sent).clean());
        CHECK(bench.state().transmit.next_used == bench.nic().transmit.used_taken());
        CHECK(bench.state().transmit.next_avail == bench.nic().transmit.avail_index());
        check_rest(bench);
      }
}

TEST_CASE("transmit: a packed burst comes back as one descriptor where the driver takes that, else as many") {
  const std::uint64_t in_order = GENERATE(std::uint64_t{0}, feature::kInOrder);
  Bench bench(small_world(feature::kVersion1 | feature::kPacked | in_order));
  bench.nic().set_styles(GENERATE(ChainStyle::kDirect, ChainStyle::kChained), ChainStyle::kDirect);
  REQUIRE(send_from_guest(bench.world, kFlow, 0, 5) == 5);
  const auto* slots =
      reinterpret_cast<const vring_packed_desc*>(bench.world.space.at(bench.nic().transmit.place().descriptors));
  std::vector<std::uint16_t> firsts, ids;  // of the chains: first slots, and the ids in their last ones
  for (std::uint16_t slot = 0, first = 0; ids.size() < 5; ++slot) {
    if ((slots[slot].flags & VRING_DESC_F_NEXT) != 0) continue;
    firsts.push_back(std::exchange(first, static_cast<std::uint16_t>(slot + 1)));
    ids.push_back(slots[slot].id);
  }
  REQUIRE(transmit_burst(bench.pair()) == 5);
  constexpr unsigned kGivenBack = 1u << VRING_PACKED_DESC_F_AVAIL | 1u << VRING_PACKED_DESC_F_USED;
  CHECK(slots[0].flags == kGivenBack);
  CHECK(slots[0].id == (in_order != 0 ? ids[4] : ids[0]));
  CHECK(slots[0].len == 0);
  for (std::size_t chain = 1; chain < 5; ++chain) {
    INFO("chain " << chain);
    CHECK(((slots[firsts[chain]].flags & kGivenBack) == kGivenBack) == (in_order == 0));
  }
  CHECK(bench.nic().reap() == 5);
  CHECK(bench.nic().transmit.wrong_returns() == 0);
}

// Slots in the middle of such a burst keep what the driver wrote there, a round long.
TEST_CASE(
    "transmit: a position in the middle of an earlier burst that came back as one is not taken for half published") {
  WorldShape shape = small_world(feature::kVersion1 | feature::kPacked | feature::kInOrder);
  shape.nic.queue_size = 8;
  Bench bench(shape);
  const auto half_published = [&](std::uint16_t position) {
    return bench.pair().transmit.queue.is_half_published(position);
  };
  std::uint32_t sent = 0;
  for (int round = 0; round < 6; ++round)
    for (const std::uint32_t burst : {5u, 3u, 2u, 1u, 4u, 1u, 8u}) {
      INFO("round " << round << ", burst of " << burst);
      const std::uint16_t before = bench.state().transmit.next_used;
      REQUIRE(send_from_guest(bench.world, kFlow, sent, burst) == burst);
      CHECK_FALSE(half_published(before));  // available, and not taken
      REQUIRE(transmit_burst(bench.pair()) == burst);
      sent += burst;
      CHECK(half_published(before));  // as a cursor would stand that was not moved
      REQUIRE(bench.nic().reap() == burst);
      CHECK_FALSE(half_published(bench.state().transmit.next_used));
      while (bench.kernel().send()) {
      }
      bench.kernel().complete(burst);
    }
}

TEST_CASE("transmit: a burst is at most 32 entries") {
  for (const std::uint64_t layout : kLayouts) {
    Bench bench(small_world(feature::kVersion1 | layout));
    REQUIRE(send_from_guest(bench.world, kFlow, 0, 40) == 40);
    CHECK(transmit_burst(bench.pair()) == kBurstPackets);
    CHECK(bench.kernel().transmit_waiting() == kBurstPackets);
    CHECK(transmit_burst(bench.pair()) == 8);
    CHECK(transmit_burst(bench.pair()) == 0);
  }
}

TEST_CASE("transmit: no free frames, then again") {
  WorldShape shape = small_world(feature::kVersion1 | GENERATE(from_range(kLayouts)));
  shape.nic.queue_size = 256;
  shape.xsk.tx_entries = 256;  // frames run out first
  Bench bench(shape);
  REQUIRE(send_from_guest(bench.world, kFlow, 0, 100) == 100);
  while (bench.owner.poll_once()) {
  }
  CHECK(bench.kernel().transmit_waiting() == 64);
  CHECK(bench.pair().transmit_pending);
  CHECK_FALSE(has_work(bench.pair()));
  // Sent but not completed: the frames are still the kernel's.
  Ledger out(kFlow), in(kFlow);
  for (int i = 0; i < 10; ++i) out.note(*bench.kernel().send());
  while (bench.owner.poll_once()) {
  }
  CHECK(bench.kernel().transmit_waiting() == 54);
  CHECK(bench.kernel().complete(7) == 7);
  while (bench.owner.poll_once()) {
  }
  CHECK(bench.kernel().transmit_waiting() == 61);
  CHECK(bench.world.audit().clean());
  drain(bench.world, bench.owner, out, in);
  CHECK(out.finish(100).clean());
  check_rest(bench);
}

TEST_CASE("transmit: TX ring full, then again") {
  WorldShape shape = small_world(feature::kVersion1 | GENERATE(from_range(kLayouts)));
  shape.nic.queue_size = 128;
  shape.xsk.tx_frames = 128;
  shape.xsk.tx_entries = 16;
  Bench bench(shape);
  REQUIRE(send_from_guest(bench.world, kFlow, 0, 60) == 60);
  while (bench.owner.poll_once()) {
  }
  CHECK(bench.kernel().transmit_waiting() == 16);
  CHECK(bench.nic().transmit.published() == 16);  // nothing is used before it is on the TX ring
  Ledger out(kFlow), in(kFlow);
  out.note(*bench.kernel().send());
  while (bench.owner.poll_once()) {
  }
  CHECK(bench.kernel().transmit_waiting() == 16);
  drain(bench.world, bench.owner, out, in);
  CHECK(out.finish(60).clean());
  check_rest(bench);
}

TEST_CASE("transmit: dropped chains take no frame, also when no frame is left") {
  WorldShape shape = small_world(feature::kVersion1 | GENERATE(from_range(kLayouts)));
  Bench bench(shape);
  GuestQueue& queue = bench.nic().transmit;
  for (int i = 0; i < 64; ++i) {
    const Piece runt{bench.nic().transmit_slot(0), 20, false};
    REQUIRE(queue.add({&runt, 1}));
  }
  queue.publish();
  while (bench.owner.poll_once()) {
  }
  CHECK(bench.state().transmit.dropped == 64);
  CHECK(bench.nic().reap() == 64);
  CHECK(bench.kernel().transmit_waiting() == 0);
  check_rest(bench);
}

TEST_CASE("completions: bits are cleared in any order, addresses that are no transmit frames are ignored") {
  Bench bench(small_world());
  Ledger out(kFlow), in(kFlow);
  REQUIRE(send_from_guest(bench.world, kFlow, 0, 3) == 3);
  bench.owner.poll_once();
  CHECK(bench.state().transmit_busy[0] == 0b111);
  while (const auto packet = bench.kernel().send()) out.note(*packet);
  const XskDescription& description = bench.kernel().description();
  auto* entries = reinterpret_cast<std::uint64_t*>(
      &bench.kernel().word(description.completion.mmap_offset + description.completion.descriptors));
  const std::uint64_t base = std::uint64_t{description.rx_frames} * description.frame_size;
  entries[0] = base + 2 * std::uint64_t{description.frame_size};
  entries[1] = 0;                  // a receive frame
  entries[2] = ~std::uint64_t{0};  // nowhere
  entries[3] = base;
  bench.kernel().word(description.completion.mmap_offset + description.completion.producer) = 4;
  drain_completions(bench.pair());
  CHECK(bench.state().transmit_busy[0] == 0b010);
  // An index that ran away is bounded by the ring.
  bench.kernel().word(description.completion.mmap_offset + description.completion.producer) = 0x80000000u;
  drain_completions(bench.pair());
  CHECK(bench.kernel().word(description.completion.mmap_offset + description.completion.consumer) == 4 + 64);
}

// CVE-2024-11614, CVE-2026-100236: fields of the virtio header that point beyond the packet. No offload is offered, so
// nothing may be read from the header: the packet goes out as it is, whatever the header says.
TEST_CASE("transmit: a header that asks for offloads nobody negotiated changes nothing") {
  struct Header {
    std::uint8_t flags, gso_type;
    std::uint16_t header_length, gso_size, checksum_start, checksum_offset, buffers;
  };
  static_assert(sizeof(Header) == 12);
  constexpr std::uint8_t kNeedsChecksum = 1, kTcp4 = 1, kUdp = 3, kTcp6 = 4;
  const Header headers[] = {
      {kNeedsChecksum, 0, 0, 0, 0xffff, 0xffff, 0},
      {kNeedsChecksum, 0, 0, 0, 59, 1, 0},
      {kNeedsChecksum, kTcp4, 0xffff, 0xffff, 0xffff, 16, 0xffff},
      {kNeedsChecksum, kTcp6, 61, 1, 60, 0, 0},
      {0, kUdp, 0, 0, 0, 0, 0},
      {0xff, 0xff, 0xffff, 0, 0xffff, 0xffff, 0xffff},
  };
  for (const Header& header : headers) {
    INFO("flags " << int{header.flags} << ", GSO type " << int{header.gso_type});
    Bench bench(small_world());
    Ledger out(kFlow), in(kFlow);
    REQUIRE(send_from_guest(bench.world, kFlow, 0, 4) == 4);
    for (std::uint32_t slot = 0; slot < 4; ++slot)
      std::memcpy(bench.world.space.at(bench.nic().transmit_slot(slot)), &header, sizeof header);
    drain(bench.world, bench.owner, out, in);
    CHECK(out.finish(4).clean());
    CHECK(bench.state().transmit.packets == 4);
    check_rest(bench);
  }
}
