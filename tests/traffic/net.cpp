// SPDX-License-Identifier: Apache-2.0
// Sockets and clocks.
#include "tests/traffic/net.hpp"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>

#include <ctime>
#include <thread>

namespace tandem::traffic {
namespace {

void set_flag(int socket, int level, int option) {
  const int on = 1;
  ::setsockopt(socket, level, option, &on, sizeof on);
}

/// One attempt; empty with errno set when it failed. A SYN that nobody answers is given up after `patience_ms`.
UniqueFd try_connect(const sockaddr_in& peer, int patience_ms) {
  UniqueFd socket{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  if (!socket) return {};
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&peer), sizeof peer) != 0) {
    if (errno != EINPROGRESS) return {};
    pollfd waiting{socket.get(), POLLOUT, 0};
    if (::poll(&waiting, 1, patience_ms) <= 0) {
      errno = ETIMEDOUT;
      return {};
    }
    int error = 0;
    socklen_t size = sizeof error;
    ::getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) {
      errno = error;
      return {};
    }
  }
  ::fcntl(socket.get(), F_SETFL, 0);
  set_flag(socket.get(), IPPROTO_TCP, TCP_NODELAY);
  return socket;
}

}  // namespace

std::int64_t now_ns(clockid_t clock) {
  timespec time{};
  ::clock_gettime(clock, &time);
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

Result<sockaddr_in> parse_address(const std::string& ip, std::uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  if (::inet_pton(AF_INET, ip.c_str(), &address.sin_addr) != 1)
    return fail(ErrorKind::kInvalid, "'" + ip + "' is not an IPv4 address; give one such as 10.0.0.2");
  return address;
}

std::string to_string(const sockaddr_in& address) {
  char text[INET_ADDRSTRLEN] = {};
  ::inet_ntop(AF_INET, &address.sin_addr, text, sizeof text);
  return std::string{text} + ":" + std::to_string(ntohs(address.sin_port));
}

Result<UniqueFd> listen_tcp(std::uint16_t port) {
  const std::string doing = "listen on TCP port " + std::to_string(port);
  UniqueFd socket{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  if (!socket) return fail_errno(doing);
  set_flag(socket.get(), SOL_SOCKET, SO_REUSEADDR);
  sockaddr_in any{};
  any.sin_family = AF_INET;
  any.sin_port = htons(port);
  if (::bind(socket.get(), reinterpret_cast<const sockaddr*>(&any), sizeof any) != 0 || ::listen(socket.get(), 4) != 0)
    return fail_errno(doing, "is another traffic program running here?");
  return socket;
}

Result<UniqueFd> connect_tcp(const sockaddr_in& peer, std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  for (;;) {
    if (UniqueFd socket = try_connect(peer, 1000)) return socket;
    if (std::chrono::steady_clock::now() >= deadline)
      return fail_errno("connect to " + to_string(peer), "is the guest up and its agent running?");
    std::this_thread::sleep_for(std::chrono::milliseconds{100});
  }
}

void set_timeouts(int socket, std::chrono::milliseconds limit) {
  const timeval time{limit.count() / 1000, limit.count() % 1000 * 1000};
  ::setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time);
  ::setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time);
}

bool send_all(int socket, const void* data, std::size_t size) {
  const char* next = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t sent = ::send(socket, next, size, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    next += sent;
    size -= static_cast<std::size_t>(sent);
  }
  return true;
}

bool receive_all(int socket, void* data, std::size_t size) {
  char* next = static_cast<char*>(data);
  while (size > 0) {
    const ssize_t got = ::recv(socket, next, size, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    next += got;
    size -= static_cast<std::size_t>(got);
  }
  return true;
}

}  // namespace tandem::traffic
