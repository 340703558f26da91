// SPDX-License-Identifier: Apache-2.0
// Hostile drivers: every malformed chain is dropped and counted or stops its queue, comes back, and harms nothing else.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>
#include <functional>
#include <string>

#include "tests/vhost-net-backend/bench.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

constexpr std::uint16_t kNext = VRING_DESC_F_NEXT;
constexpr std::uint16_t kIndirectFlag = VRING_DESC_F_INDIRECT;

// What a row may use: descriptors 40 to 63, which the well-behaved half of the driver never reaches, and memory of its
// own.
struct Hostile {
  EngineWorld& world;
  GuestQueue& queue;
  bool receive;
  std::uint64_t memory;  ///< 1 KiB that this chain may name
  std::uint64_t tables;  ///< 4 KiB for indirect tables, ends at the end of the first spare region

  [[nodiscard]] std::uint16_t direction() const { return receive ? VRING_DESC_F_WRITE : std::uint16_t{0}; }
  void direct(std::uint32_t i, std::uint64_t address, std::uint32_t length, unsigned flags = 0,
              unsigned next = 0) const {
    queue.descriptor(i) = {address, length, static_cast<std::uint16_t>(flags ^ direction()),
                           static_cast<std::uint16_t>(next)};
  }
  void entry(std::uint64_t table, std::uint32_t i, std::uint64_t address, std::uint32_t length, unsigned flags = 0,
             unsigned next = 0) const {
    const vring_desc descriptor{address, length, static_cast<std::uint16_t>(flags ^ direction()),
                                static_cast<std::uint16_t>(next)};
    for (std::size_t byte = 0; byte < sizeof descriptor; ++byte)
      *world.space.at(table + i * sizeof descriptor + byte) = reinterpret_cast<const std::byte*>(&descriptor)[byte];
  }
  void indirect(std::uint64_t table, std::uint32_t length, unsigned flags = kIndirectFlag, unsigned next = 0) const {
    queue.descriptor(40) = {table, length, static_cast<std::uint16_t>(flags), static_cast<std::uint16_t>(next)};
  }
};

enum class Fate { kDropped, kDelivered };

struct Row {
  const char* name;
  std::function<std::uint16_t(const Hostile&)> make;  ///< returns the head to offer
  Fate transmit = Fate::kDropped;
  Fate receive = Fate::kDropped;
};

