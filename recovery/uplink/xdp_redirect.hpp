// SPDX-License-Identifier: Apache-2.0
// XdpRedirect: the XDP program that feeds a netdev's AF_XDP sockets, attached by a pinned link.
#pragma once

#include <cstdint>
#include <string>

#include "common/result.hpp"
#include "common/unique_fd.hpp"

namespace tandem {

/// Pinned in `pin_dir`, so that traffic flows on when the supervisor dies; unpin() and the end of this object detach
/// it.
class XdpRedirect {
 public:
  XdpRedirect() = default;

  /// Attaches to `ifindex` in native mode, else in generic mode (generic() tells). kInvalid if the netdev has another
  /// XDP program. `pass_host_traffic`: frames of queues without a socket go to the host's stack instead of being
  /// dropped.
  static Result<XdpRedirect> attach(std::uint32_t ifindex, bool pass_host_traffic, const std::string& pin_dir);

  /// What a dead supervisor attached and pinned in `pin_dir`. kGone: nothing is pinned there.
  static Result<XdpRedirect> adopt(const std::string& pin_dir);

  /// Puts a bound socket in the map. The kernel takes it out when its last holder closes it.
  Status add(std::uint32_t queue, int socket_fd);
  Status unpin();
  [[nodiscard]] bool generic() const noexcept { return generic_; }

 private:
  UniqueFd map_;
  UniqueFd link_;
  std::string pin_dir_;
  bool generic_ = false;
};

}  // namespace tandem
