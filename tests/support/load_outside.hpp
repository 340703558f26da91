// SPDX-License-Identifier: Apache-2.0
// LoadOutside: the other end of the cable at full speed: a packet socket that sends and receives in batches.
//
// Thread: one at a time. Failures of the constructor are Catch2's, later ones are counted.
#pragma once

#include <sys/socket.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "common/unique_fd.hpp"

namespace tandem::test {

class LoadOutside {
 public:
  explicit LoadOutside(const char* netdev = "host0");
  LoadOutside(const LoadOutside&) = delete;
  LoadOutside& operator=(const LoadOutside&) = delete;

  /// Room for one more frame of the batch; flush() first when it is full().
  std::span<std::byte> next() { return send_buffers_[queued_]; }
  void queue(std::size_t length);
  [[nodiscard]] bool full() const { return queued_ == kBatch; }
  /// Sends the batch, whole.
  void flush();
  /// Hands everything that is waiting to `take`; the number of frames.
  std::size_t receive(const std::function<void(std::span<const std::byte>)>& take);

  [[nodiscard]] std::uint64_t send_errors() const { return send_errors_; }
  /// Frames that the socket could not hold (PACKET_STATISTICS), since the last call.
  std::uint64_t take_drops();

 private:
  static constexpr std::size_t kBatch = 64, kRoom = 2048;
  using Buffers = std::vector<std::array<std::byte, kRoom>>;

  UniqueFd socket_;
  Buffers send_buffers_{kBatch}, receive_buffers_{kBatch};
  std::array<iovec, kBatch> send_pieces_{}, receive_pieces_{};
  std::array<mmsghdr, kBatch> send_messages_{}, receive_messages_{};
  std::size_t queued_ = 0;
  std::uint64_t send_errors_ = 0;
};

}  // namespace tandem::test