// 12 bytes of header and 60 of packet fit in 72.
const Row kRows[] = {
    {"head just beyond the ring", [](const Hostile&) { return std::uint16_t{64}; }},
    {"head 65535", [](const Hostile&) { return std::uint16_t{65535}; }},
    {"next beyond the ring",
     [](const Hostile& h) {
       h.direct(40, h.memory, 8, kNext, 64);
       return std::uint16_t{40};
     }},
    {"loop of two",
     [](const Hostile& h) {
       h.direct(40, h.memory, 1, kNext, 41);
       h.direct(41, h.memory + 1, 1, kNext, 40);
       return std::uint16_t{40};
     }},
    {"loop of one",
     [](const Hostile& h) {
       h.direct(40, h.memory, 1, kNext, 40);
       return std::uint16_t{40};
     }},
    {"zero length, alone",
     [](const Hostile& h) {
       h.direct(40, h.memory, 0);
       return std::uint16_t{40};
     }},
    {"zero length, in the middle",
     [](const Hostile& h) {
       h.direct(40, h.memory, 12, kNext, 41);
       h.direct(41, h.memory + 12, 0, kNext, 42);
       h.direct(42, h.memory + 12, 200);
       return std::uint16_t{40};
     }},
    {"zero length, first",
     [](const Hostile& h) {
       h.direct(40, h.memory, 0, kNext, 41);
       h.direct(41, h.memory, 212);
       return std::uint16_t{40};
     }},
    {"wrong direction",
     [](const Hostile& h) {
       h.direct(40, h.memory, 72, VRING_DESC_F_WRITE);
       return std::uint16_t{40};
     }},
    {"wrong direction after the header",
     [](const Hostile& h) {
       h.direct(40, h.memory, 12, kNext, 41);
       h.direct(41, h.memory + 12, 60, VRING_DESC_F_WRITE);
       return std::uint16_t{40};
     }},
    {"indirect in indirect",
     [](const Hostile& h) {
       h.indirect(h.tables, 32);
       h.entry(h.tables, 0, h.memory, 12, kNext, 1);
       h.entry(h.tables, 1, h.tables + 64, 16, kIndirectFlag);
       h.entry(h.tables + 64, 0, h.memory + 12, 60);
       return std::uint16_t{40};
     }},
    {"indirect in indirect, itself",
     [](const Hostile& h) {
       h.indirect(h.tables, 16);
       h.entry(h.tables, 0, h.tables, 16, kIndirectFlag);
       return std::uint16_t{40};
     }},
    {"indirect with next",
     [](const Hostile& h) {
       h.indirect(h.tables, 16, kIndirectFlag | kNext, 41);
       h.entry(h.tables, 0, h.memory, 72);
       h.direct(41, h.memory, 72);
       return std::uint16_t{40};
     }},
    {"indirect table of length 0",
     [](const Hostile& h) {
       h.indirect(h.tables, 0);
       return std::uint16_t{40};
     }},
    {"indirect table of length 15",
     [](const Hostile& h) {
       h.indirect(h.tables, 15);
       return std::uint16_t{40};
     }},
    {"indirect table of length 17",
     [](const Hostile& h) {
       h.indirect(h.tables, 17);
       h.entry(h.tables, 0, h.memory, 72);
       return std::uint16_t{40};
     }},
    {"indirect table of 4 GiB",
     [](const Hostile& h) {
       h.indirect(h.tables, 0xfffffff0u);
       return std::uint16_t{40};
     }},
    {"indirect table at 0",
     [](const Hostile& h) {
       h.indirect(0, 16);
       return std::uint16_t{40};
     }},
    {"indirect table that wraps",
     [](const Hostile& h) {
       h.indirect(~std::uint64_t{0} - 15, 32);
       return std::uint16_t{40};
     }},
    {"indirect entry across the end of memory",
     [](const Hostile& h) {
       h.indirect(h.world.spare_address(0) + 4096 - 8, 16);
       return std::uint16_t{40};
     }},
    {"indirect next beyond its table",
     [](const Hostile& h) {
       h.indirect(h.tables, 32);
       h.entry(h.tables, 0, h.memory, 12, kNext, 2);
       h.entry(h.tables, 2, h.memory + 12, 60);
       return std::uint16_t{40};
     }},
    {"indirect loop in its table",
     [](const Hostile& h) {
       h.indirect(h.tables, 32);
       h.entry(h.tables, 0, h.memory, 1, kNext, 1);
       h.entry(h.tables, 1, h.memory, 1, kNext, 0);
       return std::uint16_t{40};
     }},
    {"address 0",
     [](const Hostile& h) {
       h.direct(40, 0, 72);
       return std::uint16_t{40};
     }},
    {"address below memory",
     [](const Hostile& h) {
       h.direct(40, kGuestBase - 1, 72);
       return std::uint16_t{40};
     }},
    {"address in a hole",
     [](const Hostile& h) {
       h.direct(40, h.world.spare_address(0) + 4096, 72);
       return std::uint16_t{40};
     }},
    {"user address instead of a guest address",
     [](const Hostile& h) {
       h.direct(40, kUserBase, 72);
       return std::uint16_t{40};
     }},
    {"address that wraps",
     [](const Hostile& h) {
       h.direct(40, ~std::uint64_t{0} - 10, 72);
       return std::uint16_t{40};
     }},
    {"buffer that runs into a hole",
     [](const Hostile& h) {
       h.direct(40, h.world.spare_address(0) + 4096 - 20, 72);
       return std::uint16_t{40};
     }},
    {"buffer that runs out of the last region",
     [](const Hostile& h) {
       h.direct(40, h.world.spare_address(1) + 4096 - 13, 72);
       return std::uint16_t{40};
     }},
    {"second piece outside memory",
     [](const Hostile& h) {
       h.direct(40, h.memory, 12, kNext, 41);
       h.direct(41, 0x1000, 60);
       return std::uint16_t{40};
     }},
    {"header outside memory",
     [](const Hostile& h) {
       h.direct(40, 0x1000, 12, kNext, 41);
       h.direct(41, h.memory, 60);
       return std::uint16_t{40};
     }},
    {"header cut short",
     [](const Hostile& h) {
       h.direct(40, h.memory, 11);
       return std::uint16_t{40};
     }},
    {"one byte",
     [](const Hostile& h) {
       h.direct(40, h.memory, 1);
       return std::uint16_t{40};
     }},
    {"header and nothing more",
     [](const Hostile& h) {
       h.direct(40, h.memory, 12);
       return std::uint16_t{40};
     }},
    {"runt",
     [](const Hostile& h) {
       h.direct(40, h.memory, 12 + 13);
       return std::uint16_t{40};
     }},
    {"longest packet and one",
     [](const Hostile& h) {
       h.direct(40, h.memory, 12 + 256 + 1);
       return std::uint16_t{40};
     },
     Fate::kDropped, Fate::kDelivered},
    {"length of 4 GiB - 1",
     [](const Hostile& h) {
       h.direct(40, h.memory, 0xffffffffu);
       return std::uint16_t{40};
     },
     Fate::kDropped, Fate::kDelivered},
    // The near side of each edge.
    {"longest packet",
     [](const Hostile& h) {
       h.direct(40, h.memory, 12 + 256);
       return std::uint16_t{40};
     },
     Fate::kDelivered, Fate::kDelivered},
    {"shortest packet",
     [](const Hostile& h) {
       h.direct(40, h.memory, 12 + 14);
       return std::uint16_t{40};
     },
     Fate::kDelivered, Fate::kDropped},
    {"header in twelve pieces",
     [](const Hostile& h) {
       for (std::uint32_t i = 0; i < 12; ++i) h.direct(40 + i, h.memory + i, 1, kNext, 41 + i);
       h.direct(52, h.memory + 12, 60);
       return std::uint16_t{40};
     },
     Fate::kDelivered, Fate::kDelivered},
    {"buffer across two adjacent regions",
     [](const Hostile& h) {
       h.direct(40, h.world.spare_address(0) - 20, 72);
       return std::uint16_t{40};
     },
     Fate::kDelivered, Fate::kDelivered},
    {"indirect after direct",
     [](const Hostile& h) {
       h.direct(40, h.memory, 12, kNext, 41);
       h.queue.descriptor(41) = {h.tables, 16, kIndirectFlag, 0};
       h.entry(h.tables, 0, h.memory + 12, 60);
       return std::uint16_t{40};
     },
     Fate::kDelivered, Fate::kDelivered},
    {"indirect marked writable, which is to be ignored",
     [](const Hostile& h) {
       h.indirect(h.tables, 16, kIndirectFlag | VRING_DESC_F_WRITE);
       h.entry(h.tables, 0, h.memory, 72);
       return std::uint16_t{40};
     },
     Fate::kDelivered, Fate::kDelivered},
    {"indirect table not aligned",
     [](const Hostile& h) {
       h.indirect(h.tables + 3, 16);
       h.entry(h.tables + 3, 0, h.memory, 72);
       return std::uint16_t{40};
     },
     Fate::kDelivered, Fate::kDelivered},
    {"indirect chain longer than the ring",
     [](const Hostile& h) {
       h.indirect(h.tables, 72 * 16);
       for (std::uint32_t i = 0; i < 72; ++i) h.entry(h.tables, i, h.memory + i, 1, i < 71 ? kNext : 0, i + 1);
       return std::uint16_t{40};
     },
     Fate::kDelivered, Fate::kDelivered},
};

