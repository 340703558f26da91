// SPDX-License-Identifier: Apache-2.0
// XskPort: one AF_XDP socket driven from its shared rings alone.
//
// The socket, its rings and its frames were made by the supervisor (recovery/uplink) and outlive every backend. Ring
// indices are never cached across bursts: they live in the rings, so that an heir goes on from where the dead owner
// stood. Thread: exactly one owner at a time (docs/fence.md). Source: include/uapi/linux/if_xdp.h, net/xdp/xsk_queue.h.
#pragma once

#include <linux/if_xdp.h>

#include <atomic>
#include <bit>
#include <cstdint>
#include <memory>
#include <span>

#include "common/layout/xsk_description.hpp"
#include "common/mapping.hpp"
#include "common/result.hpp"
#include "common/unique_fd.hpp"
#include "vhost-net-backend/seal.hpp"

namespace tandem {

/// One ring: `Entry` is struct xdp_desc (RX, TX) or std::uint64_t (fill, completion).
template <class Entry>
class XskRingView {
 public:
  XskRingView() = default;
  XskRingView(std::byte* base, const XskRing& ring)
      : producer_(reinterpret_cast<std::uint32_t*>(base + ring.producer)),
        consumer_(reinterpret_cast<std::uint32_t*>(base + ring.consumer)),
        entries_(reinterpret_cast<Entry*>(base + ring.descriptors)),
        mask_(ring.entries - 1) {}

  // Acquire pairs with the kernel's release: entries up to the index are visible. Release the other way round.
  [[nodiscard]] std::uint32_t producer() const {
    return std::atomic_ref<std::uint32_t>(*producer_).load(std::memory_order_acquire);
  }
  [[nodiscard]] std::uint32_t consumer() const {
    return std::atomic_ref<std::uint32_t>(*consumer_).load(std::memory_order_acquire);
  }
  void publish(std::uint32_t index) const {
    std::atomic_ref<std::uint32_t>(*producer_).store(index, std::memory_order_release);
  }
  void consume(std::uint32_t index) const {
    std::atomic_ref<std::uint32_t>(*consumer_).store(index, std::memory_order_release);
  }
  [[nodiscard]] Entry& at(std::uint32_t index) const { return entries_[index & mask_]; }
  [[nodiscard]] std::uint32_t size() const { return mask_ + 1; }

 private:
  std::uint32_t* producer_ = nullptr;
  std::uint32_t* consumer_ = nullptr;
  Entry* entries_ = nullptr;
  std::uint32_t mask_ = 0;
  std::uint32_t no_padding_ = 0;  // for fold()
};

/// Which transmit frame an address lies in, for many in a row: a copy of what XskPort::transmit_frame() goes by, which
/// no store in between can change.
struct XskFrames {
  std::uint32_t shift, first;
  [[nodiscard]] std::uint64_t number(std::uint64_t address) const { return (address >> shift) - first; }
  [[nodiscard]] std::uint64_t address(std::uint32_t number) const { return (std::uint64_t{first} + number) << shift; }
};

class XskPort {
 public:
  /// Maps the four rings and the UMEM. `what` names the uplink in errors.
  static Result<std::unique_ptr<XskPort>> map(const XskDescription& description, UniqueFd socket, UniqueFd umem,
                                              const std::string& what);
  /// A port over memory that is not a socket: tests and measurements play the kernel's side. `memory` holds rings and
  /// frames.
  static std::unique_ptr<XskPort> over_memory(const XskDescription& description, std::byte* rings, std::byte* frames);

  XskRingView<xdp_desc> rx, tx;
  XskRingView<std::uint64_t> fill, completion;

  /// Bytes of a frame, or nullptr if the range leaves the UMEM.
  [[nodiscard]] std::byte* frame(std::uint64_t address, std::uint64_t length) const {
    return address <= umem_size_ && length <= umem_size_ - address ? frames_ + address : nullptr;
  }
  [[nodiscard]] std::uint64_t transmit_address(std::uint32_t frame) const {
    return (std::uint64_t{description_.rx_frames} + frame) << frame_shift_;
  }
  /// Inverse of transmit_address; description().tx_frames or more if the address is no transmit frame.
  [[nodiscard]] std::uint64_t transmit_frame(std::uint64_t address) const {
    return (address >> frame_shift_) - description_.rx_frames;
  }
  [[nodiscard]] XskFrames transmit_frames() const { return {frame_shift_, description_.rx_frames}; }
  [[nodiscard]] std::uint64_t frame_start(std::uint64_t address) const {
    return address >> frame_shift_ << frame_shift_;
  }
  [[nodiscard]] bool is_receive_frame(std::uint64_t address) const {
    return address >> frame_shift_ < description_.rx_frames;
  }
  [[nodiscard]] const XskDescription& description() const { return description_; }
  /// -1: nothing to wait for.
  [[nodiscard]] int fd() const { return socket_.get(); }
  /// The owner of the rings plays the kernel's side as well, once a round.
  [[nodiscard]] bool in_memory() const { return (description_.flags & XskDescription::kInMemory) != 0; }

  /// Lets the kernel send what is on the TX ring; at most a few system calls. True when the ring is empty afterwards.
  /// False means "later": the device is down, its queue is full, or (copy mode) the call's budget of 32 frames is used
  /// up.
  bool wake_transmit() const;

  /// Whether the owner is to call poll_netdev().
  [[nodiscard]] bool polls_netdev() const { return (description_.flags & XskDescription::kBusyPoll) != 0; }
  /// Has the kernel take what waits in the netdev's queue, in this thread, if RX is empty: one system call. Outside of
  /// transactions.
  void poll_netdev() const;

  /// in_memory() only: does what the kernel would do with everything that is on TX and fill (null_port.cpp). Before
  /// anything else moves on these rings, and never between arm and disarm.
  void play_kernel() const;

  /// False: what map() has set, as far as a burst uses it, was changed since (seal.hpp).
  [[nodiscard]] bool is_whole() const { return seal_ == checksum(); }

 private:
  explicit XskPort(const XskDescription& description)
      : description_(description), frame_shift_(static_cast<std::uint32_t>(std::countr_zero(description.frame_size))) {}
  [[nodiscard]] std::uint64_t checksum() const {
    const auto word = [](std::uint32_t high, std::uint32_t low) { return std::uint64_t{high} << 32 | low; };
    return fold(rx) ^ fold(tx) ^ fold(fill) ^ fold(completion) ^ fold(frames_) ^ umem_size_ ^
           word(description_.flags, description_.frame_size) ^ word(description_.rx_frames, description_.tx_frames) ^
           word(frame_shift_, description_.max_packet);
  }
  void play_transmit() const;
  void play_source() const;
  void play_loopback() const;
  XskDescription description_{};
  UniqueFd socket_, umem_;
  UniqueFd rings_;  // instead of socket_ if in_memory()
  Mapping maps_[5];
  std::byte* frames_ = nullptr;
  std::uint64_t umem_size_ = 0;
  std::uint32_t frame_shift_ = 0;  // a frame's size is a power of two
  std::uint64_t seal_ = 0;
};

}  // namespace tandem
