// SPDX-License-Identifier: Apache-2.0
// A dead owner's record with damage in it: it is not replayed, or stops its queue; nothing is written where it does not
// belong.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>
#include <functional>

#include "tests/support/takeover_check.hpp"
#include "tests/vhost-net-backend/bench.hpp"
#include "tests/vhost-net-backend/probe.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

const PacketFlow kFlow{};

// A world whose owner died right after arming a burst of `packets`, in one direction.
struct Crashed {
  Crashed(bool receive, std::uint32_t packets, std::uint64_t layout, ProbePoint point = ProbePoint::kArmed)
      : world(shape(layout)), flows(kFlow) {
    world.nics[0].post();
    flows.send(world, receive ? 0 : packets, receive ? packets : 0);
    const bool died = killed([&] {
      fence.view_again();
      ShardStepper owner(world.segment(), fence.view(), 1);
      owner.hold(world.make_ports(), {world.make_device(world.describe(1))});
      owner.take_over();
      die_at(point, 1);
      owner.poll_once();
    });
    if (!died || !record_is_valid(world.record())) std::abort();
    fence.kill(1);
  }
  static WorldShape shape(std::uint64_t layout) {
    WorldShape small = small_world(feature::kVersion1 | feature::kIndirect | layout);
    small.queue_pairs = 2;
    return small;
  }
  EngineWorld world;
  Flows flows;
  FakeFence fence;
};

// Worlds to try heirs in; device and ports are made once.
struct Trial {
  explicit Trial(std::uint64_t layout)
      : world(Crashed::shape(layout)), ports(world.make_ports()), device(world.make_device(world.describe(1))) {}
  EngineWorld world;
  std::shared_ptr<const UplinkPorts> ports;
  std::shared_ptr<const Device> device;
};

// Shared bytes besides owner word and record that an heir changed.
std::size_t changed(const EngineWorld& world, const std::vector<std::byte>& before) {
  std::size_t at = 0, count = 0;
  const auto* shard = reinterpret_cast<const std::byte*>(&world.segment().shards[0]);
  for (const std::span<const std::byte> bytes : world.parts()) {
    const bool own = bytes.data() >= shard && bytes.data() < shard + sizeof(ShardState);
    for (std::size_t i = 0; i < bytes.size(); ++i) count += !own && bytes[i] != before[at + i];
    at += bytes.size();
  }
  return count;
}

std::vector<std::byte> all_bytes(const EngineWorld& world) {
  std::vector<std::byte> bytes;
  for (const auto part : world.parts()) bytes.insert(bytes.end(), part.begin(), part.end());
  return bytes;
}

void check_second_pair_serves(EngineWorld& world, ShardStepper& heir) {
  Ledger out(kFlow), in(kFlow);
  world.nics[1].post();
  send_from_guest(world, kFlow, 0, 3, 1);
  send_from_uplink(world, kFlow, 0, 3, 1);
  for (int round = 0; round < 3; ++round) heir.poll_once();
  while (const auto packet = world.kernels[1].send()) out.note(*packet);
  std::vector<std::byte> packet;
  while (world.nics[1].take(packet)) in.note(packet);
  CHECK(out.finish(3).clean());
  CHECK(in.finish(3).clean());
}

}  // namespace

TEST_CASE("a flipped bit anywhere in an armed record: it is not replayed") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const bool receive : {false, true})
    for (const std::uint32_t packets : {1u, 3u}) {
      const Crashed crashed(receive, packets, layout);
      Trial trial(layout);
      const std::size_t tail = offsetof(RedoRecord, used) + crashed.world.record().used_count * sizeof(RedoUsed);
      const std::size_t frames_end = offsetof(RedoRecord, frames) + packets * sizeof(RedoFrame);
      for (std::size_t byte = 0; byte < tail; ++byte) {
        if (byte >= frames_end && byte < offsetof(RedoRecord, used)) continue;  // not in use
        for (unsigned bit = 0; bit < 8; ++bit) {
          trial.world.copy_from(crashed.world);
          reinterpret_cast<unsigned char*>(&trial.world.record())[byte] ^= static_cast<unsigned char>(1u << bit);
          const std::vector<std::byte> before = all_bytes(trial.world);
          ShardStepper heir(trial.world.segment(), crashed.fence.view(), 2);
          heir.hold(trial.ports, {trial.device});
          INFO("byte " << byte << ", bit " << bit);
          REQUIRE(heir.take_over());
          REQUIRE(trial.world.segment().shards[0].takeover.record_valid == 0);
          REQUIRE(trial.world.record().arm.load() == 0);
          REQUIRE(changed(trial.world, before) == 0);
          if (byte % 16 == 0 && bit == 0) check_second_pair_serves(trial.world, heir);
        }
      }
    }
}

