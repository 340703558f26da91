// SPDX-License-Identifier: Apache-2.0
// A shard as heir and owner: commands, generations, several shards and devices, and its own loop in a thread.
#include <catch2/catch.hpp>
#include <functional>

#include "tests/support/takeover_check.hpp"
#include "tests/vhost-net-backend/bench.hpp"
#include "tests/vhost-net-backend/running_shard.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

const PacketFlow kFlow{};

DeviceDescription stopped(DeviceDescription description) {
  for (VringDescription& vring : description.vrings) vring.flags &= ~VringDescription::kRunning;
  return description;
}

DeviceDescription started(DeviceDescription description, std::uint32_t start_count) {
  for (VringDescription& vring : description.vrings) vring.start_count = start_count;
  return description;
}

// The driver starts over: rings formatted, nothing outstanding.
void reset_driver(EngineWorld& world) {
  for (std::uint32_t n = 0; n < world.shape().queue_pairs; ++n) {
    const RingPlace place = world.nics[n].receive.place();
    world.nics[n] = GuestNic(world.space, place.descriptors, world.shape().nic);
  }
}

void check_serves(EngineWorld& world, ShardStepper& owner, std::uint32_t pair = 0) {
  Ledger out(kFlow), in(kFlow);
  world.nics[pair].post();
  send_from_guest(world, kFlow, 0, 5, pair);
  send_from_uplink(world, kFlow, 0, 5, pair);
  drain(world, owner, out, in, pair);
  CHECK(out.finish(5).clean());
  CHECK(in.finish(5).clean());
}

}  // namespace

TEST_CASE("an heir says what it holds, an owner what is in force") {
  EngineWorld world(small_world());
  FakeFence fence;
  ShardStepper shard(world.segment(), fence.view(), 1);
  shard.hold(world.make_ports(), {world.make_device(world.describe(1)), world.make_device(world.describe(2))});
  auto events = shard.events();
  REQUIRE(only<HeldEvent>(events).size() == 2);
  CHECK(only<HeldEvent>(events)[1].generation == 2);
  CHECK(only<InForceEvent>(events).empty());
  CHECK(world.state().generation.load() == 0);

  REQUIRE(shard.take_over());
  events = shard.events();
  REQUIRE(only<TookOverEvent>(events).size() == 1);
  CHECK(only<TookOverEvent>(events)[0].timeline.record_armed == 0);
  REQUIRE(only<InForceEvent>(events).size() == 1);
  CHECK(only<InForceEvent>(events)[0].generation == 2);
  CHECK(world.state().generation.load() == 2);

  shard.post(DescribeCommand{world.make_device(world.describe(3))});
  shard.post(DescribeCommand{world.make_device(world.describe(3))});  // a supervisor that died in between says it again
  shard.post(DescribeCommand{world.make_device(world.describe(2))});  // and one that lags says an old one
  shard.run_commands();
  events = shard.events();
  REQUIRE(only<InForceEvent>(events).size() == 3);
  for (const InForceEvent& event : only<InForceEvent>(events)) CHECK(event.generation == 3);
  CHECK(world.state().generation.load() == 3);
  check_serves(world, shard);
}

TEST_CASE("pruning drops what is older and not in force, detaching drops all") {
  EngineWorld world(small_world());
  FakeFence fence;
  ShardStepper shard(world.segment(), fence.view(), 1);
  std::vector<std::weak_ptr<const Device>> devices;
  {
    std::vector<std::shared_ptr<const Device>> held;
    for (std::uint64_t generation = 1; generation <= 3; ++generation) {
      held.push_back(world.make_device(world.describe(generation)));
      devices.push_back(held.back());
    }
    shard.hold(world.make_ports(), std::move(held));
  }
  shard.post(PruneCommand{0, 3});
  shard.run_commands();
  CHECK_FALSE(devices[0].expired());  // the control thread's to destroy: it is in the events
  shard.events();
  CHECK(devices[0].expired());
  CHECK(devices[1].expired());
  CHECK_FALSE(devices[2].expired());
  REQUIRE(shard.take_over());
  check_serves(world, shard);
  shard.post(DetachCommand{0});
  shard.run_commands();
  CHECK(shard.pairs().empty());
  CHECK(only<DetachedEvent>(shard.events()).size() == 1);
  CHECK(devices[2].expired());
  send_from_guest(world, kFlow, 0, 1);
  CHECK_FALSE(shard.poll_once());
}

