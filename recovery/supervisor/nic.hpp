// SPDX-License-Identifier: Apache-2.0
// Nic: one network card of one domain: its option, its vhost-user device, its uplink, and the request in hand.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "recovery/supervisor/control_server.hpp"
#include "recovery/supervisor/event_loop.hpp"
#include "recovery/supervisor/pair.hpp"
#include "recovery/uplink/uplink.hpp"
#include "recovery/vault/vault_client.hpp"
#include "vmm/domain_option.hpp"
#include "vmm/vhost_user_device.hpp"

namespace tandem {

/// A message (or disconnection) of the front end whose answer waits until every owner has let go.
struct PendingRequest {
  std::uint64_t sequence = 0;
  bool disconnect = false;
  bool disable = false;
  bool vault_lost = false;  ///< nobody to answer
  Outcome outcome;
  std::uint64_t generation = 0;
  std::uint64_t since_ns = 0;
  EventLoop::Timer limit;
  bool alarmed = false;
};

/// Why a NIC has no link until an operator enables it (parking.cpp).
struct Disabled {
  bool by_tandem = false;  ///< parked: its packets kept killing backends
  std::string reason;
  std::int64_t since_ms = 0;  ///< since 1970, UTC
};

struct Nic {
  NicOption option;
  std::string domain, domain_uuid;
  Pair* pair = nullptr;
  std::uint32_t device_index = 0;
  std::uint32_t first_queue_pair = 0;
  std::uint32_t group = 0;  ///< NICs of one group, not 0, reach one another without the bridge
  std::optional<Uplink> uplink;
  EventLoop::Source uplink_watch;
  EventLoop::Timer carrier_limit;  ///< runs until the uplink is connected
  std::string uplink_problem;      ///< empty while it works
  std::optional<VhostUserDevice> device;
  bool connected = false;
  std::uint64_t connection = 0;
  /// QEMU's connection, never read: QEMU sees its end, and goes by what the rings say, only once this is closed. So
  /// that no owner writes by then, also where it is the vault that died.
  UniqueFd held;
  std::optional<PendingRequest> pending;
  /// Of a QEMU that found the new vault before the owners had let go for the old one's connection: they come after
  /// that.
  UniqueFd held_next;
  std::optional<RelayedMessage> waiting;
  std::string start_failure;  ///< why its domain's start must be refused; empty: no reason yet
  bool releasing = false;
  std::optional<Disabled> disabled;
  std::vector<ControlServer::Answer> when_disabled;
  std::uint64_t kills_seen = 0;     ///< sum of QueuePairState::kills when it was last looked at
  std::deque<std::uint64_t> kills;  ///< CLOCK_MONOTONIC ns when more were found; the last ones
  std::vector<std::function<void()>> when_released;
};

}  // namespace tandem
