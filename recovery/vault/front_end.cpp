// SPDX-License-Identifier: Apache-2.0
// Framing of the vhost-user byte stream and non-blocking replies.
#include "recovery/vault/front_end.hpp"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>

namespace tandem {
namespace {

constexpr std::uint32_t kVersionMask = 0x3;
constexpr std::uint32_t kVersion1 = 0x1;

/// Moves every descriptor of `message` into `fds`, whatever else is wrong with it: none leaks.
bool collect_fds(msghdr& message, std::vector<UniqueFd>& fds) {
  bool any = false;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof fd);
      fds.emplace_back(fd);
      any = true;
    }
  }
  return any;
}

}  // namespace

const char* close_reason_text(CloseReason reason) {
  switch (reason) {
    case CloseReason::kHangUp:
      return "closed by the front end";
    case CloseReason::kMidMessage:
      return "closed by the front end inside a message";
    case CloseReason::kReadError:
      return "read failed";
    case CloseReason::kBadVersion:
      return "message is not vhost-user version 1";
    case CloseReason::kOversize:
      return "payload above 4096 bytes";
    case CloseReason::kTooManyFds:
      return "more than 8 descriptors in one message, or no room for them";
    case CloseReason::kStrayFds:
      return "descriptors in the middle of a message";
    case CloseReason::kUnreadReplies:
      return "front end does not read its replies";
    case CloseReason::kWriteError:
      return "write failed";
    case CloseReason::kAsked:
      return "closed by tandemd";
    case CloseReason::kCount:
      break;
  }
  return "unknown";
}

FrontEnd::Progress FrontEnd::over(CloseReason reason) {
  reason_ = reason;
  return Progress::kClosed;
}

FrontEnd::Progress FrontEnd::read() {
  while (received_ < wanted_) {
    if (const Progress progress = receive_some(); progress != Progress::kComplete) return progress;
    if (received_ == kVhostUserHeader && wanted_ == kVhostUserHeader)
      if (const Progress progress = accept_header(); progress != Progress::kComplete) return progress;
  }
  return Progress::kComplete;
}

/// One recvmsg towards wanted_. kComplete: some bytes came.
FrontEnd::Progress FrontEnd::receive_some() {
  iovec data{buffer_.data() + received_, wanted_ - received_};
  alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(kMaxVhostUserFds * sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t got = 0;
  do {
    got = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  } while (got < 0 && errno == EINTR);
  if (got < 0) {
    if (errno == EAGAIN || errno == EWOULDBLOCK) return Progress::kIncomplete;
    return over(errno == ECONNRESET ? CloseReason::kHangUp : CloseReason::kReadError);
  }
  const bool came_with_fds = collect_fds(message, fds_);
  if (got == 0) return over(received_ == 0 ? CloseReason::kHangUp : CloseReason::kMidMessage);
  if ((message.msg_flags & MSG_CTRUNC) != 0) return over(CloseReason::kTooManyFds);
  if (came_with_fds && received_ != 0) return over(CloseReason::kStrayFds);
  received_ += static_cast<std::size_t>(got);
  return Progress::kComplete;
}

/// Validates the header in hand and learns the payload's size from it.
FrontEnd::Progress FrontEnd::accept_header() {
  std::uint32_t flags = 0;
  std::uint32_t size = 0;
  std::memcpy(&flags, buffer_.data() + 4, sizeof flags);
  std::memcpy(&size, buffer_.data() + 8, sizeof size);
  if ((flags & kVersionMask) != kVersion1) return over(CloseReason::kBadVersion);
  if (size > kMaxRelayedPayload) return over(CloseReason::kOversize);
  wanted_ = kVhostUserHeader + size;
  return Progress::kComplete;
}

VhostUserFrame FrontEnd::take() {
  VhostUserFrame frame;
  frame.bytes.assign(buffer_.begin(), buffer_.begin() + static_cast<std::ptrdiff_t>(received_));
  frame.fds = std::exchange(fds_, {});
  received_ = 0;
  wanted_ = kVhostUserHeader;
  return frame;
}

bool FrontEnd::reply(std::vector<std::byte> bytes, UniqueFd fd) {
  unwritten_ += bytes.size();
  replies_.push_back(Reply{std::move(bytes), 0, std::move(fd)});
  if (!flush()) return false;
  if (unwritten_ <= kMaxUnreadReplies) return true;
  reason_ = CloseReason::kUnreadReplies;
  return false;
}

bool FrontEnd::flush() {
  while (!replies_.empty()) {
    Reply& first = replies_.front();
    const ssize_t written = write_some(first);
    if (written < 0) {
      if (errno == EAGAIN || errno == EWOULDBLOCK) return true;
      reason_ = errno == EPIPE || errno == ECONNRESET ? CloseReason::kHangUp : CloseReason::kWriteError;
      return false;
    }
    first.fd.reset();
    first.written += static_cast<std::size_t>(written);
    unwritten_ -= static_cast<std::size_t>(written);
    if (first.written == first.bytes.size()) replies_.pop_front();
  }
  return true;
}

ssize_t FrontEnd::write_some(Reply& reply) {
  iovec data{reply.bytes.data() + reply.written, reply.bytes.size() - reply.written};
  alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (reply.fd) {
    const int fd = reply.fd.get();
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  }
  ssize_t written = 0;
  do {
    written = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (written < 0 && errno == EINTR);
  return written;
}

}  // namespace tandem
