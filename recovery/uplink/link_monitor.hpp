// SPDX-License-Identifier: Apache-2.0
// LinkMonitor: tells that some link changed or went away, as a readable fd.
#pragma once

#include "common/result.hpp"
#include "common/unique_fd.hpp"

namespace tandem {

/// An rtnetlink socket in the links group. What changed is not read from it: links are looked up afresh, so that lost
/// messages (ENOBUFS) do no harm. One thread.
class LinkMonitor {
 public:
  LinkMonitor() = default;
  static Result<LinkMonitor> open();

  /// EPOLLIN when links changed since drain().
  [[nodiscard]] int fd() const noexcept { return socket_.get(); }
  void drain() noexcept;
  /// Sleeps until links change, at most `timeout_ms`; false if they did not.
  [[nodiscard]] bool wait(int timeout_ms) const noexcept;

 private:
  explicit LinkMonitor(UniqueFd socket) : socket_(std::move(socket)) {}
  UniqueFd socket_;
};

}  // namespace tandem
