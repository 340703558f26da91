// SPDX-License-Identifier: Apache-2.0
// A netdev's offload features and channels, through the ethtool ioctls (include/uapi/linux/ethtool.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/result.hpp"

namespace tandem {

/// One feature under its kernel name ("tx-checksum-ip-generic", "rx-gro").
struct NetdevFeature {
  std::string name;
  bool active = false;
  bool changeable = false;
};

/// All features of netdev `name` in this thread's network namespace.
Result<std::vector<NetdevFeature>> netdev_features(const std::string& name);

/// Switches every active, changeable feature off whose name begins with one of `prefixes`; returns the names of those
/// that were on, for restoring. What the driver refuses to switch off stays on without an error: query afterwards.
Result<std::vector<std::string>> switch_features_off(const std::string& name, const std::vector<std::string>& prefixes);

/// Switches the named features on again.
Status switch_features_on(const std::string& name, const std::vector<std::string>& features);

/// Queue counts. Drivers have either combined channels or separate ones, or no channel control at all (all zero).
struct Channels {
  std::uint32_t rx = 0;
  std::uint32_t tx = 0;
  std::uint32_t combined = 0;
  std::uint32_t max_rx = 0;
  std::uint32_t max_tx = 0;
  std::uint32_t max_combined = 0;

  [[nodiscard]] std::uint32_t rx_queues() const noexcept { return rx + combined; }
  [[nodiscard]] std::uint32_t tx_queues() const noexcept { return tx + combined; }
};
Result<Channels> channels(const std::string& name);
Status set_channels(const std::string& name, const Channels& wanted);

}  // namespace tandem
