// SPDX-License-Identifier: Apache-2.0
// ThreadIdentity: which thread a tid means right now, so that a recycled tid is not mistaken for the thread it once
// named.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string_view>

#include "common/result.hpp"

namespace tandem {

/// A tid is unique only together with the moment its thread began (in clock ticks since boot, /proc/TID/stat field 22).
struct ThreadIdentity {
  pid_t tid = 0;
  std::uint64_t start_ticks = 0;
  /// True from the first step of exit on (PF_EXITING, or a zombie): the exit tracepoint may already have passed.
  bool exiting = false;

  [[nodiscard]] bool same_thread(const ThreadIdentity& other) const noexcept {
    return tid == other.tid && start_ticks == other.start_ticks;
  }
};

/// Looks `tid` up in /proc; with `process` not 0 it must be one of that process's threads. kGone: no such thread.
Result<ThreadIdentity> identify_thread(pid_t tid, pid_t process = 0);

/// Reads one line of /proc/PID/stat (Documentation/filesystems/proc.rst). The command name may hold anything, so fields
/// are counted from its last ')'. kInvalid if it is not such a line.
Result<ThreadIdentity> parse_thread_stat(std::string_view line);

}  // namespace tandem
