// SPDX-License-Identifier: Apache-2.0
// Packets with offload requests through the engine: to the uplink, and to another guest that takes them or does not.
#include <algorithm>
#include <catch2/catch.hpp>
#include <functional>
#include <cstring>
#include <string>

#include "tests/support/tcp_packets.hpp"
#include "tests/vhost-net-backend/bench.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

NetHeaderBytes ask(const TcpPacket& packet) {
  NetHeaderBytes bytes;
  std::memcpy(bytes.data(), &packet.net, bytes.size());
  return bytes;
}

WorldShape large_world(std::uint64_t features) {
  WorldShape shape;
  shape.nic.features = features | feature::kVersion1 | feature::kIndirect;
  shape.nic.queue_size = 64;
  shape.nic.slot_size = 66000;
  shape.nic.receive_slot_size = 2048;
  shape.xsk.tx_frames = 1024;
  shape.xsk.tx_entries = 1024;
  return shape;
}

struct TwoGuests {
  explicit TwoGuests(WorldShape shape, std::uint64_t receiver_features = 0) : world(with_two(shape)) {
    DeviceDescription to = world.describe(1, 1);
    if (receiver_features != 0) to.features = receiver_features;
    owner.emplace(world.segment(), fence.view(), 1);
    owner->post(AttachCommand{world.make_ports(1)});
    owner->hold(world.make_ports(0), {world.make_device(world.describe(1, 0)), world.make_device(to)});
    REQUIRE(owner->take_over());
  }
  static WorldShape with_two(WorldShape shape) {
    shape.devices = shape.queue_pairs = 2;
    return shape;
  }
  std::vector<Bytes> arrived() {
    std::vector<Bytes> packets;
    for (Bytes packet; world.nics[1].take(packet);) packets.push_back(packet);
    return packets;
  }
  void run() {
    world.nics[0].transmit.publish();
    while (owner->poll_once()) {
    }
    world.nics[0].reap();
  }

  FakeFence fence;
  EngineWorld world;
  std::optional<ShardStepper> owner;
};

// Which one differs first; the packets themselves would say nothing to a reader. -1: none.
int first_difference(const std::vector<Bytes>& got, const std::vector<Bytes>& expected) {
  const std::size_t common = std::min(got.size(), expected.size());
  for (std::size_t i = 0; i < common; ++i)
    if (got[i] != expected[i]) return static_cast<int>(i);
  return got.size() == expected.size() ? -1 : static_cast<int>(common);
}

// Lets everything cross; the kernel takes and completes as it goes.
std::vector<Bytes> sent_by(Bench& bench) {
  std::vector<Bytes> frames;
  bench.nic().transmit.publish();
  for (bool moved = true; moved;) {
    moved = bench.owner.poll_once();
    while (const auto frame = bench.kernel().send()) {
      frames.emplace_back(frame->begin(), frame->end());
      moved = true;
    }
    moved |= bench.kernel().complete() != 0;
  }
  drain_completions(bench.pair());
  bench.nic().reap();
  CHECK(bench.nic().transmit.outstanding() == 0);
  CHECK(bench.nic().transmit.wrong_returns() == 0);
  CHECK(bench.kernel().bad_descriptors() == 0);
  CHECK(bench.world.audit().clean());
  return frames;
}

const TcpShape kSmall{.payload = 600, .segment = 100, .flags = 0x99};
const TcpShape kLarge{.payload = 65000, .segment = 1400, .flags = 0x18};

}  // namespace

TEST_CASE("offloads to the uplink: cut and summed packets between plain ones, in order, however chains are cut") {
  for (const std::uint64_t layout : kLayouts)
    for (const ChainStyle style : {ChainStyle::kDirect, ChainStyle::kChained, ChainStyle::kIndirect})
      for (const auto& cuts :
           {std::vector<std::uint32_t>{12}, {1, 2, 3}, {9, 11, 13, 40, 100, 4000, 30001}, {66, 67}}) {
        WorldShape shape = large_world(feature::kAsksOffloads | layout);
        shape.nic.transmit = style;
        shape.nic.cuts = cuts;
        if (layout != 0) shape.nic.queue_size = 40;
        Bench bench(shape);
        std::vector<Bytes> expected;
        for (int round = 0; round < 3; ++round) {
          TcpShape large = kLarge;
          large.ipv6 = round % 2 != 0;
          large.vlan_tags = static_cast<std::uint32_t>(round);
          const TcpPacket tso(large);
          REQUIRE(bench.nic().send(tso.bytes, ask(tso)));
          for (const Bytes& frame : reference_cut(tso)) expected.push_back(frame);
          Bytes plain(100, static_cast<std::byte>(round));
          REQUIRE(bench.nic().send(plain));
          expected.push_back(plain);
          TcpPacket summed(TcpShape{.payload = 33, .segment = 33});
          expected.push_back(reference_cut(summed).front());
          summed.net.gso_type = 0;
          REQUIRE(bench.nic().send(summed.bytes, ask(summed)));
          CHECK(first_difference(sent_by(bench), expected) == -1);
          expected.clear();
        }
        CHECK(bench.state().transmit.packets == 9);
        CHECK(bench.state().transmit.dropped == 0);
      }
}

