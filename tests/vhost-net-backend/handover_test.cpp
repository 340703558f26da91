// SPDX-License-Identifier: Apache-2.0
// Planned handovers: owner and heir change places and nothing is lost; requests that come to nothing; deaths of either
// side between request and takeover.
#include <sys/eventfd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdio>

#include "tests/vhost-net-backend/bench.hpp"
#include "tests/vhost-net-backend/running_shard.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

const PacketFlow kFlow{};

struct Stage {
  explicit Stage(const WorldShape& shape = small_world()) : world(shape), flows(kFlow) { world.nics[0].post(); }
  ShardStepper member(std::uint32_t tag) {
    ShardStepper stepper(world.segment(), fence.view(), tag);
    stepper.hold(world.make_ports(), {world.make_device(world.describe(1))});
    return stepper;
  }
  ShardState& shard() { return world.segment().shards[0]; }
  std::uint32_t owner() { return owner_tag(shard().owner.load()); }
  std::uint32_t epoch() { return owner_epoch(shard().owner.load()); }

  EngineWorld world;
  FakeFence fence;
  Flows flows;
};

std::string refusal_of(ShardStepper& heir) {
  const auto refusals = only<NotHandedOverEvent>(heir.events());
  return refusals.size() == 1 ? refusals[0].text : std::to_string(refusals.size()) + " refusals";
}

}  // namespace

TEST_CASE("owner and heir change places again and again, each with traffic in hand") {
  for (const std::uint64_t features :
       {feature::kVersion1, feature::kVersion1 | feature::kMergeable | feature::kEventIndex}) {
    Stage stage(small_world(features));
    ShardStepper one = stage.member(1), two = stage.member(2);
    REQUIRE(one.take_over());
    ShardStepper *owner = &one, *heir = &two;
    for (std::uint32_t epoch = 1; epoch <= 20; ++epoch) {
      INFO("epoch " << epoch);
      REQUIRE(stage.epoch() == epoch);
      REQUIRE(stage.owner() == owner->tag());
      stage.flows.send(stage.world, 40, 40);
      owner->poll_once();  // a burst each way; the rest is the heir's
      heir->events();
      heir->ask_owner();
      CHECK_FALSE(heir->take_over());  // it lives and has not let go
      REQUIRE(owner->let_go());
      CHECK(stage.owner() == 0);
      CHECK(owner->left_to_another());
      CHECK(owner->pairs().empty());
      CHECK_FALSE(owner->poll_once());
      REQUIRE(heir->take_over());
      CHECK_FALSE(owner->take_over());
      const auto reports = only<TookOverEvent>(heir->events());
      REQUIRE(reports.size() == 1);
      const TakeoverTimeline& timeline = reports[0].timeline;
      CHECK(timeline.kind == TakeoverKind::kHandover);
      CHECK(timeline.previous_tag == owner->tag());
      CHECK(timeline.epoch == epoch + 1);
      CHECK(timeline.record_armed == 0);
      CHECK(timeline.requested_ns <= timeline.granted_ns);
      CHECK(timeline.granted_ns <= timeline.epoch_ns);
      CHECK(timeline.fence_ns == 0);
      CHECK(stage.shard().handover.request.load() == 0);
      REQUIRE(drain(stage.world, *heir, stage.flows.uplink, stage.flows.guest).quiet);
      std::swap(owner, heir);
    }
    // The last one dies, and the ordinary takeover finds what it always finds.
    stage.fence.kill(owner->tag());
    CHECK(take_over_and_judge(stage.world, *heir, stage.flows).clean());
    CHECK(only<TookOverEvent>(heir->events()).back().timeline.kind == TakeoverKind::kFailover);
  }
}

