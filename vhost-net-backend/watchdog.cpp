// SPDX-License-Identifier: Apache-2.0
// Timer, thread state and verdict.
#include "vhost-net-backend/watchdog.hpp"

#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <ctime>

#include "common/thread_priority.hpp"

namespace tandem {

namespace {

constexpr long kLookNs = 300'000;          // between two readings of the owner's CPU time
constexpr std::uint64_t kBusyNs = 50'000;  // of CPU used in between: running, not waiting for a CPU

timespec to_timespec(std::uint64_t ns) {
  return {static_cast<time_t>(ns / 1'000'000'000), static_cast<long>(ns % 1'000'000'000)};
}

// CPU time of a whole process, exact to the moment of the call also while it runs (unlike /proc, which is brought up to
// date by the timer tick). Of another process only the whole can be read, not one thread; its control thread hardly
// ever runs.
std::uint64_t cpu_time(pid_t pid) {
  clockid_t clock{};
  timespec used{};
  if (::clock_getcpuclockid(pid, &clock) != 0 || ::clock_gettime(clock, &used) != 0) return 0;
  return static_cast<std::uint64_t>(used.tv_sec) * 1'000'000'000u + static_cast<std::uint64_t>(used.tv_nsec);
}

char thread_state(pid_t pid, pid_t tid) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/task/%d/stat", pid, tid);
  const UniqueFd file{::open(path, O_RDONLY | O_CLOEXEC)};
  char text[512];
  const ssize_t got = file ? ::read(file.get(), text, sizeof text - 1) : -1;
  if (got <= 0) return '?';
  text[got] = '\0';
  const char* name_end = std::strrchr(text, ')');
  return name_end != nullptr && name_end[1] == ' ' ? name_end[2] : '?';
}

}  // namespace

void DeadManSwitch::push(std::uint64_t limit_ns) const {
  if (!timer_) return;
  itimerspec time{};
  time.it_value = to_timespec(std::max<std::uint64_t>(limit_ns, 1));
  ::timerfd_settime(timer_.get(), 0, &time, nullptr);
}

bool DeadManSwitch::drain() const {
  std::uint64_t expiries = 0;
  return timer_ && ::read(timer_.get(), &expiries, sizeof expiries) == sizeof expiries;
}

HangVerdict judge(const OwnerView& view) {
  if (view.passes_work_by) return HangVerdict::kNoProgress;
  if (view.marked_asleep) {
    if (!view.work_pending || view.state == '?' || view.state == 'Z' || view.state == 'X') return HangVerdict::kNone;
    // Woken, and waits for a CPU.
    if (view.state == 'R' && !view.uses_cpu)
      return view.asleep_work_ns > kStarvedLimitNs ? HangVerdict::kStarved : HangVerdict::kNone;
    return view.asleep_work_ns > view.blocked_limit_ns ? HangVerdict::kAsleepWithWork : HangVerdict::kNone;
  }
  switch (view.state) {
    case 'R':
      if (view.uses_cpu) return view.still_ns > view.spin_limit_ns ? HangVerdict::kSpinning : HangVerdict::kNone;
      return view.still_ns > kStarvedLimitNs ? HangVerdict::kStarved : HangVerdict::kNone;
    case '?':  // gone, or /proc is hidden: the fence decides
    case 'Z':
    case 'X':
      return HangVerdict::kNone;
    default:  // S, D, T, t, I
      return view.still_ns > view.blocked_limit_ns ? HangVerdict::kBlocked : HangVerdict::kNone;
  }
}

void Watchdog::look(OwnerView& view) const {
  view.state = thread_state(pid_, tid_);
  if (view.state != 'R') return;
  const std::uint64_t before = cpu_time(pid_);
  const timespec pause{0, kLookNs};
  ::nanosleep(&pause, nullptr);
  view.uses_cpu = cpu_time(pid_) - before > kBusyNs;
}

void Watchdog::put_aside(const cpu_set_t& cpus) const {
  if (::syscall(SYS_tgkill, pid_, tid_, 0) == 0) tandem::put_aside(tid_, cpus);
}

void Watchdog::kill() const { ::syscall(SYS_pidfd_send_signal, pidfd_.get(), SIGKILL, nullptr, 0); }

}  // namespace tandem
