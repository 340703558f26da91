// SPDX-License-Identifier: Apache-2.0
// A scripted front end for tests: guest memory, eventfds, and messages as QEMU and DPDK build them.
#pragma once

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>
#include <map>
#include <vector>

#include "common/unique_fd.hpp"
#include "vmm/vhost_user_device.hpp"

namespace tandem::test {

/// Open descriptors of this process; the iteration's own is there each time and cancels out.
inline std::size_t open_fds() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++count;
  return count;
}

inline UniqueFd make_memfd(std::uint64_t size) {
  UniqueFd fd{::memfd_create("tandem-test-guest", MFD_CLOEXEC | MFD_ALLOW_SEALING)};
  REQUIRE(fd);
  REQUIRE(::ftruncate(fd.get(), static_cast<off_t>(size)) == 0);
  return fd;
}

/// Blocking on purpose: the device has to make it non-blocking.
inline UniqueFd make_eventfd() {
  UniqueFd fd{::eventfd(0, EFD_CLOEXEC)};
  REQUIRE(fd);
  return fd;
}

/// One message with the descriptors to attach (borrowed; copies are sent).
struct Message {
  std::vector<std::byte> bytes;
  std::vector<int> fds;
};

inline std::vector<UniqueFd> copies(const std::vector<int>& fds) {
  std::vector<UniqueFd> result;
  for (const int fd : fds) result.emplace_back(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  return result;
}

inline Result<Outcome> send(VhostUserDevice& device, const Message& message) {
  return device.handle(message.bytes, copies(message.fds));
}

/// Sends and requires success.
inline Outcome accept(VhostUserDevice& device, const Message& message) {
  auto outcome = send(device, message);
  INFO((outcome ? std::string{} : outcome.error().text));
  REQUIRE(outcome.has_value());
  return std::move(*outcome);
}

/// Sends, requires an error, returns its text.
inline std::string reject(VhostUserDevice& device, const Message& message) {
  const std::size_t before = open_fds();
  const DeviceDescription description = device.description();
  auto outcome = send(device, message);
  REQUIRE_FALSE(outcome.has_value());
  CHECK(open_fds() == before);
  CHECK(std::memcmp(&description, &device.description(), sizeof description) == 0);
  return outcome.error().text;
}

inline Message raw(VhostUserRequest request, std::span<const std::byte> payload = {}, std::vector<int> fds = {},
                   bool need_reply = false) {
  return {make_vhost_user_message(request, need_reply ? VhostUserHeader::kNeedReply : 0, payload), std::move(fds)};
}

template <class T>
Message with(VhostUserRequest request, const T& payload, std::vector<int> fds = {}, bool need_reply = false) {
  return raw(request, std::as_bytes(std::span{&payload, 1}), std::move(fds), need_reply);
}

inline Message u64(VhostUserRequest request, std::uint64_t value, std::vector<int> fds = {}, bool need_reply = false) {
  return with(request, value, std::move(fds), need_reply);
}

inline Message state(VhostUserRequest request, std::uint32_t index, std::uint32_t num, bool need_reply = false) {
  return with(request, VhostUserVringState{index, num}, {}, need_reply);
}

template <class T>
T reply_payload(const Outcome& outcome) {
  REQUIRE(outcome.reply.has_value());
  REQUIRE(outcome.reply->size() == sizeof(VhostUserHeader) + sizeof(T));
  const auto header = load_wire<VhostUserHeader>(*outcome.reply);
  CHECK(header.flags == 5);  // reply, version 1: QEMU and DPDK compare for equality
  CHECK(header.size == sizeof(T));
  return load_wire<T>(*outcome.reply, sizeof(VhostUserHeader));
}

inline std::uint64_t reply_u64(const Outcome& outcome) { return reply_payload<std::uint64_t>(outcome); }

/// A guest's memory and notifiers, and the messages about them.
class FrontEnd {
 public:
  static constexpr std::uint64_t kHalf = 4u << 20;
  static constexpr std::uint64_t kUser = 0x7f1200000000;
  static constexpr std::uint32_t kRingSize = 256;
  static constexpr std::uint64_t kFeatures = virtio_feature::kVersion1 | virtio_feature::kEventIdx |
                                             virtio_feature::kMrgRxbuf | virtio_feature::kMq | virtio_feature::kCtrlVq |
                                             kVhostUserFProtocolFeatures;

  FrontEnd() : memory_(make_memfd(2 * kHalf)) {}

  [[nodiscard]] int memory() const { return memory_.get(); }

  /// Below and above the PCI hole, one file, as QEMU has it.
  static VhostUserMemoryRegion low() { return {0, kHalf, kUser, 0}; }
  static VhostUserMemoryRegion high() { return {0x100000000, kHalf, kUser + kHalf, kHalf}; }

  [[nodiscard]] Message mem_table(const std::vector<VhostUserMemoryRegion>& regions, std::vector<int> fds,
                                  bool need_reply = true) const {
    const VhostUserMemoryHeader header{static_cast<std::uint32_t>(regions.size()), 0};
    std::vector<std::byte> payload(sizeof header + regions.size() * sizeof(VhostUserMemoryRegion));
    std::memcpy(payload.data(), &header, sizeof header);
    if (!regions.empty())
      std::memcpy(payload.data() + sizeof header, regions.data(), regions.size() * sizeof(VhostUserMemoryRegion));
    return raw(VhostUserRequest::kSetMemTable, payload, std::move(fds), need_reply);
  }
  [[nodiscard]] Message mem_table() const { return mem_table({low(), high()}, {memory(), memory()}); }

  [[nodiscard]] Message add_region(const VhostUserMemoryRegion& region) const {
    return with(VhostUserRequest::kAddMemReg, VhostUserSingleRegion{0, region}, {memory()}, true);
  }
  [[nodiscard]] Message remove_region(const VhostUserMemoryRegion& region, std::vector<int> fds = {}) const {
    return with(VhostUserRequest::kRemMemReg, VhostUserSingleRegion{0, region}, std::move(fds), true);
  }

  static VhostUserVringAddress addresses(std::uint32_t vring) {
    const std::uint64_t start = kUser + 0x10000 * (vring + 1);
    return {vring, 0, start, start + 0x8000, start + 0x4000, 0};
  }

  static Message num(std::uint32_t vring, std::uint32_t size = kRingSize) {
    return state(VhostUserRequest::kSetVringNum, vring, size);
  }
  static Message base(std::uint32_t vring, std::uint32_t index = 0) {
    return state(VhostUserRequest::kSetVringBase, vring, index);
  }
  static Message addr(std::uint32_t vring) { return with(VhostUserRequest::kSetVringAddr, addresses(vring)); }
  static Message enable(std::uint32_t vring, std::uint32_t on = 1) {
    return state(VhostUserRequest::kSetVringEnable, vring, on);
  }
  static Message get_base(std::uint32_t vring) { return state(VhostUserRequest::kGetVringBase, vring, 0); }
  Message kick(std::uint32_t vring) { return u64(VhostUserRequest::kSetVringKick, vring, {kick_fd(vring)}); }
  Message call(std::uint32_t vring) { return u64(VhostUserRequest::kSetVringCall, vring, {call_fd(vring)}); }

  int kick_fd(std::uint32_t vring) { return event(kicks_, vring); }
  int call_fd(std::uint32_t vring) { return event(calls_, vring); }

  /// What QEMU 7.2 sends per queue pair when it connects.
  std::vector<Message> qemu_connect(std::uint32_t pairs) {
    using R = VhostUserRequest;
    std::vector<Message> script;
    for (std::uint32_t pair = 0; pair < pairs; ++pair) {
      script.push_back(raw(R::kGetFeatures));
      script.push_back(raw(R::kGetProtocolFeatures));
      script.push_back(u64(R::kSetProtocolFeatures, default_protocol_features()));
      if (pair == 0) script.push_back(raw(R::kGetQueueNum));
      script.push_back(raw(R::kGetMaxMemSlots));
      if (pair == 0) script.push_back(raw(R::kSetOwner));
      script.push_back(raw(R::kGetFeatures));
      for (std::uint32_t vring = 2 * pair; vring < 2 * pair + 2; ++vring) {
        script.push_back(call(vring));
        script.push_back(u64(R::kSetVringErr, vring, {call_fd(vring)}));
      }
    }
    script.push_back(u64(R::kNetSetMtu, 1500, {}, true));
    for (std::uint32_t vring = 0; vring < 2 * pairs; ++vring) script.push_back(enable(vring, vring < 2 ? 1 : 0));
    return script;
  }

  /// What QEMU 7.2 sends when the guest's driver starts the device. `slots`: ADD_MEM_REG instead of SET_MEM_TABLE.
  std::vector<Message> qemu_start(std::uint32_t pairs, bool slots = true, std::uint32_t base_index = 0) {
    using R = VhostUserRequest;
    std::vector<Message> script;
    for (std::uint32_t pair = 0; pair < pairs; ++pair) {
      script.push_back(enable(2 * pair));
      script.push_back(enable(2 * pair + 1));
      script.push_back(u64(R::kSetFeatures, kFeatures));
      script.push_back(raw(R::kGetStatus));
      script.push_back(u64(R::kSetStatus, 8));
      if (pair == 0 && slots) {
        script.push_back(add_region(low()));
        script.push_back(add_region(high()));
      } else if (pair == 0) {
        script.push_back(mem_table());
      }
      for (std::uint32_t vring = 2 * pair; vring < 2 * pair + 2; ++vring) {
        script.push_back(num(vring));
        script.push_back(base(vring, base_index));
        script.push_back(addr(vring));
        script.push_back(kick(vring));
        script.push_back(call(vring));
      }
      if (pair + 1 == pairs) {
        script.push_back(raw(R::kGetStatus));
        script.push_back(u64(R::kSetStatus, 15));
      }
    }
    return script;
  }

  /// What QEMU 7.2 sends when the driver stops: the last pair resets the status before its vrings are asked for.
  static std::vector<Message> qemu_stop(std::uint32_t pairs) {
    std::vector<Message> script;
    for (std::uint32_t pair = 0; pair < pairs; ++pair) {
      if (pair + 1 == pairs) script.push_back(u64(VhostUserRequest::kSetStatus, 0));
      script.push_back(get_base(2 * pair));
      script.push_back(get_base(2 * pair + 1));
    }
    return script;
  }

  /// What DPDK 22.11's virtio_user sends from connect to DRIVER_OK.
  std::vector<Message> dpdk_start(std::uint32_t pairs) {
    using R = VhostUserRequest;
    const std::uint64_t protocol = protocol_feature::kMq | protocol_feature::kReplyAck | protocol_feature::kStatus;
    const std::uint64_t features = virtio_feature::kVersion1 | virtio_feature::kMrgRxbuf | kVhostUserFProtocolFeatures;
    std::vector<std::uint32_t> order;
    for (std::uint32_t pair = 0; pair < pairs; ++pair) order.push_back(2 * pair);
    for (std::uint32_t pair = 0; pair < pairs; ++pair) order.push_back(2 * pair + 1);
    std::vector<Message> script{raw(R::kSetOwner), raw(R::kGetFeatures), raw(R::kGetProtocolFeatures),
                                u64(R::kSetProtocolFeatures, protocol)};
    for (const std::uint32_t vring : order) script.push_back(call(vring));
    script.push_back(u64(R::kSetFeatures, features));
    script.push_back(u64(R::kSetStatus, 11, {}, true));
    script.push_back(raw(R::kGetStatus));
    script.push_back(mem_table({{kUser, kHalf, kUser, 0}}, {memory()}));  // guest addresses are user addresses
    for (const std::uint32_t vring : order) {
      script.push_back(num(vring));
      script.push_back(base(vring));
      script.push_back(addr(vring));
      script.push_back(kick(vring));
    }
    script.push_back(enable(0));
    script.push_back(enable(1));
    script.push_back(u64(R::kSetStatus, 15, {}, true));
    return script;
  }

 private:
  static int event(std::map<std::uint32_t, UniqueFd>& events, std::uint32_t vring) {
    UniqueFd& fd = events[vring];
    if (!fd) fd = make_eventfd();
    return fd.get();
  }

  UniqueFd memory_;
  std::map<std::uint32_t, UniqueFd> kicks_;
  std::map<std::uint32_t, UniqueFd> calls_;
};

inline VhostUserDeviceConfig test_config(std::uint32_t pairs = 2) {
  VhostUserDeviceConfig config;
  config.device = 3;
  config.max_queue_pairs = pairs;
  config.virtio_features = default_virtio_features();
  config.protocol_features = default_protocol_features();
  config.mtu = 1500;
  config.first_generation = 41;
  config.first_start_count = 7;
  return config;
}

inline VhostUserDevice make_device(std::uint32_t pairs = 2) {
  auto device = VhostUserDevice::create(test_config(pairs));
  REQUIRE(device.has_value());
  return std::move(*device);
}

inline void play(VhostUserDevice& device, const std::vector<Message>& script) {
  for (const Message& message : script) {
    INFO(vhost_user_message_name(load_wire<VhostUserHeader>(message.bytes).request));
    accept(device, message);
  }
}

inline bool runs(const VhostUserDevice& device, std::uint32_t vring) {
  return (device.description().vrings[vring].flags & VringDescription::kRunning) != 0;
}

/// Description without its generation, as bytes.
inline std::vector<std::byte> content(const VhostUserDevice& device) {
  DeviceDescription description = device.description();
  description.generation = 0;
  const auto bytes = std::as_bytes(std::span{&description, 1});
  return {bytes.begin(), bytes.end()};
}

}  // namespace tandem::test
