// SPDX-License-Identifier: Apache-2.0
// The control channel, backend's side: greeting, then messages with descriptors of every kind; then what the poll
// thread does with the commands that came of it. Input: the greeting's shape, then messages, see feed().
#include "vhost-net-backend/controller.hpp"

#include <sys/socket.h>

#include "common/layout/fence_slot.h"
#include "tests/fuzz/targets/descriptors.hpp"
#include "tests/support/engine_world.hpp"

namespace tandem {

// The steps of Shard::run() that handle commands.
struct ShardSteps {
  static void run_commands(Shard& shard) { shard.run_commands(); }
};

}  // namespace tandem

using namespace tandem;
using namespace tandem::fuzz;

namespace {

UniqueFd memory(std::size_t bytes) {
  UniqueFd fd{::memfd_create("fuzz-control", MFD_CLOEXEC)};
  must_hold(fd && ::ftruncate(fd.get(), static_cast<off_t>(bytes)) == 0, "a memfd can be made");
  return fd;
}

class Site {
 public:
  Site()
      : segment_(memory(sizeof(Segment))),
        slots_(memory(TANDEM_FENCE_SLOTS * sizeof(tandem_fence_slot))),
        ring_(memory(2 * 4096)) {
    // What a message may bring that is right: an uplink's description and a device's.
    xsk_ = test::describe_xsk({2048, 256, 64, 64, 64});
    socket_ = memory(test::xsk_ring_bytes(xsk_));
    umem_ = memory(xsk_.umem_size);
    std::uint64_t page = 0;
    for (XskRing* ring : {&xsk_.rx, &xsk_.tx, &xsk_.fill, &xsk_.completion}) {
      ring->mmap_offset = page;  // each ring at a page of its own, as a socket has them
      page += (ring->mmap_size + 4095) / 4096 * 4096;
    }
    must_hold(::ftruncate(socket_.get(), static_cast<off_t>(page)) == 0, "a memfd can grow");
  }

