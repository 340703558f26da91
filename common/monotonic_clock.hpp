// SPDX-License-Identifier: Apache-2.0
// The clock of everything that Tandem measures: the fence's marks (bpf_ktime_get_ns()), incidents, limits. Thread: any.
#pragma once

#include <cstdint>
#include <ctime>

namespace tandem {

/// CLOCK_MONOTONIC in nanoseconds.
inline std::uint64_t monotonic_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<std::uint64_t>(now.tv_nsec);
}

}  // namespace tandem
