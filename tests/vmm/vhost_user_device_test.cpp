// SPDX-License-Identifier: Apache-2.0
// The message orders of real front ends, and when a vring runs.
#include "vmm/vhost_user_device.hpp"

#include "tests/vmm/front_end.hpp"

using namespace tandem;
using namespace tandem::test;
using R = VhostUserRequest;

TEST_CASE("offered features are what the datapath has") {
  auto device = make_device();
  CHECK(reply_u64(accept(device, raw(R::kGetFeatures))) == 0xd7063bb8b);
  CHECK(reply_u64(accept(device, raw(R::kGetProtocolFeatures))) == 0x1801d);
}

TEST_CASE("a configuration beyond the code's abilities is refused") {
  auto config = test_config();
  SECTION("UDP segmentation") { config.virtio_features |= 1ull << 14; }
  SECTION("ring reset") { config.virtio_features |= 1ull << 40; }
  SECTION("migration log") { config.protocol_features |= protocol_feature::kLogShmfd; }
  SECTION("no queue") { config.max_queue_pairs = 0; }
  SECTION("too many queues") { config.max_queue_pairs = kMaxQueuePairsPerDevice + 1; }
  SECTION("MTU") { config.mtu = 67; }
  CHECK_FALSE(VhostUserDevice::create(config).has_value());
}

TEST_CASE("QEMU 7.2 starts a device with two queue pairs") {
  const bool slots = GENERATE(true, false);
  FrontEnd qemu;
  auto device = make_device(2);
  const std::uint64_t first = device.description().generation;
  CHECK(first == 41);
  play(device, qemu.qemu_connect(2));
  for (std::uint32_t vring = 0; vring < 4; ++vring) CHECK_FALSE(runs(device, vring));
  play(device, qemu.qemu_start(2, slots, 17));

  const DeviceDescription& description = device.description();
  CHECK(description.version == kDeviceDescriptionVersion);
  CHECK(description.device == 3);
  CHECK(description.generation > first);
  CHECK(description.features == (FrontEnd::kFeatures & ~kVhostUserFProtocolFeatures));
  CHECK(description.mtu == 1500);
  CHECK(description.queue_pairs == 2);
  REQUIRE(description.region_count == 2);
  CHECK(description.regions[1].guest_address == 0x100000000);
  CHECK(description.regions[1].mmap_offset == FrontEnd::kHalf);
  for (std::uint32_t vring = 0; vring < 4; ++vring) {
    const VringDescription& shown = description.vrings[vring];
    CHECK(shown.flags == (VringDescription::kRunning | VringDescription::kHasKick | VringDescription::kHasCall));
    CHECK(shown.size == FrontEnd::kRingSize);
    CHECK(shown.base == 17);
    CHECK(shown.start_count == 8);
    CHECK(shown.used_user_address == FrontEnd::addresses(vring).used_user_address);
  }
  CHECK(device.description_fds().size() == 2 + 4 * 2);
  CHECK((::fcntl(qemu.kick_fd(0), F_GETFL) & O_NONBLOCK) != 0);
  CHECK((::fcntl(qemu.call_fd(0), F_GETFL) & O_NONBLOCK) != 0);
}

TEST_CASE("description_fds follow the fixed order") {
  FrontEnd qemu;
  auto device = make_device(1);
  play(device, qemu.qemu_connect(1));
  play(device, qemu.qemu_start(1));
  accept(device, u64(R::kSetVringCall, 0 | kVringFileNoFd));
  const std::vector<int> fds = device.description_fds();
  REQUIRE(fds.size() == 2 + 1 + 2);
  CHECK(same_eventfd(fds[2], qemu.kick_fd(0)));
  CHECK(same_eventfd(fds[3], qemu.kick_fd(1)));
  CHECK(same_eventfd(fds[4], qemu.call_fd(1)));
  CHECK(device.description().vrings[0].flags == (VringDescription::kRunning | VringDescription::kHasKick));
}