TEST_CASE("a former owner obeys as an heir does: it holds new descriptions and puts none in force") {
  Stage stage;
  ShardStepper one = stage.member(1), two = stage.member(2);
  REQUIRE(one.take_over());
  two.ask_owner();
  REQUIRE(one.let_go());
  REQUIRE(two.take_over());
  one.events();
  for (ShardStepper* member : {&one, &two}) {
    member->post(DescribeCommand{stage.world.make_device(stage.world.describe(2))});
    member->run_commands();
  }
  auto events = one.events();
  CHECK(only<HeldEvent>(events).size() == 1);
  CHECK(only<InForceEvent>(events).empty());
  CHECK(stage.world.state().generation.load() == 2);
  one.post(PruneCommand{0, 2});
  one.run_commands();
  one.ask_owner();
  REQUIRE(two.let_go());
  REQUIRE(one.take_over());
  CHECK(one.pairs().size() == 1);
  CHECK(one.pairs()[0].generation == 2);
}

TEST_CASE("requests that come to nothing leave the owner alone") {
  Stage stage;
  ShardStepper owner = stage.member(1), heir = stage.member(2);
  REQUIRE(owner.take_over());
  Handover& handover = stage.shard().handover;
  const auto refused = [&] {
    const std::uint64_t word = stage.shard().owner.load();
    CHECK_FALSE(owner.let_go());
    CHECK(stage.shard().owner.load() == word);
    CHECK(handover.request.load() == 0);
  };
  SECTION("of another epoch") {
    heir.ask_owner();
    handover.request.store(std::uint64_t{77} << 32 | 5);
    refused();
    heir.follow_request();
    CHECK(refusal_of(heir).find("refused") != std::string::npos);
  }
  SECTION("of an heir that died") {
    heir.ask_owner();
    stage.fence.kill(2);
    refused();
  }
  SECTION("of the owner itself, or of nobody") {
    for (const std::uint32_t tag : {1u, 0u}) {
      heir.ask_owner();
      handover.heir_tag.store(tag);
      refused();
    }
  }
  SECTION("to whom owns already, or may not own") {
    owner.events();
    owner.ask_owner();
    CHECK(refusal_of(owner).find("owns") != std::string::npos);
    ShardStepper unarmed(stage.world.segment(), stage.fence.view(), 3);
    unarmed.post(HandOverCommand{});
    unarmed.run_commands();
    CHECK(refusal_of(unarmed).find("may not own") != std::string::npos);
    CHECK(handover.request.load() == 0);
  }
  SECTION("without the description in force") {
    owner.post(DescribeCommand{stage.world.make_device(stage.world.describe(2))});
    owner.run_commands();
    heir.ask_owner();
    CHECK(refusal_of(heir).find("description") != std::string::npos);
    CHECK(handover.request.load() == 0);
  }
  stage.flows.send(stage.world, 5, 5);
  stage.fence.kill(1);
  ShardStepper last = stage.member(9);
  CHECK(take_over_and_judge(stage.world, last, stage.flows).clean());
}

TEST_CASE("the heir does not come: the former owner takes back, at once if the heir is dead") {
  for (const bool dead : {false, true}) {
    Stage stage;
    ShardStepper owner = stage.member(1), heir = stage.member(2);
    REQUIRE(owner.take_over());
    stage.flows.send(stage.world, 10, 10);
    stage.shard().spin_limit_ns = stage.shard().blocked_limit_ns = dead ? 3'600'000'000'000 : 1;
    heir.ask_owner();
    REQUIRE(owner.let_go());
    if (dead) {
      CHECK(owner.left_to_another());
      stage.fence.kill(2);
      CHECK_FALSE(owner.left_to_another());
    } else {
      while (owner.left_to_another()) {  // a few milliseconds at least, whatever the limits
      }
    }
    owner.events();
    REQUIRE(owner.take_over());
    const auto reports = only<TookOverEvent>(owner.events());
    REQUIRE(reports.size() == 1);
    CHECK(reports[0].timeline.kind == TakeoverKind::kTakenBack);
    CHECK(reports[0].timeline.previous_tag == 1);
    if (!dead) {
      CHECK_FALSE(heir.take_over());
      heir.follow_request();
      CHECK(refusal_of(heir).find("took it back") != std::string::npos);
    }
    REQUIRE(drain(stage.world, owner, stage.flows.uplink, stage.flows.guest).quiet);
    stage.fence.kill(1);
    ShardStepper last = stage.member(9);
    CHECK(take_over_and_judge(stage.world, last, stage.flows).clean());
  }
}

