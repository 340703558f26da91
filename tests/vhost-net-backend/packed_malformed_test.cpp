// SPDX-License-Identifier: Apache-2.0
// Hostile drivers of packed rings: every malformed chain is dropped and counted, comes back, and harms nothing else; a
// chain without an end stops its queue.
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>

#include "tests/vhost-net-backend/bench.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

constexpr unsigned kNext = VRING_DESC_F_NEXT;
constexpr unsigned kIndirectFlag = VRING_DESC_F_INDIRECT;
constexpr unsigned kWrite = VRING_DESC_F_WRITE;
constexpr std::uint64_t kFeatures = feature::kVersion1 | feature::kIndirect | feature::kPacked;
constexpr std::uint32_t kRingSize = 50;
constexpr std::uint16_t kId = 0;  // the last one that the well-behaved half of the driver would use
const PacketFlow kFlow{60, 60};

struct Hostile {
  EngineWorld& world;
  GuestQueue& queue;
  bool receive;
  std::uint64_t memory;  ///< 1 KiB that this chain may name
  std::uint64_t tables;  ///< 3 KiB for indirect tables, end at the end of the first spare region
  std::uint32_t slots = 0;

  [[nodiscard]] unsigned direction() const { return receive ? kWrite : 0; }
  /// The chain's next descriptor; `flags` turn the right direction over if they have WRITE.
  void slot(std::uint64_t address, std::uint32_t length, unsigned flags = 0) {
    queue.packed_descriptor(slots++) = {address, length, 0, static_cast<std::uint16_t>(flags ^ direction())};
  }
  void indirect(std::uint64_t table, std::uint32_t length, unsigned flags = kIndirectFlag) {
    queue.packed_descriptor(slots++) = {table, length, 0, static_cast<std::uint16_t>(flags)};
  }
  void entry(std::uint64_t table, std::uint32_t i, std::uint64_t address, std::uint32_t length,
             unsigned flags = 0) const {
    const vring_packed_desc made{address, length, 0xffff, static_cast<std::uint16_t>(flags ^ direction())};
    for (std::size_t byte = 0; byte < sizeof made; ++byte)
      *world.space.at(table + i * sizeof made + byte) = reinterpret_cast<const std::byte*>(&made)[byte];
  }
};

enum class Fate { kDropped, kDelivered };

struct Row {
  const char* name;
  std::function<void(Hostile&)> make;
  Fate transmit = Fate::kDropped;
  Fate receive = Fate::kDropped;
};