TEST_CASE("offloads to the uplink: a packet waits until all of its frames are free") {
  WorldShape shape = large_world(feature::kAsksOffloads);
  shape.xsk.tx_frames = shape.xsk.tx_entries = 64;
  Bench bench(shape);
  const TcpPacket packet(TcpShape{.payload = 40 * 100, .segment = 100});  // 40 segments
  const auto frames = reference_cut(packet);
  ShardStepper heir(bench.world.segment(), bench.fence.view(), 2);
  heir.hold(bench.world.make_ports(), {bench.world.make_device(bench.world.describe(1))});
  for (int i = 0; i < 3; ++i) REQUIRE(bench.nic().send(packet.bytes, ask(packet)));
  bench.nic().transmit.publish();
  for (int i = 0; i < 3; ++i) {
    while (bench.owner.poll_once()) {
    }
    CHECK(bench.kernel().transmit_waiting() == 40);
    for (const Bytes& frame : frames) {
      const auto sent = bench.kernel().send();
      REQUIRE(sent);
      CHECK(std::equal(sent->begin(), sent->end(), frame.begin(), frame.end()));
    }
    // The ring is empty, but the frames are still the kernel's.
    while (bench.owner.poll_once()) {
    }
    CHECK(bench.kernel().transmit_waiting() == 0);
    // It is the uplink that keeps it waiting, and no owner is ended for that.
    CHECK_FALSE(heir.work_waits());
    CHECK(bench.kernel().complete() == 40);
    CHECK(heir.work_waits() == (i < 2));
  }
  CHECK(bench.state().transmit.packets == 3);
  CHECK(sent_by(bench).empty());
}

TEST_CASE("offloads to the uplink: what can never fit, or is hostile, is dropped and counted, and the rest goes on") {
  for (const std::uint64_t layout : kLayouts) {
    WorldShape shape = large_world(feature::kAsksOffloads | layout);
    shape.xsk.tx_frames = shape.xsk.tx_entries = 64;
    Bench bench(shape);
    std::uint32_t bad = 0;
    const auto send_bad = [&](const TcpPacket& packet) {
      REQUIRE(bench.nic().send(packet.bytes, ask(packet)));
      ++bad;
    };
    send_bad(TcpPacket(TcpShape{.payload = 65 * 100, .segment = 100}));  // 65 frames; there are 64
    send_bad(TcpPacket(TcpShape{.payload = 4000, .segment = 3000}));     // longer than a frame
    const std::function<void(NetHeader&)> lies[] = {
        [](NetHeader& net) { net.gso_size = 0; },
        [](NetHeader& net) { net.checksum_start = 60000; },
        [](NetHeader& net) { net.gso_type = 3; },
        [](NetHeader& net) { net.flags = 0; },
        [](NetHeader& net) { net.gso_type = 0, net.checksum_offset = 0xfff0; },
    };
    for (const auto& lie : lies) {
      TcpPacket packet(kSmall);
      lie(packet.net);
      send_bad(packet);
    }
    TcpPacket packet(TcpShape{.payload = 65500, .segment = 1400, .flags = 0x10});
    packet.bytes.resize(kLargestPacket + 1);
    send_bad(packet);
    // Too long for a frame, and nobody asks that it be cut.
    packet = TcpPacket(kLarge);
    packet.net.gso_type = 0;
    send_bad(packet);
    const Bytes plain(60, std::byte{7});
    REQUIRE(bench.nic().send(plain));
    CHECK(first_difference(sent_by(bench), std::vector<Bytes>{plain}) == -1);
    CHECK(bench.state().transmit.dropped == bad);
    CHECK(bench.state().transmit.packets == 1);
    CHECK(bench.state().transmit.fault.load() == QueueFault::kNone);
  }
}

