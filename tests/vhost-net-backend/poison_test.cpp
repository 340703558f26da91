// SPDX-License-Identifier: Apache-2.0
// Packets that kill: counted by whose fault a death was, dropped exactly, whoever dies meanwhile.
#include "vhost-net-backend/poison.hpp"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <csignal>
#include <cstring>

#include "tests/support/takeover_check.hpp"
#include "tests/vhost-net-backend/bench.hpp"
#include "tests/vhost-net-backend/probe.hpp"
#include "vhost-net-backend/poison_probe.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

// Runs `act` in a child; the signal that ended it, 0 if none did.
int signal_of(const std::function<void()>& act) {
  const pid_t child = ::fork();
  if (child < 0) std::abort();
  if (child == 0) {
    for (int number = 1; number < NSIG; ++number) ::signal(number, SIG_DFL);
    const rlimit none{0, 0};
    ::setrlimit(RLIMIT_CORE, &none);
    act();
    ::_exit(0);
  }
  int status = 0;
  if (::waitpid(child, &status, 0) != child) std::abort();
  return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

std::vector<std::byte> poison_packet(DrillFault fault) {
  std::vector<std::byte> packet(kPoisonAt + kPoisonMagicSize + 1 + 30);
  for (std::size_t i = 0; i < packet.size(); ++i) packet[i] = static_cast<std::byte>(i * 7);
  std::memcpy(packet.data() + kPoisonAt, kPoisonMagic, kPoisonMagicSize);
  packet[kPoisonAt + kPoisonMagicSize] = static_cast<std::byte>(fault);
  return packet;
}

struct Stage {
  explicit Stage(std::uint64_t features = feature::kVersion1 | feature::kIndirect,
                 ChainStyle style = ChainStyle::kDirect)
      : world(shape(features, style)), flows(PacketFlow{}) {
    world.nics[0].post();
  }
  static WorldShape shape(std::uint64_t features, ChainStyle style) {
    WorldShape shape = small_world(features);
    shape.nic.transmit = style;
    shape.nic.queue_size = 256;
    if (shape.nic.mergeable()) shape.nic.receive_slot_size = 64;
    return shape;
  }
  ShardStepper heir(std::uint32_t tag) {
    ShardStepper stepper(world.segment(), fence.view(), tag);
    stepper.hold(world.make_ports(), {world.make_device(world.describe(1))});
    return stepper;
  }
  void send_poison(bool receive, const std::vector<std::byte>& packet) {
    if (receive) {
      REQUIRE(world.kernels[0].receive(packet));
      ++flows.bad_from_uplink;
    } else {
      REQUIRE(world.nics[0].send(packet));
      world.nics[0].transmit.publish();
      ++flows.bad_from_guest;
    }
    ++flows.poisoned;
  }
  // An owner in a child, until it finds nothing more to do; the signal it died of.
  int owner_runs(
      std::uint32_t tag, const std::function<void()>& prepare = [] {}) {
    return signal_of([&] {
      fence.view_again();
      ShardStepper owner = heir(tag);
      prepare();
      if (!owner.take_over()) std::abort();
      while (owner.poll_once()) {
      }
    });
  }
  [[nodiscard]] Suspicion& suspicion(bool receive) {
    return receive ? world.state().receive_suspicion : world.state().transmit_suspicion;
  }
  [[nodiscard]] std::uint32_t deaths(bool receive) { return Suspect::from(suspicion(receive).suspect.load()).deaths; }

  FakeFence fence;
  EngineWorld world;
  Flows flows;
};

std::vector<PoisonPacket> poison_in(const std::vector<ShardEvent>& events) {
  std::vector<PoisonPacket> found;
  for (const ShardEvent& event : events)
    if (const auto* poison = std::get_if<PoisonEvent>(&event)) found.push_back(poison->packet);
  return found;
}

}  // namespace

