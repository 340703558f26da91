// SPDX-License-Identifier: Apache-2.0
// UniqueFd: sole owner of a file descriptor.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <utility>

namespace tandem {

/// Closes its descriptor when it goes; move-only. -1 means "none". Any thread, no locking of its own.
class UniqueFd {
 public:
  UniqueFd() noexcept = default;
  explicit UniqueFd(int fd) noexcept : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) reset(std::exchange(other.fd_, -1));
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { reset(); }

  [[nodiscard]] int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }
  [[nodiscard]] int release() noexcept { return std::exchange(fd_, -1); }
  void reset(int fd = -1) noexcept {
    if (fd_ >= 0) ::close(fd_);
    fd_ = fd;
  }
  /// A second descriptor of the same open file, close-on-exec; empty when the process is out of descriptors.
  [[nodiscard]] UniqueFd duplicate() const noexcept { return UniqueFd{::fcntl(fd_, F_DUPFD_CLOEXEC, 0)}; }

 private:
  int fd_ = -1;
};

}  // namespace tandem