TEST_CASE("offloads: what was not negotiated is not looked at") {
  Bench bench(large_world(0));
  const TcpPacket packet(kSmall);
  REQUIRE(bench.nic().send(packet.bytes, ask(packet)));
  CHECK(first_difference(sent_by(bench), std::vector<Bytes>{packet.bytes}) == -1);
  // Segmentation that was not negotiated, beside a checksum that was.
  Bench summing(large_world(1));
  REQUIRE(summing.nic().send(packet.bytes, ask(packet)));
  CHECK(sent_by(summing).empty());
  CHECK(summing.state().transmit.dropped == 1);
}

TEST_CASE("offloads: a burst ends where its record is full, and the next one goes on") {
  Bench bench(large_world(feature::kAsksOffloads));
  std::vector<Bytes> expected;
  for (std::uint32_t i = 0; i < 5; ++i) {
    const TcpPacket packet(TcpShape{.payload = 200 * 10, .segment = 10, .sequence = i * 5000, .seed = i});
    REQUIRE(bench.nic().send(packet.bytes, ask(packet)));
    for (const Bytes& frame : reference_cut(packet)) expected.push_back(frame);
  }
  CHECK(first_difference(sent_by(bench), expected) == -1);
  CHECK(bench.state().transmit.packets == 5);
}

TEST_CASE("offloads between guests: taken whole, with the sender's request") {
  for (const std::uint64_t layout : kLayouts)
    for (const std::uint64_t mergeable : {std::uint64_t{0}, feature::kMergeable}) {
      WorldShape shape = large_world(feature::kAsksOffloads | feature::kTakesOffloads | layout | mergeable);
      shape.nic.receive_slot_size = mergeable != 0 ? 2048 : 66000;
      TwoGuests guests(shape);
      guests.world.nics[1].post();
      const TcpPacket tso(kLarge);
      TcpPacket summed(kSmall);
      summed.net.gso_type = 0;
      const Bytes plain = TcpPacket(kSmall).bytes;
      REQUIRE(guests.world.nics[0].send(tso.bytes, ask(tso)));
      REQUIRE(guests.world.nics[0].send(summed.bytes, ask(summed)));
      REQUIRE(guests.world.nics[0].send(plain));
      guests.run();
      Bytes packet;
      REQUIRE(guests.world.nics[1].take(packet));
      CHECK((packet == tso.bytes));
      CHECK(guests.world.nics[1].taken_header() == ask(tso));
      REQUIRE(guests.world.nics[1].take(packet));
      CHECK((packet == summed.bytes));
      CHECK(guests.world.nics[1].taken_header() == net_header(1, 0, 0, 0, 34, 16));
      REQUIRE(guests.world.nics[1].take(packet));
      CHECK((packet == plain));
      CHECK(guests.world.nics[1].taken_header() == NetHeaderBytes{});
      CHECK(guests.world.state(1).receive.packets == 3);
      CHECK(guests.world.state(0).transmit.packets == 3);
      CHECK(guests.world.nics[1].protocol_errors() == 0);
    }
}

TEST_CASE("offloads between guests: done for a receiver that does not take them") {
  // What the receiver takes: nothing; checksums; IPv6 only, which is no help to IPv4; all but ECN.
  for (const std::uint64_t taken : {std::uint64_t{0}, std::uint64_t{1} << 1, std::uint64_t{1} << 1 | 1u << 8,
                                    std::uint64_t{1} << 1 | 1u << 7 | 1u << 8})
    for (const std::uint64_t layout : kLayouts) {
      const std::uint64_t all = feature::kVersion1 | feature::kIndirect | feature::kMergeable | layout;
      WorldShape shape = large_world(feature::kAsksOffloads | all);
      shape.nic.queue_size = 128;
      shape.nic.receive_slot_size = 800;  // two buffers for each segment
      TwoGuests guests(shape, all | taken);
      guests.world.nics[1].post();
      TcpShape large = kLarge;
      large.flags = 0x98;
      large.payload = 40000;
      const TcpPacket tso(large);
      REQUIRE(guests.world.nics[0].send(tso.bytes, ask(tso)));
      guests.run();
      const auto expected = reference_cut(tso);
      CHECK(first_difference(guests.arrived(), expected) == -1);
      CHECK(guests.world.state(0).transmit.packets == 1);
      CHECK(guests.world.state(1).receive.packets == expected.size());
      CHECK(guests.world.nics[1].protocol_errors() == 0);
      if (taken != 0) continue;
      guests.world.nics[1].post();
      TcpPacket summed(TcpShape{.payload = 33, .segment = 33});
      const Bytes finished = reference_cut(summed).front();
      summed.net.gso_type = 0;
      REQUIRE(guests.world.nics[0].send(summed.bytes, ask(summed)));
      guests.run();
      CHECK(first_difference(guests.arrived(), std::vector<Bytes>{finished}) == -1);
    }
}