TEST_CASE("bits that the record does not use change nothing") {
  const Crashed crashed(false, 2, 0);
  Trial trial(0);
  trial.world.copy_from(crashed.world);
  trial.world.record().frames[2].address = ~std::uint64_t{0};
  trial.world.record().used[2].id = 0xffff;
  ShardStepper heir(trial.world.segment(), crashed.fence.view(), 2);
  heir.hold(trial.ports, {trial.device});
  REQUIRE(heir.take_over());
  CHECK(trial.world.segment().shards[0].takeover.record_valid == 1);
}

namespace {

struct Lie {
  const char* name;
  std::function<void(EngineWorld&, RedoRecord&)> tell;
  bool stops_queue = true;  ///< otherwise it is not replayed at all
};

std::vector<Lie> lies(bool receive) {
  std::vector<Lie> all = {
      {"of another version", [](EngineWorld&, RedoRecord& r) { r.version = kRedoVersion + 1; }, false},
      {"of no kind", [](EngineWorld&, RedoRecord& r) { r.kind = RedoKind{0}; }, false},
      {"of an unknown kind", [](EngineWorld&, RedoRecord& r) { r.kind = RedoKind{7}; }, false},
      {"too many frames", [](EngineWorld&, RedoRecord& r) { r.frame_count = kBurstPackets + 1; }, false},
      {"too many used elements", [](EngineWorld&, RedoRecord& r) { r.used_count = kBurstUsed + 1; }, false},
      {"no such queue pair", [](EngineWorld&, RedoRecord& r) { r.queue_pair = kMaxQueuePairs; }, false},
      {"queue pair that is not served", [](EngineWorld&, RedoRecord& r) { r.queue_pair = 5; }, false},
      {"another generation", [](EngineWorld&, RedoRecord& r) { r.generation = 77; }, false},
      {"avail before and after elsewhere", [](EngineWorld&, RedoRecord& r) { r.avail_before = r.avail_after = 999; }},
      {"used before and after elsewhere",
       [](EngineWorld&, RedoRecord& r) {
         r.used_before = 1000;
         r.used_after = static_cast<std::uint16_t>(1000 + r.used_count);
       }},
      {"used count that does not fit", [](EngineWorld&, RedoRecord& r) { ++r.used_after; }},
      {"avail count that does not fit", [](EngineWorld&, RedoRecord& r) { ++r.avail_after; }},
      {"chain without a slot", [](EngineWorld&, RedoRecord& r) { r.used[0].slots = 0; }},
      {"chain of more slots", [](EngineWorld&, RedoRecord& r) { ++r.used[0].slots; }},
      {"chain of more slots than the ring has",
       [](EngineWorld&, RedoRecord& r) {
         r.used[0].slots = 64;
         r.avail_after = r.avail_before, r.used_after = r.used_before;
       }},
      {"producer elsewhere",
       [](EngineWorld&, RedoRecord& r) {
         r.producer_before += 500;
         r.producer_after += 500;
       }},
      {"producer that does not fit the frames", [](EngineWorld&, RedoRecord& r) { ++r.producer_after; }},
      {"frame of the other kind",
       [receive](EngineWorld& w, RedoRecord& r) {
         r.frames[0].address = receive ? w.kernels[0].description().umem_size - 512 : 0;
       }},
      {"frame beyond the memory",
       [](EngineWorld& w, RedoRecord& r) { r.frames[0].address = w.kernels[0].description().umem_size + 512; }},
      {"frame at the top of the address space",
       [](EngineWorld&, RedoRecord& r) { r.frames[0].address = ~std::uint64_t{511}; }},
      {"cursors of the segment elsewhere",
       [receive](EngineWorld& w, RedoRecord&) {
         VringCursors& cursors = receive ? w.state().receive : w.state().transmit;
         cursors.next_avail = 4242;
         copy_positions(cursors, position_word(cursors));
       }},
      {"used cursors of the segment elsewhere",
       [receive](EngineWorld& w, RedoRecord&) {
         VringCursors& cursors = receive ? w.state().receive : w.state().transmit;
         cursors.next_used = 4242;
         copy_positions(cursors, position_word(cursors));
       }},
  };
  if (receive)
    all.push_back({"consumer elsewhere", [](EngineWorld&, RedoRecord& r) {
                     r.consumer_before += 70;
                     r.consumer_after += 70;
                   }});
  else
    all.push_back(
        {"frame that runs out of the memory", [](EngineWorld&, RedoRecord& r) { r.frames[0].length = 1u << 30; }});
  return all;
}

}  // namespace

