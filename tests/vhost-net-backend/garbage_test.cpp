// SPDX-License-Identifier: Apache-2.0
// Rings full of garbage, and rings that change while they are read: the engine survives, and writes only what it was
// offered.
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <cstring>
#include <random>
#include <thread>

#include "tests/vhost-net-backend/bench.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

const PacketFlow kFlow{60, 200};

WorldShape garbage_world(bool mergeable) {
  WorldShape shape = small_world(feature::kVersion1 | feature::kIndirect | (mergeable ? feature::kMergeable : 0));
  shape.spare_bytes = 4096;
  return shape;
}

// Descriptors that are right often enough to get somewhere.
struct Garbage {
  explicit Garbage(std::uint32_t seed, const Bench& bench) : random(seed), world(bench.world) {}

  std::uint32_t below(std::uint32_t limit) { return static_cast<std::uint32_t>(random() % limit); }
  std::uint64_t address() {
    switch (below(12)) {
      case 0:
        return random() << 32 | random();
      case 1:
        return ~std::uint64_t{0} - below(64);
      case 2:
        return kGuestBase - below(64);
      case 3:
        return world.spare_address(0) - below(300);
      case 4:
        return world.spare_address(1) + 4096 - below(300);
      default:
        return world.spare_address(static_cast<int>(below(2))) + below(2048);
    }
  }
  std::uint32_t length() {
    const std::uint32_t kind = below(10);
    return kind == 0 ? 0 : kind == 1 ? static_cast<std::uint32_t>(random()) : kind < 6 ? below(40) : below(400);
  }
  vring_desc descriptor(bool receive, std::uint32_t entries) {
    vring_desc made{};
    made.addr = address();
    made.len = length();
    unsigned flags = receive != (below(16) == 0) ? VRING_DESC_F_WRITE : 0;
    if (below(3) == 0) flags |= VRING_DESC_F_NEXT;
    if (below(6) == 0) {
      flags = (flags & (below(8) == 0 ? ~0u : ~unsigned{VRING_DESC_F_NEXT})) | VRING_DESC_F_INDIRECT;
      made.addr = world.spare_address(0) + 2048 + 16 * below(100);
      made.len = below(8) == 0 ? below(100) : 16 * below(20);
    }
    made.flags = static_cast<std::uint16_t>(flags);
    made.next = static_cast<std::uint16_t>(below(10) == 0 ? random() : below(entries));
    return made;
  }

  std::mt19937_64 random;
  const EngineWorld& world;
};

void mark(const Bench& bench, const vring_desc& descriptor, std::vector<bool>& may) {
  if ((descriptor.flags & VRING_DESC_F_WRITE) == 0) return;
  const auto bytes = bench.world.guest_bytes();
  const std::uint64_t spare = bench.world.spare_address(1);
  const std::uint64_t first_two = bench.world.spare_address(0) + 4096 - kGuestBase;
  for (std::uint64_t i = 0; i < std::min<std::uint64_t>(descriptor.len, 1024); ++i) {
    const std::uint64_t at = descriptor.addr + i;
    if (at - kGuestBase < first_two) may[at - kGuestBase] = true;
    if (at - spare < 4096) may[bytes.size() - 4096 + (at - spare)] = true;
  }
}

}  // namespace

TEST_CASE("rings full of garbage: nothing is written that no descriptor offered") {
  std::uint64_t sent = 0, received = 0, refused = 0, judged = 0;
  for (std::uint32_t seed = 1; seed <= 400; ++seed) {
    INFO("seed " << seed);
    Bench bench(garbage_world(seed % 2 == 0));
    Garbage garbage(seed, bench);
    const auto bytes = bench.world.guest_bytes();
    for (std::uint32_t i = 0; i < 100; ++i) {
      const vring_desc entry = garbage.descriptor(seed % 3 != 0, 20);
      std::memcpy(bench.world.space.at(bench.world.spare_address(0) + 2048 + i * 16), &entry, sizeof entry);
    }
    for (GuestQueue* queue : {&bench.nic().receive, &bench.nic().transmit}) {
      for (std::uint32_t i = 0; i < queue->size(); ++i)
        queue->descriptor(i) = garbage.descriptor(queue == &bench.nic().receive, queue->size());
      for (std::uint32_t i = 0; i < queue->size(); ++i)
        queue->offer(
            static_cast<std::uint16_t>(garbage.below(20) == 0 ? garbage.random() : garbage.below(queue->size())));
      queue->publish();
    }
    send_from_uplink(bench.world, kFlow, 0, 60);
    std::vector<bool> may(bytes.size(), false);
    for (std::uint32_t i = 0; i < 64; ++i) mark(bench, bench.nic().receive.descriptor(i), may);
    // Every aligned place of the table area may have served as an indirect descriptor.
    for (std::uint64_t i = 0; i < 2048 - 16; i += 16) {
      vring_desc entry;
      std::memcpy(&entry, bench.world.space.at(bench.world.spare_address(0) + 2048 + i), sizeof entry);
      mark(bench, entry, may);
    }
    for (const GuestQueue* queue : {&bench.nic().receive, &bench.nic().transmit})
      for (std::uint64_t i = 0; i < 4 + 8 * 64 + 2; ++i) may[queue->place().used - kGuestBase + i] = true;
    const std::vector<std::byte> before(bytes.begin(), bytes.end());
    for (int round = 0; round < 20; ++round) bench.owner.poll_once();
    std::size_t strays = 0;
    for (std::size_t i = 0; i < bytes.size(); ++i) strays += bytes[i] != before[i] && !may[i];
    // A guest that offers its own descriptors as buffers changes what is offered: it may only harm itself.
    bool self_harm = false;
    for (std::uint64_t i = 0; i < 2048; ++i) {
      const std::size_t at = bench.world.spare_address(0) + 2048 + i - kGuestBase;
      self_harm = self_harm || bytes[at] != before[at];
    }
    if (!self_harm) CHECK(strays == 0);
    judged += !self_harm;
    CHECK(bench.world.audit().clean());
    CHECK(bench.world.record().arm.load() == 0);
    const VringCursors& transmit = bench.state().transmit;
    CHECK(transmit.packets + transmit.dropped == 64);
    sent += transmit.packets;
    received += bench.state().receive.packets;
    refused += transmit.dropped + bench.state().receive.dropped;
    while (bench.kernel().send()) {
    }
    CHECK(bench.kernel().bad_descriptors() == 0);
  }
  // The garbage is good enough: a good part of everything happened.
  CAPTURE(sent, received, refused, judged);
  CHECK(sent > 400);
  CHECK(received > 400);
  CHECK(refused > 4000);
  CHECK(judged > 200);
}

