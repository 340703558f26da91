// SPDX-License-Identifier: Apache-2.0
// Writes the seeds of the corpora, from the scripts of front ends that the other tests use and from valid messages:
// `TANDEM_CORPUS=../corpus fuzz_seeds`. By hand, when a format changes; ASCII corpora are written by hand.
#include <cstdlib>
#include <fstream>

#include "common/layout/control_message.hpp"
#include "recovery/vault/protocol.hpp"
#include "tests/fuzz/targets/descriptors.hpp"
#include "tests/support/engine_world.hpp"
#include "tests/support/tcp_packets.hpp"
#include "tests/vmm/front_end.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

class Seed {
 public:
  Seed& u8(unsigned value) {
    bytes_.push_back(static_cast<char>(value));
    return *this;
  }
  Seed& u16(unsigned value) { return u8(value & 0xffu).u8(value >> 8 & 0xffu); }
  Seed& bytes(std::span<const std::byte> more) {
    bytes_.append(reinterpret_cast<const char*>(more.data()), more.size());
    return *this;
  }
  template <class T>
  Seed& value(const T& value) {
    return bytes(std::as_bytes(std::span(&value, 1)));
  }
  void write(const std::string& target, const std::string& name) const {
    const char* corpus = std::getenv("TANDEM_CORPUS");
    REQUIRE(corpus != nullptr);
    const std::filesystem::path folder = std::filesystem::path(corpus) / target;
    std::filesystem::create_directories(folder);
    std::ofstream(folder / name, std::ios::binary) << bytes_;
  }

 private:
  std::string bytes_;
};

// As vhost_user.cpp reads it.
class Recording {
 public:
  explicit Recording(const FrontEnd& front_end) : front_end_(front_end) { seed_.u8(0x81); }
  Recording& play(const std::vector<Message>& script, unsigned flags = 0) {
    for (const Message& message : script) {
      seed_.u8(static_cast<unsigned>(message.fds.size()) | flags);
      for (const int fd : message.fds) seed_.u8(fd == front_end_.memory() ? fuzz::kGuestMemory : fuzz::kEvent);
      seed_.bytes(message.bytes);
    }
    return *this;
  }
  Recording& step(unsigned what) {
    seed_.u8(what);
    return *this;
  }
  void write(const std::string& name) const { seed_.write("vhost_user", name); }

 private:
  const FrontEnd& front_end_;
  Seed seed_;
};

}  // namespace

TEST_CASE("vhost_user") {
  FrontEnd front_end;
  constexpr unsigned kTwice = 0x10, kLeave = 0xf0, kRestore = 0xf1;
  Recording(front_end).play(front_end.qemu_connect(2)).play(front_end.qemu_start(2)).write("qemu-slots");
  Recording(front_end)
      .play(front_end.qemu_connect(2))
      .play(front_end.qemu_start(2, false), kTwice)
      .step(kRestore)
      .play(FrontEnd::qemu_stop(2))
      .play(front_end.qemu_start(2, false, 5))
      .write("qemu-table-stop-start");
  Recording(front_end)
      .play(front_end.dpdk_start(1))
      .step(kLeave)
      .play(front_end.dpdk_start(2), kTwice)
      .write("virtio-user");
}