  void run(Input& input) {
    auto ends = FdChannel::make_pair();
    must_hold(ends.has_value(), "a channel can be made");
    FdChannel supervisor = std::move(ends->first);
    Controller controller{std::move(ends->second)};
    const std::uint8_t greeting = input.u8();
    set_up_segment(greeting);
    if ((greeting & 0x80u) != 0)
      feed(supervisor, input);
    else
      welcome(supervisor);
    const std::uint8_t messages = static_cast<std::uint8_t>(input.u8() % 24);
    for (int i = 0; i < messages && !input.empty(); ++i) feed(supervisor, input);
    // No more will come; what the controller says still finds a reader.
    ::shutdown(supervisor.fd(), SHUT_WR);
    const bool greeted = controller.greet(1'000'000'000).has_value();
    // Or the rest would be fed to nobody.
    must_hold(greeted || greeting >= 0x7f, "a lawful greeting is accepted");
    if (!greeted) return;
    static_cast<void>(controller.run());
    for (auto& shard : controller.shards()) {
      ShardSteps::run_commands(*shard);
      shard->take_events();
    }
  }

 private:
  void set_up_segment(std::uint8_t greeting) const {
    struct {
      std::uint64_t magic = kSegmentMagic;
      std::uint32_t version = kSegmentVersion;
      std::uint32_t shards = 1;
      std::uint64_t size = sizeof(Segment);
    } head;
    if (greeting == 0x7f) head.version = 99;
    must_hold(::pwrite(segment_.get(), &head, sizeof head, 0) == sizeof head, "the segment can be written");
  }

  void welcome(FdChannel& supervisor) const {
    struct {
      ControlHeader header;
      WelcomeBody body;
    } message{};
    message.header.type = ControlType::kWelcome;
    message.header.body_size = sizeof message.body;
    const int fds[] = {segment_.get(), slots_.get(), ring_.get(), descriptors_.get(kTimer), descriptors_.get(kEvent)};
    static_cast<void>(supervisor.send(std::as_bytes(std::span(&message, 1)), fds));
  }

  // Descriptors (low five bits; kinds follow) and form of a message. Bits 5 and 6: 0 raw bytes behind a lawful header,
  // 1 raw bytes, 2 an attach whose description is right but for patches, 3 a description that is right but for patches.
  void feed(FdChannel& supervisor, Input& input) const {
    const std::uint8_t form = input.u8();
    std::vector<int> fds;
    for (const std::byte kind : input.take(form & 0x1fu)) fds.push_back(number(std::to_integer<std::uint8_t>(kind)));
    std::erase_if(fds, [](int fd) { return fd < 0; });
    std::vector<std::byte> body;
    ControlHeader header;
    switch (form >> 5 & 3u) {
      case 0: {
        header.type = static_cast<ControlType>(input.u16() % 16);
        const auto bytes = input.take(input.u8());
        body.assign(bytes.begin(), bytes.end());
        break;
      }
      case 1: {
        const auto bytes = input.take(input.u16() % 512);
        return send(supervisor, bytes, fds);
      }
      case 2: {
        header.type = ControlType::kAttach;
        AttachBody attach;
        attach.device = input.u8() % 2;
        attach.queue_pairs = 1;
        append(body, attach);
        append(body, xsk_);
        patch(body, input);
        break;
      }
      default: {
        header.type = ControlType::kDescribe;
        append(body, describe(input.u8()));
        patch(body, input);
      }
    }
    header.body_size = static_cast<std::uint32_t>(body.size());
    std::vector<std::byte> message;
    append(message, header);
    message.insert(message.end(), body.begin(), body.end());
    send(supervisor, message, fds);
  }

  // All but drills: those make the backend abort, spin or block, as they should.
  static void send(FdChannel& supervisor, std::span<const std::byte> message, std::span<const int> fds) {
    ControlHeader header;
    if (message.size() >= sizeof header) std::memcpy(&header, message.data(), sizeof header);
    if (message.empty() || header.type == ControlType::kDrill) return;
    static_cast<void>(supervisor.send(message, fds));
  }

  template <class T>
  static void append(std::vector<std::byte>& bytes, const T& value) {
    const auto more = std::as_bytes(std::span(&value, 1));
    bytes.insert(bytes.end(), more.begin(), more.end());
  }
  static void patch(std::vector<std::byte>& bytes, Input& input) {
    for (int patches = input.u8() % 4; patches > 0; --patches) {
      const std::size_t at = input.u16() % bytes.size();
      const auto with = input.take(std::min<std::size_t>(1 + input.u8() % 8, bytes.size() - at));
      if (!with.empty()) std::memcpy(bytes.data() + at, with.data(), with.size());
    }
  }

  static DeviceDescription describe(std::uint8_t how) {
    DeviceDescription description;
    description.device = how & 1u;
    description.generation = 1 + (how >> 1 & 7u);
    description.queue_pairs = 1;
    description.region_count = 1;
    description.regions[0] = {0x40000000, kGuestMemoryBytes, 0x7f0000000000, 0};
    for (std::uint32_t i = 0; i < 2; ++i) {
      VringDescription& vring = description.vrings[i];
      vring.flags = VringDescription::kHasCall | VringDescription::kHasKick | VringDescription::kRunning;
      vring.size = 256;
      vring.start_count = 1;
      vring.descriptor_user_address = 0x7f0000000000 + 0x10000 * i;
      vring.avail_user_address = vring.descriptor_user_address + 0x4000;
      vring.used_user_address = vring.descriptor_user_address + 0x8000;
    }
    return description;
  }

  [[nodiscard]] int number(std::uint8_t kind) const {
    if (kind == 0xf0) return socket_.get();
    if (kind == 0xf1) return umem_.get();
    if (kind == 0xf2) return segment_.get();
    return descriptors_.get(kind);
  }

  Descriptors descriptors_;
  UniqueFd segment_, slots_, ring_, socket_, umem_;
  XskDescription xsk_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Site site;
  const DescriptorCheck all_closed;
  Input input(data, size);
  site.run(input);
  return 0;
}
