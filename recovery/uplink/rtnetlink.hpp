// SPDX-License-Identifier: Apache-2.0
// Rtnetlink: the link operations an uplink needs, over libnl. Acts in the network namespace its maker's thread was in.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/result.hpp"

struct nl_sock;
struct rtnl_link;

namespace tandem {

/// What one link looks like now.
struct LinkState {
  std::uint32_t ifindex = 0;
  std::uint32_t master = 0;  ///< ifindex of the bridge or bond it belongs to; 0: none
  std::uint32_t mtu = 0;
  std::uint32_t rx_queues = 0;
  bool up = false;        ///< administratively
  bool carrying = false;  ///< operationally (RFC 2863): frames pass
  bool loopback = false;
  std::string name;
  std::string kind;   ///< "bridge", "veth", ...; empty for hardware
  std::string alias;  ///< ifalias; empty: none
};

struct VethPlan {
  std::string name;
  std::string peer;
  std::uint32_t queues = 1;  ///< RX and TX queues of each end
  std::uint32_t mtu = 1500;
};

/// Changes to one link; what is empty stays.
struct LinkChange {
  std::optional<bool> up;
  std::optional<std::uint32_t> master;
  std::optional<std::string> alias;
};

/// One netlink socket; one thread.
class Rtnetlink {
 public:
  static Result<Rtnetlink> open();

  /// An empty optional: there is no such link.
  Result<std::optional<LinkState>> find(const std::string& name);
  Result<std::optional<LinkState>> find(std::uint32_t ifindex);
  Result<std::vector<LinkState>> all();
  /// True if the link has an IPv4 address, or an IPv6 address other than a link-local one.
  Result<bool> has_address(std::uint32_t ifindex);

  /// Makes both ends, down. kInvalid if a name is taken.
  Status add_veth(const VethPlan& plan);
  Status change(std::uint32_t ifindex, const LinkChange& change);
  /// Deleting one end of a veth deletes both. A link that is gone is fine.
  Status remove(std::uint32_t ifindex);

 private:
  struct Close {
    void operator()(nl_sock* socket) const noexcept;
  };
  explicit Rtnetlink(nl_sock* socket) : socket_(socket) {}
  Result<std::optional<LinkState>> find(std::uint32_t ifindex, const char* name);

  std::unique_ptr<nl_sock, Close> socket_;
};

}  // namespace tandem
