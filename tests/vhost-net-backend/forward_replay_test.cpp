// SPDX-License-Identifier: Apache-2.0
// An owner dies with a forward armed, guest to guest, and either half of its record is damaged, or the receiver has
// gone before the heir comes: each half that fits is done, nobody suffers for the other.
#include <sys/mman.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <csignal>
#include <cstring>
#include <functional>

#include "tests/support/takeover_check.hpp"
#include "tests/vhost-net-backend/bench.hpp"
#include "tests/vhost-net-backend/probe.hpp"
#include "vhost-net-backend/guest_memory.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

const PacketFlow kFlow{};
constexpr std::uint32_t kPackets = 3;

// A world whose owner (tag 1) died at `point` of a forward of kPackets, from device 0 to device 1.
struct Crashed {
  explicit Crashed(std::uint64_t layout, ProbePoint point = ProbePoint::kArmed, int visit = 1)
      : world(shape(layout)), flows(kFlow) {
    for (GuestNic& nic : world.nics) nic.post();
    flows.send(world, kPackets, 0);
    const bool died = killed([&] {
      fence.view_again();
      ShardStepper owner(world.segment(), fence.view(), 1);
      hold_all(owner, world);
      if (!owner.take_over()) std::abort();
      die_at(point, visit);
      owner.poll_once();
    });
    if (!died || !record_is_valid(world.record()) || world.record().kind != RedoKind::kForward) std::abort();
    fence.kill(1);
  }
  static WorldShape shape(std::uint64_t layout) {
    return neighbours(small_world(feature::kVersion1 | feature::kIndirect | layout));
  }
  EngineWorld world;
  Flows flows;
  FakeFence fence;
};

// Worlds to try heirs in; ports and devices are made once.
struct Trial {
  explicit Trial(const Crashed& died) : crashed(died), world(Crashed::shape(died.world.shape().nic.features)) {
    for (std::uint32_t n = 0; n < 2; ++n) {
      ports.push_back(world.make_ports(n));
      devices.push_back(world.make_device(world.describe(1, n)));
    }
    begin();
  }
  void begin() {
    world.copy_from(crashed.world);
    before.clear();
    for (const auto part : world.parts()) before.insert(before.end(), part.begin(), part.end());
  }
  [[nodiscard]] ShardStepper heir() {
    ShardStepper shard(world.segment(), crashed.fence.view(), 2);
    shard.post(AttachCommand{ports[1]});
    shard.hold(ports[0], devices);
    return shard;
  }
  // Bytes of the receiver's memory that differ from what the dead owner left.
  [[nodiscard]] std::size_t receiver_changed() const {
    const auto now = world.guest_bytes(), then = crashed.world.guest_bytes();
    std::size_t count = 0;
    for (std::size_t i = world.nics[1].receive.place().descriptors - kGuestBase; i < now.size(); ++i)
      count += now[i] != then[i];
    return count;
  }
  [[nodiscard]] const TakeoverTimeline& timeline() const { return world.segment().shards[0].takeover; }

  const Crashed& crashed;
  EngineWorld world;
  std::vector<std::shared_ptr<const UplinkPorts>> ports;
  std::vector<std::shared_ptr<const Device>> devices;
  std::vector<std::byte> before;
};

// Shared bytes besides owner word and record that an heir changed.
std::size_t changed(const Trial& trial) {
  std::size_t at = 0, count = 0;
  const auto* shard = reinterpret_cast<const std::byte*>(&trial.world.segment().shards[0]);
  for (const std::span<const std::byte> bytes : trial.world.parts()) {
    const bool own = bytes.data() >= shard && bytes.data() < shard + sizeof(ShardState);
    for (std::size_t i = 0; i < bytes.size(); ++i) count += !own && bytes[i] != trial.before[at + i];
    at += bytes.size();
  }
  return count;
}

// Both NICs still get what their uplinks bring, unless `stopped` has no receive queue any more.
void check_uplinks(EngineWorld& world, ShardStepper& heir, bool receiver_too) {
  for (std::uint32_t pair = 0; pair < (receiver_too ? 2u : 1u); ++pair) {
    std::vector<std::byte> packet;
    while (world.nics[pair].take(packet)) {
    }
    world.nics[pair].post();
    Ledger in(kFlow);
    REQUIRE(send_from_uplink(world, kFlow, 0, 3, pair) == 3);
    for (int round = 0; round < 3; ++round) heir.poll_once();
    while (world.nics[pair].take(packet)) in.note(packet);
    CHECK(in.finish(3).clean());
  }
}

