// SPDX-License-Identifier: Apache-2.0
// Guest to guest: a receiver that goes away, or is hostile, costs the sender nothing but packets that are counted as
// the receiver's. Malformed chains on such a receive queue: malformed_test.cpp, packed_malformed_test.cpp.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>

#include "tests/vhost-net-backend/bench.hpp"
#include "vhost-net-backend/guest_memory.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

const PacketFlow kFlow{60, 60};

WorldShape shape_of(std::uint64_t layout) {
  return neighbours(small_world(feature::kVersion1 | feature::kIndirect | layout));
}

// Until nothing moves: the burst that finds its receiver unfit moves nothing, the next one does. A stopped neighbour
// must not keep the owner busy. False: it does.
bool run_quiet(ShardStepper& owner) {
  int rounds = 0;
  for (int idle = 0; idle < 3;) {
    idle = owner.poll_once() ? 0 : idle + 1;
    if (++rounds > 1000) return false;
  }
  return true;
}
void run(ShardStepper& owner) { REQUIRE(run_quiet(owner)); }

// The sender has all its chains back, nobody's frames are lost, and the record is empty.
void check_sender(Bench& bench, std::uint32_t sent) {
  bench.nic().reap();
  CHECK(bench.nic().transmit.outstanding() == 0);
  CHECK(bench.nic().transmit.wrong_returns() == 0);
  CHECK(bench.state().transmit.packets == sent);
  CHECK(bench.state().transmit.dropped == 0);
  CHECK(bench.state().transmit.fault.load() == QueueFault::kNone);
  CHECK(bench.world.record().arm.load() == 0);
  for (const std::uint32_t pair : {0u, 1u}) CHECK(bench.world.audit(pair).clean());
}

// What the sender receives, and what the receiver sends, has nothing to do with it.
void check_others(Bench& bench) {
  bench.nic().post();
  Ledger in(kFlow);
  REQUIRE(send_from_uplink(bench.world, kFlow, 0, 5) == 5);
  run(bench.owner);
  std::vector<std::byte> packet;
  while (bench.nic().take(packet)) in.note(packet);
  CHECK(in.finish(5).clean());
}

Tally taken(GuestNic& nic, Ledger& ledger, std::uint32_t sent) {
  std::vector<std::byte> packet;
  while (nic.take(packet)) ledger.note(packet);
  return ledger.finish(sent);
}

}  // namespace

TEST_CASE("forward: an avail index of the receiver that jumps stops its queue, and costs the sender only packets") {
  for (const int jump : {65, 128, 1000, 32768, 65535}) {
    INFO("jump of " << jump);
    Bench bench(shape_of(0));
    bench.nic(1).receive.publish_index(static_cast<std::uint16_t>(jump));
    REQUIRE(send_from_guest(bench.world, kFlow, 0, 20) == 20);
    run(bench.owner);
    const VringCursors& receive = bench.state(1).receive;
    CHECK(receive.fault.load() == QueueFault::kAvailJump);
    CHECK(receive.overflow == 20);
    CHECK(receive.packets + receive.dropped == 0);
    CHECK(bench.nic(1).receive.used_index() == 0);
    check_sender(bench, 20);
    check_others(bench);
  }
}

TEST_CASE("forward: a packed chain of the receiver without an end stops its queue, after what came before it") {
  for (const std::uint32_t before : {0u, 3u}) {
    INFO("after " << before << " good chains");
    WorldShape shape = shape_of(feature::kPacked);
    shape.nic.queue_size = 50;
    Bench bench(shape);
    GuestNic& peer = bench.nic(1);
    peer.post(before);
    for (std::uint32_t i = 0; i < 50 - before; ++i)
      peer.receive.packed_descriptor(i) = {peer.receive_slot(40), 4, 0, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE};
    peer.receive.offer_packed(0, 50 - before);
    peer.receive.publish();
    REQUIRE(send_from_guest(bench.world, kFlow, 0, 20) == 20);
    run(bench.owner);
    const VringCursors& receive = bench.state(1).receive;
    CHECK(receive.fault.load() == QueueFault::kEndlessChain);
    CHECK(receive.packets == before);
    CHECK(receive.overflow == 20 - before);
    CHECK(receive.dropped == 0);
    CHECK(peer.receive.published() == before);
    check_sender(bench, 20);
    check_others(bench);
  }
}

TEST_CASE("forward: a receiver without buffers loses packets as its overflow, and gets the next ones in order") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  Bench bench(shape_of(layout));
  bench.nic(1).post(7);
  REQUIRE(send_from_guest(bench.world, kFlow, 0, 20) == 20);
  run(bench.owner);
  CHECK(bench.state(1).receive.packets == 7);
  CHECK(bench.state(1).receive.overflow == 13);
  Ledger ledger(kFlow);
  CHECK(taken(bench.nic(1), ledger, 7).clean());
  bench.nic(1).post();
  REQUIRE(send_from_guest(bench.world, kFlow, 20, 20) == 20);
  run(bench.owner);
  const Tally tally = taken(bench.nic(1), ledger, 40);
  CHECK(tally.lost == 13);
  CHECK(tally.duplicated + tally.reordered + tally.corrupt == 0);
  check_sender(bench, 40);
  check_others(bench);
}