TEST_CASE("a record with a right checksum and wrong content stops its queue, or is not replayed") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const bool receive : {false, true}) {
    const Crashed crashed(receive, 3, layout);
    Trial trial(layout);
    for (const Lie& lie : lies(receive)) {
      INFO((receive ? "receive: " : "transmit: ") << lie.name);
      trial.world.copy_from(crashed.world);
      lie.tell(trial.world, trial.world.record());
      sign(trial.world.record());
      VringCursors& cursors = receive ? trial.world.state().receive : trial.world.state().transmit;
      const std::vector<std::byte> before = all_bytes(trial.world);
      ShardStepper heir(trial.world.segment(), crashed.fence.view(), 2);
      heir.hold(trial.ports, {trial.device});
      REQUIRE(heir.take_over());
      CHECK(trial.world.segment().shards[0].takeover.record_armed == 1);
      CHECK(trial.world.segment().shards[0].takeover.record_valid == 0);
      CHECK(trial.world.record().arm.load() == 0);
      CHECK((cursors.fault.load() == QueueFault::kRecordInvalid) == lie.stops_queue);
      CHECK(changed(trial.world, before) == (lie.stops_queue ? 1 : 0));  // the fault's own byte
      bool said = false;
      for (const ShardEvent& event : heir.events()) said = said || std::holds_alternative<ProblemEvent>(event);
      CHECK(said);
      check_second_pair_serves(trial.world, heir);
      // The other direction of the same pair.
      if (receive) {
        trial.world.nics[0].transmit.publish();
        send_from_guest(trial.world, kFlow, 0, 2);
        heir.poll_once();
        CHECK(trial.world.kernels[0].transmit_waiting() == 2);
      }
    }
  }
}

TEST_CASE("a damaged record of a burst that the guest was shown stops its queue, of another one, it does not") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const bool receive : {false, true})
    for (const auto& [point, shown] : {std::pair{ProbePoint::kArmed, false},
                                       {ProbePoint::kDestinationWritten, receive && layout != 0},
                                       {ProbePoint::kSourcePublished, true},
                                       {ProbePoint::kCursorsAdvanced, false}}) {
      INFO((receive ? "receive" : "transmit") << (layout != 0 ? ", packed, " : ", ") << name(point));
      // Packed: other slots than the first are overwritten before the burst is shown, and could not be read again.
      const Crashed crashed(receive, 3, layout, point);
      for (const bool moves_on : {false, true}) {
        Trial trial(layout);
        trial.world.copy_from(crashed.world);
        Flows flows = crashed.flows;
        if (moves_on) world_moves_on(trial.world, flows, 70);  // round the ring, if there is room
        trial.world.record().packets_after ^= 1;
        ShardStepper heir(trial.world.segment(), crashed.fence.view(), 2);
        heir.hold(trial.ports, {trial.device});
        REQUIRE(heir.take_over());
        const VringCursors& cursors = receive ? trial.world.state().receive : trial.world.state().transmit;
        const VringCursors& other = receive ? trial.world.state().transmit : trial.world.state().receive;
        CHECK((cursors.fault.load() == QueueFault::kRecordInvalid) == shown);
        CHECK(other.fault.load() == QueueFault::kNone);
        check_second_pair_serves(trial.world, heir);
      }
    }
}

TEST_CASE("an untouched record is replayed, and a replayed one is empty") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const bool receive : {false, true}) {
    const Crashed crashed(receive, 3, layout);
    Trial trial(layout);
    trial.world.copy_from(crashed.world);
    Flows flows = crashed.flows;
    ShardStepper heir(trial.world.segment(), crashed.fence.view(), 2);
    heir.hold(trial.ports, {trial.device});
    CHECK(take_over_and_judge(trial.world, heir, flows).clean());
    const TakeoverTimeline& timeline = trial.world.segment().shards[0].takeover;
    CHECK(timeline.record_armed == 1);
    CHECK(timeline.record_valid == 1);
    CHECK(timeline.replayed_packets == 3);
    CHECK(timeline.replayed_kind == static_cast<std::uint32_t>(receive ? RedoKind::kReceive : RedoKind::kTransmit));
    CHECK(timeline.previous_tag == 1);
    CHECK(timeline.tag == 2);
  }
}
