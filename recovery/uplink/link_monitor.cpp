// SPDX-License-Identifier: Apache-2.0
// A raw rtnetlink multicast socket.
#include "recovery/uplink/link_monitor.hpp"

#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <poll.h>
#include <sys/socket.h>

#include <array>

namespace tandem {

Result<LinkMonitor> LinkMonitor::open() {
  UniqueFd socket{::socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_ROUTE)};
  if (!socket) return fail_errno("watch netdevs");
  sockaddr_nl address{};
  address.nl_family = AF_NETLINK;
  address.nl_groups = RTMGRP_LINK;
  if (::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    return fail_errno("watch netdevs");
  return LinkMonitor{std::move(socket)};
}

void LinkMonitor::drain() noexcept {
  std::array<std::byte, 16384> buffer{};
  // ENOBUFS says that messages were lost and is reported once; reading goes on until nothing is left.
  while (::recv(socket_.get(), buffer.data(), buffer.size(), MSG_DONTWAIT | MSG_TRUNC) >= 0 || errno == ENOBUFS ||
         errno == EINTR) {
  }
}

bool LinkMonitor::wait(int timeout_ms) const noexcept {
  pollfd waiting{socket_.get(), POLLIN, 0};
  return ::poll(&waiting, 1, timeout_ms) == 1;
}

}  // namespace tandem
