// SPDX-License-Identifier: Apache-2.0
// A dying owner's wild store hits the segment: one flipped bit, anywhere in what is not the record. The heir makes it
// good, and every packet crosses exactly once.
#include <catch2/catch.hpp>
#include <cstddef>
#include <string>

#include "tests/support/takeover_check.hpp"
#include "tests/vhost-net-backend/bench.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

constexpr std::uint32_t kDead = 1, kHeir = 2;

WorldShape shape(std::uint64_t layout) {
  return small_world(feature::kVersion1 | feature::kIndirect | feature::kEventIndex | layout);
}

// An owner moved some packets each way and died between two bursts; some of its frames are with the kernel, and more
// packets wait.
struct Scene {
  explicit Scene(std::uint64_t layout) : world(shape(layout)), flows(PacketFlow{}) {
    ShardStepper owner(world.segment(), fence.view(), kDead);
    owner.hold(world.make_ports(), {world.make_device(world.describe(1))});
    if (!owner.take_over()) std::abort();
    world.nics[0].post();
    flows.send(world, 5, 5);
    while (owner.poll_once()) {
    }
    for (int i = 0; i < 4; ++i) flows.uplink.note(*world.kernels[0].send());
    flows.send(world, 3, 3);
    fence.kill(kDead);
  }
  FakeFence fence;
  EngineWorld world;
  Flows flows;
};

// Only told to operators: what these say may be wrong, what is moved may not.
bool only_counts(std::size_t offset) {
  const auto within = [offset](std::size_t begin, std::size_t size) {
    return offset >= begin && offset < begin + size;
  };
  for (const std::size_t vring : {offsetof(QueuePairState, receive), offsetof(QueuePairState, transmit)})
    if (within(vring + offsetof(VringCursors, packets), 3 * sizeof(std::uint64_t))) return true;
  for (const std::size_t suspicion :
       {offsetof(QueuePairState, receive_suspicion), offsetof(QueuePairState, transmit_suspicion)})
    if (within(suspicion + offsetof(Suspicion, poisoned), sizeof(std::uint32_t))) return true;
  return false;
}

// Flips every bit of `part` of a segment, one at a time, and lets an heir take over.
template <class Part>
void try_every_bit(std::uint64_t layout, std::size_t size, Part part, bool counters) {
  const Scene scene(layout);
  EngineWorld world(shape(layout));
  const auto ports = world.make_ports();
  const auto device = world.make_device(world.describe(1));
  for (std::size_t offset = 0; offset < size; ++offset)
    for (unsigned bit = 0; bit < 8; ++bit) {
      world.copy_from(scene.world);
      part(world)[offset] ^= static_cast<std::byte>(1u << bit);
      Flows flows = scene.flows;
      ShardStepper heir(world.segment(), scene.fence.view(), kHeir);
      heir.hold(ports, {device});
      heir.post(ArmCommand{kHeir, std::make_shared<Watchdog>(UniqueFd{}, 0, 0, kDead)});
      heir.run_commands();
      Verdict verdict = take_over_and_judge(world, heir, flows);
      if (counters && only_counts(offset)) verdict.miscounted = 0;
      INFO("byte " << offset << ", bit " << bit << ": lost " << verdict.tally.lost << ", duplicated "
                   << verdict.tally.duplicated << ", corrupt " << verdict.tally.corrupt << ", frames "
                   << verdict.leaked_frames << ", descriptors " << verdict.descriptor_errors << ", miscounted "
                   << verdict.miscounted << ", stopped " << verdict.stopped);
      CHECK(verdict.clean());
    }
}

}  // namespace

TEST_CASE("a flipped bit in the state of a queue pair is made good") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  try_every_bit(
      layout, sizeof(QueuePairState),
      [](const EngineWorld& world) { return reinterpret_cast<std::byte*>(&world.state()); }, true);
}

TEST_CASE("a flipped bit in the state of a shard is made good") {
  try_every_bit(
      0, offsetof(ShardState, record),
      [](const EngineWorld& world) { return reinterpret_cast<std::byte*>(&world.segment().shards[0]); }, false);
}

TEST_CASE("a flipped bit in the segment's header is nothing to an heir that has mapped it") {
  try_every_bit(
      0, offsetof(Segment, shards),
      [](const EngineWorld& world) { return reinterpret_cast<std::byte*>(&world.segment()); }, false);
}

TEST_CASE("cursors of which no two copies agree stop their virtqueue, and nobody dies of them") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const bool receive : {false, true}) {
    INFO((receive ? "receive" : "transmit"));
    Scene scene(layout);
    QueuePairState& state = scene.world.state();
    VringCursors& cursors = receive ? state.receive : state.transmit;
    const VringCursors& other = receive ? state.transmit : state.receive;
    const std::uint64_t moved = other.packets;
    cursors.next_used ^= 1;
    cursors.copies[0] ^= 2;
    ShardStepper heir(scene.world.segment(), scene.fence.view(), kHeir);
    heir.hold(scene.world.make_ports(), {scene.world.make_device(scene.world.describe(1))});
    REQUIRE(heir.take_over());
    while (heir.poll_once()) {
    }
    CHECK(cursors.fault.load() == QueueFault::kRecordInvalid);
    CHECK(other.packets == moved + 3);
    bool said = false;
    for (const ShardEvent& event : heir.events()) said = said || std::holds_alternative<ProblemEvent>(event);
    CHECK(said);
    // A stop for this reason lasts through the next takeover.
    scene.fence.kill(kHeir);
    ShardStepper last(scene.world.segment(), scene.fence.view(), kHeir + 1);
    last.hold(scene.world.make_ports(), {scene.world.make_device(scene.world.describe(1))});
    REQUIRE(last.take_over());
    last.poll_once();
    CHECK(cursors.fault.load() == QueueFault::kRecordInvalid);
  }
}