TEST_CASE("descriptors that change while they are read") {
  Bench bench(garbage_world(false));
  GuestQueue& transmit = bench.nic().transmit;
  GuestQueue& receive = bench.nic().receive;
  const std::uint64_t good = bench.world.spare_address(0);
  std::memset(bench.world.space.at(good), 0x11, 4096);
  std::memset(bench.world.space.at(bench.world.spare_address(1)), 0x22, 4096);
  std::atomic<bool> stop{false};
  // Each field is written apart from the others, from good to bad and back.
  std::thread scribbler([&] {
    for (std::uint32_t i = 0; !stop.load(std::memory_order_relaxed); ++i) {
      for (GuestQueue* queue : {&transmit, &receive}) {
        auto& descriptor = queue->descriptor(i % 4);
        const std::uint16_t direction = queue == &receive ? VRING_DESC_F_WRITE : std::uint16_t{0};
        const std::uint64_t addresses[] = {good, ~std::uint64_t{0} - 8, good - 30, 0, good + 1024};
        const std::uint32_t lengths[] = {100, 0xffffffffu, 0, 12, 300};
        const unsigned flags[] = {0u, VRING_DESC_F_NEXT, VRING_DESC_F_INDIRECT, VRING_DESC_F_WRITE, 0u};
        std::atomic_ref<__virtio64>(descriptor.addr).store(addresses[i % 5], std::memory_order_relaxed);
        std::atomic_ref<__virtio32>(descriptor.len).store(lengths[i / 5 % 5], std::memory_order_relaxed);
        std::atomic_ref<__virtio16>(descriptor.flags)
            .store(static_cast<std::uint16_t>(flags[i / 25 % 5] ^ direction), std::memory_order_relaxed);
      }
    }
  });
  std::vector<std::byte> room(kFlow.longest);
  for (std::uint32_t round = 0; round < 5000; ++round) {
    for (GuestQueue* queue : {&transmit, &receive}) {
      for (std::uint16_t head = 0; head < 4; ++head) queue->offer(head);
      queue->publish();
    }
    for (std::uint32_t i = 0; i < 4; ++i) {
      const std::uint32_t length = kFlow.write(round * 4 + i, room);
      bench.kernel().receive({room.data(), length});
    }
    bench.owner.poll_once();
    while (bench.kernel().send()) {
    }
    bench.kernel().complete();
    while (transmit.take_used()) {
    }
    while (receive.take_used()) {
    }
  }
  stop.store(true);
  scribbler.join();
  CHECK(bench.state().transmit.packets + bench.state().transmit.dropped == 20000);
  CHECK(bench.kernel().bad_descriptors() == 0);
  CHECK(bench.world.audit().clean());
  // No receive descriptor ever named the second spare region, nor what lies between its two buffers and their ends.
  const std::byte* other = bench.world.space.at(bench.world.spare_address(1));
  CHECK(std::all_of(other, other + 4096, [](std::byte byte) { return byte == std::byte{0x22}; }));
  const std::byte* rest = bench.world.space.at(good);
  CHECK(std::all_of(rest + 512, rest + 1024, [](std::byte byte) { return byte == std::byte{0x11}; }));
  CHECK(std::all_of(rest + 2048, rest + 4096, [](std::byte byte) { return byte == std::byte{0x11}; }));
}
