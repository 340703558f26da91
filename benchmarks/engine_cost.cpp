// SPDX-License-Identifier: Apache-2.0
// tandem-engine-cost: the engine at work in one process over plain memory, to be counted under callgrind.
//
// Bursts of 32 packets go one way; guest and kernel are played here. Nothing depends on time or on where memory lies,
// so that two runs execute the same instructions. Count inside transmit_burst() or receive_burst() only
// (--toggle-collect): what plays the ends is not the engine. Prints the number of packets.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <vector>

#include "tests/support/engine_world.hpp"

using namespace tandem;
using namespace tandem::test;

int main(int argc, char** argv) {
  std::string direction = "transmit";
  std::uint32_t bytes = 64, bursts = 1000;
  bool mergeable = true;
  CLI::App app{"The engine over plain memory. For benchmarks/run overhead, under callgrind."};
  app.add_option("--direction", direction, "transmit or receive")->check(CLI::IsMember({"transmit", "receive"}));
  app.add_option("--bytes", bytes, "of a packet")->check(CLI::Range(60u, 1700u));
  app.add_option("--bursts", bursts, "of 32 packets")->check(CLI::Range(1u, 1'000'000u));
  app.add_option("--mergeable", mergeable, "receive buffers");
  CLI11_PARSE(app, argc, argv);

  WorldShape shape;
  shape.nic.queue_size = 256;
  shape.nic.slot_size = 2048;
  shape.nic.features = feature::kVersion1 | (mergeable ? feature::kMergeable : 0);
  shape.xsk.rx_frames = shape.xsk.tx_frames = shape.xsk.tx_entries = 256;
  EngineWorld world(shape);
  FakeFence fence;
  ShardStepper shard(world.segment(), fence.view(), 1);
  shard.hold(world.make_ports(), {world.make_device(world.describe(1))});
  if (!shard.take_over()) return 1;
  GuestNic& nic = world.nics[0];
  KernelXsk& kernel = world.kernels[0];
  nic.transmit.calls_off(true);
  nic.receive.calls_off(true);
  nic.post();

  const std::vector<std::byte> packet(bytes, std::byte{0x5a});
  std::vector<std::byte> got;
  std::uint64_t packets = 0;
  for (std::uint32_t burst = 0; burst < bursts; ++burst) {
    for (std::uint32_t i = 0; i < kBurstPackets; ++i)
      if (direction == "transmit" ? !nic.send(packet) : !kernel.receive(packet)) return 2;
    if (direction == "transmit") nic.transmit.publish();
    shard.poll_once();
    while (kernel.send()) ++packets;
    kernel.complete();
    nic.reap();
    while (nic.take(got)) ++packets;
    nic.post();
  }
  if (packets != std::uint64_t{bursts} * kBurstPackets) return 3;
  std::printf("%llu\n", static_cast<unsigned long long>(packets));
  return 0;
}