TEST_CASE("engine_split") {
  const auto descriptor = [](Seed& seed, unsigned where, unsigned index, unsigned region, unsigned at, unsigned length,
                             unsigned flags, unsigned next) -> Seed& {
    return seed.u8(0).u8(where).u16(index).u8(region).u16(at).u8(length).u16(flags).u16(next);
  };
  constexpr unsigned kTransmit = 0, kReceive = 9, kPoll = 5, kOffer = 1, kReceived = 4, kSent = 6, kSleep = 7, kDie = 8;
  for (const unsigned features : {0u, 0xfu}) {
    Seed seed;
    seed.u8(features);
    descriptor(seed, 1, 0, 0, 0, 12, 1, 1);  // header, then two pieces, the last in the other region
    descriptor(seed, 1, 1, 0, 100, 30, 1, 2);
    descriptor(seed, 1, 2, 1, 0, 40, 0, 0);
    descriptor(seed, 1, 3, 2, 20, 80, 0, 0);  // across the end of a region
    seed.u8(kOffer + kTransmit).u16(0).u8(kOffer + kTransmit).u16(3).u8(kPoll).u8(kSent).u8(kSleep);
    seed.write("engine_split", "transmit-" + std::to_string(features));
    Seed back;
    back.u8(features);
    descriptor(back, 0, 0, 0, 0, 100, 3, 1);
    descriptor(back, 0, 1, 1, 0, 100, 2, 0);
    descriptor(back, 0, 2, 0, 512, 200, 2, 0);
    descriptor(back, 0, 3, 1, 512, 60, 2, 0);
    for (const unsigned head : {0u, 2u, 3u}) back.u8(kOffer + kReceive).u16(head);
    back.u8(kReceived).u8(63).u8(kReceived).u8(90).u8(kReceived).u8(200).u8(kPoll).u8(kDie).u8(kSleep);
    back.write("engine_split", "receive-" + std::to_string(features));
  }
  Seed indirect;
  indirect.u8(0xf);
  descriptor(indirect, 2, 0, 0, 0, 12, 1, 1);
  descriptor(indirect, 2, 1, 0, 50, 60, 0, 0);
  // The table lies where the NIC's transmit slots are: address 3 is in the NIC's memory.
  const NicShape shape{16, 64, 0, 0xf, ChainStyle::kDirect, ChainStyle::kDirect, {}, 0};
  GuestSpace space;
  std::vector<std::byte> room(GuestNic::bytes(shape));
  space.add(kGuestBase, room.size(), room.data());
  const GuestNic nic(space, kGuestBase, shape);
  descriptor(indirect, 1, 0, 3, static_cast<unsigned>(nic.transmit_slot(0) - kGuestBase), 32, 4, 0);
  indirect.u8(kOffer + kTransmit).u16(0).u8(kPoll).u8(kSent);
  indirect.write("engine_split", "indirect");
}

TEST_CASE("engine_packed") {
  // A slot of the ring itself: address, length, id, flags. AVAIL and USED are the offer's to set.
  const auto slot = [](Seed& seed, unsigned ring, unsigned index, unsigned region, unsigned at, unsigned length,
                       unsigned flags) -> Seed& {
    return seed.u8(0).u8(ring).u16(index).u8(region).u16(at).u8(length).u16(0).u16(flags);
  };
  constexpr unsigned kRx = 0, kTx = 1, kNext = 1, kWrite = 2;
  constexpr unsigned kOffer = 1, kOfferMany = 2, kOnReceive = 9, kReceived = 4, kPoll = 5, kSent = 6, kSleep = 7,
                     kDie = 8;
  for (const unsigned features : {0u, 0xfu, 0x2fu}) {
    Seed seed;
    seed.u8(features);
    slot(seed, kTx, 0, 0, 0, 12, kNext);
    slot(seed, kTx, 1, 0, 100, 30, kNext);
    slot(seed, kTx, 2, 1, 0, 40, 0);
    slot(seed, kTx, 3, 2, 20, 80, 0);  // across the end of a region
    seed.u8(kOfferMany).u8(2).u16(5).u8(kOffer).u16(3).u8(kPoll).u8(kSent).u8(kSleep);
    // Round the ring's end: 12 more, then one chain over it.
    for (unsigned index = 4; index < 16; ++index) slot(seed, kTx, index, 0, 64 * index, 60, 0);
    for (unsigned index = 4; index < 15; ++index) seed.u8(kOffer).u16(index);
    seed.u8(kPoll);
    slot(seed, kTx, 15, 0, 0, 20, kNext);
    slot(seed, kTx, 0, 0, 100, 30, 0);
    seed.u8(kOfferMany).u8(1).u16(7).u8(kPoll).u8(kSent);
    seed.write("engine_packed", "transmit-" + std::to_string(features));
    Seed back;
    back.u8(features);
    slot(back, kRx, 0, 0, 0, 100, kWrite | kNext);
    slot(back, kRx, 1, 1, 0, 100, kWrite);
    slot(back, kRx, 2, 0, 512, 200, kWrite);
    slot(back, kRx, 3, 1, 512, 60, kWrite);
    back.u8(kOfferMany + kOnReceive).u8(1).u16(0);
    for (const unsigned id : {2u, 3u}) back.u8(kOffer + kOnReceive).u16(id);
    back.u8(kReceived).u8(63).u8(kReceived).u8(90).u8(kReceived).u8(200).u8(kPoll).u8(kDie).u8(kSleep);
    back.write("engine_packed", "receive-" + std::to_string(features));
  }
  Seed indirect;
  indirect.u8(0xf);
  // A table where the NIC's transmit slots are: entries as in a ring, but for AVAIL, USED and NEXT.
  slot(indirect, 2, 0, 0, 0, 12, 0);
  slot(indirect, 2, 1, 0, 50, 60, 0);
  const NicShape shape{16, 64, 0, 0xf | feature::kPacked, ChainStyle::kDirect, ChainStyle::kDirect, {}, 0};
  GuestSpace space;
  std::vector<std::byte> room(GuestNic::bytes(shape));
  space.add(kGuestBase, room.size(), room.data());
  const GuestNic nic(space, kGuestBase, shape);
  slot(indirect, kTx, 0, 3, static_cast<unsigned>(nic.transmit_slot(0) - kGuestBase), 32, 4);
  indirect.u8(kOffer).u16(0).u8(kPoll).u8(kSent);
  indirect.write("engine_packed", "indirect");
}

