// SPDX-License-Identifier: Apache-2.0
// Bench: a world with its first owner in place, for unit tests of the engine.
#pragma once

#include <array>

#include "tests/support/engine_world.hpp"

namespace tandem::test {

struct Bench {
  explicit Bench(const WorldShape& shape) : world(shape), owner(world.segment(), fence.view(), 1) {
    hold_all(owner, world);
    if (!owner.take_over() || owner.pairs().size() != shape.queue_pairs) std::abort();
  }

  [[nodiscard]] QueuePair& pair(std::uint32_t n = 0) { return owner.pairs()[n]; }
  [[nodiscard]] QueuePairState& state(std::uint32_t n = 0) const { return world.state(n); }
  [[nodiscard]] GuestNic& nic(std::uint32_t n = 0) { return world.nics[n]; }
  [[nodiscard]] KernelXsk& kernel(std::uint32_t n = 0) { return world.kernels[n]; }

  FakeFence fence;
  EngineWorld world;
  ShardStepper owner;
};

/// Feature bits of the ring layouts, for tests that hold for all: split, packed, and packed with one used descriptor
/// for a burst.
inline constexpr std::array<std::uint64_t, 3> kLayouts = {0, feature::kPacked, feature::kPacked | feature::kInOrder};

/// Two guests of one bridge: packets of the first one's transmit queue go to the second one's receive queue.
inline WorldShape neighbours(WorldShape shape) {
  shape.devices = shape.queue_pairs = 2;
  return shape;
}

/// Small frames and slots: enough for PacketFlow's default lengths.
inline WorldShape small_world(std::uint64_t features = feature::kVersion1 | feature::kIndirect) {
  WorldShape shape;
  shape.nic.features = features;
  shape.xsk.frame_size = 512;
  shape.xsk.headroom = 256;
  return shape;
}

}  // namespace tandem::test