WorldShape hostile_world(std::uint64_t features) {
  WorldShape shape = small_world(features);
  shape.nic.slot_size = 512;
  shape.spare_bytes = 4096;
  return shape;
}

struct Range {
  std::uint64_t from, size;
};

// Offsets of guest memory that differ from `before` and lie in none of `allowed`.
std::uint64_t strays(const Bench& bench, const std::vector<std::byte>& before, const std::vector<Range>& allowed) {
  std::uint64_t count = 0;
  const auto now = bench.world.guest_bytes();
  std::vector<bool> may(now.size(), false);
  for (const Range& range : allowed)
    for (std::uint64_t i = 0; i < range.size; ++i) {
      const std::byte* at = bench.world.space.at(range.from + i);
      may[static_cast<std::size_t>(at - now.data())] = true;
    }
  for (std::size_t i = 0; i < now.size(); ++i) count += now[i] != before[i] && !may[i];
  return count;
}

Range used_ring(const GuestQueue& queue) { return {queue.place().used, 4 + 8 * std::uint64_t{queue.size()} + 2}; }

void fill_spare(Bench& bench) {
  for (int region = 0; region < 2; ++region)
    std::memset(bench.world.space.at(bench.world.spare_address(region)), 0xa5, 4096);
}

std::vector<std::byte> copy_of_guest(const Bench& bench) {
  const auto bytes = bench.world.guest_bytes();
  return {bytes.begin(), bytes.end()};
}