TEST_CASE("QEMU 7.2 stops, asks for the indices after resetting the status, and starts again") {
  FrontEnd qemu;
  auto device = make_device(2);
  play(device, qemu.qemu_connect(2));
  play(device, qemu.qemu_start(2));
  for (const Message& message : FrontEnd::qemu_stop(2)) {
    const Outcome outcome = accept(device, message);
    CHECK(outcome.wait_for_owners);
    if (load_wire<VhostUserHeader>(message.bytes).request != static_cast<std::uint32_t>(R::kGetVringBase)) continue;
    REQUIRE(outcome.vring_base_index.has_value());
    CHECK_FALSE(outcome.reply.has_value());
    Outcome answered;
    answered.reply = device.vring_base_reply(*outcome.vring_base_index, 1234);
    const auto payload = reply_payload<VhostUserVringState>(answered);
    CHECK(payload.index == *outcome.vring_base_index);
    CHECK(payload.num == 1234);
  }
  for (std::uint32_t vring = 0; vring < 4; ++vring) CHECK_FALSE(runs(device, vring));
  CHECK(device.description().region_count == 2);  // with memory slots QEMU does not send unchanged memory again
  CHECK(device.description_fds().size() == 2);

  auto script = qemu.qemu_start(2, true, 1234);
  std::erase_if(script, [](const Message& message) {
    return load_wire<VhostUserHeader>(message.bytes).request == static_cast<std::uint32_t>(R::kAddMemReg);
  });
  play(device, script);
  for (std::uint32_t vring = 0; vring < 4; ++vring) {
    CHECK(runs(device, vring));
    CHECK(device.description().vrings[vring].start_count == 9);
    CHECK(device.description().vrings[vring].base == 1234);
  }
  CHECK(device.highest_start_count() == 9);
}

TEST_CASE("DPDK 22.11 virtio_user starts, changes its memory, and stops") {
  FrontEnd dpdk;
  auto device = make_device(2);
  play(device, dpdk.dpdk_start(2));
  CHECK(runs(device, 0));
  CHECK(runs(device, 1));
  CHECK_FALSE(runs(device, 2));  // started, not enabled
  const std::uint32_t starts = device.description().vrings[0].start_count;

  // virtio_user_mem_event_cb: pause, new table, resume. The cursors go on.
  for (const std::uint32_t vring : {0u, 1u}) CHECK(accept(device, FrontEnd::enable(vring, 0)).wait_for_owners);
  CHECK_FALSE(runs(device, 0));
  const Outcome table =
      accept(device, dpdk.mem_table({{FrontEnd::kUser, 2 * FrontEnd::kHalf, FrontEnd::kUser, 0}}, {dpdk.memory()}));
  CHECK(table.wait_for_owners);
  CHECK(table.description_changed);
  CHECK(reply_u64(table) == 0);
  for (const std::uint32_t vring : {0u, 1u}) accept(device, FrontEnd::enable(vring, 1));
  CHECK(runs(device, 0));
  CHECK(device.description().vrings[0].start_count == starts);

  // virtio_user_stop_device
  for (std::uint32_t vring = 0; vring < 4; ++vring) accept(device, FrontEnd::enable(vring, 0));
  for (std::uint32_t vring = 0; vring < 4; ++vring) {
    const Outcome outcome = accept(device, FrontEnd::get_base(vring));
    CHECK(outcome.vring_base_index.has_value() == (vring < 2));                   // the second pair never ran:
    if (vring >= 2) CHECK(reply_payload<VhostUserVringState>(outcome).num == 0);  // its index is known
  }
}

