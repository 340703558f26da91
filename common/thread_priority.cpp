// SPDX-License-Identifier: Apache-2.0
// sched_setattr(2), which glibc 2.36 does not wrap, and affinities.
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

Status pin_thread(pid_t tid, std::uint32_t cpu) {
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(cpu, &only);
  if (::sched_setaffinity(tid, sizeof only, &only) != 0)
    return fail_errno(
        "pin " + (tid == 0 ? "a thread" : "poll thread " + std::to_string(tid)) + " to CPU " + std::to_string(cpu),
        errno == EPERM ? "tandemd needs CAP_SYS_NICE"
                       : "give CPUs that are in /sys/devices/system/cpu/online and in tandemd's cpuset");
  return {};
}

bool runs_on(pid_t tid, std::uint32_t cpu) {
  cpu_set_t allowed;
  return ::sched_getaffinity(tid, sizeof allowed, &allowed) == 0 && CPU_ISSET(cpu, &allowed);
}

Status keep_off(std::span<const std::uint32_t> cpus) {
  const cpu_set_t before = allowed_cpus();
  cpu_set_t others = before;
  Status usable;
  for (const std::uint32_t cpu : cpus) {
    if (usable) usable = pin_thread(0, cpu);
    CPU_CLR(cpu, &others);
  }
  const bool some = CPU_COUNT(&others) != 0;
  const cpu_set_t& next = usable && some ? others : before;
  if (::sched_setaffinity(0, sizeof next, &next) != 0 && usable)
    return fail_errno("leave the poll threads' CPUs to them");
  if (usable && !some)
    return fail(ErrorKind::kUnsupported, "these are all CPUs there are: everything else goes on running on them, too");
  return usable;
}

cpu_set_t allowed_cpus() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  ::sched_getaffinity(0, sizeof allowed, &allowed);
  return allowed;
}

void put_aside(pid_t tid, cpu_set_t cpus) {
  constexpr int kLast = 19;
  ::setpriority(PRIO_PROCESS, static_cast<id_t>(tid), kLast);
  if (const int here = ::sched_getcpu(); here >= 0) CPU_CLR(static_cast<unsigned>(here), &cpus);
  if (CPU_COUNT(&cpus) != 0) ::sched_setaffinity(tid, sizeof cpus, &cpus);
}

}  // namespace tandem
