// SPDX-License-Identifier: Apache-2.0
// Poison for tests: a packet that says so makes whoever stages it fail. Only probed builds include this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/layout/control_message.hpp"

namespace tandem {

/// Where poison begins: behind Ethernet, IPv4 and UDP headers. Then comes one byte, a DrillFault.
inline constexpr std::size_t kPoisonAt = 14 + 20 + 8;
inline constexpr char kPoisonMagic[] = "tandem poison:";
inline constexpr std::size_t kPoisonMagicSize = sizeof kPoisonMagic - 1;

void fail_on_purpose(DrillFault fault, const std::byte* read_only);

inline void fail_on_poison(const std::byte* packet, std::size_t length) {
  if (packet == nullptr || length <= kPoisonAt + kPoisonMagicSize) return;
  if (std::memcmp(packet + kPoisonAt, kPoisonMagic, kPoisonMagicSize) != 0) return;
  fail_on_purpose(static_cast<DrillFault>(packet[kPoisonAt + kPoisonMagicSize]), nullptr);
}

}  // namespace tandem