TEST_CASE("a vring runs when it is started, enabled, complete and in memory, in whatever order that came") {
  FrontEnd front_end;
  auto device = make_device(1);
  accept(device, u64(R::kSetFeatures, FrontEnd::kFeatures));
  accept(device, front_end.mem_table());
  std::vector<Message> pieces{FrontEnd::num(0), FrontEnd::addr(0), front_end.kick(0), FrontEnd::enable(0)};
  std::vector<std::size_t> order{0, 1, 2, 3};
  const int permutation = GENERATE(range(0, 24));
  for (int i = 0; i < permutation; ++i) std::next_permutation(order.begin(), order.end());
  for (std::size_t i = 0; i < order.size(); ++i) {
    CHECK_FALSE(runs(device, 0));
    accept(device, pieces[order[i]]);
  }
  CHECK(runs(device, 0));
  CHECK(device.description().vrings[0].start_count == 8);
}

TEST_CASE("without VHOST_USER_F_PROTOCOL_FEATURES a vring starts enabled") {
  FrontEnd front_end;
  auto device = make_device(1);
  accept(device, u64(R::kSetFeatures, 0));  // a legacy driver, too
  accept(device, front_end.mem_table());
  for (const Message& message : {FrontEnd::num(0), FrontEnd::base(0, 5), FrontEnd::addr(0), front_end.kick(0)})
    accept(device, message);
  CHECK(runs(device, 0));
  CHECK(device.description().features == 0);
  CHECK(device.description().vrings[0].base == 5);
}

TEST_CASE("a vring that polls has no kick descriptor and runs") {
  FrontEnd front_end;
  auto device = make_device(1);
  accept(device, u64(R::kSetFeatures, 0));
  accept(device, front_end.mem_table());
  for (const Message& message : {FrontEnd::num(1), FrontEnd::addr(1), u64(R::kSetVringKick, 1 | kVringFileNoFd)})
    accept(device, message);
  CHECK(device.description().vrings[1].flags == VringDescription::kRunning);
}

TEST_CASE("a running vring") {
  FrontEnd front_end;
  auto device = make_device(1);
  play(device, front_end.qemu_connect(1));
  play(device, front_end.qemu_start(1));
  const std::uint64_t generation = device.description().generation;

  SECTION("does not notice a repetition of what it has") {
    for (const Message& message : {front_end.call(0), front_end.kick(0), FrontEnd::num(0), FrontEnd::addr(0),
                                   FrontEnd::enable(0), front_end.add_region(FrontEnd::low())})
      CHECK_FALSE(accept(device, message).description_changed);
    CHECK(device.description().generation == generation);
  }
  SECTION("gets a new call fd: new generation, old one closed") {
    const UniqueFd call = make_eventfd();
    const std::size_t before = open_fds();
    const Outcome outcome = accept(device, u64(R::kSetVringCall, 0, {call.get()}));
    CHECK(outcome.description_changed);
    CHECK(outcome.wait_for_owners);
    CHECK(open_fds() == before);
    CHECK(device.description().generation == generation + 1);
  }
  SECTION("cannot change size, place or index") {
    CHECK_FALSE(reject(device, FrontEnd::num(0, 128)).empty());
    CHECK_FALSE(reject(device, FrontEnd::base(0, 1)).empty());
    auto moved = FrontEnd::addresses(0);
    moved.used_user_address += 64;
    CHECK_FALSE(reject(device, with(R::kSetVringAddr, moved)).empty());
  }
  SECTION("pauses while its memory is away") {
    CHECK(accept(device, front_end.remove_region(FrontEnd::low())).wait_for_owners);
    CHECK_FALSE(runs(device, 0));
    accept(device, front_end.add_region(FrontEnd::low()));
    CHECK(runs(device, 0));
    CHECK(device.description().vrings[0].start_count == 8);
  }
  SECTION("keeps running when memory is added or removed elsewhere") {
    accept(device, front_end.remove_region(FrontEnd::high()));
    CHECK(device.description().region_count == 1);
    CHECK(runs(device, 0));
  }
  SECTION("stops at RESET_OWNER and needs ENABLE again") {
    CHECK(accept(device, raw(R::kResetOwner)).wait_for_owners);
    accept(device, front_end.kick(0));
    CHECK_FALSE(runs(device, 0));
    accept(device, FrontEnd::enable(0));
    CHECK(runs(device, 0));
  }
  SECTION("starts at index 0 after a reset if nobody said otherwise") {
    accept(device, u64(R::kSetStatus, 0));
    accept(device, front_end.kick(0));
    CHECK(runs(device, 0));
    CHECK(device.description().vrings[0].base == 0);
    CHECK(device.description().vrings[0].start_count == 9);
  }
  SECTION("different features take something away") {
    const Outcome outcome = accept(device, u64(R::kSetFeatures, FrontEnd::kFeatures & ~virtio_feature::kEventIdx));
    CHECK(outcome.wait_for_owners);
    CHECK(outcome.description_changed);
  }
  SECTION("is gone after a disconnect, and so is the memory; the counts go on") {
    const std::size_t before = open_fds();
    device.disconnect();
    CHECK(open_fds() < before);
    CHECK(device.description().generation == generation + 1);
    CHECK(device.description().region_count == 0);
    CHECK(device.description().features == 0);
    CHECK(device.description_fds().empty());
    CHECK_FALSE(runs(device, 0));
    play(device, front_end.qemu_connect(1));
    play(device, front_end.qemu_start(1));
    CHECK(runs(device, 0));
    CHECK(device.description().vrings[0].start_count == 9);
  }
}