enum class Fate {
  kNotReplayed,    ///< the record is refused as a whole: the burst is staged anew
  kReceiverStops,  ///< the receiver's queue stops, the sender's half is done
  kSenderStops,    ///< the other way round
  kSenderOnly,     ///< there is no such receiver: the sender's half is done, nobody stops
};

struct Lie {
  const char* name;
  Fate fate;
  std::function<void(EngineWorld&, RedoRecord&)> tell;
};

// What may be said wrongly of a half's cursors; `Half`: RedoRecord or RedoDestination.
template <class Half>
void add_cursor_lies(std::vector<Lie>& lies, Fate fate, Half& (*half)(RedoRecord&)) {
  const auto add = [&](const char* name, void (*spoil)(Half&)) {
    lies.push_back({name, fate, [half, spoil](EngineWorld&, RedoRecord& r) { spoil(half(r)); }});
  };
  add("avail before and after elsewhere", [](Half& h) { h.avail_before = h.avail_after = 999; });
  add("avail moved elsewhere", [](Half& h) {
    h.avail_before = static_cast<std::uint16_t>(h.avail_before + 7);
    h.avail_after = static_cast<std::uint16_t>(h.avail_after + 7);
  });
  add("used moved elsewhere", [](Half& h) {
    h.used_before = static_cast<std::uint16_t>(h.used_before + 7);
    h.used_after = static_cast<std::uint16_t>(h.used_after + 7);
  });
  add("used beyond any ring", [](Half& h) { h.used_before = h.used_after = 0x7fff; });
  add("avail after that does not fit", [](Half& h) { ++h.avail_after; });
  add("used after that does not fit", [](Half& h) { ++h.used_after; });
  add("fewer used elements", [](Half& h) { --h.used_count; });
  add("as many used elements as there is room for", [](Half& h) { h.used_count = kBurstUsed; });
  add("chain without a slot", [](Half& h) { h.used[0].slots = 0; });
  add("chain of more slots", [](Half& h) { ++h.used[0].slots; });
  add("chain of more slots than the ring has", [](Half& h) {
    h.used[0].slots = 64;
    h.avail_after = h.avail_before, h.used_after = h.used_before;
  });
  add("chain of 65535 slots", [](Half& h) { h.used[1].slots = 0xffff; });
}

void move_cursors(VringCursors& cursors, std::uint16_t VringCursors::*field) {
  cursors.*field = 4242;
  copy_positions(cursors, position_word(cursors));
}

std::vector<Lie> lies() {
  std::vector<Lie> all{
      {"receiver: used count beyond the record", Fate::kNotReplayed,
       [](EngineWorld&, RedoRecord& r) { r.destination.used_count = kBurstUsed + 1; }},
      {"receiver: largest used count", Fate::kNotReplayed,
       [](EngineWorld&, RedoRecord& r) { r.destination.used_count = 0xffff; }},
      {"receiver: no such queue pair", Fate::kNotReplayed,
       [](EngineWorld&, RedoRecord& r) { r.destination.queue_pair = kMaxQueuePairs; }},
      {"receiver: largest queue pair", Fate::kNotReplayed,
       [](EngineWorld&, RedoRecord& r) { r.destination.queue_pair = ~0u; }},
      {"receiver: the sender itself", Fate::kNotReplayed,
       [](EngineWorld&, RedoRecord& r) { r.destination.queue_pair = r.queue_pair; }},
      {"receiver: a queue pair that is not served", Fate::kSenderOnly,
       [](EngineWorld&, RedoRecord& r) { r.destination.queue_pair = 5; }},
      {"receiver: another generation", Fate::kSenderOnly,
       [](EngineWorld&, RedoRecord& r) { r.destination.generation = 77; }},
      {"receiver: the largest generation", Fate::kSenderOnly,
       [](EngineWorld&, RedoRecord& r) { r.destination.generation = ~std::uint64_t{0}; }},
      {"receiver: generation 0", Fate::kSenderOnly, [](EngineWorld&, RedoRecord& r) { r.destination.generation = 0; }},
      {"receiver: cursors of the segment elsewhere", Fate::kReceiverStops,
       [](EngineWorld& w, RedoRecord&) { move_cursors(w.state(1).receive, &VringCursors::next_avail); }},
      {"receiver: used cursor of the segment elsewhere", Fate::kReceiverStops,
       [](EngineWorld& w, RedoRecord&) { move_cursors(w.state(1).receive, &VringCursors::next_used); }},
      {"sender: frames, which a forward has none of", Fate::kNotReplayed,
       [](EngineWorld&, RedoRecord& r) { r.frame_count = 1; }},
      {"sender: used count beyond the record", Fate::kNotReplayed,
       [](EngineWorld&, RedoRecord& r) { r.used_count = kBurstUsed + 1; }},
      {"sender: a queue pair that is not served", Fate::kNotReplayed,
       [](EngineWorld&, RedoRecord& r) { r.queue_pair = 5; }},
      {"sender: another generation", Fate::kNotReplayed, [](EngineWorld&, RedoRecord& r) { r.generation = 77; }},
      {"sender: cursors of the segment elsewhere", Fate::kSenderStops,
       [](EngineWorld& w, RedoRecord&) { move_cursors(w.state(0).transmit, &VringCursors::next_avail); }},
      {"sender: used cursor of the segment elsewhere", Fate::kSenderStops,
       [](EngineWorld& w, RedoRecord&) { move_cursors(w.state(0).transmit, &VringCursors::next_used); }},
  };
  add_cursor_lies<RedoDestination>(all, Fate::kReceiverStops,
                                   [](RedoRecord& r) -> RedoDestination& { return r.destination; });
  add_cursor_lies<RedoRecord>(all, Fate::kSenderStops, [](RedoRecord& r) -> RedoRecord& { return r; });
  return all;
}