TEST_CASE("a stopped ring is not touched once its generation is in force, a new start takes its base") {
  EngineWorld world(small_world());
  FakeFence fence;
  ShardStepper shard(world.segment(), fence.view(), 1);
  shard.hold(world.make_ports(), {world.make_device(world.describe(1))});
  REQUIRE(shard.take_over());
  check_serves(world, shard);
  send_from_guest(world, kFlow, 5, 3);
  send_from_uplink(world, kFlow, 5, 3);
  shard.post(DescribeCommand{world.make_device(stopped(world.describe(2)))});
  shard.run_commands();
  CHECK(world.state().generation.load() == 2);
  const auto bytes = world.guest_bytes();
  const std::vector<std::byte> before(bytes.begin(), bytes.end());
  for (int round = 0; round < 5; ++round) CHECK_FALSE(shard.poll_once());
  CHECK(std::equal(before.begin(), before.end(), bytes.begin()));

  // The same start again (a new memory table, say): cursors stand, the waiting packets cross.
  world.state().transmit.fault.store(QueueFault::kAvailJump);
  shard.post(DescribeCommand{world.make_device(world.describe(3))});
  shard.run_commands();
  CHECK(world.state().transmit.fault.load() == QueueFault::kAvailJump);  // the same start is the same fault
  world.state().transmit.fault.store(QueueFault::kNone);
  while (shard.poll_once()) {
  }
  CHECK(world.kernels[0].transmit_waiting() == 3);
  while (world.kernels[0].send()) {
  }
  world.kernels[0].complete();

  // A new start: the cursors begin at its base, a fault is forgiven.
  shard.post(DescribeCommand{world.make_device(stopped(world.describe(4)))});
  shard.run_commands();
  world.state().transmit.fault.store(QueueFault::kAvailJump);
  reset_driver(world);
  world.nics[0].transmit.begin_at(1000);
  world.nics[0].receive.begin_at(2000);
  DeviceDescription again = started(world.describe(5), 2);
  again.vrings[0].base = 2000;
  again.vrings[1].base = 1000;
  shard.post(DescribeCommand{world.make_device(again)});
  shard.run_commands();
  CHECK(world.state().transmit.fault.load() == QueueFault::kNone);
  CHECK(world.state().transmit.next_avail == 1000);
  CHECK(world.state().transmit.next_used == 1000);
  CHECK(world.state().receive.next_avail == 2000);
  check_serves(world, shard);
  CHECK(world.audit().clean());
}

TEST_CASE("an heir goes on under the generation that was in force, then puts its newest in force") {
  EngineWorld world(small_world());
  FakeFence fence;
  ShardStepper owner(world.segment(), fence.view(), 1);
  owner.hold(world.make_ports(), {world.make_device(world.describe(1))});
  REQUIRE(owner.take_over());
  Flows flows(kFlow);
  world.nics[0].post();
  flows.send(world, 10, 10);
  owner.poll_once();
  fence.kill(1);
  ShardStepper heir(world.segment(), fence.view(), 2);
  heir.hold(world.make_ports(), {world.make_device(world.describe(1)), world.make_device(world.describe(2))});
  CHECK(take_over_and_judge(world, heir, flows).clean());
  CHECK(world.state().generation.load() == 2);
  CHECK(only<InForceEvent>(heir.events()).back().generation == 2);
}

