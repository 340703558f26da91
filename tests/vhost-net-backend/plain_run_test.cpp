// SPDX-License-Identifier: Apache-2.0
// Bursts in which plain packets and others follow each other: a run ends where one is not plain, and the general way
// goes on there.
#include <catch2/catch.hpp>

#include "tests/vhost-net-backend/bench.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

constexpr std::uint32_t kPackets = 40;  // more than one burst

// Every `period`th chain is not plain.
ChainStyle style_of(std::uint32_t number, std::uint32_t period) {
  if (number % period != 0) return ChainStyle::kDirect;
  return number / period % 2 == 0 ? ChainStyle::kChained : ChainStyle::kIndirect;
}

void post_mixed(GuestNic& nic, std::uint32_t period, std::uint32_t most) {
  for (std::uint32_t i = 0; i < most; ++i) {
    nic.set_styles(ChainStyle::kDirect, style_of(i, period));
    if (nic.post(1) == 0) return;
  }
}

std::uint32_t send_mixed(EngineWorld& world, const PacketFlow& flow, std::uint32_t first, std::uint32_t period) {
  std::uint32_t sent = 0;
  for (std::uint32_t i = 0; i < kPackets; ++i) {
    world.nics[0].set_styles(style_of(i, period), ChainStyle::kDirect);
    sent += send_from_guest(world, flow, first + sent, 1);
  }
  return sent;
}

void note_all(GuestNic& nic, Ledger& ledger) {
  std::vector<std::byte> packet;
  while (nic.take(packet)) ledger.note(packet);
  CHECK(nic.protocol_errors() == 0);
  CHECK(nic.empty_returns() == 0);
  CHECK(nic.receive.wrong_returns() == 0);
}

void run(ShardStepper& owner) {
  while (owner.poll_once()) {
  }
}

template <class Check>
void for_each_mixture(Check check) {
  for (const std::uint64_t layout : kLayouts)
    for (const bool mergeable : {false, true})
      for (const std::uint32_t period : {1u, 2u, 3u, 7u, 31u, 1000u}) {
        WorldShape shape =
            small_world(feature::kVersion1 | feature::kIndirect | layout | (mergeable ? feature::kMergeable : 0));
        shape.nic.queue_size = 256;
        shape.nic.transmit = shape.nic.receive = ChainStyle::kIndirect;  // room for the tables
        shape.nic.first_index = static_cast<std::uint16_t>(layout == 0 ? 65536 - 20 : 256 - 20);
        // Some packets take one buffer, some several.
        if (mergeable) shape.nic.receive_slot_size = 128;
        INFO((layout == 0 ? "split" : "packed") << (mergeable ? ", mergeable" : "") << ", every " << period);
        check(shape, period);
      }
}

}  // namespace

TEST_CASE("plain and other packets of a guest keep their order in one burst") {
  const PacketFlow flow{};
  for_each_mixture([&](const WorldShape& shape, std::uint32_t period) {
    Bench bench(shape);
    Ledger out(flow), in(flow);
    std::uint32_t sent = 0;
    for (int round = 0; round < 3; ++round) {
      sent += send_mixed(bench.world, flow, sent, period);
      drain(bench.world, bench.owner, out, in);
    }
    CHECK(sent == 3 * kPackets);
    CHECK(out.finish(sent).clean());
    CHECK(bench.state().transmit.packets == sent);
    CHECK(bench.state().transmit.dropped == 0);
    CHECK(bench.nic().transmit.wrong_returns() == 0);
    CHECK(bench.nic().transmit.outstanding() == 0);
    CHECK(bench.world.audit().clean());
  });
}

TEST_CASE("plain and other buffers of a guest are filled in order in one burst") {
  const PacketFlow flow{};
  for_each_mixture([&](const WorldShape& shape, std::uint32_t period) {
    Bench bench(shape);
    Ledger in(flow);
    std::uint32_t sent = 0;
    for (int round = 0; round < 3; ++round) {
      post_mixed(bench.nic(), period, 3 * kPackets);
      sent += send_from_uplink(bench.world, flow, sent, kPackets);
      run(bench.owner);
      note_all(bench.nic(), in);
    }
    CHECK(sent == 3 * kPackets);
    CHECK(in.finish(sent).clean());
    CHECK(bench.state().receive.packets == sent);
    CHECK(bench.state().receive.dropped == 0);
    CHECK(bench.world.audit().clean());
  });
}

TEST_CASE("plain and other packets go from guest to guest in order in one burst") {
  const PacketFlow flow{60, 60};
  for_each_mixture([&](const WorldShape& shape, std::uint32_t period) {
    for (const std::uint32_t buffers : {1u, 5u, 1000u}) {
      Bench bench(neighbours(shape));
      Ledger in(flow);
      std::uint32_t sent = 0;
      for (int round = 0; round < 3; ++round) {
        post_mixed(bench.nic(1), buffers, 3 * kPackets);
        sent += send_mixed(bench.world, flow, sent, period);
        run(bench.owner);
        note_all(bench.nic(1), in);
      }
      CHECK(sent == 3 * kPackets);
      CHECK(in.finish(sent).clean());
      CHECK(bench.state(0).transmit.packets == sent);
      CHECK(bench.state(1).receive.packets == sent);
      CHECK(bench.state(1).receive.overflow == 0);
      bench.nic().reap();
      CHECK(bench.nic().transmit.outstanding() == 0);
      CHECK(bench.world.audit(1).clean());
    }
  });
}
