// SPDX-License-Identifier: Apache-2.0
// What a backend is told about devices and sockets: inconsistent descriptions are refused with a reason, never mapped.
#include <sys/mman.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <functional>

#include "tests/vhost-net-backend/bench.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

std::vector<UniqueFd> copies(int fd, std::size_t count) {
  std::vector<UniqueFd> fds;
  for (std::size_t i = 0; i < count; ++i) fds.emplace_back(::dup(fd));
  return fds;
}

}  // namespace

TEST_CASE("device descriptions that are inconsistent are refused") {
  const EngineWorld world(small_world());
  struct Row {
    const char* name;
    std::function<void(DeviceDescription&)> change;
    std::size_t fds = 3;  ///< one region, two call fds
  };
  const Row rows[] = {
      {"another version", [](DeviceDescription& d) { d.version = 2; }},
      {"too many regions", [](DeviceDescription& d) { d.region_count = kMaxMemoryRegions + 1; }},
      {"too many queue pairs", [](DeviceDescription& d) { d.queue_pairs = kMaxQueuePairsPerDevice + 1; }},
      {"a descriptor short", [](DeviceDescription&) {}, 2},
      {"a descriptor too many", [](DeviceDescription&) {}, 4},
      {"no descriptors", [](DeviceDescription&) {}, 0},
      {"kick fds that did not come", [](DeviceDescription& d) { d.vrings[1].flags |= VringDescription::kHasKick; }},
      {"a region beyond its file", [](DeviceDescription& d) { d.regions[0].size = std::uint64_t{1} << 40; }},
  };
  for (const Row& row : rows) {
    INFO(row.name);
    DeviceDescription description = world.describe(1);
    row.change(description);
    std::vector<std::string> problems;
    const auto device = Device::make(description, copies(world.memory_fd(), row.fds), nullptr, problems);
    REQUIRE_FALSE(device.has_value());
    CHECK(device.error().kind == ErrorKind::kInvalid);
    CHECK_FALSE(device.error().text.empty());
  }
}

TEST_CASE("a vring that cannot be bound is left out and named, its device serves the others") {
  WorldShape shape = small_world();
  shape.queue_pairs = 2;
  EngineWorld world(shape);
  DeviceDescription description = world.describe(1);
  description.vrings[1].size = 63;
  std::vector<std::string> problems;
  auto device = Device::make(description, copies(world.memory_fd(), 5), nullptr, problems);
  REQUIRE(device.has_value());
  REQUIRE(problems.size() == 1);
  CHECK(problems[0].find("vring 1") != std::string::npos);
  CHECK((*device)->vring(0).queue.bound());
  CHECK_FALSE((*device)->vring(1).queue.bound());
  CHECK((*device)->vring(3).queue.bound());
}

TEST_CASE("unchanged memory is shared between generations, changed memory is not") {
  const EngineWorld world(small_world()), other(small_world());
  const auto first = world.make_device(world.describe(1));
  const auto second = world.make_device(world.describe(2), first.get());
  CHECK(first->memory() == second->memory());
  // The same addresses in another file are other memory.
  const auto third = other.make_device(other.describe(3), second.get());
  CHECK(third->memory() != second->memory());
  DeviceDescription moved = world.describe(4);
  moved.regions[0].size -= 4096;
  moved.vrings[0].flags = moved.vrings[1].flags = 0;
  CHECK(world.make_device(moved, second.get())->memory() != second->memory());
}

TEST_CASE("socket descriptions that are inconsistent are refused before anything is mapped") {
  XskShape shape;
  const XskDescription good = describe_xsk(shape);
  UniqueFd rings{::memfd_create("rings", MFD_CLOEXEC)}, frames{::memfd_create("frames", MFD_CLOEXEC)};
  REQUIRE(::ftruncate(frames.get(), static_cast<off_t>(good.umem_size)) == 0);
  struct Row {
    const char* name;
    std::function<void(XskDescription&)> change;
  };
  const Row rows[] = {
      {"another version", [](XskDescription& d) { d.version = 9; }},
      {"ring of no entries", [](XskDescription& d) { d.rx.entries = 0; }},
      {"ring not a power of two", [](XskDescription& d) { d.tx.entries = 48; }},
      {"ring beyond its mapping", [](XskDescription& d) { d.fill.entries = 4096; }},
      {"producer beyond its mapping", [](XskDescription& d) { d.completion.producer = d.completion.mmap_size - 3; }},
      {"consumer that wraps", [](XskDescription& d) { d.rx.consumer = ~std::uint64_t{0}; }},
      {"entries that wrap", [](XskDescription& d) { d.rx.descriptors = ~std::uint64_t{0} - 7; }},
      {"frame size not a power of two", [](XskDescription& d) { d.frame_size = 3000; }},
      {"frame size too small", [](XskDescription& d) { d.frame_size = 1024; }},
      {"packets larger than frames", [](XskDescription& d) { d.max_packet = d.frame_size + 1; }},
      {"no transmit frames", [](XskDescription& d) { d.tx_frames = 0; }},
      {"transmit frames not in words of the bitmap", [](XskDescription& d) { d.tx_frames = 63; }},
      {"more transmit frames than the bitmap has", [](XskDescription& d) { d.tx_frames = kTransmitFrames + 64; }},
      {"memory of another size", [](XskDescription& d) { d.umem_size += 4096; }},
      {"frames whose number wraps",
       [](XskDescription& d) {
         d.rx_frames = 0u - d.tx_frames;
         d.umem_size = 0;
       }},
      {"producer not aligned", [](XskDescription& d) { d.rx.producer = 2; }},
      {"consumer not aligned", [](XskDescription& d) { d.tx.consumer = 65; }},
      {"entries not aligned",
       [](XskDescription& d) {
         d.fill.descriptors = 196;
         d.fill.mmap_size += 64;
       }},
  };
  for (const Row& row : rows) {
    INFO(row.name);
    XskDescription description = good;
    row.change(description);
    const auto port = XskPort::map(description, UniqueFd{::dup(rings.get())}, UniqueFd{::dup(frames.get())}, "uplink");
    REQUIRE_FALSE(port.has_value());
    CHECK(port.error().kind == ErrorKind::kInvalid);
  }
}

TEST_CASE("frames of a port: bounds and names") {
  const EngineWorld world(small_world());
  const auto ports = world.make_ports();
  const XskPort& port = *ports->ports[0];
  const std::uint64_t size = port.description().umem_size;
  CHECK(port.frame(0, size) != nullptr);
  CHECK(port.frame(0, size + 1) == nullptr);
  CHECK(port.frame(size, 1) == nullptr);
  CHECK(port.frame(~std::uint64_t{0}, 2) == nullptr);
  CHECK(port.frame(16, ~std::uint64_t{0}) == nullptr);
  for (std::uint32_t frame = 0; frame < port.description().tx_frames; ++frame) {
    CHECK(port.transmit_frame(port.transmit_address(frame)) == frame);
    CHECK_FALSE(port.is_receive_frame(port.transmit_address(frame)));
  }
  CHECK(port.transmit_frame(0) >= port.description().tx_frames);
  CHECK(port.frame_start(3 * 512 + 300) == 3 * 512);
}
