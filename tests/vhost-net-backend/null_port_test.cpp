// SPDX-License-Identifier: Apache-2.0
// Rings that no kernel serves: what the owner does in its place, and that a second owner may do it again.
#include <catch2/catch.hpp>
#include <cstring>
#include <vector>

#include "tests/support/xsk_rings.hpp"
#include "vhost-net-backend/xsk_port.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

// A port over memory whose owner plays the kernel. The backend's own moves are played by the test.
struct NullWorld {
  explicit NullWorld(std::uint32_t flags, std::uint32_t source_length = 0, std::uint32_t index = 0) {
    description = describe_xsk({});
    description.flags = XskDescription::kInMemory | flags;
    description.source_length = source_length;
    rings.resize(xsk_ring_bytes(description));
    frames.resize(description.umem_size);
    KernelXsk(description, rings.data(), frames.data()).reset(index);
    port = XskPort::over_memory(description, rings.data(), frames.data());
  }
  void send(char content, std::uint32_t length) {
    const std::uint32_t producer = port->tx.producer();
    const std::uint64_t address = port->transmit_address(producer % description.tx_frames);
    std::memset(frames.data() + address, content, length);
    port->tx.at(producer) = {address, length, 0};
    port->tx.publish(producer + 1);
  }
  // Takes every frame from RX, gives it back on fill, and names them by first byte and length.
  std::vector<std::pair<char, std::uint32_t>> take() {
    std::vector<std::pair<char, std::uint32_t>> taken;
    for (std::uint32_t i = port->rx.consumer(); i != port->rx.producer(); ++i) {
      const xdp_desc descriptor = port->rx.at(i);
      taken.emplace_back(static_cast<char>(frames[descriptor.addr]), descriptor.len);
      const std::uint32_t fill = port->fill.producer();
      port->fill.at(fill) = port->frame_start(descriptor.addr);
      port->fill.publish(fill + 1);
      port->rx.consume(i + 1);
    }
    return taken;
  }
  std::uint32_t completed() {
    const std::uint32_t count = port->completion.producer() - port->completion.consumer();
    port->completion.consume(port->completion.producer());
    return count;
  }

  XskDescription description;
  std::vector<std::byte> rings, frames;
  std::unique_ptr<XskPort> port;
};

constexpr std::uint32_t kBeforeWrap = 0xffffffe0u;

}  // namespace

TEST_CASE("a sink completes what is sent and gives nothing") {
  NullWorld world(0, 0, GENERATE(0u, kBeforeWrap));
  for (int round = 0; round < 5; ++round) {
    for (int i = 0; i < 40; ++i) world.send('a', 64);
    CHECK(world.port->wake_transmit());
    CHECK(world.port->tx.consumer() == world.port->tx.producer());
    CHECK(world.completed() == 40);
    CHECK(world.take().empty());
  }
}

TEST_CASE("a source gives as many frames as the fill ring offers, each as long as asked, over and over") {
  NullWorld world(XskDescription::kSource, 300, GENERATE(0u, kBeforeWrap));
  for (int round = 0; round < 5; ++round) {
    world.port->play_kernel();
    world.port->play_kernel();  // more is not offered
    const auto taken = world.take();
    CHECK(taken.size() == world.description.rx_frames);
    for (const auto& [content, length] : taken) CHECK(length == 300);
  }
  world.send('a', 64);
  CHECK(world.port->wake_transmit());
  CHECK(world.completed() == 1);
}

TEST_CASE("a loopback gives back what is sent: in order, whole, and no more than there are frames for") {
  NullWorld world(XskDescription::kLoopback, 0, GENERATE(0u, kBeforeWrap));
  for (int round = 0; round < 5; ++round) {
    for (std::uint32_t i = 0; i < 64; ++i) world.send(static_cast<char>('0' + i), 60 + i);
    REQUIRE(world.port->wake_transmit());
    // RX holds all frames now: what follows waits on TX, and nothing is lost.
    CHECK(world.completed() == 64);
    world.send('!', 1000);
    CHECK_FALSE(world.port->wake_transmit());
    CHECK(world.completed() == 0);
    const auto taken = world.take();
    REQUIRE(taken.size() == 64);
    for (std::uint32_t i = 0; i < 64; ++i) CHECK(taken[i] == std::pair{static_cast<char>('0' + i), 60 + i});
    CHECK(world.port->wake_transmit());
    CHECK(world.take() == std::vector<std::pair<char, std::uint32_t>>{{'!', 1000}});
    CHECK(world.completed() == 1);
  }
}

TEST_CASE(
    "an owner dies between two stores of the kernel's part: the next one completes it, and nothing happens twice") {
  const std::uint32_t flags = GENERATE(0u, XskDescription::kSource, XskDescription::kLoopback);
  NullWorld world(flags, flags == XskDescription::kSource ? 200 : 0, GENERATE(0u, kBeforeWrap));
  for (std::uint32_t i = 0; i < 20; ++i) world.send(static_cast<char>('a' + i), 100 + i);
  // The indices in the order in which play_kernel() stores them; all but the first `done` are put back.
  struct Index {
    std::uint64_t offset;
    bool moves;
  };
  const XskDescription& d = world.description;
  const bool loopback = flags == XskDescription::kLoopback, source = flags == XskDescription::kSource;
  const Index order[] = {
      {d.rx.mmap_offset + d.rx.producer, loopback},     {d.completion.mmap_offset + d.completion.producer, true},
      {d.fill.mmap_offset + d.fill.consumer, loopback}, {d.tx.mmap_offset + d.tx.consumer, true},
      {d.rx.mmap_offset + d.rx.producer, source},       {d.fill.mmap_offset + d.fill.consumer, source}};
  KernelXsk words(d, world.rings.data(), world.frames.data());
  const auto done = GENERATE(range(std::size_t{0}, std::size_t{7}));
  std::uint32_t before[6], after[6];
  for (std::size_t i = 0; i < 6; ++i) before[i] = words.word(order[i].offset);
  world.port->play_kernel();
  for (std::size_t i = 0; i < 6; ++i) after[i] = words.word(order[i].offset);
  for (std::size_t i = done; i < 6; ++i)
    if (order[i].moves) words.word(order[i].offset) = before[i];
  world.port->play_kernel();
  for (std::size_t i = 0; i < 6; ++i) CHECK(words.word(order[i].offset) == after[i]);
  CHECK(world.completed() == 20);
  const auto taken = world.take();
  CHECK(taken.size() == (loopback ? 20 : source ? d.rx_frames : 0u));
  if (loopback)
    for (std::uint32_t i = 0; i < 20; ++i) CHECK(taken[i] == std::pair{static_cast<char>('a' + i), 100 + i});
}

TEST_CASE("damaged entries of a loopback take their place with no length") {
  NullWorld world(XskDescription::kLoopback);
  world.send('a', 64);
  world.send('b', 64);
  world.send('c', 64);
  world.port->tx.at(1).addr = world.description.umem_size;
  world.port->tx.at(2).len = world.description.max_packet + 1;
  CHECK(world.port->wake_transmit());
  const auto taken = world.take();
  REQUIRE(taken.size() == 3);
  CHECK(taken[0].second == 64);
  CHECK(taken[1].second == 0);
  CHECK(taken[2].second == 0);
  CHECK(world.completed() == 3);
}
