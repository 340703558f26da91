// SPDX-License-Identifier: Apache-2.0
// What a test and the probed backends share: which probe point is deadly, and how often each was passed.
#pragma once

#include <atomic>
#include <cstdint>

#include "vhost-net-backend/probe.hpp"

namespace tandem::test {

/// A file that the environment's TANDEM_PROBE_FILE names, mapped by the test and every backend.
struct ProbeControl {
  std::atomic<std::uint32_t> armed;      ///< ProbePoint + 1; 0: none
  std::atomic<std::uint32_t> countdown;  ///< the pass that kills
  std::atomic<std::uint32_t> then;       ///< what to arm when that has happened, for one pass; 0: nothing
  std::atomic<std::uint32_t> killed;     ///< pid of the last one killed
  std::atomic<std::uint32_t> attempt;  ///< 1: the next thread to pass tries what is forbidden; 2: the results are there
  std::atomic<std::int32_t> fork_error, exec_error, bpf_error;  ///< errno of each; 0: it succeeded
  std::atomic<std::uint32_t> working;   ///< pid of who is between arming and disarming; 0: nobody
  std::atomic<std::uint32_t> overlaps;  ///< how often somebody armed while another was there
  std::atomic<std::uint32_t> transactions;
  std::atomic<std::uint32_t> passes[static_cast<std::size_t>(ProbePoint::kCount)];
};

}  // namespace tandem::test
