// SPDX-License-Identifier: Apache-2.0
// Devices whose rings are packed: sizes, areas, bases, and changes of the layout.
#include "tests/vmm/front_end.hpp"
#include "vmm/vhost_user_device.hpp"

using namespace tandem;
using namespace tandem::test;
using R = VhostUserRequest;

namespace {

constexpr std::uint64_t kPackedFeatures = FrontEnd::kFeatures | virtio_feature::kRingPacked;

struct Ring {
  std::uint32_t size = 256;
  std::uint32_t base = kPackedStartBase;
  std::uint64_t descriptors = FrontEnd::kUser + 0x10000, driver = FrontEnd::kUser + 0x14000,
                device = FrontEnd::kUser + 0x14004;

  [[nodiscard]] Message addr() const {
    return with(R::kSetVringAddr, VhostUserVringAddress{0, 0, descriptors, device, driver, 0});
  }
};

// A device with memory, and `features` negotiated.
VhostUserDevice negotiated(const FrontEnd& front_end, std::uint64_t features) {
  auto device = make_device(1);
  accept(device, u64(R::kSetProtocolFeatures, default_protocol_features()));
  accept(device, u64(R::kSetFeatures, features));
  accept(device, front_end.mem_table());
  accept(device, FrontEnd::enable(0));
  return device;
}

void start(VhostUserDevice& device, FrontEnd& front_end, const Ring& ring) {
  accept(device, FrontEnd::num(0, ring.size));
  accept(device, FrontEnd::base(0, ring.base));
  accept(device, ring.addr());
  accept(device, front_end.kick(0));
}

std::uint32_t stop(VhostUserDevice& device, std::uint32_t owners_base) {
  const Outcome outcome = accept(device, FrontEnd::get_base(0));
  REQUIRE(outcome.vring_base_index.has_value());
  Outcome answered;
  answered.reply = device.vring_base_reply(0, owners_base);
  return reply_payload<VhostUserVringState>(answered).num;
}

}  // namespace

TEST_CASE("packed rings of any size run, with both positions in their base") {
  FrontEnd front_end;
  for (const std::uint32_t size : {1u, 2u, 3u, 100u, 256u, 32768u}) {
    auto device = negotiated(front_end, kPackedFeatures);
    Ring ring;
    ring.size = size;
    ring.descriptors = FrontEnd::kUser + FrontEnd::kHalf;  // 512 KiB for the largest
    start(device, front_end, ring);
    REQUIRE(runs(device, 0));
    const VringDescription& shown = device.description().vrings[0];
    CHECK(shown.size == size);
    CHECK(shown.base == kPackedStartBase);
    CHECK(shown.avail_user_address == ring.driver);
    CHECK(shown.used_user_address == ring.device);
    CHECK((device.description().features & kFeatureRingPacked) != 0);
  }
}

TEST_CASE("packed sizes that no ring has are refused, split rings stay powers of two") {
  FrontEnd front_end;
  auto packed = negotiated(front_end, kPackedFeatures);
  for (const std::uint32_t size : {0u, 32769u, 65536u, 0x80000001u}) reject(packed, FrontEnd::num(0, size));
  auto split = negotiated(front_end, FrontEnd::kFeatures);
  reject(split, FrontEnd::num(0, 100));
}

TEST_CASE("areas of a packed ring must be aligned and inside memory") {
  FrontEnd front_end;
  const std::uint64_t end = FrontEnd::kUser + 2 * FrontEnd::kHalf;
  struct Row {
    const char* name;
    std::uint64_t Ring::*field;
    std::uint64_t value;
    bool fine;
  };
  const Row rows[] = {
      {"descriptors at 8", &Ring::descriptors, FrontEnd::kUser + 8, false},
      {"descriptors end with memory", &Ring::descriptors, end - 16 * 256, true},
      {"descriptors end beyond", &Ring::descriptors, end - 16 * 255, false},
      {"driver area at 2", &Ring::driver, FrontEnd::kUser + 2, false},
      {"driver area at 4", &Ring::driver, FrontEnd::kUser + 4, true},
      {"driver area at the end", &Ring::driver, end - 4, true},  // a split avail ring would not fit
      {"driver area beyond", &Ring::driver, end, false},
      {"device area at 2", &Ring::device, FrontEnd::kUser + 2, false},
      {"device area at the end", &Ring::device, end - 4, true},
      {"device area beyond", &Ring::device, end, false},
  };
  for (const Row& row : rows) {
    INFO(row.name);
    auto device = negotiated(front_end, kPackedFeatures);
    accept(device, FrontEnd::num(0, 256));
    Ring ring;
    ring.*row.field = row.value;
    if (row.fine)
      accept(device, ring.addr());
    else
      reject(device, ring.addr());
  }
}