TEST_CASE("an heir binds ahead what is in force, and at the takeover what has changed since") {
  EngineWorld world(small_world());
  FakeFence fence;
  ShardStepper owner(world.segment(), fence.view(), 1), heir(world.segment(), fence.view(), 2);
  owner.hold(world.make_ports(), {world.make_device(world.describe(1))});
  REQUIRE(owner.take_over());
  heir.hold(world.make_ports(), {world.make_device(world.describe(1))});
  REQUIRE(heir.pairs().size() == world.shape().queue_pairs);
  CHECK(heir.pairs()[0].generation == 1);
  check_serves(world, owner);
  std::uint64_t expected = 1;
  const auto put_in_force = [&](std::uint64_t generation) {
    expected = generation;
    for (ShardStepper* shard : {&heir, &owner}) {
      shard->post(DescribeCommand{world.make_device(world.describe(generation))});
      shard->run_commands();
    }
  };
  SECTION("nothing") {}
  SECTION("a newer generation is in force, and it has not looked since") {
    put_in_force(2);
    CHECK(heir.pairs()[0].generation == 1);
  }
  SECTION("what it bound was pruned") {
    put_in_force(2);
    heir.post(PruneCommand{0, 2});
    heir.run_commands();
    CHECK(heir.pairs().empty());
  }
  SECTION("its uplink came anew") {
    heir.post(AttachCommand{world.make_ports()});
    heir.run_commands();
    CHECK(heir.pairs().empty());
  }
  const QueuePair* const bound = heir.pairs().empty() ? nullptr : heir.pairs().data();
  fence.kill(1);
  REQUIRE(heir.take_over());
  REQUIRE(heir.pairs().size() == world.shape().queue_pairs);
  if (bound != nullptr) CHECK(heir.pairs().data() == bound);  // no memory was asked for
  CHECK(heir.pairs()[0].generation == expected);
  CHECK(heir.pairs()[0].epoch == 2);
  check_serves(world, heir);
}

TEST_CASE("an heir whose device is released before it takes over touches nothing of it") {
  EngineWorld world(small_world());
  FakeFence fence;
  ShardStepper owner(world.segment(), fence.view(), 1), heir(world.segment(), fence.view(), 2);
  for (ShardStepper* shard : {&owner, &heir}) shard->hold(world.make_ports(), {world.make_device(world.describe(1))});
  REQUIRE(owner.take_over());
  heir.post(DetachCommand{0});
  heir.run_commands();
  CHECK(heir.pairs().empty());
  heir.events();
  fence.kill(1);
  send_from_guest(world, kFlow, 0, 1);
  REQUIRE(heir.take_over());
  CHECK(heir.pairs().empty());
  CHECK_FALSE(heir.poll_once());
}

TEST_CASE("frames that do not add up at a takeover: nothing is sent until the kernel has given all back, or too long") {
  EngineWorld world(small_world());
  FakeFence fence;
  ShardStepper owner(world.segment(), fence.view(), 1), heir(world.segment(), fence.view(), 2);
  hold_all(owner, world);
  REQUIRE(owner.take_over());
  send_from_guest(world, kFlow, 0, 3);
  while (owner.poll_once()) {
  }
  REQUIRE(world.kernels[0].transmit_waiting() == 3);
  constexpr std::uint64_t kNobodys = std::uint64_t{1} << 40;
  REQUIRE((world.state().transmit_busy[0] & kNobodys) == 0);
  world.state().transmit_busy[0] |= kNobodys;
  fence.kill(1);
  hold_all(heir, world);
  REQUIRE(heir.take_over());
  send_from_guest(world, kFlow, 3, 2);
  CHECK_FALSE(heir.poll_once());
  CHECK(world.kernels[0].transmit_waiting() == 3);
  std::uint64_t& settling = heir.pairs()[0].settling_until_ns;
  REQUIRE(settling != 0);
  REQUIRE(settling != QueuePair::kNotLookedAt);
  SECTION("all back") {
    while (world.kernels[0].send()) {
    }
    world.kernels[0].complete();
    CHECK(heir.poll_once());
    CHECK(world.kernels[0].transmit_waiting() == 2);
    CHECK((world.state().transmit_busy[0] & kNobodys) == 0);
  }
  SECTION("too long, and it is not looked at again when another description comes") {
    settling = 1;
    CHECK(heir.poll_once());
    CHECK(world.kernels[0].transmit_waiting() == 5);
    heir.post(DescribeCommand{world.make_device(world.describe(2))});
    heir.run_commands();
    CHECK(heir.pairs()[0].settling_until_ns == 0);
  }
  SECTION("a description that comes meanwhile does not end it") {
    const std::uint64_t until = settling;
    heir.post(DescribeCommand{world.make_device(world.describe(2))});
    heir.run_commands();
    CHECK(heir.pairs()[0].settling_until_ns == until);
    CHECK_FALSE(heir.poll_once());
  }
}