const PacketFlow kFlow{60, 60};

void run_transmit(const Row& row, std::uint64_t features, Fate fate) {
  INFO("transmit: " << row.name);
  Bench bench(hostile_world(features));
  fill_spare(bench);
  GuestQueue& queue = bench.nic().transmit;
  const std::uint64_t memory = bench.nic().receive_slot(60);
  std::memset(bench.world.space.at(memory), 0x5a, 2048);
  send_from_guest(bench.world, kFlow, 0, 1);
  queue.offer(row.make({bench.world, queue, false, memory, bench.world.spare_address(0) + 1024}));
  send_from_guest(bench.world, kFlow, 1, 1);
  const std::vector<std::byte> before = copy_of_guest(bench);
  while (bench.owner.poll_once()) {
  }
  std::vector<std::size_t> lengths;
  Ledger ledger(kFlow);
  for (std::uint32_t number = 0; const auto packet = bench.kernel().send();) {
    lengths.push_back(packet->size());
    if (kFlow.intact(*packet, number)) ledger.note(*packet);
  }
  CHECK(ledger.finish(2).clean());
  CHECK(lengths.size() == (fate == Fate::kDelivered ? 3 : 2));
  CHECK(bench.state().transmit.dropped == (fate == Fate::kDelivered ? 0 : 1));
  CHECK(bench.state().transmit.packets == lengths.size());
  CHECK(bench.state().transmit.fault.load() == QueueFault::kNone);
  CHECK(bench.nic().reap() == 3);
  CHECK(queue.wrong_returns() == 1);  // the hostile chain, which the driver half here knows nothing of
  CHECK(queue.outstanding() == 0);
  CHECK(bench.kernel().bad_descriptors() == 0);
  CHECK(strays(bench, before, {used_ring(queue)}) == 0);
  CHECK(bench.world.audit().clean());
  CHECK(bench.world.record().arm.load() == 0);
}

// Packets from the uplink, or `direct` from another guest, whom it may cost nothing.
void run_receive(const Row& row, std::uint64_t features, Fate fate, bool direct = false) {
  INFO((direct ? "forward: " : "receive: ") << row.name);
  Bench bench(direct ? neighbours(hostile_world(features)) : hostile_world(features));
  fill_spare(bench);
  const std::uint32_t receiver = direct ? 1 : 0;
  GuestNic& nic = bench.nic(receiver);
  const VringCursors& cursors = bench.state(receiver).receive;
  GuestQueue& queue = nic.receive;
  const std::uint64_t memory = nic.transmit_slot(60);
  std::memset(bench.world.space.at(memory), 0x5a, 2048);
  nic.post(1);
  queue.offer(row.make({bench.world, queue, true, memory, bench.world.spare_address(0) + 1024}));
  nic.post(1);
  REQUIRE((direct ? send_from_guest : send_from_uplink)(bench.world, kFlow, 0, 3, 0) == 3);
  const std::vector<std::byte> before = copy_of_guest(bench);
  while (bench.owner.poll_once()) {
  }
  std::vector<std::byte> packet;
  std::vector<std::uint32_t> numbers;
  for (std::uint32_t number = 0; nic.take(packet);)
    if (kFlow.intact(packet, number)) numbers.push_back(number);
  CHECK(numbers == std::vector<std::uint32_t>{0, 2});
  CHECK(cursors.packets == (fate == Fate::kDelivered ? 3 : 2));
  CHECK(cursors.dropped == (fate == Fate::kDelivered ? 0 : 1));
  CHECK(cursors.overflow == 0);
  CHECK(cursors.fault.load() == QueueFault::kNone);
  if (direct) {
    CHECK(bench.nic().reap() == 3);
    CHECK(bench.state().transmit.packets == 3);
    CHECK(bench.state().transmit.dropped == 0);
    CHECK(bench.kernel().transmit_waiting() == 0);
  }
  CHECK(queue.used_index() == 3);
  CHECK(queue.wrong_returns() == 1);
  CHECK(queue.outstanding() == 0);
  const std::uint64_t boundary = bench.world.spare_address(0);
  CHECK(strays(bench, before,
               {used_ring(queue),
                used_ring(direct ? bench.nic().transmit : queue),
                {nic.receive_slot(0), 1024},
                {memory, 1024},
                {boundary - 20, 72},
                {boundary + 4096 - 20, 20},
                {bench.world.spare_address(1) + 4096 - 13, 13}}) == 0);
  if (fate == Fate::kDelivered && std::string(row.name).find("across") == std::string::npos) {
    // Not a byte beyond the packet, though the buffer went on.
    const std::byte* tail = bench.world.space.at(memory) + 72;
    CHECK(std::all_of(tail, tail + 512, [](std::byte byte) { return byte == std::byte{0x5a}; }));
  }
  CHECK(bench.world.audit().clean());
  CHECK(bench.world.record().arm.load() == 0);
}

}  // namespace

