// SPDX-License-Identifier: Apache-2.0
// What a test and the probed tandemd share: which probe point is deadly.
#pragma once

#include <atomic>
#include <cstdint>

#include "recovery/supervisor/probe.hpp"

namespace tandem::test {

/// A file that the environment's TANDEM_SUPERVISOR_PROBE_FILE names, mapped by the test and tandemd.
struct SupervisorProbeControl {
  std::atomic<std::uint32_t> armed;      ///< SupervisorProbe + 1; 0: none
  std::atomic<std::uint32_t> countdown;  ///< the pass that kills
  std::atomic<std::uint32_t> killed;     ///< pid of the one killed; 0: not yet
};

}  // namespace tandem::test