// 12 bytes of header and 60 of packet fit in 72.
const Row kRows[] = {
    {"zero length, alone", [](Hostile& h) { h.slot(h.memory, 0); }},
    {"zero length, in the middle",
     [](Hostile& h) {
       h.slot(h.memory, 12, kNext);
       h.slot(h.memory + 12, 0, kNext);
       h.slot(h.memory + 12, 200);
     }},
    {"zero length, first",
     [](Hostile& h) {
       h.slot(h.memory, 0, kNext);
       h.slot(h.memory, 212);
     }},
    {"wrong direction", [](Hostile& h) { h.slot(h.memory, 72, kWrite); }},
    {"wrong direction after the header",
     [](Hostile& h) {
       h.slot(h.memory, 12, kNext);
       h.slot(h.memory + 12, 60, kWrite);
     }},
    {"indirect in indirect",
     [](Hostile& h) {
       h.indirect(h.tables, 32);
       h.entry(h.tables, 0, h.memory, 12);
       h.entry(h.tables, 1, h.tables + 64, 16, kIndirectFlag);
       h.entry(h.tables + 64, 0, h.memory + 12, 60);
     }},
    {"indirect in indirect, itself",
     [](Hostile& h) {
       h.indirect(h.tables, 16);
       h.entry(h.tables, 0, h.tables, 16, kIndirectFlag);
     }},
    {"indirect with next",
     [](Hostile& h) {
       h.indirect(h.tables, 16, kIndirectFlag | kNext);
       h.entry(h.tables, 0, h.memory, 72);
       h.slot(h.memory, 72);
     }},
    {"indirect after direct",
     [](Hostile& h) {
       h.slot(h.memory, 12, kNext);
       h.indirect(h.tables, 16);
       h.entry(h.tables, 0, h.memory + 12, 60);
     }},
    {"indirect table of length 0", [](Hostile& h) { h.indirect(h.tables, 0); }},
    {"indirect table of length 15", [](Hostile& h) { h.indirect(h.tables, 15); }},
    {"indirect table of length 17",
     [](Hostile& h) {
       h.indirect(h.tables, 17);
       h.entry(h.tables, 0, h.memory, 72);
     }},
    {"indirect table of 4 GiB", [](Hostile& h) { h.indirect(h.tables, 0xfffffff0u); }},
    {"indirect table at 0", [](Hostile& h) { h.indirect(0, 16); }},
    {"indirect table that wraps", [](Hostile& h) { h.indirect(~std::uint64_t{0} - 15, 32); }},
    {"indirect entry across the end of memory",
     [](Hostile& h) { h.indirect(h.world.spare_address(0) + 4096 - 8, 16); }},
    {"address 0", [](Hostile& h) { h.slot(0, 72); }},
    {"address below memory", [](Hostile& h) { h.slot(kGuestBase - 1, 72); }},
    {"address in a hole", [](Hostile& h) { h.slot(h.world.spare_address(0) + 4096, 72); }},
    {"address that wraps", [](Hostile& h) { h.slot(~std::uint64_t{0} - 10, 72); }},
    {"buffer that runs into a hole", [](Hostile& h) { h.slot(h.world.spare_address(0) + 4096 - 20, 72); }},
    {"second piece outside memory",
     [](Hostile& h) {
       h.slot(h.memory, 12, kNext);
       h.slot(0x1000, 60);
     }},
    {"header outside memory",
     [](Hostile& h) {
       h.slot(0x1000, 12, kNext);
       h.slot(h.memory, 60);
     }},
    {"header cut short", [](Hostile& h) { h.slot(h.memory, 11); }},
    {"header and nothing more", [](Hostile& h) { h.slot(h.memory, 12); }},
    {"longest packet and one", [](Hostile& h) { h.slot(h.memory, 12 + 256 + 1); }, Fate::kDropped, Fate::kDelivered},
    {"length of 4 GiB - 1", [](Hostile& h) { h.slot(h.memory, 0xffffffffu); }, Fate::kDropped, Fate::kDelivered},
    // The near side of each edge.
    {"longest packet", [](Hostile& h) { h.slot(h.memory, 12 + 256); }, Fate::kDelivered, Fate::kDelivered},
    {"shortest packet", [](Hostile& h) { h.slot(h.memory, 12 + 14); }, Fate::kDelivered, Fate::kDropped},
    {"header in twelve pieces",
     [](Hostile& h) {
       for (std::uint32_t i = 0; i < 12; ++i) h.slot(h.memory + i, 1, kNext);
       h.slot(h.memory + 12, 60);
     },
     Fate::kDelivered, Fate::kDelivered},
    {"as many descriptors as the burst has left of the ring",
     [](Hostile& h) {
       for (std::uint32_t i = 0; i < kRingSize - 2; ++i) h.slot(h.memory + 2 * i, 2, kNext);
       h.slot(h.memory + 2 * (kRingSize - 2), 12);
     },
     Fate::kDelivered, Fate::kDelivered},
    {"indirect marked writable, which is to be ignored",
     [](Hostile& h) {
       h.indirect(h.tables, 16, kIndirectFlag | kWrite);
       h.entry(h.tables, 0, h.memory, 72);
     },
     Fate::kDelivered, Fate::kDelivered},
    {"next within a table, which is to be ignored, on the last entry too",
     [](Hostile& h) {
       h.indirect(h.tables, 32);
       h.entry(h.tables, 0, h.memory, 12);
       h.entry(h.tables, 1, h.memory + 12, 60, kNext);
     },
     Fate::kDelivered, Fate::kDelivered},
    {"indirect table not aligned",
     [](Hostile& h) {
       h.indirect(h.tables + 3, 16);
       h.entry(h.tables + 3, 0, h.memory, 72);
     },
     Fate::kDelivered, Fate::kDelivered},
    {"indirect table longer than the ring",
     [](Hostile& h) {
       h.indirect(h.tables, 72 * 16);
       for (std::uint32_t i = 0; i < 72; ++i) h.entry(h.tables, i, h.memory + i, 1);
     },
     Fate::kDelivered, Fate::kDelivered},
};