Tally taken_by_receiver(EngineWorld& world, std::uint32_t sent) {
  Ledger ledger(kFlow);
  std::vector<std::byte> packet;
  while (world.nics[1].take(packet)) ledger.note(packet);
  return ledger.finish(sent);
}

}  // namespace

TEST_CASE("forward: a flipped bit anywhere in either half of an armed record: it is not replayed") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  const Crashed crashed(layout);
  Trial trial(crashed);
  const RedoRecord& record = crashed.world.record();
  const auto end = [](std::size_t used, std::uint32_t count) { return used + count * sizeof(RedoUsed); };
  const std::pair<std::size_t, std::size_t> in_use[] = {
      {0, offsetof(RedoRecord, frames)},
      {offsetof(RedoRecord, used), end(offsetof(RedoRecord, used), record.used_count)},
      {offsetof(RedoRecord, destination),
       end(offsetof(RedoRecord, destination) + offsetof(RedoDestination, used), record.destination.used_count)}};
  for (const auto& [from, to] : in_use)
    for (std::size_t byte = from; byte < to; ++byte)
      for (unsigned bit = 0; bit < 8; ++bit) {
        trial.begin();
        reinterpret_cast<unsigned char*>(&trial.world.record())[byte] ^= static_cast<unsigned char>(1u << bit);
        ShardStepper heir = trial.heir();
        INFO("byte " << byte << ", bit " << bit);
        REQUIRE(heir.take_over());
        REQUIRE(trial.timeline().record_valid == 0);
        REQUIRE(trial.world.record().arm.load() == 0);
        REQUIRE(changed(trial) == 0);
        if (bit != 0 || byte % 8 != 0) continue;
        // Nothing had been shown to anybody: the heir stages the same burst again.
        heir.poll_once();
        REQUIRE(taken_by_receiver(trial.world, kPackets).clean());
        check_uplinks(trial.world, heir, true);
      }
}

