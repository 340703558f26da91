// SPDX-License-Identifier: Apache-2.0
// Names of an uplink's netdevs and pins: pure functions, the same after every restart.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "common/result.hpp"

namespace tandem {

/// "52:54:00:AB:cd:ef" in lower case; kInvalid if it is not six hex bytes, or a multicast or all-zero address.
Result<std::string> normalized_mac(std::string_view mac);

/// A veth end's name, ten characters: "tdm", six hex digits, 'a' (ours) or 'b' (the bridge port). Attempt 0 takes the
/// digits of the MAC's last three bytes, so that people find it; further attempts, for when that name is taken, take
/// hashes.
std::string veth_name(std::string_view normalized_mac, std::uint32_t attempt, char end);
/// True for every name veth_name() can make.
bool is_veth_name(std::string_view name);

/// The alias that both ends carry, by which they are found again.
std::string uplink_alias(std::string_view instance, std::string_view normalized_mac);
/// True for the aliases of all uplinks of `instance`.
bool is_alias_of(std::string_view alias, std::string_view instance);

/// `name` as a bpffs directory name: bpffs allows no dots.
std::string pin_name(std::string_view name);

}  // namespace tandem