TEST_CASE("answers to questions") {
  auto device = make_device(4);
  accept(device, u64(R::kSetProtocolFeatures, default_protocol_features()));
  CHECK(reply_u64(accept(device, raw(R::kGetQueueNum))) == 4);  // pairs
  CHECK(reply_u64(accept(device, raw(R::kGetMaxMemSlots))) == kMaxMemoryRegions);
  accept(device, u64(R::kSetStatus, 11));
  CHECK(reply_u64(accept(device, raw(R::kGetStatus))) == 11);
}

TEST_CASE("NEED_REPLY is answered once REPLY_ACK is negotiated, and ignored before") {
  auto device = make_device();
  CHECK_FALSE(accept(device, raw(R::kSetOwner, {}, {}, true)).reply.has_value());
  accept(device, u64(R::kSetProtocolFeatures, protocol_feature::kReplyAck));
  CHECK(reply_u64(accept(device, raw(R::kSetOwner, {}, {}, true))) == 0);
  CHECK_FALSE(accept(device, raw(R::kSetOwner)).reply.has_value());
}

TEST_CASE("NET_SET_MTU") {
  auto device = make_device();
  accept(device, u64(R::kSetProtocolFeatures, default_protocol_features()));
  CHECK(reply_u64(accept(device, u64(R::kNetSetMtu, 1400, {}, true))) == 0);
  CHECK(device.description().mtu == 1400);
  for (const std::uint64_t bad : {0ull, 67ull, 1501ull, 9217ull, 0x100000000ull + 1400}) {
    const Outcome outcome = accept(device, u64(R::kNetSetMtu, bad, {}, true));
    CHECK(reply_u64(outcome) != 0);
    CHECK_FALSE(outcome.refusal.empty());
    CHECK_FALSE(reject(device, u64(R::kNetSetMtu, bad)).empty());
  }
  CHECK(device.description().mtu == 1400);
}

TEST_CASE("SEND_RARP hands out the address") {
  auto device = make_device();
  accept(device, u64(R::kSetProtocolFeatures, default_protocol_features()));
  const std::array<std::uint8_t, 8> payload{0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0};
  const Outcome outcome = accept(device, with(R::kSendRarp, payload));
  REQUIRE(outcome.rarp_mac.has_value());
  CHECK(*outcome.rarp_mac == std::array<std::uint8_t, 6>{0x52, 0x54, 0, 0x12, 0x34, 0x56});
}