TEST_CASE("forward: a record with a right checksum and wrong content in one half stops that queue, not the other") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  const Crashed crashed(layout);
  Trial trial(crashed);
  for (const Lie& lie : lies()) {
    INFO((layout != 0 ? "packed: " : "split: ") << lie.name << ", fate " << static_cast<int>(lie.fate));
    trial.begin();
    EngineWorld& world = trial.world;
    lie.tell(world, world.record());
    sign(world.record());
    ShardStepper heir = trial.heir();
    REQUIRE(heir.take_over());
    const VringCursors& sender = world.state(0).transmit;
    const VringCursors& receiver = world.state(1).receive;
    CHECK(trial.timeline().record_armed == 1);
    CHECK((trial.timeline().record_valid == 1) == (lie.fate == Fate::kSenderOnly));
    CHECK(world.record().arm.load() == 0);
    const auto fault_if = [](bool stopped) { return stopped ? QueueFault::kRecordInvalid : QueueFault::kNone; };
    CHECK(sender.fault.load() == fault_if(lie.fate == Fate::kSenderStops));
    CHECK(receiver.fault.load() == fault_if(lie.fate == Fate::kReceiverStops));
    // What has to be done is done, once; what may not, is not begun.
    const bool sent = lie.fate == Fate::kReceiverStops || lie.fate == Fate::kSenderOnly;
    CHECK(sender.packets == (sent ? kPackets : 0));
    CHECK(world.nics[0].reap() == (sent ? kPackets : 0));
    CHECK(receiver.packets == (lie.fate == Fate::kSenderStops ? kPackets : 0));
    if (lie.fate != Fate::kSenderStops) CHECK(trial.receiver_changed() == 0);
    bool said = false;
    for (const ShardEvent& event : heir.events()) said = said || std::holds_alternative<ProblemEvent>(event);
    CHECK(said == (lie.fate != Fate::kSenderOnly));

    // The sender goes on, and so does the receiver, each with whatever of it was not stopped.
    if (lie.fate != Fate::kSenderStops) send_from_guest(world, kFlow, kPackets, 4);
    for (int round = 0; round < 3; ++round) heir.poll_once();
    world.nics[0].reap();
    switch (lie.fate) {
      case Fate::kNotReplayed:
        CHECK(taken_by_receiver(world, kPackets + 4).clean());
        break;
      case Fate::kReceiverStops:
        CHECK(receiver.overflow == 4);
        CHECK(receiver.packets == 0);
        break;
      case Fate::kSenderStops:
        CHECK(taken_by_receiver(world, kPackets).clean());
        break;
      case Fate::kSenderOnly: {
        const Tally tally = taken_by_receiver(world, kPackets + 4);
        CHECK(tally.lost == kPackets);
        CHECK(tally.duplicated + tally.reordered + tally.corrupt == 0);
      }
    }
    if (lie.fate != Fate::kSenderStops) CHECK(world.nics[0].transmit.outstanding() == 0);
    check_uplinks(world, heir, lie.fate != Fate::kReceiverStops);
    for (const std::uint32_t pair : {0u, 1u}) CHECK(world.audit(pair).clean());
  }
}

namespace {

// Moments of a forward, and what stands of it then.
struct Moment {
  ProbePoint point;
  int visit = 1;
  bool shown = false;     ///< the receiver has been shown the burst
  bool advanced = false;  ///< and its cursors say so
};
const Moment kMoments[] = {{ProbePoint::kArmed},
                           {ProbePoint::kDestinationWritten},
                           {ProbePoint::kDestinationPublished, 1, true},
                           {ProbePoint::kCursorsAdvanced, 1, true, true},
                           {ProbePoint::kSourceWritten, 1, true, true},
                           {ProbePoint::kSourcePublished, 1, true, true},
                           {ProbePoint::kCursorsAdvanced, 2, true, true}};

// The sender's half is done once, and it goes on: to the uplink, if its neighbour is gone.
void check_sender_goes_on(EngineWorld& world, ShardStepper& heir, bool to_uplink) {
  CHECK(world.state(0).transmit.packets == kPackets);
  CHECK(world.state(0).transmit.fault.load() == QueueFault::kNone);
  CHECK(world.nics[0].reap() == kPackets);
  REQUIRE(send_from_guest(world, kFlow, kPackets, 4) == 4);
  for (int round = 0; round < 3; ++round) heir.poll_once();
  CHECK(world.nics[0].reap() == 4);
  CHECK(world.nics[0].transmit.wrong_returns() + world.nics[0].transmit.outstanding() == 0);
  CHECK(world.kernels[0].transmit_waiting() == (to_uplink ? 4 : 0));
  CHECK(world.record().arm.load() == 0);
  check_uplinks(world, heir, false);
}

}  // namespace

TEST_CASE("forward: the receiver is detached before the heir comes: the sender loses nothing of its own") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const Moment& moment : kMoments) {
    INFO((layout != 0 ? "packed, " : "split, ") << name(moment.point) << ", visit " << moment.visit);
    const Crashed crashed(layout, moment.point, moment.visit);
    Trial trial(crashed);
    ShardStepper heir(trial.world.segment(), crashed.fence.view(), 2);
    heir.hold(trial.ports[0], {trial.devices[0]});
    REQUIRE(heir.take_over());
    CHECK(trial.timeline().record_valid == 1);
    CHECK(trial.receiver_changed() == 0);
    check_sender_goes_on(trial.world, heir, true);
  }
}