TEST_CASE("an heir whose wiring was hit by a stray store binds it anew") {
  EngineWorld world(small_world());
  FakeFence fence;
  ShardStepper owner(world.segment(), fence.view(), 1), heir(world.segment(), fence.view(), 2);
  hold_all(owner, world);
  REQUIRE(owner.take_over());
  check_serves(world, owner);
  hold_all(heir, world);
  REQUIRE_FALSE(heir.pairs().empty());
  heir.pairs()[0].header_size ^= 2;
  fence.kill(1);
  REQUIRE(heir.take_over());
  check_serves(world, heir);
}

TEST_CASE("an owner that always polls tells its drivers not to kick, from its first round on") {
  EngineWorld world(small_world(feature::kVersion1));
  FakeFence fence;
  GuestQueue& driver = world.nics[0].transmit;
  send_from_guest(world, kFlow, 0, 1);
  REQUIRE(driver.kick_wanted());
  RunningShard owner(world, fence, 1, Polling::kAlways);
  REQUIRE(owner.heard<TookOverEvent>());
  const std::uint64_t give_up = monotonic_ns() + 10'000'000'000u;
  std::uint32_t sent = 1;
  bool wanted = true;
  while (wanted && monotonic_ns() < give_up) {
    while (world.kernels[0].send()) {
    }
    world.kernels[0].complete();
    world.nics[0].reap();
    if (send_from_guest(world, kFlow, sent, 1) == 0) continue;  // the ring is full until the owner comes by
    ++sent;
    wanted = driver.kick_wanted();
  }
  CHECK_FALSE(wanted);
}

TEST_CASE("an heir that does not hold the generation in force says so and leaves the rings alone") {
  EngineWorld world(small_world());
  FakeFence fence;
  ShardStepper owner(world.segment(), fence.view(), 1);
  owner.hold(world.make_ports(), {world.make_device(world.describe(7))});
  REQUIRE(owner.take_over());
  fence.kill(1);
  ShardStepper heir(world.segment(), fence.view(), 2);
  heir.hold(world.make_ports(), {});
  REQUIRE(heir.take_over());
  CHECK(only<ProblemEvent>(heir.events()).size() == 1);
  CHECK(heir.pairs().empty());
  // A newer description heals it.
  heir.post(DescribeCommand{world.make_device(world.describe(8))});
  heir.run_commands();
  check_serves(world, heir);
}

TEST_CASE("an owner that died between its queue pairs' generations: the newest stands for all") {
  WorldShape shape = small_world();
  shape.queue_pairs = 3;
  EngineWorld world(shape);
  FakeFence fence;
  ShardStepper owner(world.segment(), fence.view(), 1);
  owner.hold(world.make_ports(), {world.make_device(world.describe(1))});
  REQUIRE(owner.take_over());
  fence.kill(1);
  world.state(0).generation.store(2);
  ShardStepper heir(world.segment(), fence.view(), 2);
  heir.hold(world.make_ports(), {world.make_device(world.describe(1)), world.make_device(world.describe(2))});
  REQUIRE(heir.take_over());
  for (std::uint32_t n = 0; n < 3; ++n) {
    CHECK(world.state(n).generation.load() == 2);
    check_serves(world, heir, n);
  }
}