TEST_CASE("whoever dies between letting go and takeover, the next one goes on") {
  Stage stage;
  ShardStepper owner = stage.member(1), heir = stage.member(2), third = stage.member(3);
  REQUIRE(owner.take_over());
  stage.flows.send(stage.world, 10, 10);
  owner.poll_once();
  heir.ask_owner();
  REQUIRE(owner.let_go());
  SECTION("the former owner: its heir comes all the same") {
    stage.fence.kill(1);
    CHECK(take_over_and_judge(stage.world, heir, stage.flows).clean());
    CHECK(only<TookOverEvent>(heir.events()).back().timeline.kind == TakeoverKind::kHandover);
  }
  SECTION("both: to a third this is a failover") {
    stage.fence.kill(1);
    stage.fence.kill(2);
    CHECK(take_over_and_judge(stage.world, third, stage.flows).clean());
    const TakeoverTimeline timeline = only<TookOverEvent>(third.events()).back().timeline;
    CHECK(timeline.kind == TakeoverKind::kFailover);
    CHECK(timeline.previous_tag == 1);
    CHECK(timeline.fence_ns != 0);
  }
  SECTION("the heir with the epoch: the former owner takes over from it, under its old tag") {
    REQUIRE(heir.take_over());
    heir.poll_once();
    stage.fence.kill(2);
    CHECK(take_over_and_judge(stage.world, owner, stage.flows).clean());
    const TakeoverTimeline timeline = only<TookOverEvent>(owner.events()).back().timeline;
    CHECK(timeline.kind == TakeoverKind::kFailover);
    CHECK(timeline.previous_tag == 2);
    CHECK(stage.owner() == 1);
    CHECK(stage.epoch() == 3);
  }
}

TEST_CASE("running threads change places under traffic") {
  for (const Polling polling : {Polling::kAlways, Polling::kAdaptive}) {
    CAPTURE(static_cast<int>(polling));
    EngineWorld world(small_world(feature::kVersion1 | feature::kEventIndex));
    FakeFence fence;
    Flows flows(kFlow);
    const UniqueFd bell{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    RunningShard one(world, fence, 1, polling, bell.get());
    REQUIRE(one.heard<TookOverEvent>());
    RunningShard two(world, fence, 2, polling, bell.get());
    REQUIRE(two.heard<HeldEvent>());
    RunningShard *owner = &one, *heir = &two;
    // A heir that gets no CPU in time is refused, and asks again: time decides how often, never what arrives.
    int handovers = 0;
    std::vector<std::uint64_t> gaps;
    for (std::uint32_t packets = 50; handovers < 100; packets += 50) {
      heir->post(HandOverCommand{});
      REQUIRE(exchange(world, flows, packets));
      bool taken = false, refused = false;
      while (!taken && !refused) {
        REQUIRE(heir->wait());
        const auto said = heir->take_events();
        refused = !only<NotHandedOverEvent>(said).empty();
        // What it took back itself, as owner, it had reported before.
        for (const TookOverEvent& event : only<TookOverEvent>(said)) {
          if (event.timeline.kind != TakeoverKind::kHandover) continue;
          taken = true;
          gaps.push_back(event.timeline.replayed_ns - event.timeline.requested_ns);
        }
      }
      if (refused) continue;
      ++handovers;
      std::swap(owner, heir);
    }
    REQUIRE(exchange(world, flows, flows.from_guest + 50));
    std::sort(gaps.begin(), gaps.end());
    std::printf("%s: request to first poll: median %.1f us, least %.1f us\n",
                polling == Polling::kAlways ? "always polling" : "adaptive",
                static_cast<double>(gaps[gaps.size() / 2]) / 1000, static_cast<double>(gaps[0]) / 1000);
    one.stop();
    two.stop();
    CHECK(flows.uplink.finish(flows.uplink.arrived()).clean());
    CHECK(flows.guest.finish(flows.guest.arrived()).clean());
    CHECK(world.nics[0].transmit.wrong_returns() == 0);
    CHECK(world.nics[0].receive.wrong_returns() == 0);
    CHECK(owner_epoch(world.segment().shards[0].owner.load()) >= 101);
  }
}