TEST_CASE("a packed base: told whole, told by half as DPDK does, not told, or impossible") {
  FrontEnd front_end;
  struct Row {
    std::uint32_t told, shown;
    bool fine = true;
  };
  const Row rows[] = {
      {kPackedStartBase, kPackedStartBase},
      {0x8000, kPackedStartBase},  // virtio-user
      {0x00050005, 0x00050005},    // second round
      {0x80630063, 0x80630063},    // slot 99 of 100
      {0x80008005, 0x80008005},    // five in flight
      {0x80000000, 0x80000000},    // the whole ring in flight
      {0x80640064, 0, false},      // slot 100
      {0x80008064, 0, false},      // avail alone beyond
      {0x80058000, 0, false},      // used ahead of avail
      {0xffffffff, 0, false},
  };
  for (const Row& row : rows) {
    INFO(std::hex << row.told);
    auto device = negotiated(front_end, kPackedFeatures);
    Ring ring;
    ring.size = 100;
    accept(device, FrontEnd::num(0, ring.size));
    accept(device, FrontEnd::base(0, row.told));
    accept(device, ring.addr());
    if (!row.fine) {
      reject(device, front_end.kick(0));
      continue;
    }
    accept(device, front_end.kick(0));
    REQUIRE(runs(device, 0));
    CHECK(device.description().vrings[0].base == row.shown);
  }
  auto device = negotiated(front_end, kPackedFeatures);
  const Ring ring;
  accept(device, FrontEnd::num(0, ring.size));
  accept(device, ring.addr());
  accept(device, front_end.kick(0));
  CHECK(device.description().vrings[0].base == kPackedStartBase);
}

TEST_CASE("GET_VRING_BASE of a packed ring carries both positions, and the next start goes on there") {
  FrontEnd front_end;
  auto device = negotiated(front_end, kPackedFeatures);
  start(device, front_end, {});
  const std::uint32_t starts = device.description().vrings[0].start_count;
  CHECK(stop(device, 0x00110011) == 0x00110011);
  CHECK(reply_payload<VhostUserVringState>(accept(device, FrontEnd::get_base(0))).num == 0x00110011);
  Ring again;
  again.base = 0x00110011;
  start(device, front_end, again);
  CHECK(device.description().vrings[0].base == 0x00110011);
  CHECK(device.description().vrings[0].start_count == starts + 1);
  // A start without a new base after a run nobody asked about begins at the beginning.
  accept(device, u64(R::kSetStatus, 0));
  accept(device, front_end.kick(0));
  CHECK(device.description().vrings[0].base == kPackedStartBase);
}

TEST_CASE("rings change their layout between runs only, and indices of the other layout are forgotten") {
  FrontEnd front_end;
  auto device = negotiated(front_end, FrontEnd::kFeatures);
  accept(device, FrontEnd::num(0));
  accept(device, FrontEnd::base(0, 4711));
  accept(device, FrontEnd::addr(0));
  accept(device, front_end.kick(0));
  REQUIRE(runs(device, 0));
  reject(device, u64(R::kSetFeatures, kPackedFeatures));
  stop(device, 4711);
  accept(device, u64(R::kSetFeatures, kPackedFeatures));
  const Ring ring;
  accept(device, ring.addr());
  accept(device, front_end.kick(0));
  REQUIRE(runs(device, 0));
  CHECK(device.description().vrings[0].base == kPackedStartBase);
  // And back, as a guest's firmware after a reboot does.
  accept(device, u64(R::kSetStatus, 0));
  accept(device, u64(R::kSetFeatures, FrontEnd::kFeatures));
  accept(device, FrontEnd::addr(0));
  accept(device, front_end.kick(0));
  CHECK(device.description().vrings[0].base == 0);
}

TEST_CASE("a packed device survives its supervisor with its positions") {
  FrontEnd front_end;
  auto device = negotiated(front_end, kPackedFeatures);
  start(device, front_end, {100, 0x00050005});
  std::vector<RestoredItem> items;
  for (const SavedItem& item : device.save()) {
    RestoredItem restored{item.item, item.bytes, {}};
    for (const int fd : item.fds) restored.fds.emplace_back(::dup(fd));
    items.push_back(std::move(restored));
  }
  auto restored = VhostUserDevice::restore(std::move(items));
  REQUIRE(restored.has_value());
  CHECK(content(*restored) == content(device));
}
