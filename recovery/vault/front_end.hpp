// SPDX-License-Identifier: Apache-2.0
// FrontEnd: one connected vhost-user front end: cuts its byte stream into messages, writes replies without ever
// blocking.
//
// The front end (QEMU, DPDK virtio-user) is hostile. Only the frame is looked at here: version bits, size, and that
// descriptors come with a message's first read (vhost-user specification, "Communication"); what a message means is
// tandemd's business. No byte beyond the message in hand is read, so the kernel never delivers the next message's
// descriptors with this one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "common/unique_fd.hpp"
#include "recovery/vault/protocol.hpp"

namespace tandem {

/// Why a connection ended. Counted and logged by the vault.
enum class CloseReason : std::uint8_t {
  kHangUp,      ///< closed by the front end between two messages
  kMidMessage,  ///< closed by the front end inside a message
  kReadError,
  kBadVersion,     ///< flags without version 1
  kOversize,       ///< payload above kMaxRelayedPayload
  kTooManyFds,     ///< ancillary data truncated: above kMaxVhostUserFds, or this process is out of descriptors
  kStrayFds,       ///< descriptors in the middle of a message
  kUnreadReplies,  ///< kMaxUnreadReplies exceeded
  kWriteError,
  kAsked,  ///< tandemd sent CLOSE or UNLISTEN
  kCount,
};
const char* close_reason_text(CloseReason reason);

struct VhostUserFrame {
  std::vector<std::byte> bytes;  ///< header and payload
  std::vector<UniqueFd> fds;
};

/// Owns the (non-blocking) socket, the message in hand with its descriptors, and replies not yet written.
class FrontEnd {
 public:
  /// Bytes of replies kept for a front end that does not read, beside what the kernel buffers.
  static constexpr std::size_t kMaxUnreadReplies = 64 * 1024;

  enum class Progress : std::uint8_t { kIncomplete, kComplete, kClosed };

  explicit FrontEnd(UniqueFd socket) : socket_(std::move(socket)) {}

  /// Reads until the message in hand is complete (take() it), the socket is empty, or the connection is over
  /// (reason()).
  Progress read();
  /// The complete message; the next read() begins the next one.
  VhostUserFrame take();
  /// Queues one reply and writes what the socket accepts. False: the connection is over (reason()).
  bool reply(std::vector<std::byte> bytes, UniqueFd fd);
  /// Writes on. False: the connection is over.
  bool flush();

  [[nodiscard]] bool has_unwritten() const noexcept { return !replies_.empty(); }
  [[nodiscard]] CloseReason reason() const noexcept { return reason_; }
  [[nodiscard]] int fd() const noexcept { return socket_.get(); }

 private:
  struct Reply {
    std::vector<std::byte> bytes;
    std::size_t written = 0;
    UniqueFd fd;  ///< travels with the first byte
  };

  Progress over(CloseReason reason);
  Progress receive_some();
  Progress accept_header();
  ssize_t write_some(Reply& reply);

  UniqueFd socket_;
  std::array<std::byte, kMaxVhostUserFrame> buffer_{};
  std::size_t received_ = 0;
  std::size_t wanted_ = kVhostUserHeader;  ///< grows by the payload once the header is known
  std::vector<UniqueFd> fds_;
  std::deque<Reply> replies_;
  std::size_t unwritten_ = 0;
  CloseReason reason_ = CloseReason::kHangUp;
};

}  // namespace tandem