WorldShape hostile_world(std::uint64_t features) {
  WorldShape shape = small_world(features);
  shape.nic.slot_size = 512;
  shape.nic.queue_size = kRingSize;
  shape.spare_bytes = 4096;
  return shape;
}

// Takes everything that came back; the lengths of the chain with `id`.
std::vector<std::uint32_t> lengths_of(GuestQueue& queue, std::uint32_t id) {
  std::vector<std::uint32_t> lengths;
  while (const auto used = queue.take_used())
    if (used->id == id) lengths.push_back(used->length);
  return lengths;
}

// One good packet, the row's chain, one more good packet.
// What a receive queue gets comes from the uplink, or `direct` from another guest, whom it may cost nothing.
void run(const Row& row, bool receive, std::uint64_t features, Fate fate, bool direct = false) {
  INFO((direct ? "forward: " : receive ? "receive: " : "transmit: ") << row.name);
  Bench bench(direct ? neighbours(hostile_world(features)) : hostile_world(features));
  const std::uint32_t hostile_pair = direct ? 1 : 0;
  GuestNic& nic = bench.nic(hostile_pair);
  GuestQueue& queue = receive ? nic.receive : nic.transmit;
  Hostile hostile{bench.world, queue, receive, (receive ? nic.transmit_slot(45) : nic.receive_slot(45)),
                  bench.world.spare_address(0) + 1024};
  std::memset(bench.world.space.at(hostile.memory), 0x5a, 1024);
  const auto good = [&](std::uint32_t number) {
    return receive ? nic.post(1) == 1 : send_from_guest(bench.world, kFlow, number, 1) == 1;
  };
  REQUIRE(good(0));
  row.make(hostile);
  queue.offer_packed(kId, hostile.slots);
  const bool room = queue.free_descriptors() != 0;
  if (room) REQUIRE(good(1));
  queue.publish();
  const std::uint32_t sent = room ? 3 : 2;
  if (receive) REQUIRE((direct ? send_from_guest : send_from_uplink)(bench.world, kFlow, 0, sent, 0) == sent);
  while (bench.owner.poll_once()) {
  }
  const QueuePairState& state = bench.state(hostile_pair);
  const VringCursors& cursors = receive ? state.receive : state.transmit;
  if (direct) {
    CHECK(bench.nic().reap() == sent);
    CHECK(bench.state().transmit.packets == sent);
    CHECK(bench.state().transmit.dropped == 0);
    CHECK(cursors.overflow == 0);
  }
  const std::uint64_t good_packets = room ? 2 : 1;
  CHECK(cursors.packets == good_packets + (fate == Fate::kDelivered ? 1 : 0));
  CHECK(cursors.dropped == (fate == Fate::kDelivered ? 0 : 1));
  CHECK(cursors.fault.load() == QueueFault::kNone);
  CHECK(queue.published() == hostile.slots + good_packets);
  const std::uint32_t written = receive && fate == Fate::kDelivered ? 72 : 0;
  CHECK(lengths_of(queue, kId) == std::vector<std::uint32_t>{written});
  CHECK(queue.wrong_returns() == 0);
  CHECK(queue.outstanding() == 0);
  CHECK(queue.free_descriptors() == kRingSize);
  CHECK(cursors.next_used == queue.used_taken());
  CHECK(bench.world.audit().clean());
  CHECK(bench.world.record().arm.load() == 0);
  // The queue goes on from the right slot.
  Ledger out(kFlow), in(kFlow);
  while (bench.kernel().send()) {
  }
  for (int round = 0; round < 5; ++round) {
    nic.post();
    if (direct) bench.nic().post();
    send_from_guest(bench.world, kFlow, static_cast<std::uint32_t>(10 * round), 10);
    send_from_uplink(bench.world, kFlow, static_cast<std::uint32_t>(10 * round), 10);
    drain(bench.world, bench.owner, out, in);
  }
  CHECK(out.finish(50).clean());
  CHECK(in.finish(50).clean());
}

}  // namespace