TEST_CASE("offload") {
  const TcpShape shapes[] = {{},
                             {.ipv6 = true},
                             {.vlan_tags = 2, .ip_options = 3, .tcp_options = 3},
                             {.ipv6 = true, .vlan_tags = 1, .ip_options = 2},
                             {.payload = 90, .segment = 7, .flags = 0x99}};
  for (unsigned n = 0; n < std::size(shapes); ++n) {
    TcpPacket packet(shapes[n]);
    Seed()
        .u8(0xf)
        .u16(1792)
        .u16(504)
        .value(packet.net)
        .bytes(packet.bytes)
        .write("offload", "tcp-" + std::to_string(n));
    packet.net.gso_type = 0;
    Seed().u8(1).u16(1792).u16(504).value(packet.net).bytes(packet.bytes).write("offload", "sum-" + std::to_string(n));
  }
}

TEST_CASE("redo_record") {
  for (unsigned how = 0; how < 32; ++how) {  // bit 3: with a neighbour; bit 4: packed
    Seed seed;
    seed.u8(how);
    seed.write("redo_record", "good-" + std::to_string(how));
    if (how % 2 == 0) continue;
    // A field of the record, a cursor, a ring index; the CRC made right in between.
    seed.u8(0).u16(24 + how).u8(0).u8(how).u8(7).u8(3).u16(0).u8(1).u16(how).u8(6).u16(64).u8(0).u8(9);
    seed.write("redo_record", "damaged-" + std::to_string(how));
    if ((how & 8u) == 0) continue;
    // Fields of the forward's destination, each with a right CRC.
    for (unsigned at = 0; at < offsetof(RedoDestination, used) + 8; at += 2) {
      Seed lie;
      lie.u8(how).u8(1).u16(offsetof(RedoRecord, destination) + at).u8(1).u8(5).u8(0).u8(7);
      if (at % 8 == 0) lie.write("redo_record", "destination-" + std::to_string(how) + "-" + std::to_string(at));
    }
  }
}

TEST_CASE("controller") {
  constexpr unsigned kLawful = 0, kAttach = 2 << 5, kDescribe = 3 << 5;
  const auto describe = [](Seed& seed, unsigned how) {
    seed.u8(kDescribe | 5).u8(fuzz::kGuestMemory).u8(1).u8(2).u8(1).u8(2).u8(how).u8(0);
  };
  const auto attach = [](Seed& seed, unsigned device) { seed.u8(kAttach | 2).u8(0xf0).u8(0xf1).u8(device).u8(0); };
  const auto lawful = [](Seed& seed, ControlType type, const auto& body) {
    seed.u8(kLawful).u16(static_cast<unsigned>(type)).u8(sizeof body).value(body);
  };
  Seed seed;
  seed.u8(0).u8(12);
  attach(seed, 0);
  describe(seed, 0);
  lawful(seed, ControlType::kArm, ArmBody{0, 5, 0, 0});
  describe(seed, 2);
  lawful(seed, ControlType::kPrune, DeviceBody{0, 0, 2});
  attach(seed, 1);
  describe(seed, 3);
  lawful(seed, ControlType::kDetach, DeviceBody{0, 0, 0});
  seed.write("controller", "life");
  Seed drill;
  drill.u8(0).u8(3);
  lawful(drill, ControlType::kArm, ArmBody{0, 5, 0, 0});
  drill.u8(1 << 5).u16(7).bytes(std::as_bytes(std::span("garbage", 7)));
  drill.write("controller", "garbage");
}