TEST_CASE("a packet that kills costs two owners, then exactly it is dropped") {
  const std::pair<DrillFault, int> faults[] = {
      {DrillFault::kBadStore, SIGSEGV}, {DrillFault::kAbort, SIGABRT}, {DrillFault::kBusError, SIGBUS}};
  for (const bool receive : {false, true})
    for (const std::uint32_t before : {0u, 1u, 5u, 40u})
      for (const auto& [fault, signal] : faults)
        for (const bool mergeable : {false, true}) {
          INFO((receive ? "receive" : "transmit")
               << ", " << before << " packets before it, signal " << signal << (mergeable ? ", mergeable" : ""));
          Stage stage(feature::kVersion1 | feature::kIndirect | (mergeable ? feature::kMergeable : 0),
                      mergeable ? ChainStyle::kIndirect : ChainStyle::kChained);
          const auto packet = poison_packet(fault);
          const auto send = [&](std::uint32_t count) { stage.flows.send(stage.world, count, receive ? count / 2 : 3); };
          send(receive ? before / 2 * 2 : before);
          stage.send_poison(receive, packet);
          send(4);
          REQUIRE(stage.owner_runs(1) == signal);
          stage.fence.kill(1, signal, true);
          REQUIRE(stage.owner_runs(2) == signal);
          CHECK(stage.deaths(receive) == 1);
          stage.fence.kill(2, signal, true);
          ShardStepper heir = stage.heir(3);
          const Verdict verdict = take_over_and_judge(stage.world, heir, stage.flows);
          CHECK(verdict.clean());
          CHECK(stage.suspicion(receive).poisoned == 1);
          CHECK(stage.suspicion(receive).suspect.load() == 0);
          CHECK(stage.world.segment().shards[0].in_hand.load() == 0);
          const std::uint32_t told = stage.world.segment().shards[0].takeover.suspect;
          CHECK(told ==
                (static_cast<std::uint32_t>(receive ? PacketPhase::kReceive : PacketPhase::kTransmit) | 2u << 8));
          const auto found = poison_in(heir.events());
          REQUIRE(found.size() == 1);
          CHECK(found[0].bytes == packet);
          CHECK(found[0].length == packet.size());
          CHECK(found[0].deaths == 2);
        }
}

TEST_CASE("deaths from outside never count, whatever the signal, those in between change nothing") {
  for (const bool receive : {false, true}) {
    Stage stage;
    stage.flows.send(stage.world, 2, 2);
    stage.send_poison(receive, poison_packet(DrillFault::kBadStore));
    std::uint32_t tag = 0;
    const auto die = [&](int signal, bool own_doing) {
      REQUIRE(stage.owner_runs(++tag) == SIGSEGV);
      stage.fence.kill(tag, signal, own_doing);
    };
    for (int round = 0; round < 3; ++round) {
      die(SIGKILL, false);
      die(SIGSEGV, false);  // somebody sent it
      die(SIGTERM, false);
    }
    die(SIGSEGV, true);
    CHECK(stage.deaths(receive) == 0);  // not weighed yet
    die(SIGKILL, false);
    CHECK(stage.deaths(receive) == 1);
    // An heir that dies by somebody else's hand right after it took the epoch: its predecessor's death is not lost, and
    // counts once.
    die(SIGKILL, false);
    CHECK(stage.owner_runs(++tag, [] { die_at(ProbePoint::kTakeoverEpoch, 1); }) == SIGKILL);
    stage.fence.kill(tag);
    CHECK(stage.deaths(receive) == 1);
    die(SIGABRT, true);
    CHECK(stage.owner_runs(++tag, [] { die_at(ProbePoint::kTakeoverEpoch, 1); }) == SIGKILL);
    stage.fence.kill(tag);
    CHECK(stage.deaths(receive) == 1);
    ShardStepper heir = stage.heir(++tag);
    CHECK(take_over_and_judge(stage.world, heir, stage.flows).clean());
    CHECK(stage.suspicion(receive).poisoned == 1);
  }
}

