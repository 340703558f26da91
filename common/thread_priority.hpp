// SPDX-License-Identifier: Apache-2.0
// Scheduling of poll threads: on which CPUs, and with what priority; an heir sleeps with a real-time one, an owner
// works with an ordinary one.
//
// An heir is woken while others keep its CPU busy. A low nice value alone does not get it the CPU at once: it counts
// within the task's session or cgroup only (sched(7), "The autogroup feature"), and a running task may be left its
// slice. A real-time task preempts in the moment it is woken. An owner that polls for long would starve its CPU with
// that, so it gives the priority up soon after a takeover, which an unprivileged thread may; getting it back takes the
// supervisor.
#pragma once

#include <sched.h>
#include <sys/types.h>

#include <cstdint>
#include <span>

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

/// Thread `tid` runs on `cpu` and nowhere else. kSystem: not permitted, or there is no such CPU for it (cpuset(7)).
Status pin_thread(pid_t tid, std::uint32_t cpu);

/// Whether thread `tid` may run on `cpu`. False if it has gone.
bool runs_on(pid_t tid, std::uint32_t cpu);

/// The caller, and what it starts from now on, leaves `cpus` to others, whether it ran there so far or not (isolcpus=).
/// kSystem: one of them cannot be used by anybody, and nothing has changed; kUnsupported: there is no other CPU to run
/// on, and the caller stays where it is.
Status keep_off(std::span<const std::uint32_t> cpus);

/// The CPUs that the calling thread may run on; none if that cannot be told.
cpu_set_t allowed_cpus();

/// Thread `tid` of the same user, which is about to exit, does that on one of `cpus` but the caller's, and lets others
/// go first: whichever thread of a process leaves last takes its address space apart, half a millisecond that the
/// caller's CPU would be busy in the kernel. Does nothing if there is no such thread; that `tid` is still the one meant
/// is the caller's care. It changes where and when a thread runs, never whether: nothing of the fence depends on it.
void put_aside(pid_t tid, cpu_set_t cpus);

}  // namespace tandem
