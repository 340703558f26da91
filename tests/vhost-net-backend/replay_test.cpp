// SPDX-License-Identifier: Apache-2.0
// An owner, and then its heir too, dies by SIGKILL at every probe point; whoever comes next finishes exactly once.
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <csignal>
#include <set>
#include <string>

#include "tests/support/takeover_check.hpp"
#include "tests/vhost-net-backend/bench.hpp"
#include "tests/vhost-net-backend/probe.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

struct Scenario {
  std::string name;
  WorldShape shape;
  std::uint32_t from_guest, from_uplink;  ///< packets in the burst
};

std::vector<Scenario> scenarios() {
  std::vector<Scenario> all;
  const auto add = [&all](std::string name, const WorldShape& shape, std::uint32_t burst, bool packed) {
    // In order, a burst of several from a guest is what differs.
    const bool in_order = (shape.nic.features & feature::kInOrder) != 0;
    if (in_order && (burst == 1 || (shape.nic.features & feature::kMergeable) == 0)) return;
    all.push_back({"transmit, " + name, shape, burst, 0});
    // Small enough for the guest to come round to the burst's first slot before the heir does.
    if (packed) all.back().shape.nic.queue_size = burst == 32 ? 101 : std::max(burst + 3, 6u);
    if (!in_order) all.push_back({"receive, " + name, shape, 0, burst});
  };
  for (const std::uint64_t layout : kLayouts)
    for (const bool mergeable : {false, true})
      for (const std::uint32_t burst : {1u, 2u, 32u, 45u}) {
        WorldShape shape =
            small_world(feature::kVersion1 | feature::kIndirect | layout | (mergeable ? feature::kMergeable : 0) |
                        (burst % 2 == 0 ? feature::kEventIndex : 0));
        // Wraps in the larger bursts.
        shape.nic.queue_size = layout == 0 ? 256 : 251;
        shape.nic.first_index = static_cast<std::uint16_t>((layout == 0 ? 65536 : 251) - 20);
        if (mergeable) shape.nic.receive_slot_size = 64;  // up to three buffers a packet
        if (mergeable) shape.nic.receive = ChainStyle::kIndirect;
        if (burst == 32) shape.nic.transmit = ChainStyle::kChained;
        const std::string name = std::string(layout == 0                  ? ""
                                             : layout == feature::kPacked ? "packed, "
                                                                          : "packed, in order, ") +
                                 "burst of " + std::to_string(burst) + (mergeable ? ", mergeable" : "");
        add(name, shape, burst, layout != 0);
      }
  return all;
}

// A world in which an owner (tag 1, long dead) has moved a few packets; the kernel still has some of the frames.
struct Stage {
  explicit Stage(const Scenario& s) : scenario(s), world(s.shape), flows(PacketFlow{}), ports(world.make_ports()) {
    ShardStepper owner = heir(1);
    owner.take_over();
    world.nics[0].post();
    flows.send(world, 5, 5);
    while (owner.poll_once()) {
    }
    for (int i = 0; i < 4; ++i) flows.uplink.note(*world.kernels[0].send());
    fence.kill(1);
  }
  ShardStepper heir(std::uint32_t tag) {
    ShardStepper stepper(world.segment(), fence.view(), tag);
    // Mappings of guest memory are not inherited: every process makes its own.
    stepper.hold(world.make_ports(), {world.make_device(world.describe(1))});
    return stepper;
  }
  // The owner with tag 2 works on the scenario's packets in a child, and dies at `point`.
  bool owner_dies(ProbePoint point, int visit) {
    const pid_t child = start([&] {
      fence.view_again();
      ShardStepper owner = heir(2);
      if (!owner.take_over()) std::abort();
      wait_for_parent();
      die_at(point, visit);
      while (owner.poll_once()) {
      }
    });
    world.kernels[0].complete(2);
    flows.send(world, scenario.from_guest, scenario.from_uplink);
    const bool died = resume(child);
    fence.kill(2);
    return died;
  }
  // The heir with `tag` dies at `point` of its takeover, in a child.
  bool heir_dies(std::uint32_t tag, ProbePoint point, int visit) {
    const bool died = killed([&] {
      fence.view_again();
      ShardStepper stepper = heir(tag);
      die_at(point, visit);
      stepper.take_over();
    });
    fence.kill(tag);
    return died;
  }

  const Scenario& scenario;
  FakeFence fence;
  EngineWorld world;
  Flows flows;
  std::shared_ptr<const UplinkPorts> ports;
};

void require_clean(const Verdict& verdict) {
  CHECK(verdict.tally.lost == 0);
  CHECK(verdict.tally.duplicated == 0);
  CHECK(verdict.tally.reordered == 0);
  CHECK(verdict.tally.corrupt == 0);
  CHECK(verdict.leaked_frames == 0);
  CHECK(verdict.descriptor_errors == 0);
  CHECK(verdict.record_left == 0);
  CHECK(verdict.not_notified == 0);
  CHECK(verdict.miscounted == 0);
  CHECK(verdict.trespasses == 0);
  CHECK(verdict.stopped == 0);
}