TEST_CASE(
    "offloads between guests: segments that find no buffers are the receiver's overflow, those before them arrive") {
  WorldShape shape = large_world(feature::kAsksOffloads);
  TwoGuests guests(shape);
  guests.world.nics[1].post(4);
  const TcpPacket packet(kSmall);  // 6 segments
  REQUIRE(guests.world.nics[0].send(packet.bytes, ask(packet)));
  guests.run();
  auto expected = reference_cut(packet);
  expected.resize(4);
  CHECK(first_difference(guests.arrived(), expected) == -1);
  CHECK(guests.world.state(1).receive.packets == 4);
  CHECK(guests.world.state(1).receive.overflow == 2);
  CHECK(guests.world.state(0).transmit.packets == 1);
  CHECK(guests.world.nics[0].transmit.outstanding() == 0);
}

TEST_CASE("offloads between guests: a packet too large for what is left of a record begins a new one") {
  const std::uint64_t all = feature::kVersion1 | feature::kIndirect | feature::kMergeable;
  WorldShape shape = large_world(feature::kAsksOffloads | all);
  shape.nic.queue_size = 1024;
  shape.nic.slot_size = 8000;
  shape.nic.receive_slot_size = 64;
  TwoGuests guests(shape, all);
  guests.world.nics[1].post();
  std::vector<Bytes> expected;
  for (std::uint32_t i = 0; i < 3; ++i) {
    // 100 segments of 64 bytes, two buffers each; 300 do not fit one record.
    const TcpPacket packet(TcpShape{.payload = 1000, .segment = 10, .sequence = i * 1000, .seed = i});
    REQUIRE(guests.world.nics[0].send(packet.bytes, ask(packet)));
    for (const Bytes& frame : reference_cut(packet)) expected.push_back(frame);
  }
  guests.run();
  CHECK(first_difference(guests.arrived(), expected) == -1);
  CHECK(guests.world.state(1).receive.packets == 300);
  CHECK(guests.world.state(1).receive.dropped == 0);
  // 300 segments with two buffers each can never fit: what does, arrives, the rest is dropped and counted.
  guests.world.nics[1].post();
  const TcpPacket packet(TcpShape{.payload = 3000, .segment = 10});
  REQUIRE(guests.world.nics[0].send(packet.bytes, ask(packet)));
  guests.run();
  expected = reference_cut(packet);
  expected.resize(kBurstFrames / 2);
  CHECK(first_difference(guests.arrived(), expected) == -1);
  CHECK(guests.world.state(1).receive.dropped == 300 - kBurstFrames / 2);
  CHECK(guests.world.state(0).transmit.packets == 4);
}

TEST_CASE("offloads between guests: a hostile header costs its sender a packet and nobody else anything") {
  TwoGuests guests(large_world(feature::kAsksOffloads | feature::kTakesOffloads | feature::kMergeable));
  guests.world.nics[1].post();
  TcpPacket packet(kSmall);
  packet.net.checksum_start = 60000;
  REQUIRE(guests.world.nics[0].send(packet.bytes, ask(packet)));
  const TcpPacket good(kSmall);
  REQUIRE(guests.world.nics[0].send(good.bytes, ask(good)));
  guests.run();
  CHECK(first_difference(guests.arrived(), std::vector<Bytes>{good.bytes}) == -1);
  CHECK(guests.world.state(0).transmit.dropped == 1);
  CHECK(guests.world.state(0).transmit.packets == 1);
  CHECK(guests.world.state(1).receive.packets == 1);
  CHECK_FALSE(guests.world.kernels[0].send());
}
