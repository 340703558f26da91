// SPDX-License-Identifier: Apache-2.0
// sched_setattr(2), which glibc 2.36 does not wrap.
#include "common/thread_priority.hpp"

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <string>

namespace tandem {

namespace {

// struct sched_attr (sched_setattr(2)).
struct SchedulingAttributes {
  std::uint32_t size, policy;
  std::uint64_t flags;
  std::int32_t nice;
  std::uint32_t priority;
  std::uint64_t runtime, deadline, period;
};

constexpr std::uint64_t kSliceNs = 100'000;

}  // namespace

Status make_ordinary(pid_t tid, int nice) {
  SchedulingAttributes attributes{};
  attributes.size = sizeof attributes;
  attributes.policy = SCHED_OTHER;
  attributes.nice = nice;
  attributes.runtime = kSliceNs;
  if (::syscall(SYS_sched_setattr, tid, &attributes, 0) != 0)
    return fail_errno("set the priority of poll thread " + std::to_string(tid), "tandemd needs CAP_SYS_NICE");
  return {};
}

Status make_real_time(pid_t tid) {
  const sched_param priority{1};
  if (::sched_setscheduler(tid, SCHED_FIFO, &priority) != 0)
    return fail_errno(
        "give poll thread " + std::to_string(tid) + " real-time priority",
        "tandemd needs CAP_SYS_NICE, and in a version 1 cpu cgroup real-time bandwidth (cpu.rt_runtime_us)");
  return {};
}

void become_ordinary() {
  // The kernel keeps the nice value of a real-time thread.
  if (::sched_getscheduler(0) != SCHED_OTHER)
    static_cast<void>(make_ordinary(0, ::getpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()))));
}

}  // namespace tandem
