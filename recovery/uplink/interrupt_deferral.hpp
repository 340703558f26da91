// SPDX-License-Identifier: Apache-2.0
// How long a netdev's interrupts wait for somebody who polls its queues: two files of its in /sys/class/net, for all
// its NAPI instances. Source: Documentation/networking/napi.rst, "IRQ mitigation"; net/core/dev.c, busy_poll_stop().
#pragma once

#include <cstdint>
#include <string>

#include "common/result.hpp"

namespace tandem {

struct InterruptDeferral {
  std::uint32_t polls = 0;       ///< in a row that find nothing before interrupts are on again; 0: at once
  std::uint64_t timeout_ns = 0;  ///< from one poll to the one that the kernel does itself
  bool operator==(const InterruptDeferral&) const = default;
};

/// Of netdev `name`, in the network namespace that /sys shows.
Result<InterruptDeferral> interrupt_deferral(const std::string& name);
Status set_interrupt_deferral(const std::string& name, const InterruptDeferral& wanted);

}  // namespace tandem