TEST_CASE("shards share a segment and nothing else") {
  WorldShape shape = small_world();
  shape.queue_pairs = 4;
  shape.shards = 2;
  EngineWorld world(shape);
  FakeFence fence;
  const auto ports = world.make_ports();
  const auto device = world.make_device(world.describe(1));
  ShardStepper even(world.segment(), fence.view(), 1, 0), odd(world.segment(), fence.view(), 2, 1);
  for (ShardStepper* shard : {&even, &odd}) {
    shard->hold(ports, {device});
    REQUIRE(shard->take_over());
    REQUIRE(shard->pairs().size() == 2);
  }
  CHECK(even.pairs()[1].index == 2);
  CHECK(odd.pairs()[1].index == 3);
  for (std::uint32_t n = 0; n < 4; ++n) {
    world.nics[n].post();
    CHECK(send_from_guest(world, kFlow, 0, 5, n) == 5);
  }
  even.poll_once();
  CHECK(world.state(0).transmit.packets == 5);
  CHECK(world.state(1).transmit.packets == 0);
  odd.poll_once();
  CHECK(world.state(3).transmit.packets == 5);
  // One owner dies; the heir of the other shard has nothing to take.
  fence.kill(1);
  ShardStepper heir_of_odd(world.segment(), fence.view(), 3, 1), heir_of_even(world.segment(), fence.view(), 4, 0);
  heir_of_odd.hold(ports, {device});
  heir_of_even.hold(ports, {device});
  CHECK_FALSE(heir_of_odd.take_over());
  REQUIRE(heir_of_even.take_over());
  for (std::uint32_t n = 0; n < 4; ++n) {
    ShardStepper& owner = n % 2 == 0 ? heir_of_even : odd;
    Ledger out(kFlow), in(kFlow);
    drain(world, owner, out, in, n);
    CHECK(out.finish(5).clean());
  }
}

TEST_CASE("several devices in one shard, one leaves, the other stays") {
  EngineWorld first(small_world());
  WorldShape shape = small_world(feature::kVersion1 | feature::kMergeable);
  shape.device = 5;
  shape.first_queue_pair = 9;
  const EngineWorld second_memory(shape);  // its memory and uplink; its cursors are in the first world's segment
  FakeFence fence;
  ShardStepper shard(first.segment(), fence.view(), 1);
  shard.hold(first.make_ports(), {first.make_device(first.describe(1))});
  shard.post(AttachCommand{second_memory.make_ports()});
  shard.post(DescribeCommand{second_memory.make_device(second_memory.describe(4))});
  shard.run_commands();
  REQUIRE(shard.take_over());
  REQUIRE(shard.pairs().size() == 2);
  CHECK(shard.pairs()[1].index == 9);
  CHECK(first.segment().queue_pairs[9].generation.load() == 4);
  shard.post(DetachCommand{5});
  shard.run_commands();
  check_serves(first, shard);
}

TEST_CASE("running threads: traffic through a succession of owners") {
  const std::pair<Polling, HeirWait> rows[] = {{Polling::kAlways, HeirWait::kSleeping},
                                               {Polling::kAdaptive, HeirWait::kSleeping},
                                               {Polling::kAdaptive, HeirWait::kPolling}};
  for (const auto& [polling, heirs] : rows) {
    EngineWorld world(small_world(feature::kVersion1 | feature::kEventIndex));
    FakeFence fence;
    Flows flows(kFlow);
    auto owner = std::make_unique<RunningShard>(world, fence, 1, polling, -1, heirs);
    REQUIRE(owner->heard<TookOverEvent>());
    for (std::uint32_t tag = 2; tag < 6; ++tag) {
      auto heir = std::make_unique<RunningShard>(world, fence, tag, polling, -1, heirs);
      REQUIRE(heir->heard<HeldEvent>());
      REQUIRE(exchange(world, flows, 1000 * (tag - 1)));
      CHECK(owner->heard<FirstTransactionEvent>());
      CHECK(owner_tag(world.segment().shards[0].owner.load()) == tag - 1);
      owner->stop();
      fence.kill(tag - 1);
      if (heirs == HeirWait::kSleeping) heir->wake();
      REQUIRE(heir->heard<TookOverEvent>());
      owner = std::move(heir);
    }
    REQUIRE(exchange(world, flows, 5000));
    owner->stop();
    CHECK(flows.uplink.finish(flows.from_guest).corrupt == 0);
    CHECK(flows.uplink.finish(flows.uplink.arrived()).clean());
    CHECK(flows.guest.finish(flows.guest.arrived()).clean());
    CHECK(world.nics[0].transmit.wrong_returns() == 0);
    CHECK(world.nics[0].receive.wrong_returns() == 0);
    CHECK(owner_epoch(world.segment().shards[0].owner.load()) == 5);
  }
}
