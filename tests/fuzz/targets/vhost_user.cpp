// SPDX-License-Identifier: Apache-2.0
// A front end's messages, one after the other, through parser and device state, with descriptors of every kind; what
// comes out must be a description that a backend can map. Input: a sequence of steps, see step().
#include <bit>
#include <map>
#include <optional>

#include "tests/fuzz/targets/descriptors.hpp"
#include "vhost-net-backend/device.hpp"
#include "vmm/vhost_user_device.hpp"

using namespace tandem;
using namespace tandem::fuzz;

namespace {

const Descriptors& descriptors() {
  static const Descriptors made;
  return made;
}

class Session {
 public:
  explicit Session(std::uint8_t shape) : device_(make(shape)) { keep(); }

  // One byte says what: 0xf0 the front end leaves, 0xf1 a new supervisor restores the device, 0xf2 a frame that is cut
  // off, else a message: descriptors (low four bits), whether it is handled twice (bit 4); their kinds; header,
  // payload.
  void step(Input& input) {
    const std::uint8_t what = input.u8();
    if (what == 0xf0) {
      device_.disconnect();
    } else if (what == 0xf1) {
      restore();
    } else if (what == 0xf2) {
      const auto cut = input.take(input.u8());
      if (!device_.handle(cut, {})) device_.disconnect();
    } else {
      message(input, what);
    }
    keep();
    check();
  }

