// SPDX-License-Identifier: Apache-2.0
// FdChannel: datagrams with file descriptors over a SOCK_SEQPACKET unix socket, between processes of one Tandem.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "common/result.hpp"
#include "common/unique_fd.hpp"

namespace tandem {

/// Linux passes at most this many descriptors in one message (SCM_MAX_FD, include/net/scm.h).
inline constexpr std::size_t kMaxFdsPerMessage = 253;
/// Largest message either side sends; a longer one arrives truncated and is refused.
inline constexpr std::size_t kMaxChannelMessage = 64 * 1024;

struct ChannelMessage {
  std::vector<std::byte> bytes;
  std::vector<UniqueFd> fds;
};

/// One end of the channel. Not thread-safe. Never blocks if the socket is non-blocking.
class FdChannel {
 public:
  FdChannel() = default;
  explicit FdChannel(UniqueFd socket) : socket_(std::move(socket)) {}

  /// A connected pair of ends, both close-on-exec and non-blocking.
  static Result<std::pair<FdChannel, FdChannel>> make_pair();

  /// Sends all of `bytes` as one message, with copies of `fds` (which stay the caller's).
  /// kGone: the peer closed. kSystem: would block (the peer does not read) or out of resources.
  Status send(std::span<const std::byte> bytes, std::span<const int> fds = {});

  /// Receives one message. An empty optional-like message (no bytes) never occurs: end of stream is kGone, nothing
  /// waiting is kSystem with `would_block` set. Truncated bytes or descriptors are kInvalid, and no descriptor leaks.
  Result<ChannelMessage> receive(bool* would_block = nullptr);

  [[nodiscard]] int fd() const noexcept { return socket_.get(); }
  [[nodiscard]] UniqueFd release() { return std::move(socket_); }

 private:
  UniqueFd socket_;
};

}  // namespace tandem
