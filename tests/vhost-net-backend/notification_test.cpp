// SPDX-License-Identifier: Apache-2.0
// Notification suppression both ways, with EVENT_IDX and with flags (Virtio 1.2, 2.7.7, 2.7.10 and 2.8.14).
#include <catch2/catch.hpp>

#include "tests/vhost-net-backend/bench.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {
const PacketFlow kFlow{};

// Every test case here holds for both layouts: it begins with `const std::uint64_t layout = GENERATE(...)`.
std::uint64_t features(bool event_index, std::uint64_t layout) {
  return feature::kVersion1 | layout | (event_index ? feature::kEventIndex : 0);
}

void settle(Bench& bench) {
  bench.world.calls(0);
  bench.world.calls(1);
}
}  // namespace

TEST_CASE("calls: the guest's flag is obeyed") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  Bench bench(small_world(features(false, layout)));
  bench.nic().post();
  settle(bench);
  send_from_guest(bench.world, kFlow, 0, 5);
  send_from_uplink(bench.world, kFlow, 0, 5);
  bench.owner.poll_once();
  CHECK(bench.world.calls(0) == 1);  // one burst, one interrupt
  CHECK(bench.world.calls(1) == 1);
  bench.nic().transmit.calls_off(true);
  bench.nic().receive.calls_off(true);
  send_from_guest(bench.world, kFlow, 5, 5);
  send_from_uplink(bench.world, kFlow, 5, 5);
  bench.owner.poll_once();
  CHECK(bench.world.calls(0) == 0);
  CHECK(bench.world.calls(1) == 0);
}

TEST_CASE("calls: an event index inside the burst interrupts, any other does not") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const int first : {0, 65530, 60}) {
    for (int offset = -2; offset <= 12; ++offset) {
      INFO("indices from " << first << ", event at " << offset);
      WorldShape shape = small_world(features(true, layout));
      shape.nic.first_index = static_cast<std::uint16_t>(first);
      Bench bench(shape);
      bench.nic().post();
      settle(bench);
      const auto event = static_cast<std::uint16_t>(first + offset);
      bench.nic().transmit.call_at(event);
      bench.nic().receive.call_at(event);
      send_from_guest(bench.world, kFlow, 0, 10);
      send_from_uplink(bench.world, kFlow, 0, 10);
      bench.owner.poll_once();
      const std::uint64_t wanted = offset >= 0 && offset < 10 ? 1 : 0;
      CHECK(bench.world.calls(0) == wanted);
      CHECK(bench.world.calls(1) == wanted);
    }
  }
}

TEST_CASE("calls: a burst that returns only dropped chains interrupts too") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  Bench bench(small_world(features(true, layout)));
  settle(bench);
  const Piece runt{bench.nic().transmit_slot(0), 20, false};
  bench.nic().transmit.add({&runt, 1});
  bench.nic().transmit.publish();
  bench.nic().transmit.call_at(0);
  bench.owner.poll_once();
  CHECK(bench.world.calls(1) == 1);
}

TEST_CASE("kicks: not wanted while the owner polls, wanted before it sleeps") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const bool event_index : {false, true}) {
    INFO("EVENT_IDX " << event_index);
    WorldShape shape = small_world(features(event_index, layout));
    Bench bench(shape);
    const Virtqueue& queue = bench.pair().transmit.queue;
    {
      const WindowOpen window;
      queue.disable_kicks();
    }
    Ledger out(kFlow), in(kFlow);
    send_from_guest(bench.world, kFlow, 0, 3);
    if (event_index && layout == 0) {
      // The event index still names the entry that the driver has just passed: this one kick is allowed, the next are
      // not.
      bench.nic().transmit.kick_wanted();
      drain(bench.world, bench.owner, out, in);
      send_from_guest(bench.world, kFlow, 3, 3);
    }
    CHECK_FALSE(bench.nic().transmit.kick_wanted());
    drain(bench.world, bench.owner, out, in);
    {
      const WindowOpen window;
      queue.enable_kicks(bench.state().transmit.next_avail);
    }
    send_from_guest(bench.world, kFlow, 6, 1);
    CHECK(bench.nic().transmit.kick_wanted());
  }
}

TEST_CASE("kicks: a starved receive queue asks for one when buffers come, a fed one does not") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const bool event_index : {false, true}) {
    INFO("EVENT_IDX " << event_index);
    Bench bench(small_world(features(event_index, layout)));
    bench.nic().post(2);
    bench.nic().receive.kick_wanted();
    send_from_uplink(bench.world, kFlow, 0, 3);
    while (bench.owner.poll_once()) {
    }
    REQUIRE(bench.pair().receive_starved);
    {
      // As the shard does before it sleeps.
      const WindowOpen window;
      bench.pair().receive.queue.enable_kicks(bench.pair().starved_avail);
    }
    bench.nic().post(1);
    CHECK(bench.nic().receive.kick_wanted());
  }
}

TEST_CASE("sleep and wake leave suppression right and lose nothing") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  for (const bool event_index : {false, true}) {
    Bench bench(small_world(features(event_index, layout)));
    Ledger out(kFlow), in(kFlow);
    std::uint32_t sent = 0;
    for (int round = 0; round < 10; ++round) {
      bench.owner.sleep();
      CHECK(bench.world.segment().shards[0].asleep.load() == 0);
      if (!event_index || layout != 0) CHECK_FALSE(bench.nic().transmit.kick_wanted());
      sent += send_from_guest(bench.world, kFlow, sent, 7);
      drain(bench.world, bench.owner, out, in);
    }
    CHECK(out.finish(sent).clean());
  }
}
