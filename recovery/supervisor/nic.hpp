// SPDX-License-Identifier: Apache-2.0
// Nic: one network card of one domain: its option, its vhost-user device, its uplink, and the request in hand.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "recovery/supervisor/event_loop.hpp"
#include "recovery/supervisor/pair.hpp"
#include "recovery/uplink/uplink.hpp"
#include "vmm/domain_option.hpp"
#include "vmm/vhost_user_device.hpp"

namespace tandem {

/// A message (or disconnection) of the front end whose answer waits until every owner has let go.
struct PendingRequest {
  std::uint64_t sequence = 0;
  bool disconnect = false;
  Outcome outcome;
  std::uint64_t generation = 0;
  std::uint64_t since_ns = 0;
  EventLoop::Timer limit;
  bool alarmed = false;
};

struct Nic {
  NicOption option;
  std::string domain, domain_uuid;
  Pair* pair = nullptr;
  std::uint32_t device_index = 0;
  std::uint32_t first_queue_pair = 0;
  std::optional<Uplink> uplink;
  EventLoop::Source uplink_watch;
  EventLoop::Timer carrier_limit;  ///< runs until the uplink is connected
  std::string uplink_problem;      ///< empty while it works
  std::optional<VhostUserDevice> device;
  bool connected = false;
  std::uint64_t connection = 0;
  std::optional<PendingRequest> pending;
  std::string start_failure;  ///< why its domain's start must be refused; empty: no reason yet
  bool releasing = false;
  std::vector<std::function<void()>> when_released;
};

}  // namespace tandem
