// SPDX-License-Identifier: Apache-2.0
// ScriptedFrontEnd: what QEMU and a guest's driver are to a NIC's socket, under a test's control.
//
// Speaks the start sequence of QEMU 7.2 (docs/vhost-user.md) and drives split virtqueues in its own memory; packed ones
// are driven by whoever asked for them (LoadGuest). The memory and the rings are open to the test, which may do with
// them what a hostile guest would. Single-threaded; failures are Catch2's.
#pragma once

// The header's legacy part is C only; its structures are what we want.
#define VIRTIO_RING_NO_LEGACY
#include <linux/virtio_ring.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "common/mapping.hpp"
#include "common/unique_fd.hpp"
#include "vmm/vhost_user_device.hpp"
#include "vmm/vhost_user_message.hpp"

namespace tandem::test {

using Frame = std::vector<std::uint8_t>;

/// The driver's side of one split virtqueue. Memory belongs to the ScriptedFrontEnd.
struct DriverQueue {
  static constexpr std::uint64_t kAreaSize = 32 * 1024;  ///< descriptors, avail ring at 16 KiB, used ring at 20 KiB
  static constexpr std::uint64_t kAvailAt = 16 * 1024, kUsedAt = 20 * 1024;
  static constexpr std::uint32_t kBufferSize = 2048;

  std::uint32_t size = 0;
  vring_desc* descriptors = nullptr;
  vring_avail* avail = nullptr;
  vring_used* used = nullptr;
  std::byte* buffers = nullptr;
  std::uint64_t buffers_guest = 0;
  int kick_fd = -1, call_fd = -1;
  std::uint16_t avail_index = 0;  ///< as published
  std::uint16_t last_used = 0;
  bool event_index = false;
  std::uint64_t kicks = 0;

  [[nodiscard]] std::uint16_t used_index() const;
  /// Publishes heads, then kicks if the device asked for it.
  void make_available(std::span<const std::uint16_t> heads);
  void kick();
};

struct FrontEndOptions {
  std::uint32_t queue_pairs = 1;
  std::uint32_t ring_size = 256;
  std::uint64_t features = virtio_feature::kVersion1 | virtio_feature::kEventIdx | virtio_feature::kMrgRxbuf |
                           virtio_feature::kMq | virtio_feature::kCtrlVq | kVhostUserFProtocolFeatures;
  bool post_buffers = true;  ///< start() posts receive buffers; false: whoever drives the rings does
};

class ScriptedFrontEnd {
 public:
  static constexpr std::uint64_t kUser = 0x7f1200000000;
  static constexpr std::uint64_t kBuffersGuest =
      0x100000000;  ///< rings lie at guest address 0, buffers above the PCI hole
  static constexpr std::uint32_t kHeader = 12;

  /// Connects to a NIC's socket.
  explicit ScriptedFrontEnd(const std::string& path, FrontEndOptions options = {});

  /// After a lost connection, as QEMU does: connects again, with the same memory. Then negotiate() and resume().
  void reconnect(const std::string& path);
  /// Starts vrings with what is in them, from their used indices on.
  void resume();

  // ---- protocol ----
  void negotiate();  ///< what QEMU sends when it connects
  void start();      ///< what it sends when the driver is up; posts all receive buffers
  void stop();       ///< STATUS 0, then GET_VRING_BASE of every vring
  void send(VhostUserRequest request, std::span<const std::byte> payload = {}, std::span<const int> fds = {},
            bool need_reply = false);
  template <class T>
  void send_body(VhostUserRequest request, const T& body, std::span<const int> fds = {}, bool need_reply = false) {
    send(request, std::as_bytes(std::span(&body, 1)), fds, need_reply);
  }
  void send_state(VhostUserRequest request, std::uint32_t vring, std::uint32_t value, bool need_reply = false) {
    send_body(request, VhostUserVringState{vring, value}, {}, need_reply);
  }
  /// Arbitrary bytes; false if the other end is gone.
  bool send_raw(std::span<const std::byte> bytes, std::span<const int> fds = {});
  /// A whole message's payload, of an answer to `request`. Fails the test on timeout, end of stream or another message.
  std::vector<std::byte> reply(VhostUserRequest request);
  std::uint64_t reply_u64(VhostUserRequest request);
  /// Requests with an answer of u64.
  std::uint64_t ask(VhostUserRequest request) {
    send(request);
    return reply_u64(request);
  }
  /// Sends GET_VRING_BASE; the index. Without an answer within `limit`: nothing.
  std::uint32_t get_base(std::uint32_t vring);
  /// A round trip: everything sent before has been applied.
  void settle() { ask(VhostUserRequest::kGetFeatures); }
  /// The same with one that may close the connection instead; answers of messages before are skipped.
  void settle_or_closed();
  void send_mem_table(bool need_reply = false);
  /// The same without the buffers' region; with NEED_REPLY.
  void send_rings_only_table();
  void send_vring(std::uint32_t vring, std::uint32_t base = 0);
  /// Whether the other end closes the connection within the failsafe.
  bool wait_closed();
  [[nodiscard]] bool readable(std::chrono::milliseconds limit) const;
  void disconnect() { socket_.reset(); }
  [[nodiscard]] int socket() const { return socket_.get(); }

  // ---- driver ----
  /// False: no room.
  bool transmit(std::uint32_t pair, std::span<const std::uint8_t> frame);
  /// All frames that have arrived; their buffers go back to the device unless `repost` is false.
  std::vector<Frame> receive(std::uint32_t pair, bool repost = true);
  /// Frames given to the device and not yet returned.
  [[nodiscard]] std::uint32_t in_flight(std::uint32_t pair);
  void post_receive_buffers(std::uint32_t pair);

  /// After stop(): everything as in a driver that begins anew.
  void reset_rings();

  /// Another piece of guest memory, for tables and slots: 64 KiB in a file of its own, behind all buffers.
  [[nodiscard]] VhostUserMemoryRegion extra_region() const;
  [[nodiscard]] int extra_fd() const { return extra_.get(); }
  /// The table with the extra region as the third.
  void send_larger_mem_table(bool need_reply);

  DriverQueue& queue(std::uint32_t vring) { return queues_[vring]; }
  [[nodiscard]] std::span<std::byte> memory() { return {mapping_.data(), mapping_.size()}; }
  [[nodiscard]] int memory_fd() const { return memory_.get(); }
  [[nodiscard]] std::uint64_t rings_size() const { return rings_size_; }
  [[nodiscard]] const FrontEndOptions& options() const { return options_; }
  [[nodiscard]] bool packed() const { return (options_.features & virtio_feature::kRingPacked) != 0; }

 private:
  void make_memory();
  void reclaim(std::uint32_t pair);
  bool read_exactly(void* data, std::size_t size);

  FrontEndOptions options_;
  UniqueFd socket_, memory_, extra_;
  Mapping mapping_;
  std::uint64_t rings_size_ = 0;
  std::vector<UniqueFd> events_;
  std::vector<DriverQueue> queues_;
  std::vector<std::vector<std::uint16_t>> free_slots_;  // of transmit queues, two descriptors each; by pair
};

}  // namespace tandem::test
