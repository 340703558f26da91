// SPDX-License-Identifier: Apache-2.0
// A supervisor may die after acting on a message: its successor restores the device and sees the same message again.
#include "tests/vmm/front_end.hpp"

using namespace tandem;
using namespace tandem::test;
using R = VhostUserRequest;

namespace {

constexpr std::uint16_t kOwnersIndex = 4711;

/// What the vault would hand out: copies of bytes and descriptors.
std::vector<RestoredItem> through_vault(const std::vector<SavedItem>& items) {
  std::vector<RestoredItem> result;
  for (const SavedItem& item : items) result.push_back({item.item, item.bytes, copies(item.fds)});
  return result;
}

VhostUserDevice successor_of(VhostUserDevice& device) {
  auto restored = VhostUserDevice::restore(through_vault(device.save()));
  INFO((restored ? std::string{} : restored.error().text));
  REQUIRE(restored.has_value());
  return std::move(*restored);
}

/// The reply as the front end gets it, with the owner's index filled in.
std::vector<std::byte> final_reply(VhostUserDevice& device, const Outcome& outcome) {
  if (outcome.vring_base_index) return device.vring_base_reply(*outcome.vring_base_index, kOwnersIndex);
  return outcome.reply.value_or(std::vector<std::byte>{});
}

/// Everything a front end can say in one life.
std::vector<Message> long_script(FrontEnd& front_end) {
  std::vector<Message> script = front_end.qemu_connect(2);
  const auto append = [&](std::vector<Message> more) {
    for (Message& message : more) script.push_back(std::move(message));
  };
  append(front_end.qemu_start(2));
  append({FrontEnd::enable(2, 0), FrontEnd::enable(2, 1), front_end.remove_region(FrontEnd::high()),
          front_end.add_region(FrontEnd::high()), front_end.mem_table(), u64(R::kSetVringCall, 1 | kVringFileNoFd),
          front_end.call(1), u64(R::kSendRarp, 0x563412005452), u64(R::kNetSetMtu, 1280, {}, true),
          u64(R::kNetSetMtu, 9000, {}, true), u64(R::kSetFeatures, FrontEnd::kFeatures & ~virtio_feature::kEventIdx)});
  append(FrontEnd::qemu_stop(2));
  append(front_end.qemu_start(2, false, 99));
  append({raw(R::kResetOwner), FrontEnd::enable(0), front_end.kick(0)});
  append({u64(R::kSetStatus, 0), front_end.kick(0), u64(R::kSetVringKick, 1 | kVringFileNoFd), FrontEnd::get_base(1)});
  return script;
}

}  // namespace

TEST_CASE("each message may be handled twice: same content, same reply, same waiting") {
  FrontEnd front_end;
  auto device = make_device(2);
  for (const Message& message : long_script(front_end)) {
    INFO(vhost_user_message_name(load_wire<VhostUserHeader>(message.bytes).request));
    const Outcome first = accept(device, message);
    const auto content_after = content(device);

    // The predecessor died before it asked the owner, ...
    auto early = successor_of(device);
    CHECK(content(early) == content_after);
    CHECK(early.description().generation > device.description().generation);
    const Outcome early_again = accept(early, message);
    CHECK(content(early) == content_after);

    // ... or after it, just before "applied".
    const auto reply = final_reply(device, first);
    auto late = successor_of(device);
    const Outcome late_again = accept(late, message);
    CHECK(content(late) == content_after);
    CHECK(final_reply(early, early_again) == reply);
    CHECK(final_reply(late, late_again) == reply);
    if (first.wait_for_owners) {
      CHECK(early_again.wait_for_owners);
      CHECK(late_again.wait_for_owners);
    }
    CHECK(early_again.rarp_mac == first.rarp_mac);
    // The life goes on with the successor half of the time.
    if (device.description().generation % 2 == 0) device = std::move(late);
  }
}

TEST_CASE("a restored device goes on like the first") {
  FrontEnd front_end;
  auto device = make_device(2);
  play(device, front_end.qemu_connect(2));
  play(device, front_end.qemu_start(2));
  auto restored = successor_of(device);
  CHECK(restored.description().generation == device.description().generation + 1);
  CHECK(restored.description_fds().size() == device.description_fds().size());
  for (std::size_t i = 2; i < device.description_fds().size(); ++i)
    CHECK(same_eventfd(restored.description_fds()[i], device.description_fds()[i]));
  CHECK(restored.config().mtu == 1500);
  const Outcome stop = accept(restored, FrontEnd::get_base(0));
  CHECK(stop.vring_base_index == 0u);
}

TEST_CASE("only what changed is saved, the device last, and no item has more descriptors than a message carries") {
  FrontEnd front_end;
  auto device = make_device(2);
  CHECK(device.save().size() == 5);
  CHECK(device.save_changed().empty());
  accept(device, FrontEnd::enable(3));
  auto items = device.save_changed();
  REQUIRE(items.size() == 1);
  CHECK(items[0].item == 4);
  play(device, front_end.qemu_connect(2));
  play(device, front_end.qemu_start(2));
  items = device.save_changed();
  REQUIRE(items.size() == 5);
  CHECK(items.back().item == 0);
  for (const SavedItem& item : items) CHECK(item.fds.size() <= kMaxMemoryRegions);
  accept(device, raw(R::kGetFeatures));
  CHECK(device.save_changed().empty());
}

TEST_CASE("damaged items are refused and their descriptors closed") {
  FrontEnd front_end;
  auto device = make_device(1);
  play(device, front_end.qemu_connect(1));
  play(device, front_end.qemu_start(1));
  const std::size_t before = open_fds();
  const int damage = GENERATE(range(0, 7));
  {
    auto items = through_vault(device.save());
    REQUIRE(items.size() == 3);
    RestoredItem& vring = items[0];
    RestoredItem& whole = items[2];
    if (damage == 0) items.pop_back();
    if (damage == 1) whole.bytes.pop_back();
    if (damage == 2) whole.bytes[0] ^= std::byte{1};
    if (damage == 3) whole.bytes[4] ^= std::byte{1};
    if (damage == 4) whole.fds.pop_back();
    if (damage == 5) vring.item = 77;
    if (damage == 6) vring.fds.pop_back();
    CHECK_FALSE(VhostUserDevice::restore(std::move(items)).has_value());
  }
  CHECK(open_fds() == before);
}

TEST_CASE("a device that goes away closes everything") {
  FrontEnd front_end;
  for (std::uint32_t vring = 0; vring < 4; ++vring) {
    front_end.kick_fd(vring);
    front_end.call_fd(vring);
  }
  const std::size_t before = open_fds();
  {
    auto device = make_device(2);
    play(device, front_end.qemu_connect(2));
    play(device, front_end.qemu_start(2));
    auto restored = successor_of(device);
    CHECK(open_fds() == before + 2 * (2 + 8));
  }
  CHECK(open_fds() == before);
}
