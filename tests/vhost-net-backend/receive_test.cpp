// SPDX-License-Identifier: Apache-2.0
// Uplink to guest: layouts, mergeable buffers, wraps, starvation, damaged rings.
#include <catch2/catch.hpp>

#include "tests/vhost-net-backend/bench.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {
const PacketFlow kFlow{};

void check_rest(Bench& bench) {
  CHECK(bench.nic().receive.wrong_returns() == 0);
  CHECK(bench.nic().protocol_errors() == 0);
  CHECK(bench.kernel().bad_descriptors() == 0);
  CHECK(bench.world.audit().clean());
  CHECK(bench.world.record().arm.load() == 0);
}
}  // namespace

TEST_CASE("receive: headers of 10 and 12 bytes, all chain styles, header split over descriptors") {
  for (const std::uint64_t features :
       {std::uint64_t{0}, feature::kMergeable, feature::kVersion1, feature::kVersion1 | feature::kPacked})
    for (const ChainStyle style : {ChainStyle::kDirect, ChainStyle::kChained, ChainStyle::kIndirect})
      for (const auto& cuts : {std::vector<std::uint32_t>{10}, {12}, {1, 2, 3}, {7, 40}, {9, 11, 13, 27}, {11, 60}}) {
        WorldShape shape = small_world(features | feature::kIndirect);
        shape.nic.receive = style;
        shape.nic.cuts = cuts;
        shape.nic.queue_size = 128;
        Bench bench(shape);
        Ledger out(kFlow), in(kFlow);
        std::uint32_t sent = 0;
        for (int round = 0; round < 8; ++round) {
          drain(bench.world, bench.owner, out, in);
          sent += send_from_uplink(bench.world, kFlow, sent, 25);
        }
        drain(bench.world, bench.owner, out, in);
        CHECK(sent == 200);
        CHECK(in.finish(sent).clean());
        CHECK(bench.state().receive.packets == sent);
        CHECK(bench.state().receive.dropped == 0);
        check_rest(bench);
      }
}

TEST_CASE("receive: mergeable packets over several buffers") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const ChainStyle style : {ChainStyle::kDirect, ChainStyle::kChained, ChainStyle::kIndirect})
    for (const std::uint32_t slot : {13u, 30u, 64u, 96u, 130u, 162u}) {
      INFO("buffers of " << slot);
      WorldShape shape = small_world(feature::kVersion1 | feature::kIndirect | feature::kMergeable | layout);
      shape.nic.receive = style;
      shape.nic.slot_size = slot;
      shape.nic.queue_size = layout == 0 ? 256 : 271;
      Bench bench(shape);
      Ledger out(kFlow), in(kFlow);
      std::uint32_t sent = 0;
      for (int round = 0; round < 20; ++round) {
        drain(bench.world, bench.owner, out, in);
        sent += send_from_uplink(bench.world, kFlow, sent, 17);
      }
      drain(bench.world, bench.owner, out, in);
      CHECK(sent == 340);
      CHECK(in.finish(sent).clean());
      check_rest(bench);
    }
}

TEST_CASE("receive: num_buffers and used lengths of a mergeable packet") {
  WorldShape shape = small_world(feature::kVersion1 | feature::kMergeable | GENERATE(from_range(kLayouts)));
  shape.nic.slot_size = 64;
  Bench bench(shape);
  const PacketFlow flow{150, 150};  // 162 with the header: 64 + 64 + 34
  bench.nic().post(4);
  REQUIRE(send_from_uplink(bench.world, flow, 0, 1) == 1);
  CHECK(receive_burst(bench.pair()) == 1);
  CHECK(bench.nic().receive.published() == 3);
  std::uint32_t lengths[3];
  for (std::uint32_t& length : lengths) length = bench.nic().receive.take_used()->length;
  CHECK(lengths[0] == 64);
  CHECK(lengths[1] == 64);
  CHECK(lengths[2] == 34);
  const std::byte* header = bench.world.space.at(bench.nic().receive_slot(0));
  CHECK(header[10] == std::byte{3});
  CHECK(header[11] == std::byte{0});
}

TEST_CASE("receive: without mergeable buffers a packet too large for its buffer is dropped and counted") {
  WorldShape shape = small_world(feature::kVersion1 | GENERATE(from_range(kLayouts)));
  shape.nic.slot_size = 100;
  Bench bench(shape);
  const PacketFlow fits{88, 88}, exceeds{89, 89};
  bench.nic().post(3);
  REQUIRE(send_from_uplink(bench.world, fits, 0, 1) == 1);
  REQUIRE(send_from_uplink(bench.world, exceeds, 1, 1) == 1);
  REQUIRE(send_from_uplink(bench.world, fits, 2, 1) == 1);
  while (bench.owner.poll_once()) {
  }
  std::vector<std::byte> packet;
  std::uint32_t number = 9;
  REQUIRE(bench.nic().take(packet));
  CHECK((fits.intact(packet, number) && number == 0));
  REQUIRE(bench.nic().take(packet));
  CHECK((fits.intact(packet, number) && number == 2));
  CHECK(bench.nic().empty_returns() == 1);
  CHECK(bench.state().receive.dropped == 1);
  check_rest(bench);
}