constexpr int kPoints = static_cast<int>(ProbePoint::kCount);

}  // namespace

TEST_CASE("a world without deaths passes the judge, and the judge can fail") {
  for (const Scenario& scenario : scenarios()) {
    INFO(scenario.name);
    Stage stage(scenario);
    stage.flows.send(stage.world, scenario.from_guest, scenario.from_uplink);
    ShardStepper heir = stage.heir(2);
    require_clean(take_over_and_judge(stage.world, heir, stage.flows));
  }
  Stage stage(scenarios()[0]);
  VringCursors& cursors = stage.world.state().transmit;
  ++cursors.next_avail;
  copy_positions(cursors, position_word(cursors));
  stage.flows.send(stage.world, 4, 4);
  ShardStepper heir = stage.heir(2);
  CHECK(take_over_and_judge(stage.world, heir, stage.flows).tally.lost == 1);
}

TEST_CASE("an owner whose wild store hits its own cursors ends itself, and its heir goes on") {
  for (const Scenario& scenario : scenarios()) {
    if (scenario.from_guest > 2 || scenario.from_uplink > 2) continue;
    for (unsigned bit = 0; bit < 64; ++bit) {
      INFO(scenario.name << ", bit " << bit);
      Stage stage(scenario);
      stage.world.kernels[0].complete(2);
      stage.flows.send(stage.world, scenario.from_guest, scenario.from_uplink);
      const bool ended_itself = killed([&] {
        std::signal(SIGABRT, [](int) { ::kill(::getpid(), SIGKILL); });
        stage.fence.view_again();
        ShardStepper owner = stage.heir(2);
        if (!owner.take_over()) ::_exit(1);
        QueuePairState& state = stage.world.state();
        VringCursors& cursors = scenario.from_guest != 0 ? state.transmit : state.receive;
        reinterpret_cast<unsigned char*>(&cursors)[bit / 8] ^= static_cast<unsigned char>(1u << bit % 8);
        owner.poll_once();
      });
      REQUIRE(ended_itself);
      stage.fence.kill(2);
      ShardStepper heir = stage.heir(3);
      require_clean(take_over_and_judge(stage.world, heir, stage.flows));
    }
  }
}

TEST_CASE("an owner killed at every probe point") {
  std::set<int> reached;
  for (const Scenario& scenario : scenarios())
    for (const bool moves_on : {false, true})
      for (int point = 0; point < kPoints; ++point)
        for (int visit = 1; visit <= 3; ++visit) {
          INFO(scenario.name << ", killed at '" << name(ProbePoint{point}) << "', visit " << visit
                             << (moves_on ? ", the world moves on" : ""));
          Stage stage(scenario);
          if (!stage.owner_dies(ProbePoint{point}, visit)) break;
          reached.insert(point);
          if (moves_on) world_moves_on(stage.world, stage.flows, 4);
          ShardStepper heir = stage.heir(3);
          require_clean(take_over_and_judge(stage.world, heir, stage.flows));
        }
  for (int point = 0; point < kPoints; ++point) {
    INFO(name(ProbePoint{point}));
    const bool of_burst = point < static_cast<int>(ProbePoint::kTakeoverEpoch);
    CHECK((reached.count(point) != 0) == of_burst);
  }
}

namespace {

void kill_owner_then_heir(bool packed) {
  std::set<int> reached;
  for (const Scenario& scenario : scenarios()) {
    if (((scenario.shape.nic.features & feature::kPacked) != 0) != packed) continue;
    if (scenario.from_guest + scenario.from_uplink > 2 && !scenario.shape.nic.mergeable()) continue;
    for (int first = 0; first < static_cast<int>(ProbePoint::kTakeoverEpoch); ++first)
      for (int second = 0; second < kPoints; ++second) {
        INFO(scenario.name << ", owner killed at '" << name(ProbePoint{first}) << "', heir at '"
                           << name(ProbePoint{second}) << "'");
        Stage stage(scenario);
        if (!stage.owner_dies(ProbePoint{first}, 1)) break;
        if ((first + second) % 2 == 0) world_moves_on(stage.world, stage.flows, 2);
        if (!stage.heir_dies(3, ProbePoint{second}, 1)) continue;
        reached.insert(second);
        if ((first + second) % 3 == 0) world_moves_on(stage.world, stage.flows, 2);
        ShardStepper heir = stage.heir(4);
        require_clean(take_over_and_judge(stage.world, heir, stage.flows));
      }
  }
  // A takeover applies, disarms, and drains completions; it neither stages nor arms.
  for (const ProbePoint point :
       {ProbePoint::kFramesMarked, ProbePoint::kDestinationWritten, ProbePoint::kDestinationPublished,
        ProbePoint::kSourceWritten, ProbePoint::kSourcePublished, ProbePoint::kCursorsAdvanced, ProbePoint::kDisarmed,
        ProbePoint::kCompletionCleared, ProbePoint::kTakeoverEpoch, ProbePoint::kTakeoverReplayed}) {
    INFO(name(point));
    CHECK(reached.count(static_cast<int>(point)) == 1);
  }
}

}  // namespace