TEST_CASE("malformed chains on a transmit queue") {
  for (const Row& row : kRows) run_transmit(row, feature::kVersion1 | feature::kIndirect, row.transmit);
}

TEST_CASE("malformed chains on a receive queue") {
  for (const Row& row : kRows) run_receive(row, feature::kVersion1 | feature::kIndirect, row.receive);
}

TEST_CASE("malformed chains on a receive queue that another guest sends to") {
  for (const Row& row : kRows) run_receive(row, feature::kVersion1 | feature::kIndirect, row.receive, true);
}

TEST_CASE("indirect descriptors that were not negotiated are refused") {
  const Row row{"indirect, well formed", [](const Hostile& h) {
                  h.indirect(h.tables, 16);
                  h.entry(h.tables, 0, h.memory, 72);
                  return std::uint16_t{40};
                }};
  run_transmit(row, feature::kVersion1, Fate::kDropped);
  run_receive(row, feature::kVersion1, Fate::kDropped);
  run_transmit(row, feature::kVersion1 | feature::kIndirect, Fate::kDelivered);
  run_receive(row, feature::kVersion1 | feature::kIndirect, Fate::kDelivered);
}

TEST_CASE("a malformed chain in the middle of a mergeable packet gives up that packet alone") {
  for (const Row& row : kRows) {
    if (row.receive == Fate::kDelivered || std::string(row.name) == "header and nothing more" ||
        std::string(row.name) == "runt" || std::string(row.name) == "shortest packet" ||
        std::string(row.name) == "header cut short" || std::string(row.name) == "one byte" ||
        std::string(row.name) == "zero length, in the middle" || std::string(row.name).find("next beyond") == 0 ||
        std::string(row.name).find("after the header") != std::string::npos ||
        std::string(row.name).find("loop") != std::string::npos)
      continue;  // as a second buffer these have room before the fault, or none is needed
    INFO(row.name);
    WorldShape shape = hostile_world(feature::kVersion1 | feature::kIndirect | feature::kMergeable);
    shape.nic.slot_size = 128;
    Bench bench(shape);
    const PacketFlow flow{180, 180};  // 192 bytes with the header: two buffers
    const std::uint64_t memory = bench.nic().transmit_slot(8);
    bench.nic().post(3);
    bench.nic().receive.offer(
        row.make({bench.world, bench.nic().receive, true, memory, bench.world.spare_address(0) + 1024}));
    bench.nic().post(2);
    REQUIRE(send_from_uplink(bench.world, flow, 0, 3) == 3);
    while (bench.owner.poll_once()) {
    }
    std::vector<std::byte> packet;
    std::vector<std::uint32_t> numbers;
    for (std::uint32_t number = 0; bench.nic().take(packet);)
      if (flow.intact(packet, number)) numbers.push_back(number);
    CHECK(numbers == std::vector<std::uint32_t>{0, 2});
    CHECK(bench.state().receive.dropped == 1);
    CHECK(bench.nic().empty_returns() == 1);  // the sound buffer that packet 1 had begun with
    CHECK(bench.nic().receive.wrong_returns() == 1);
    CHECK(bench.nic().receive.outstanding() == 0);
    CHECK(bench.world.audit().clean());
  }
}

