// SPDX-License-Identifier: Apache-2.0
// The guest's side of the traffic: an agent that obeys the control connection.
#pragma once

#include <string>

#include "common/result.hpp"

namespace tandem::traffic {

/// Serves control connections one after the other, for ever. A new one ends the traffic of the one before.
/// `interface` is the network interface whose link changes and drops are reported.
Status run_guest_agent(const std::string& interface);

/// Sets the number of combined channels, as `ethtool -L INTERFACE combined COUNT` does; a device with fewer gets all it
/// has. Returns how many are in use.
Result<unsigned> set_channels(const std::string& interface, unsigned count);

}  // namespace tandem::traffic
