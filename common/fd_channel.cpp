// SPDX-License-Identifier: Apache-2.0
// sendmsg/recvmsg with SCM_RIGHTS, all cases checked.
#include "common/fd_channel.hpp"

#include <sys/socket.h>

#include <array>
#include <cstring>

namespace tandem {

Result<std::pair<FdChannel, FdChannel>> FdChannel::make_pair() {
  std::array<int, 2> ends{};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()) != 0)
    return fail_errno("make a channel");
  return std::make_pair(FdChannel{UniqueFd{ends[0]}}, FdChannel{UniqueFd{ends[1]}});
}

Status FdChannel::send(std::span<const std::byte> bytes, std::span<const int> fds) {
  if (bytes.empty() || bytes.size() > kMaxChannelMessage || fds.size() > kMaxFdsPerMessage)
    return fail(ErrorKind::kInvalid, "send on channel: " + std::to_string(bytes.size()) + " bytes with " +
                                         std::to_string(fds.size()) + " descriptors are outside the channel's limits");
  iovec data{const_cast<std::byte*>(bytes.data()), bytes.size()};
  alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(kMaxFdsPerMessage * sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size_bytes());
  }
  ssize_t sent = 0;
  do {
    sent = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent < 0) return fail_errno("send on channel");
  return {};
}

Result<ChannelMessage> FdChannel::receive(bool* would_block) {
  if (would_block != nullptr) *would_block = false;
  ChannelMessage result;
  result.bytes.resize(kMaxChannelMessage);
  iovec data{result.bytes.data(), result.bytes.size()};
  alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(kMaxFdsPerMessage * sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t got = 0;
  do {
    got = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
  } while (got < 0 && errno == EINTR);
  if (got < 0) {
    if (would_block != nullptr && (errno == EAGAIN || errno == EWOULDBLOCK)) *would_block = true;
    return fail_errno("receive on channel");
  }
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof fd);
      result.fds.emplace_back(fd);
    }
  }
  if (got == 0) return fail(ErrorKind::kGone, "receive on channel: the other end closed it");
  if ((message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0)
    return fail(ErrorKind::kInvalid, "receive on channel: message or descriptors truncated");
  result.bytes.resize(static_cast<std::size_t>(got));
  return result;
}

}  // namespace tandem