TEST_CASE("an avail index that jumps stops its queue and nothing else") {
  for (const bool receive : {false, true})
    for (const int jump : {65, 128, 1000, 32768, 65535}) {
      INFO((receive ? "receive" : "transmit") << ", jump of " << jump);
      WorldShape shape = small_world();
      shape.queue_pairs = 2;
      Bench bench(shape);
      bench.nic(0).post();
      bench.nic(1).post();
      GuestQueue& queue = receive ? bench.nic().receive : bench.nic().transmit;
      const std::vector<std::byte> before = copy_of_guest(bench);
      queue.publish_index(static_cast<std::uint16_t>(jump));
      send_from_uplink(bench.world, kFlow, 0, 1, 0);
      if (!receive) queue.publish_index(static_cast<std::uint16_t>(jump));
      VringCursors& cursors = receive ? bench.state().receive : bench.state().transmit;
      while (bench.owner.poll_once()) {
      }
      CHECK(cursors.fault.load() == QueueFault::kAvailJump);
      CHECK(queue.used_index() == 0);
      CHECK(cursors.packets == 0);
      CHECK_FALSE((receive ? bench.pair().can_receive() : bench.pair().can_transmit()));
      // The other direction of this pair, and the other pair.
      Ledger out(kFlow), in(kFlow);
      if (receive) {
        send_from_guest(bench.world, kFlow, 0, 5, 0);
        drain(bench.world, bench.owner, out, in, 0);
        CHECK(out.finish(5).clean());
      } else {
        std::vector<std::byte> packet;
        REQUIRE(bench.nic().take(packet));
      }
      Ledger out1(kFlow), in1(kFlow);
      send_from_guest(bench.world, kFlow, 0, 5, 1);
      send_from_uplink(bench.world, kFlow, 0, 5, 1);
      drain(bench.world, bench.owner, out1, in1, 1);
      CHECK(out1.finish(5).clean());
      CHECK(in1.finish(5).clean());
    }
}

TEST_CASE("rings that lie outside memory, or are misaligned or of a wrong size, are not bound") {
  const WorldShape shape = small_world();
  const EngineWorld world(shape);
  const auto device = world.make_device(world.describe(1));
  const VringDescription good = world.describe(1).vrings[0];
  REQUIRE(SplitQueue::bind(*device->memory(), good, 0).has_value());
  struct BindRow {
    const char* name;
    std::function<void(VringDescription&)> change;
  };
  const BindRow rows[] = {
      {"size 0", [](VringDescription& v) { v.size = 0; }},
      {"size not a power of two", [](VringDescription& v) { v.size = 63; }},
      {"size above 32768", [](VringDescription& v) { v.size = 65536; }},
      {"descriptors outside", [](VringDescription& v) { v.descriptor_user_address = 0x1000; }},
      {"descriptors end outside", [](VringDescription& v) { v.descriptor_user_address = kUserBase + 0x10000000; }},
      {"avail outside", [](VringDescription& v) { v.avail_user_address = kUserBase - 2; }},
      {"avail wraps", [](VringDescription& v) { v.avail_user_address = ~std::uint64_t{0} - 1; }},
      {"used outside", [](VringDescription& v) { v.used_user_address = 0; }},
      {"guest address instead of a user address", [](VringDescription& v) { v.used_user_address = kGuestBase; }},
      {"descriptors misaligned", [](VringDescription& v) { v.descriptor_user_address += 8; }},
      {"avail misaligned", [](VringDescription& v) { v.avail_user_address += 1; }},
      {"used misaligned", [](VringDescription& v) { v.used_user_address += 2; }},
  };
  for (const BindRow& row : rows) {
    INFO(row.name);
    VringDescription vring = good;
    row.change(vring);
    const auto bound = SplitQueue::bind(*device->memory(), vring, 0);
    REQUIRE_FALSE(bound.has_value());
    CHECK(bound.error().kind == ErrorKind::kInvalid);
  }
}