TEST_CASE("packed: malformed chains on a transmit queue") {
  for (const Row& row : kRows) run(row, false, kFeatures, row.transmit);
}

TEST_CASE("packed: malformed chains on a receive queue") {
  for (const Row& row : kRows) run(row, true, kFeatures, row.receive);
}

TEST_CASE("packed: malformed chains on a receive queue that another guest sends to") {
  for (const Row& row : kRows) run(row, true, kFeatures, row.receive, true);
}

TEST_CASE("packed: indirect descriptors that were not negotiated are refused") {
  const Row row{"indirect, well formed", [](Hostile& h) {
                  h.indirect(h.tables, 16);
                  h.entry(h.tables, 0, h.memory, 72);
                }};
  for (const bool receive : {false, true}) {
    run(row, receive, kFeatures & ~feature::kIndirect, Fate::kDropped);
    run(row, receive, kFeatures, Fate::kDelivered);
  }
}

TEST_CASE("packed: any buffer id comes back as it was given") {
  for (const std::uint32_t id : {0u, 50u, 4711u, 65535u}) {
    Bench bench(hostile_world(kFeatures));
    GuestQueue& queue = bench.nic().transmit;
    std::memset(bench.world.space.at(bench.nic().transmit_slot(0)), 0, 512);
    queue.packed_descriptor(0) = {bench.nic().transmit_slot(0), 20, 0xaaaa, kNext};
    queue.packed_descriptor(1) = {bench.nic().transmit_slot(0) + 20, 100, 0, 0};
    queue.offer_packed(static_cast<std::uint16_t>(id), 2);
    queue.publish();
    while (bench.owner.poll_once()) {
    }
    const auto used = queue.take_used();
    REQUIRE(used.has_value());
    CHECK(used->id == id);
    CHECK(bench.state().transmit.packets == 1);
  }
}

TEST_CASE("packed: a chain without an end stops its queue, after what came before it, and nothing else") {
  for (const bool receive : {false, true})
    for (const std::uint32_t before : {0u, 3u}) {
      INFO((receive ? "receive, after " : "transmit, after ") << before);
      WorldShape shape = hostile_world(kFeatures);
      shape.queue_pairs = 2;
      Bench bench(shape);
      GuestQueue& queue = receive ? bench.nic().receive : bench.nic().transmit;
      if (receive)
        bench.nic().post(before);
      else
        send_from_guest(bench.world, kFlow, 0, before);
      for (std::uint32_t i = 0; i < kRingSize - before; ++i)
        queue.packed_descriptor(i) = {bench.world.spare_address(0), 4, 0,
                                      static_cast<std::uint16_t>(kNext | (receive ? kWrite : 0))};
      queue.offer_packed(kId, kRingSize - before);
      queue.publish();
      if (receive) send_from_uplink(bench.world, kFlow, 0, before + 2);
      while (bench.owner.poll_once()) {
      }
      const VringCursors& cursors = receive ? bench.state().receive : bench.state().transmit;
      CHECK(cursors.fault.load() == QueueFault::kEndlessChain);
      CHECK(cursors.packets == before);
      CHECK(cursors.dropped == 0);
      CHECK(queue.published() == before);
      CHECK(bench.world.record().arm.load() == 0);
      CHECK(bench.world.audit().clean());
      Ledger out(kFlow), in(kFlow);
      bench.nic(1).post();
      send_from_guest(bench.world, kFlow, 0, 5, 1);
      send_from_uplink(bench.world, kFlow, 0, 5, 1);
      drain(bench.world, bench.owner, out, in, 1);
      CHECK(out.finish(5).clean());
      CHECK(in.finish(5).clean());
    }
}