TEST_CASE("receive: ring and index wraps inside a burst, of virtqueue and AF_XDP rings") {
  for (const std::uint64_t features : {feature::kVersion1, feature::kVersion1 | feature::kMergeable})
    for (const int first : {0, 50, 65500, 65535, 32760})
      for (const std::uint32_t xsk_first : {0u, 40u, 0xffffffe8u, 0x7ffffff0u}) {
        WorldShape shape = small_world(features);
        shape.nic.first_index = static_cast<std::uint16_t>(first);
        if (features != feature::kVersion1) shape.nic.slot_size = 100;
        shape.xsk_index = xsk_first;
        Bench bench(shape);
        Ledger out(kFlow), in(kFlow);
        std::uint32_t sent = 0;
        for (int round = 0; round < 12; ++round) {
          drain(bench.world, bench.owner, out, in);
          sent += send_from_uplink(bench.world, kFlow, sent, 29);
        }
        drain(bench.world, bench.owner, out, in);
        CHECK(sent == 12 * 29);
        CHECK(in.finish(sent).clean());
        check_rest(bench);
      }
}

TEST_CASE("receive: no buffers, then again") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const std::uint64_t features : {feature::kVersion1, feature::kVersion1 | feature::kMergeable}) {
    WorldShape shape = small_world(features | layout);
    if (features != feature::kVersion1) shape.nic.slot_size = 64;
    Bench bench(shape);
    const PacketFlow flow = features == feature::kVersion1 ? PacketFlow{} : PacketFlow{150, 150};  // three buffers each
    Ledger out(flow), in(flow);
    REQUIRE(send_from_uplink(bench.world, flow, 0, 10) == 10);
    CHECK_FALSE(bench.owner.poll_once());
    CHECK(bench.pair().receive_starved);
    CHECK_FALSE(has_work(bench.pair()));
    CHECK(bench.nic().receive.published() == 0);
    bench.nic().post(2);
    CHECK(has_work(bench.pair()));
    while (bench.owner.poll_once()) {
    }
    CHECK(bench.nic().receive.published() == (features == feature::kVersion1 ? 2 : 0));
    CHECK(bench.pair().receive_starved);
    CHECK_FALSE(has_work(bench.pair()));
    bench.nic().post(1);
    CHECK(has_work(bench.pair()));
    while (bench.owner.poll_once()) {
    }
    CHECK(bench.nic().receive.published() == 3);
    drain(bench.world, bench.owner, out, in);
    CHECK(in.finish(10).clean());
    CHECK_FALSE(bench.pair().receive_starved);
    check_rest(bench);
  }
}

TEST_CASE("receive: packed rings of any size and chains of any layout, many times around") {
  for (const std::uint64_t mergeable : {std::uint64_t{0}, feature::kMergeable})
    for (const std::uint32_t size : {9u, 33u, 96u, 100u})
      for (const ChainStyle style : {ChainStyle::kDirect, ChainStyle::kChained, ChainStyle::kIndirect})
        for (const std::uint32_t first : {0u, size - 1, size, 2 * size - 1, 2 * size - 3}) {
          INFO("ring of " << size << ", from " << first << ", style " << static_cast<int>(style));
          WorldShape shape = small_world(feature::kVersion1 | feature::kIndirect | feature::kPacked | mergeable);
          shape.nic.queue_size = size;
          shape.nic.receive = style;
          shape.nic.first_index = static_cast<std::uint16_t>(first);
          if (mergeable != 0) shape.nic.receive_slot_size = 60;
          Bench bench(shape);
          Ledger out(kFlow), in(kFlow);
          std::uint32_t sent = 0;
          for (int round = 0; round < 40; ++round) {
            drain(bench.world, bench.owner, out, in);
            sent += send_from_uplink(bench.world, kFlow, sent, 1 + static_cast<std::uint32_t>(round) % 35);
          }
          drain(bench.world, bench.owner, out, in);
          CHECK(in.finish(sent).clean());
          CHECK(bench.state().receive.next_used == bench.nic().receive.used_taken());
          check_rest(bench);
        }
}

TEST_CASE("receive: an uplink ring that is full drops outside, and what was in it arrives") {
  Bench bench(small_world());
  Ledger out(kFlow), in(kFlow);
  const std::uint32_t sent = send_from_uplink(bench.world, kFlow, 0, 100);
  CHECK(sent == 64);
  drain(bench.world, bench.owner, out, in);
  CHECK(in.finish(sent).clean());
  check_rest(bench);
}

TEST_CASE(
    "receive: descriptors of a damaged RX ring are dropped and counted, frames come back where they can be told") {
  Bench bench(small_world());
  bench.nic().post();
  REQUIRE(send_from_uplink(bench.world, kFlow, 0, 4) == 4);
  const XskDescription& description = bench.kernel().description();
  bench.kernel().rx_entry(1).len = 0;
  bench.kernel().rx_entry(2).len = 0xffffffffu;
  while (bench.owner.poll_once()) {
  }
  CHECK(bench.state().receive.dropped == 2);
  CHECK(bench.state().receive.packets == 2);
  CHECK(bench.world.audit().clean());
  REQUIRE(send_from_uplink(bench.world, kFlow, 4, 2) == 2);
  bench.kernel().rx_entry(4).addr = description.umem_size;
  bench.kernel().rx_entry(5).addr = ~std::uint64_t{0};
  while (bench.owner.poll_once()) {
  }
  CHECK(bench.state().receive.dropped == 4);
  std::vector<std::byte> packet;
  int received = 0;
  while (bench.nic().take(packet)) ++received;
  CHECK(received == 2);
}