TEST_CASE("member_message") {
  const auto write = [](ControlType type, const auto& body, const char* name) {
    ControlHeader header;
    header.type = type;
    header.body_size = sizeof body;
    Seed seed;
    seed.u8(0).value(header).value(body);
    seed.write("member_message", name);
  };
  ReadyBody ready;
  ready.shard_count = 1;
  ready.thread_ids[0] = 4711;
  write(ControlType::kReady, ready, "ready");
  write(ControlType::kHeld, DeviceBody{3, 0, 7}, "held");
  write(ControlType::kInForce, DeviceBody{63, 0, 8}, "in-force");
  write(ControlType::kDetached, DeviceBody{0, 0, 0}, "detached");
  write(ControlType::kTookOver, TakeoverBody{}, "took-over");
  write(ControlType::kFirstTransaction, TakeoverBody{}, "first-transaction");
  ProblemBody problem;
  std::strcpy(problem.text, "the uplink \x1b[2J is gone");
  write(ControlType::kProblem, problem, "problem");
}

TEST_CASE("vault_protocol") {
  for (const VaultRule& rule : kVaultRules) {
    const std::string name(rule.min_name, 'n');
    const std::vector<std::byte> body(std::min<std::size_t>(rule.max_body, 16), std::byte{1});
    const auto bytes =
        encode_vault_message(rule.type, name, rule.connection ? 3 : 0, rule.sequence ? 4 : 0, body, rule.min_fds);
    REQUIRE(bytes.has_value());
    Seed seed;
    seed.u8(static_cast<unsigned>(rule.sender == VaultSender::kVault) | static_cast<unsigned>(rule.min_fds) << 1);
    for (std::size_t i = 0; i < rule.min_fds; ++i) seed.u8(fuzz::kEvent);
    seed.bytes(*bytes);
    std::string file = rule.title;
    std::transform(file.begin(), file.end(), file.begin(), [](char c) { return static_cast<char>(std::tolower(c)); });
    seed.write("vault_protocol", file);
  }
}

TEST_CASE("vault") {
  constexpr unsigned kConnect = 7, kFrame = 11, kListenTo = 15, kApply = 4, kLeave = 8, kAttach = 0, kHello = 6,
                     kFetch = 5, kLawful = 3, kSecond = 16;
  Seed life;
  life.u8(kConnect).u8(kFrame).u8(0).u8(1).u8(0).u8(kListenTo).u8(kApply).u8(20);
  for (int i = 0; i < 20; ++i) life.u8(static_cast<unsigned>(i));
  life.u8(kFrame).u8(1).u8(fuzz::kGuestMemory).u8(5).u8(40);
  for (int i = 0; i < 40; ++i) life.u8(1);
  life.u8(kAttach).u8(kHello).u8(kListenTo).u8(kApply).u8(0).u8(kLeave).u8(kListenTo).u8(kApply).u8(0);
  life.write("vault", "relay");
  Seed items;
  items.u8(kLawful).u8(2).u8(1).u8(2).u8(1).u8(1).u8(3).u8('x').u8('y').u8('z');
  items.u8(kFetch).u8(kListenTo).u8(kConnect | kSecond).u8(9 | kSecond).u8(0).u8(5).u8(1).u8(0).u8(0).u8(0).u8(0).u8(0);
  items.u8(kLawful).u8(0).u8(2).u8(0).u8(kLawful | kSecond).u8(0).u8(6).u8(0);
  items.write("vault", "items");
}