  // The backend maps and binds everything that the supervisor let through.
  void map() const {
    std::vector<UniqueFd> fds;
    for (const int fd : device_.description_fds()) fds.emplace_back(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    std::vector<std::string> problems;
    const auto mapped = Device::make(device_.description(), std::move(fds), nullptr, problems);
    if (!mapped) std::fprintf(stderr, "%s\n", mapped.error().text.c_str());
    for (const std::string& problem : problems) std::fprintf(stderr, "%s\n", problem.c_str());
    must_hold(mapped.has_value() && problems.empty(), "a backend can serve what the supervisor accepted");
  }

 private:
  static VhostUserDevice make(std::uint8_t shape) {
    VhostUserDeviceConfig config;
    config.max_queue_pairs = 1 + shape % 3;
    config.virtio_features = default_virtio_features();
    config.protocol_features = default_protocol_features();
    config.mtu = (shape & 0x80u) != 0 ? 1500 : 0;
    auto device = VhostUserDevice::create(config);
    must_hold(device.has_value(), "the default configuration is possible");
    return std::move(*device);
  }

  void message(Input& input, std::uint8_t what) {
    const auto kinds = input.take(what & 0xfu);
    const auto header = input.take(sizeof(VhostUserHeader));
    const std::uint32_t size = header.size() == sizeof(VhostUserHeader) ? load_wire<VhostUserHeader>(header).size : 0;
    const auto payload = input.take(std::min(size, kMaxVhostUserPayload + 1));
    std::vector<std::byte> bytes(header.begin(), header.end());
    bytes.insert(bytes.end(), payload.begin(), payload.end());
    auto outcome = handle(bytes, kinds);
    if (!outcome || (what & 0x10u) == 0) return;
    // A supervisor that dies before it says "applied" has a successor that handles the message once more.
    const DeviceDescription once = device_.description();
    const auto reply = outcome->reply;
    const bool asked_owner = outcome->vring_base_index.has_value();
    outcome = handle(bytes, kinds);
    must_hold(outcome.has_value(), "a message that was accepted is accepted when it is repeated");
    DeviceDescription twice = device_.description();
    twice.generation = once.generation;
    must_hold(std::memcmp(&once, &twice, sizeof once) == 0, "handling a message twice changes nothing");
    must_hold(asked_owner || outcome->reply == reply, "the reply to a repeated message is the same");
  }

  Result<Outcome> handle(std::span<const std::byte> bytes, std::span<const std::byte> kinds) {
    auto outcome = device_.handle(bytes, descriptors().copies(kinds));
    if (!outcome) {
      must_hold(!outcome.error().text.empty(), "a refusal says why");
      device_.disconnect();
    } else if (outcome->vring_base_index) {
      device_.vring_base_reply(*outcome->vring_base_index, 77);
    }
    return outcome;
  }

  // What the vault keeps.
  void keep() {
    for (SavedItem& item : device_.save_changed()) {
      RestoredItem& kept = kept_[item.item];
      kept = {item.item, std::move(item.bytes), {}};
      for (const int fd : item.fds) kept.fds.emplace_back(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    }
  }

  void restore() {
    std::vector<RestoredItem> items;
    for (const auto& [number, kept] : kept_) {
      RestoredItem& item = items.emplace_back(RestoredItem{number, kept.bytes, {}});
      for (const UniqueFd& fd : kept.fds) item.fds.push_back(fd.duplicate());
    }
    DeviceDescription before = device_.description();
    auto restored = VhostUserDevice::restore(std::move(items));
    if (!restored) std::fprintf(stderr, "%s\n", restored.error().text.c_str());
    must_hold(restored.has_value(), "a successor can restore what was saved");
    DeviceDescription after = restored->description();
    must_hold(after.generation > before.generation, "a restored device has a new generation");
    before.generation = after.generation = 0;
    must_hold(std::memcmp(&before, &after, sizeof before) == 0, "a restored device is the same");
    device_ = std::move(*restored);
  }

  void check() {
    const DeviceDescription& now = device_.description();
    must_hold(now.generation >= generation_, "generations go up");
    generation_ = now.generation;
    must_hold(now.region_count <= kMaxMemoryRegions, "regions are within limits");
    std::size_t fds = now.region_count;
    for (const VringDescription& vring : now.vrings) {
      fds += (vring.flags & VringDescription::kHasKick) != 0;
      fds += (vring.flags & VringDescription::kHasCall) != 0;
      if ((vring.flags & VringDescription::kRunning) == 0) continue;
      must_hold(std::has_single_bit(vring.size) && vring.size <= kMaxVringSize, "a running ring has a lawful size");
      must_hold(vring.base <= 0xffff, "a running ring begins at a 16-bit index");
      must_hold(inside(now, vring.descriptor_user_address, 16 * std::uint64_t{vring.size}),
                "descriptors are in memory");
      must_hold(inside(now, vring.avail_user_address, 6 + 2 * std::uint64_t{vring.size}),
                "the avail ring is in memory");
      must_hold(inside(now, vring.used_user_address, 6 + 8 * std::uint64_t{vring.size}), "the used ring is in memory");
    }
    const auto numbers = device_.description_fds();
    must_hold(numbers.size() == fds, "descriptors and description agree");
    for (const int fd : numbers) must_hold(::fcntl(fd, F_GETFD) >= 0, "every descriptor is open");
    for (std::uint32_t i = 0; i < now.region_count; ++i) {
      const MemoryRegion& a = now.regions[i];
      must_hold(a.size > 0 && a.guest_address + a.size - 1 >= a.guest_address &&
                    a.user_address + a.size - 1 >= a.user_address && a.mmap_offset + a.size <= kGuestMemoryBytes,
                "regions do not wrap and lie in their file");
      for (std::uint32_t j = 0; j < i; ++j) {
        const MemoryRegion& b = now.regions[j];
        must_hold(a.guest_address - b.guest_address >= b.size && b.guest_address - a.guest_address >= a.size &&
                      a.user_address - b.user_address >= b.size && b.user_address - a.user_address >= a.size,
                  "regions do not overlap");
      }
    }
  }

  static bool inside(const DeviceDescription& description, std::uint64_t address, std::uint64_t size) {
    for (std::uint32_t i = 0; i < description.region_count; ++i) {
      const MemoryRegion& region = description.regions[i];
      const std::uint64_t from = address - region.user_address;
      if (address >= region.user_address && from <= region.size && size <= region.size - from) return true;
    }
    return false;
  }

  VhostUserDevice device_;
  std::map<std::uint32_t, RestoredItem> kept_;
  std::uint64_t generation_ = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  descriptors();
  const DescriptorCheck all_closed;
  Input input(data, size);
  Session session(input.u8());
  while (!input.empty()) session.step(input);
  session.map();
  return 0;
}