TEST_CASE("packed: rings that lie outside memory, are misaligned, of a wrong size or base are not bound") {
  const EngineWorld world(hostile_world(kFeatures));
  const auto device = world.make_device(world.describe(1));
  const VringDescription good = world.describe(1).vrings[0];
  const std::uint64_t end = kUserBase + (world.spare_address(0) - kGuestBase);
  struct BindRow {
    const char* name;
    std::function<void(VringDescription&)> change;
    bool fine = false;
  };
  const BindRow rows[] = {
      {"as it is", [](VringDescription&) {}, true},
      {"size 1", [](VringDescription& v) { v.size = 1; }, true},
      {"size 0", [](VringDescription& v) { v.size = 0; }},
      {"size above 32768", [](VringDescription& v) { v.size = 32769; }},
      {"ring outside", [](VringDescription& v) { v.descriptor_user_address = 0x1000; }},
      {"ring ends outside", [end](VringDescription& v) { v.descriptor_user_address = end - 16 * (kRingSize - 1); }},
      {"ring ends with memory", [end](VringDescription& v) { v.descriptor_user_address = end - 16 * kRingSize; }, true},
      {"ring misaligned", [](VringDescription& v) { v.descriptor_user_address += 8; }},
      {"driver area outside", [](VringDescription& v) { v.avail_user_address = kUserBase - 4; }},
      {"driver area misaligned", [](VringDescription& v) { v.avail_user_address += 2; }},
      {"device area outside", [end](VringDescription& v) { v.used_user_address = end; }},
      {"device area at the end", [end](VringDescription& v) { v.used_user_address = end - 4; }, true},
      {"device area misaligned", [](VringDescription& v) { v.used_user_address += 2; }},
      {"base beyond the ring", [](VringDescription& v) { v.base = 0x80000000u | 0x8000u | kRingSize; }},
      {"used base beyond the ring", [](VringDescription& v) { v.base = (0x8000u | kRingSize) << 16 | 0x8000u; }},
      {"a full ring in flight", [](VringDescription& v) { v.base = 0x80000000u; }, true},
      {"more than a ring in flight", [](VringDescription& v) { v.base = 0x80000001u; }},
      {"used ahead of avail", [](VringDescription& v) { v.base = 0x80018000u; }},
      {"the last slots", [](VringDescription& v) { v.base = (kRingSize - 1) << 16 | (kRingSize - 1); }, true},
  };
  for (const BindRow& row : rows) {
    INFO(row.name);
    VringDescription vring = good;
    row.change(vring);
    const auto bound = Virtqueue::bind(*device->memory(), vring, kFeatures);
    CHECK(bound.has_value() == row.fine);
    if (!bound) CHECK(bound.error().kind == ErrorKind::kInvalid);
  }
}

TEST_CASE("packed: cursors of the segment that are no positions stop the queue instead of leaving the ring") {
  for (const bool receive : {false, true})
    for (const bool used : {false, true}) {
      Bench bench(hostile_world(kFeatures));
      bench.nic().post();
      send_from_guest(bench.world, kFlow, 0, 3);
      send_from_uplink(bench.world, kFlow, 0, 3);
      VringCursors& cursors = receive ? bench.state().receive : bench.state().transmit;
      (used ? cursors.next_used : cursors.next_avail) = 0x8000 | kRingSize;
      copy_positions(cursors, position_word(cursors));
      CHECK_FALSE(bench.pair().transmit.queue.offers(0x8000 | kRingSize));
      while (bench.owner.poll_once()) {
      }
      CHECK(cursors.fault.load() == QueueFault::kRecordInvalid);
      CHECK(cursors.packets == 0);
      CHECK((receive ? bench.state().transmit : bench.state().receive).packets == 3);
    }
}

