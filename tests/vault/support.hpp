// SPDX-License-Identifier: Apache-2.0
// Fixtures of the vault's tests: a scripted front end, a recording tandemd, a folder that goes away.
#pragma once

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "recovery/vault/vault_client.hpp"

namespace tandem::test {

using Bytes = std::vector<std::byte>;

inline constexpr std::chrono::seconds kFailsafe{10};

inline void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what + ": " + std::strerror(errno));
}

/// A vhost-user message: request number, payload of `size` bytes counting up from 0.
inline Bytes frame(std::uint32_t request, std::uint32_t size = 0, std::uint32_t flags = 1) {
  Bytes bytes(kVhostUserHeader + size);
  std::memcpy(bytes.data(), &request, 4);
  std::memcpy(bytes.data() + 4, &flags, 4);
  std::memcpy(bytes.data() + 8, &size, 4);
  for (std::size_t i = 0; i < size; ++i) bytes[kVhostUserHeader + i] = static_cast<std::byte>(i);
  return bytes;
}

inline std::uint32_t request_of(const Bytes& bytes) {
  std::uint32_t request = 0;
  std::memcpy(&request, bytes.data(), 4);
  return request;
}

inline ino_t inode(int fd) {
  struct stat status {};
  require(::fstat(fd, &status) == 0, "fstat");
  return status.st_ino;
}

/// A descriptor with an inode of its own. (A real file: all eventfds share one inode.)
inline UniqueFd some_file() {
  UniqueFd fd{::memfd_create("vault-test", MFD_CLOEXEC)};
  require(static_cast<bool>(fd), "memfd");
  return fd;
}

inline std::size_t count_fds(pid_t pid) {
  const std::filesystem::path folder{"/proc/" + std::to_string(pid) + "/fd"};
  return static_cast<std::size_t>(
      std::distance(std::filesystem::directory_iterator{folder}, std::filesystem::directory_iterator{}));
}

/// Raw write with descriptors on the first byte, as a front end does it.
inline void write_raw(int socket, std::span<const std::byte> bytes, const std::vector<int>& fds = {}) {
  iovec data{const_cast<std::byte*>(bytes.data()), bytes.size()};
  alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(253 * sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
  }
  require(::sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size()), "write to socket");
}

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "tandem-vault-XXXXXX").string();
    require(::mkdtemp(pattern.data()) != nullptr, "mkdtemp");
    path_ = pattern;
    ::chmod(path_.c_str(), 0755);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  [[nodiscard]] std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

inline sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  return address;
}

inline UniqueFd listen_unix(const std::string& path, int type) {
  UniqueFd socket{::socket(AF_UNIX, type | SOCK_CLOEXEC, 0)};
  const sockaddr_un address = address_of(path);
  ::unlink(path.c_str());
  require(::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0, "bind " + path);
  require(::listen(socket.get(), 8) == 0, "listen");
  return socket;
}

/// A scripted front end on a real socket. Its calls block, with a limit.
class ScriptedFrontEnd {
 public:
  explicit ScriptedFrontEnd(const std::string& path) : socket_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    const sockaddr_un address = address_of(path);
    require(::connect(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0, "connect");
    const timeval limit{kFailsafe.count(), 0};
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  }
  void send(std::span<const std::byte> bytes, const std::vector<int>& fds = {}) {
    write_raw(socket_.get(), bytes, fds);
  }
  /// Reads exactly `size` bytes; fewer when the other end closes first.
  Bytes read(std::size_t size) {
    Bytes bytes(size);
    std::size_t have = 0;
    while (have < size) {
      const ssize_t got = ::read(socket_.get(), bytes.data() + have, size - have);
      if (got <= 0) break;
      have += static_cast<std::size_t>(got);
    }
    bytes.resize(have);
    return bytes;
  }
  /// Nothing to read now.
  [[nodiscard]] bool quiet() const {
    pollfd ready{socket_.get(), POLLIN, 0};
    return ::poll(&ready, 1, 0) == 0;
  }
  [[nodiscard]] int fd() const { return socket_.get(); }
  void close() { socket_.reset(); }

 private:
  UniqueFd socket_;
};

/// Records everything; applies nothing by itself.
struct Recorder : VaultHandler {
  struct End {
    std::string nic;
    std::uint64_t connection, sequence;
  };
  void on_listening(const std::string& nic) override { listening.push_back(nic); }
  void on_connected(const std::string& nic, std::uint64_t connection, UniqueFd) override {
    connected.emplace_back(nic, connection);
  }
  void on_message(RelayedMessage message) override { messages.push_back(std::move(message)); }
  void on_disconnected(const std::string& nic, std::uint64_t connection, std::uint64_t sequence) override {
    ends.push_back({nic, connection, sequence});
  }
  void on_announced() override { announced = true; }
  void on_error(const std::string& text) override { errors.push_back(text); }

  std::vector<std::string> listening;
  std::vector<std::pair<std::string, std::uint64_t>> connected;
  std::vector<RelayedMessage> messages;
  std::vector<End> ends;
  std::vector<std::string> errors;
  bool announced = false;
};

/// Dispatches until `done`, waiting on the client's descriptor. False: the failsafe ended it, or the vault went.
inline bool dispatch_until(VaultClient& client, VaultHandler& handler, const std::function<bool()>& done) {
  const auto deadline = std::chrono::steady_clock::now() + kFailsafe;
  while (!done()) {
    if (std::chrono::steady_clock::now() >= deadline) return false;
    pollfd ready{client.fd(), POLLIN, 0};
    ::poll(&ready, 1, 1000);
    if (!client.dispatch(handler)) return done();
  }
  return true;
}

}  // namespace tandem::test