TEST_CASE("a suspect that passes is forgotten") {
  for (const bool receive : {false, true}) {
    Stage stage;
    auto packet = poison_packet(DrillFault::kBadStore);
    stage.send_poison(receive, packet);
    REQUIRE(stage.owner_runs(1) == SIGSEGV);
    stage.fence.kill(1, SIGSEGV, true);
    ShardStepper heir = stage.heir(2);
    REQUIRE(heir.take_over());
    CHECK(stage.deaths(receive) == 1);
    // It turns harmless: the guest changed its mind, or the backend was replaced.
    const auto all = receive ? std::span(stage.world.parts().back()) : stage.world.guest_bytes();
    const auto at = std::search(all.begin(), all.end(), packet.begin(), packet.end());
    REQUIRE(at != all.end());
    *(at + kPoisonAt) = std::byte{0};
    while (heir.poll_once()) {
    }
    stage.flows.send(stage.world, 1, 1);
    while (heir.poll_once()) {
    }
    CHECK(stage.deaths(receive) == 0);
    CHECK(stage.suspicion(receive).poisoned == 0);
    CHECK(stage.world.state().transmit.dropped + stage.world.state().receive.dropped == 0);
    CHECK_FALSE(heir.pairs()[0].has_suspects);
  }
}

TEST_CASE("two kinds of poison at once, one each way: two owners each") {
  Stage stage;
  stage.flows.send(stage.world, 1, 1);
  stage.send_poison(false, poison_packet(DrillFault::kAbort));
  stage.send_poison(true, poison_packet(DrillFault::kBadStore));
  stage.flows.send(stage.world, 3, 3);
  std::uint32_t tag = 0;
  for (int deaths = 0; deaths < 4; ++deaths) {
    const int signal = stage.owner_runs(++tag);
    REQUIRE(signal != 0);
    stage.fence.kill(tag, signal, true);
  }
  ShardStepper heir = stage.heir(++tag);
  CHECK(take_over_and_judge(stage.world, heir, stage.flows).clean());
}

TEST_CASE("the owner that drops is killed at every probe point: dropped and counted once") {
  for (const bool receive : {false, true})
    for (int point = 0; point < static_cast<int>(ProbePoint::kCount); ++point)
      for (int visit = 1; visit <= 4; ++visit) {
        INFO((receive ? "receive" : "transmit") << ", " << name(ProbePoint{point}) << ", visit " << visit);
        Stage stage;
        stage.flows.send(stage.world, 2, 2);
        stage.send_poison(receive, poison_packet(DrillFault::kBadStore));
        stage.flows.send(stage.world, 2, 2);
        for (const std::uint32_t tag : {1u, 2u}) {
          REQUIRE(stage.owner_runs(tag) == SIGSEGV);
          stage.fence.kill(tag, SIGSEGV, true);
        }
        const int signal = stage.owner_runs(3, [&] { die_at(ProbePoint{point}, visit); });
        if (signal == 0) break;
        REQUIRE(signal == SIGKILL);
        stage.fence.kill(3);
        ShardStepper heir = stage.heir(4);
        CHECK(take_over_and_judge(stage.world, heir, stage.flows).clean());
      }
}