namespace {

// Descriptors that are right often enough to get somewhere.
vring_packed_desc garbage(std::mt19937_64& random, const EngineWorld& world, bool receive) {
  const auto below = [&](std::uint32_t limit) { return static_cast<std::uint32_t>(random() % limit); };
  vring_packed_desc made{};
  const std::uint64_t addresses[] = {random(), kGuestBase - below(64), world.spare_address(0) - below(300),
                                     world.spare_address(1) + 4096 - below(300)};
  made.addr = below(3) == 0 ? addresses[below(4)] : world.spare_address(static_cast<int>(below(2))) + below(2048);
  made.len = below(8) == 0 ? static_cast<std::uint32_t>(random()) : below(400);
  unsigned flags = receive != (below(16) == 0) ? kWrite : 0;
  if (below(4) == 0) flags |= kNext;
  if (below(6) == 0) {
    flags |= kIndirectFlag;
    made.addr = world.spare_address(0) + 2048 + 16 * below(100);
    made.len = below(8) == 0 ? below(100) : 16 * below(20);
  }
  made.id = static_cast<std::uint16_t>(random());
  made.flags = static_cast<std::uint16_t>(flags);
  return made;
}

void mark(const Bench& bench, std::uint64_t address, std::uint64_t length, std::vector<bool>& may) {
  const std::uint64_t first_two = bench.world.spare_address(0) + 4096 - kGuestBase;
  const std::uint64_t spare = bench.world.spare_address(1);
  for (std::uint64_t i = 0; i < std::min<std::uint64_t>(length, 1024); ++i) {
    if (address + i - kGuestBase < first_two) may[address + i - kGuestBase] = true;
    if (address + i - spare < 4096) may[may.size() - 4096 + (address + i - spare)] = true;
  }
}

}  // namespace

TEST_CASE("packed: rings full of garbage: nothing is written that no descriptor offered") {
  std::uint64_t sent = 0, received = 0, refused = 0, endless = 0, judged = 0;
  for (std::uint32_t seed = 1; seed <= 400; ++seed) {
    INFO("seed " << seed);
    WorldShape shape = hostile_world(kFeatures | (seed % 2 == 0 ? feature::kMergeable : 0));
    Bench bench(shape);
    std::mt19937_64 random(seed);
    const auto bytes = bench.world.guest_bytes();
    const std::uint64_t tables = bench.world.spare_address(0) + 2048;
    std::vector<bool> may(bytes.size(), false);
    for (std::uint32_t i = 0; i < 128; ++i) {
      vring_packed_desc entry = garbage(random, bench.world, seed % 3 != 0);
      if (random() % 8 != 0) entry.flags &= static_cast<std::uint16_t>(~kIndirectFlag);
      std::memcpy(bench.world.space.at(tables + i * 16), &entry, sizeof entry);
      if ((entry.flags & kWrite) != 0) mark(bench, entry.addr, entry.len, may);
    }
    for (GuestQueue* queue : {&bench.nic().receive, &bench.nic().transmit}) {
      const bool receive = queue == &bench.nic().receive;
      for (std::uint32_t i = 0; i < kRingSize; ++i) {
        queue->packed_descriptor(0) = garbage(random, bench.world, receive);
        const vring_packed_desc& made = queue->packed_descriptor(0);
        if (receive && (made.flags & kWrite) != 0) mark(bench, made.addr, made.len, may);
        queue->offer_packed(made.id, 1);
      }
      queue->publish();
      mark(bench, queue->place().descriptors, 16 * kRingSize, may);
    }
    send_from_uplink(bench.world, kFlow, 0, 60);
    const std::vector<std::byte> before(bytes.begin(), bytes.end());
    for (int round = 0; round < 20; ++round) bench.owner.poll_once();
    std::size_t strays = 0;
    for (std::size_t i = 0; i < bytes.size(); ++i) strays += bytes[i] != before[i] && !may[i];
    // A guest that offers its own tables as buffers changes what is offered: it may only harm itself.
    const std::size_t own = tables - kGuestBase;
    if (std::equal(before.begin() + static_cast<std::ptrdiff_t>(own),
                   before.begin() + static_cast<std::ptrdiff_t>(own + 2048),
                   bytes.begin() + static_cast<std::ptrdiff_t>(own))) {
      CHECK(strays == 0);
      ++judged;
    }
    CHECK(bench.world.audit().clean());
    CHECK(bench.world.record().arm.load() == 0);
    for (const VringCursors* cursors : {&bench.state().transmit, &bench.state().receive}) {
      refused += cursors->dropped;
      const QueueFault fault = cursors->fault.load();
      CHECK((fault == QueueFault::kNone || fault == QueueFault::kEndlessChain));
      endless += fault == QueueFault::kEndlessChain;
    }
    sent += bench.state().transmit.packets;
    received += bench.state().receive.packets;
    while (bench.kernel().send()) {
    }
    CHECK(bench.kernel().bad_descriptors() == 0);
  }
  // The garbage is good enough: a good part of everything happened.
  CAPTURE(sent, received, refused, endless, judged);
  CHECK(sent > 400);
  CHECK(received > 400);
  CHECK(refused > 4000);
  CHECK(judged > 200);
}