TEST_CASE("an heir killed at every probe point of its takeover, after an owner killed at every one: split rings") {
  kill_owner_then_heir(false);
}
TEST_CASE("an heir killed at every probe point of its takeover, after an owner killed at every one: packed rings") {
  kill_owner_then_heir(true);
}

TEST_CASE("either side of a handover killed at every probe point of it") {
  std::set<int> reached;
  for (const Scenario& scenario : scenarios())
    for (const bool heir_asks :
         {true, false})  // who is killed: the heir that asks and takes, or the owner that lets go
      for (const bool moves_on : {false, true})
        for (int point = 0; point < kPoints; ++point) {
          INFO(scenario.name << (heir_asks ? ", heir" : ", owner") << " killed at '" << name(ProbePoint{point}) << "'"
                             << (moves_on ? ", the world moves on" : ""));
          Stage stage(scenario);
          bool died = false;
          if (heir_asks) {
            ShardStepper owner = stage.heir(2);
            REQUIRE(owner.take_over());
            stage.flows.send(stage.world, scenario.from_guest, scenario.from_uplink);
            const pid_t child = start([&] {
              stage.fence.view_again();
              ShardStepper heir = stage.heir(3);
              die_at(ProbePoint{point}, 1);
              heir.ask_owner();
              wait_for_parent();
              heir.take_over();
            });
            died = child == 0;
            if (!died) {
              owner.poll_once();
              if (!owner.let_go()) std::abort();
              died = resume(child);
            }
            stage.fence.kill(3);
            if (!died) continue;
            reached.insert(point);
            if (moves_on) world_moves_on(stage.world, stage.flows, 4);
            // The owner has let go and takes back or over; or it lives on, sees a dead heir's request, and drops it.
            if (owner_tag(stage.world.segment().shards[0].owner.load()) == 2) {
              CHECK_FALSE(owner.let_go());
              CHECK(stage.world.segment().shards[0].handover.request.load() == 0);
              stage.fence.kill(2);
              ShardStepper third = stage.heir(4);
              require_clean(take_over_and_judge(stage.world, third, stage.flows));
            } else {
              CHECK_FALSE(owner.left_to_another());
              require_clean(take_over_and_judge(stage.world, owner, stage.flows));
            }
          } else {
            ShardStepper heir = stage.heir(3);
            const pid_t child = start([&] {
              stage.fence.view_again();
              ShardStepper owner = stage.heir(2);
              if (!owner.take_over()) std::abort();
              wait_for_parent();
              die_at(ProbePoint{point}, 1);
              owner.poll_once();
              if (!owner.let_go()) std::abort();
            });
            stage.flows.send(stage.world, scenario.from_guest, scenario.from_uplink);
            heir.ask_owner();
            died = resume(child);
            stage.fence.kill(2);
            if (!died) continue;
            reached.insert(point);
            if (moves_on) world_moves_on(stage.world, stage.flows, 4);
            require_clean(take_over_and_judge(stage.world, heir, stage.flows));
          }
        }
  for (const ProbePoint point : {ProbePoint::kHandoverAsked, ProbePoint::kHandoverGranted, ProbePoint::kHandoverLetGo,
                                 ProbePoint::kTakeoverEpoch, ProbePoint::kTakeoverReplayed, ProbePoint::kArmed}) {
    INFO(name(point));
    CHECK(reached.count(static_cast<int>(point)) == 1);
  }
}

TEST_CASE("five heirs in a row die while they replay the same record") {
  for (const Scenario& scenario : scenarios()) {
    INFO(scenario.name);
    Stage stage(scenario);
    REQUIRE(stage.owner_dies(ProbePoint::kArmed, 1));
    for (std::uint32_t tag = 3; tag < 8; ++tag) REQUIRE(stage.heir_dies(tag, ProbePoint::kDestinationPublished, 1));
    ShardStepper heir = stage.heir(8);
    require_clean(take_over_and_judge(stage.world, heir, stage.flows));
    CHECK(owner_epoch(stage.world.segment().shards[0].owner.load()) == 8);
  }
}

TEST_CASE("nobody takes over from an owner that lives") {
  Stage stage(scenarios()[0]);
  ShardStepper second = stage.heir(2);
  REQUIRE(second.take_over());
  ShardStepper third = stage.heir(3);
  CHECK_FALSE(third.take_over());
  CHECK(owner_tag(stage.world.segment().shards[0].owner.load()) == 2);
  stage.fence.kill(3);
  CHECK_FALSE(third.take_over());
}
