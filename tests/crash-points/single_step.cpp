// SPDX-License-Identifier: Apache-2.0
// Single-stepping a child.
#include "tests/crash-points/single_step.hpp"

#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>

namespace tandem::test {

namespace {
[[noreturn]] void give_up(const char* what, int status) {
  std::fprintf(stderr, "single-step a child: %s (wait status 0x%x)\n", what, static_cast<unsigned>(status));
  std::abort();
}
}  // namespace

void stepped::pause() { ::raise(SIGSTOP); }

SteppedProcess::SteppedProcess(const std::function<void()>& act) {
  child_ = ::fork();
  if (child_ < 0) give_up("fork failed", 0);
  if (child_ == 0) {
    if (::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) ::_exit(1);
    act();
    ::_exit(0);
  }
  if (!wait()) give_up("no pause at the beginning", 0);
  if (::ptrace(PTRACE_SETOPTIONS, child_, nullptr, PTRACE_O_EXITKILL) != 0) give_up("ptrace options refused", 0);
}

SteppedProcess::~SteppedProcess() {
  ::kill(child_, SIGKILL);
  int status = 0;
  while (::waitpid(child_, &status, 0) == child_ && WIFSTOPPED(status)) {
  }
}

bool SteppedProcess::wait() const {
  int status = 0;
  if (::waitpid(child_, &status, __WALL) != child_ || !WIFSTOPPED(status)) give_up("the child is gone", status);
  const int signal = WSTOPSIG(status);
  if (signal != SIGSTOP && signal != SIGTRAP) give_up("the child got a signal", status);
  return signal == SIGSTOP;
}

void SteppedProcess::run() {
  if (::ptrace(PTRACE_CONT, child_, nullptr, nullptr) != 0) give_up("continue refused", 0);
  if (!wait()) give_up("a trap that nobody asked for", 0);
}

std::uint64_t SteppedProcess::step(const std::function<void()>& look) {
  for (std::uint64_t steps = 0;; ++steps) {
    if (::ptrace(PTRACE_SINGLESTEP, child_, nullptr, nullptr) != 0) give_up("step refused", 0);
    if (wait()) return steps;
    look();
  }
}

}  // namespace tandem::test
