// SPDX-License-Identifier: Apache-2.0
// Scheduling of poll threads: an heir sleeps with real-time priority, an owner works with an ordinary one.
//
// An heir is woken while others keep its CPU busy. A low nice value alone does not get it the CPU at once: it counts
// within the task's session or cgroup only (sched(7), "The autogroup feature"), and a running task may be left its
// slice. A real-time task preempts in the moment it is woken. An owner that polls for long would starve its CPU with
// that, so it gives the priority up soon after a takeover, which an unprivileged thread may; getting it back takes the
// supervisor.
#pragma once

#include <sys/types.h>

#include "common/result.hpp"

namespace tandem {

/// Thread `tid` (0: the caller) is scheduled as others are, with nice value `nice` and a short slice (honoured since
/// Linux 6.12). A thread may do this to itself if `nice` is the value it has. kSystem: not permitted.
Status make_ordinary(pid_t tid, int nice);

/// Thread `tid` preempts every ordinary one (SCHED_FIFO, priority 1); its nice value is kept for later. kSystem: not
/// permitted, as in a cgroup of version 1 without real-time bandwidth (cpu.rt_runtime_us).
Status make_real_time(pid_t tid);

/// The calling thread gives its real-time priority up, if it has one; its nice value is what it was.
void become_ordinary();

}  // namespace tandem