TEST_CASE("forward: a receiver that is taken away between two bursts: what follows goes to the uplink") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  enum class Away { kDetached, kStopped, kOtherGroup };
  const Away away = GENERATE(Away::kDetached, Away::kStopped, Away::kOtherGroup);
  INFO("layout " << layout << ", way " << static_cast<int>(away));
  Bench bench(shape_of(layout));
  bench.nic(1).post();
  REQUIRE(send_from_guest(bench.world, kFlow, 0, 10) == 10);
  run(bench.owner);
  // Offered, not yet looked at.
  REQUIRE(send_from_guest(bench.world, kFlow, 10, 10) == 10);
  if (away == Away::kDetached) {
    bench.owner.post(DetachCommand{1});
  } else if (away == Away::kStopped) {
    DeviceDescription description = bench.world.describe(2, 1);
    description.vrings[0].flags &= ~VringDescription::kRunning;
    bench.owner.post(DescribeCommand{bench.world.make_device(description)});
  } else {
    const auto ports = std::const_pointer_cast<UplinkPorts>(bench.world.make_ports(1));
    ports->group = 2;
    bench.owner.post(AttachCommand{ports});
  }
  bench.owner.run_commands();
  const std::vector<std::byte> before(bench.world.guest_bytes().begin(), bench.world.guest_bytes().end());
  run(bench.owner);
  Ledger direct(kFlow), bridge(kFlow);
  CHECK(taken(bench.nic(1), direct, 10).clean());
  for (std::uint32_t number = 0; number < 10; ++number) {
    const auto packet = bench.kernel().send();
    REQUIRE(packet);
    std::uint32_t found = 0;
    CHECK((kFlow.intact(*packet, found) && found == 10 + number));
  }
  bench.kernel().complete();
  // Not a byte of what had been the receiver's.
  const std::size_t from = bench.nic(1).receive.place().descriptors - kGuestBase;
  CHECK(std::memcmp(bench.world.guest_bytes().data() + from, before.data() + from, before.size() - from) == 0);
  CHECK(bench.state(1).receive.packets == 10);
  CHECK(bench.state(1).receive.overflow == 0);
  drain_completions(bench.pair());
  check_sender(bench, 20);
  check_others(bench);
}

TEST_CASE("forward: a receiver whose memory shrinks is stopped, and costs the sender only packets") {
  // In a child, because the fault handler is for the whole process.
  for (const std::uint64_t layout : kLayouts)
    for (const bool rings_too : {false, true}) {
      INFO("layout " << layout << (rings_too ? ", rings too" : ", buffers only"));
      const pid_t child = ::fork();
      if (child == 0) {
        if (!install_guest_fault_handler()) ::_exit(10);
        EngineWorld world(shape_of(layout));
        // A file of its own under all memory of the receiver, with the same content: its rings come first.
        const std::size_t bytes = world.guest_bytes().size();
        const UniqueFd file{::memfd_create("shrinks", MFD_CLOEXEC)};
        if (::ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) ::_exit(11);
        if (::pwrite(file.get(), world.guest_bytes().data(), bytes, 0) != static_cast<ssize_t>(bytes)) ::_exit(12);
        auto* mapped =
            static_cast<std::byte*>(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0));
        if (mapped == MAP_FAILED) ::_exit(13);
        GuestSpace space;
        space.add(kGuestBase, bytes, mapped);
        GuestNic peer = world.nics[1];
        peer.rebase(space);
        DeviceDescription description = world.describe(1, 1);
        for (VringDescription& vring : description.vrings) vring.flags &= ~VringDescription::kHasCall;
        std::vector<UniqueFd> fds;
        for (std::uint32_t i = 0; i < description.region_count; ++i) fds.emplace_back(::dup(file.get()));
        std::vector<std::string> problems;
        auto device = Device::make(description, std::move(fds), nullptr, problems);
        if (!device) ::_exit(14);
        FakeFence fence;
        ShardStepper owner(world.segment(), fence.view(), 1);
        owner.post(AttachCommand{world.make_ports(1)});
        owner.hold(world.make_ports(), {world.make_device(world.describe(1)), *device});
        if (!owner.take_over()) ::_exit(15);
        peer.post();
        send_from_guest(world, kFlow, 0, 10);
        while (owner.poll_once()) {
        }
        Ledger ledger(kFlow);
        if (!taken(peer, ledger, 10).clean()) ::_exit(16);
        peer.post();
        send_from_guest(world, kFlow, 10, 10);
        const std::uint64_t keep = rings_too ? 0 : peer.receive_slot(0) - kGuestBase;
        if (::ftruncate(file.get(), static_cast<off_t>((keep + 4095) / 4096 * 4096)) != 0) ::_exit(17);
        owner.sleep();  // and asks the rings that are gone for kicks
        if (!run_quiet(owner)) ::_exit(18);
        world.nics[0].reap();
        const VringCursors& receive = world.state(1).receive;
        const VringCursors& transmit = world.state(0).transmit;
        if (!(*device)->memory()->faulted() || receive.fault.load() != QueueFault::kMemoryFault) ::_exit(19);
        if (receive.packets != 10 || receive.overflow != 10) ::_exit(20);
        if (transmit.packets != 20 || transmit.dropped != 0 || transmit.fault.load() != QueueFault::kNone) ::_exit(21);
        if (world.nics[0].transmit.outstanding() != 0 || world.record().arm.load() != 0) ::_exit(22);
        ::_exit(0);
      }
      int status = 0;
      REQUIRE(::waitpid(child, &status, 0) == child);
      CAPTURE(status);
      CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 0));
    }
}
