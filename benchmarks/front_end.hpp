// SPDX-License-Identifier: Apache-2.0
// FrontEnd: a vhost-user front end with a guest's memory and driver, for measurements: Tandem, DPDK and OVS alike.
//
// It survives its back end: when the socket closes it connects again and goes on with the same rings from used.idx, as
// QEMU does with split rings. Frames go through GuestNics (tests/support). Thread: one. The driver polls: interrupts
// are off, kicks are given when the device wants them.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/mapping.hpp"
#include "common/result.hpp"
#include "common/unique_fd.hpp"
#include "tests/support/guest_nic.hpp"
#include "vmm/vhost_user_message.hpp"

namespace tandem::benchmark {

struct FrontEndShape {
  std::uint32_t queue_pairs = 1;
  std::uint32_t queue_size = 1024;
  std::uint32_t slot_size = 2048;  ///< of each buffer
  bool listen = false;             ///< the back end connects to us (dpdkvhostuserclient), instead of we to it
};

class FrontEnd {
 public:
  /// Makes the guest's memory; connect() follows.
  static Result<std::unique_ptr<FrontEnd>> make(std::string path, const FrontEndShape& shape);

  /// The whole start sequence: features, memory, rings. kGone: nobody is there (yet), or it went away meanwhile.
  Status connect();
  [[nodiscard]] bool connected() const { return static_cast<bool>(socket_); }
  /// Notices that the back end has closed the socket. One system call.
  void look();

  [[nodiscard]] std::uint32_t queue_pairs() const { return shape_.queue_pairs; }
  test::GuestNic& nic(std::uint32_t pair) { return nics_[pair]; }
  /// Publishes what was queued and kicks if the device asked for it.
  void publish_transmit(std::uint32_t pair);
  void publish_receive(std::uint32_t pair);

 private:
  FrontEnd(std::string path, const FrontEndShape& shape) : path_(std::move(path)), shape_(shape) {}
  Status make_memory();
  Status listen();
  Status converse();
  Status start_vring(std::uint32_t vring);
  Status send(VhostUserRequest request, std::span<const std::byte> payload, std::span<const int> fds = {});
  Result<std::uint64_t> ask(VhostUserRequest request);
  void kick(std::uint32_t vring);
  test::GuestQueue& queue(std::uint32_t vring) {
    return vring % 2 == 0 ? nics_[vring / 2].receive : nics_[vring / 2].transmit;
  }

  std::string path_;
  FrontEndShape shape_;
  UniqueFd listener_, socket_, memory_;
  Mapping mapping_;
  test::GuestSpace space_;
  std::deque<test::GuestNic> nics_;
  std::vector<UniqueFd> kicks_, calls_;
};

}  // namespace tandem::benchmark