TEST_CASE(
    "forward: the receiver's ring is to stop, not yet in force when its owner died: delivered once, then stopped") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const Moment& moment : kMoments) {
    INFO((layout != 0 ? "packed, " : "split, ") << name(moment.point) << ", visit " << moment.visit);
    const Crashed crashed(layout, moment.point, moment.visit);
    Trial trial(crashed);
    DeviceDescription stopped = trial.world.describe(2, 1);
    stopped.vrings[0].flags &= ~VringDescription::kRunning;
    trial.devices.push_back(trial.world.make_device(stopped));
    ShardStepper heir = trial.heir();
    REQUIRE(heir.take_over());
    CHECK(trial.timeline().record_valid == 1);
    CHECK(trial.world.state(1).generation.load() == 2);
    const VringCursors& receive = trial.world.state(1).receive;
    CHECK(receive.packets == kPackets);
    CHECK(taken_by_receiver(trial.world, kPackets).clean());
    CHECK(receive.next_used == trial.world.nics[1].receive.used_taken());
    check_sender_goes_on(trial.world, heir, true);
    CHECK(receive.packets == kPackets);
  }
}

TEST_CASE("forward: of the receiver only a newer description is held: nothing is shown to it twice") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const Moment& moment : kMoments) {
    INFO((layout != 0 ? "packed, " : "split, ") << name(moment.point) << ", visit " << moment.visit);
    const Crashed crashed(layout, moment.point, moment.visit);
    Trial trial(crashed);
    EngineWorld& world = trial.world;
    trial.devices[1] = world.make_device(world.describe(2, 1));
    ShardStepper heir = trial.heir();
    REQUIRE(heir.take_over());
    CHECK(world.record().arm.load() == 0);
    CHECK(world.state(0).transmit.packets == kPackets);
    CHECK(world.nics[0].reap() == kPackets);
    REQUIRE(send_from_guest(world, kFlow, kPackets, 4) == 4);
    for (int round = 0; round < 3; ++round) heir.poll_once();
    CHECK(world.nics[0].reap() == 4);
    const bool stopped = world.state(1).receive.fault.load() == QueueFault::kRecordInvalid;
    // Where the guest was shown what our cursors do not say, its queue stops.
    if (moment.shown) CHECK(stopped != moment.advanced);
    Ledger ledger(kFlow);
    std::vector<std::byte> packet;
    while (world.nics[1].take(packet)) ledger.note(packet);
    const Tally tally = ledger.finish(kPackets + 4);
    CHECK(tally.duplicated + tally.reordered + tally.corrupt == 0);
    CHECK(world.nics[1].receive.wrong_returns() == 0);
    if (!stopped) CHECK(tally.lost == (moment.shown ? 0 : kPackets));
    check_uplinks(world, heir, false);
  }
}

namespace {

// An heir takes over where the receiver's memory, in a file of its own, has lost all its pages. Status: 0 is fine.
int take_over_without_memory(std::uint64_t layout, const Moment& moment) {
  if (!install_guest_fault_handler()) return 10;
  const Crashed crashed(layout, moment.point, moment.visit);
  Trial trial(crashed);
  const std::size_t bytes = trial.world.guest_bytes().size();
  const UniqueFd file{::memfd_create("shrinks", MFD_CLOEXEC)};
  if (::ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) return 11;
  DeviceDescription description = trial.world.describe(1, 1);
  for (VringDescription& vring : description.vrings) vring.flags &= ~VringDescription::kHasCall;
  std::vector<UniqueFd> fds;
  for (std::uint32_t i = 0; i < description.region_count; ++i) fds.emplace_back(::dup(file.get()));
  std::vector<std::string> problems;
  auto device = Device::make(description, std::move(fds), nullptr, problems);
  if (!device) return 12;
  trial.devices[1] = *device;
  ShardStepper heir = trial.heir();
  if (::ftruncate(file.get(), 0) != 0) return 13;
  if (!heir.take_over()) return 14;
  EngineWorld& world = trial.world;
  if (world.record().arm.load() != 0) return 15;
  if (world.state(0).transmit.packets != kPackets || world.nics[0].reap() != kPackets) return 16;
  send_from_guest(world, kFlow, kPackets, 4);
  for (int round = 0; round < 3; ++round) heir.poll_once();
  if (world.nics[0].reap() != 4 || world.state(0).transmit.fault.load() != QueueFault::kNone) return 17;
  if (world.state(1).receive.fault.load() != QueueFault::kMemoryFault) return 18;
  return 0;
}

}  // namespace

TEST_CASE("forward: the receiver's memory is gone before the heir comes: its queue stops, the sender's does not") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const Moment& moment : kMoments) {
    INFO((layout != 0 ? "packed, " : "split, ") << name(moment.point) << ", visit " << moment.visit);
    const int status = status_of([&] { return take_over_without_memory(layout, moment); });
    CHECK(status == 0);
  }
}