TEST_CASE("packed: descriptors that change while they are read") {
  Bench bench(hostile_world(kFeatures));
  const std::uint64_t good = bench.world.spare_address(0);
  std::memset(bench.world.space.at(good), 0x11, 4096);
  std::memset(bench.world.space.at(bench.world.spare_address(1)), 0x22, 4096);
  std::atomic<bool> stop{false};
  // Each field of every slot, from good to bad and back, AVAIL and USED bits included.
  std::thread scribbler([&] {
    for (std::uint32_t i = 0; !stop.load(std::memory_order_relaxed); ++i)
      for (GuestQueue* queue : {&bench.nic().transmit, &bench.nic().receive}) {
        auto* slots = reinterpret_cast<vring_packed_desc*>(bench.world.space.at(queue->place().descriptors));
        vring_packed_desc& slot = slots[i % kRingSize];
        const unsigned direction = queue == &bench.nic().receive ? kWrite : 0;
        const std::uint64_t addresses[] = {good, ~std::uint64_t{0} - 8, good - 30, 0, good + 1024};
        const std::uint32_t lengths[] = {100, 0xffffffffu, 0, 12, 300};
        const unsigned flags[] = {0u, kNext, kIndirectFlag, kWrite, 0u};
        const unsigned round =
            (i / kRingSize & 1) != 0 ? 1u << VRING_PACKED_DESC_F_AVAIL : 1u << VRING_PACKED_DESC_F_USED;
        std::atomic_ref<__virtio64>(slot.addr).store(addresses[i % 5], std::memory_order_relaxed);
        std::atomic_ref<__virtio32>(slot.len).store(lengths[i / 5 % 5], std::memory_order_relaxed);
        std::atomic_ref<__virtio16>(slot.id).store(static_cast<std::uint16_t>(i), std::memory_order_relaxed);
        std::atomic_ref<__virtio16>(slot.flags)
            .store(static_cast<std::uint16_t>((flags[i / 25 % 5] ^ direction) | round), std::memory_order_release);
      }
  });
  std::vector<std::byte> room(kFlow.longest);
  const VringCursors& transmit = bench.state().transmit;
  const VringCursors& receive = bench.state().receive;
  std::uint32_t number = 0;
  // Until enough has happened, however the two threads are scheduled.
  const auto enough = [&] {
    return transmit.packets > 200 && receive.packets > 200 && transmit.dropped > 200 && receive.dropped > 200;
  };
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds{60};
  while (!enough() && std::chrono::steady_clock::now() < limit) {
    for (std::uint32_t i = 0; i < 4; ++i) {
      const std::uint32_t length = kFlow.write(number++, room);
      bench.kernel().receive({room.data(), length});
    }
    bench.owner.poll_once();
    while (bench.kernel().send()) {
    }
    bench.kernel().complete();
    for (VringCursors* cursors : {&bench.state().transmit, &bench.state().receive}) {
      const QueueFault fault = cursors->fault.exchange(QueueFault::kNone);
      REQUIRE((fault == QueueFault::kNone || fault == QueueFault::kEndlessChain));
    }
  }
  stop.store(true);
  scribbler.join();
  CHECK(enough());
  CHECK(bench.kernel().bad_descriptors() == 0);
  CHECK(bench.world.audit().clean());
  const std::byte* other = bench.world.space.at(bench.world.spare_address(1));
  CHECK(std::all_of(other, other + 4096, [](std::byte byte) { return byte == std::byte{0x22}; }));
}