TEST_CASE("a record that kills whoever applies it is given up after two: its queue stops, the rest goes on") {
  for (const bool receive : {false, true})
    for (const ProbePoint point : {ProbePoint::kArmed, ProbePoint::kDestinationWritten,
                                   ProbePoint::kDestinationPublished, ProbePoint::kSourcePublished}) {
      INFO((receive ? "receive: " : "transmit: ") << name(point));
      Stage stage;
      stage.flows.send(stage.world, receive ? 0 : 3, receive ? 3 : 0);
      std::uint32_t tag = 0;
      // A replay does not arm: an heir dies at the first point of its own there.
      const auto die = [&](bool own_doing) {
        const ProbePoint there = tag == 0 || point != ProbePoint::kArmed ? point : ProbePoint::kDestinationWritten;
        REQUIRE(stage.owner_runs(++tag, [&] { die_at(there, 1); }) == SIGKILL);
        stage.fence.kill(tag, own_doing ? SIGSEGV : SIGKILL, own_doing);
      };
      for (int round = 0; round < 3; ++round) die(false);
      die(true);
      die(false);
      REQUIRE(stage.world.record().arm.load() != 0);
      die(true);
      ShardStepper heir = stage.heir(++tag);
      REQUIRE(heir.take_over());
      CHECK(stage.world.record().arm.load() == 0);
      CHECK((receive ? stage.world.state().receive : stage.world.state().transmit).fault.load() ==
            QueueFault::kRecordInvalid);
      CHECK((receive ? stage.world.state().transmit : stage.world.state().receive).fault.load() == QueueFault::kNone);
      CHECK(stage.world.segment().shards[0].takeover.suspect ==
            (static_cast<std::uint32_t>(PacketPhase::kApply) | 2u << 8));
      CHECK(stage.world.audit().doubled == 0);
      CHECK(stage.world.audit().leaked == 0);
      Ledger out(PacketFlow{}), in(PacketFlow{});
      if (receive)
        send_from_guest(stage.world, PacketFlow{}, 0, 3);
      else
        send_from_uplink(stage.world, PacketFlow{}, 0, 3);
      for (int round = 0; round < 4; ++round) heir.poll_once();
      while (const auto bytes = stage.world.kernels[0].send()) out.note(*bytes);
      std::vector<std::byte> packet;
      while (stage.world.nics[0].take(packet)) in.note(packet);
      CHECK((receive ? out : in).finish(3).clean());
    }
}

TEST_CASE("a verdict counts if the thread span, not if somebody stopped it") {
  for (const auto& [verdict, counts] :
       {std::pair{HangVerdict::kSpinning, true}, std::pair{HangVerdict::kBlocked, false},
        std::pair{HangVerdict::kAsleepWithWork, false}, std::pair{HangVerdict::kStarved, false},
        std::pair{HangVerdict::kNone, false}}) {
    Stage stage;
    stage.fence.kill(7);
    ShardState& shard = stage.world.segment().shards[0];
    shard.in_hand.store(PacketCursor{7, PacketPhase::kReceive, 0, 5}.word());
    CHECK((weigh_death(stage.world.segment(), 0, stage.fence.view(), {7, verdict}) != 0) == counts);
    CHECK(stage.deaths(true) == (counts ? 1 : 0));
    // Again: an heir that died right after it counted.
    CHECK(weigh_death(stage.world.segment(), 0, stage.fence.view(), {7, verdict}) == 0);
    CHECK(stage.deaths(true) == (counts ? 1 : 0));
  }
}

TEST_CASE("whatever the cursor and the suspects hold, nobody else's packet is lost") {
  std::uint64_t random = 88172645463325252u;
  const auto next = [&] {
    random ^= random << 13;
    random ^= random >> 7;
    return random ^= random << 17;
  };
  for (int round = 0; round < 500; ++round) {
    Stage stage;
    stage.fence.kill(1, SIGSEGV, true);
    stage.world.segment().shards[0].owner.store(owner_word(1, 1));
    stage.world.segment().shards[0].in_hand.store(next());
    stage.world.state().record_suspect.store(next());
    // A suspect that is no packet in the rings' reach; one that is would rightly be dropped.
    stage.world.state().receive_suspicion.suspect.store(next() | 0x80000000u);
    stage.world.state().transmit_suspicion.suspect.store(next() | 0x80000000u);
    ShardStepper heir = stage.heir(2);
    stage.flows.send(stage.world, 5, 5);
    CHECK(take_over_and_judge(stage.world, heir, stage.flows).clean());
  }
}
