// SPDX-License-Identifier: Apache-2.0
// Single-stepping a child.
#include "tests/crash-points/single_step.hpp"

#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstddef>
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

bool SteppedProcess::go_on(int request) {
  if (::ptrace(static_cast<__ptrace_request>(request), child_, nullptr, nullptr) != 0) give_up("going on refused", 0);
  return wait();
}

std::uint64_t SteppedProcess::instruction() const {
  errno = 0;
  const long address = ::ptrace(PTRACE_PEEKUSER, child_, offsetof(user, regs.rip), nullptr);
  if (errno != 0) give_up("its registers cannot be read", 0);
  return static_cast<std::uint64_t>(address);
}

void SteppedProcess::set_instruction(std::uint64_t address) {
  if (::ptrace(PTRACE_POKEUSER, child_, offsetof(user, regs.rip), address) != 0)
    give_up("its registers cannot be written", 0);
}

void SteppedProcess::run() {
  if (traps_) traps_->lift();
  if (!go_on(PTRACE_CONT)) give_up("a trap that nobody asked for", 0);
}

void SteppedProcess::step(const std::function<void(bool could_store)>& look) {
  if (traps_) traps_->lift();
  for (;;) {
    const bool could_store = can_store(instruction());
    if (go_on(PTRACE_SINGLESTEP)) return;
    look(could_store);
  }
}

void SteppedProcess::step_stores(const std::function<void()>& look) {
  if (!traps_) traps_ = std::make_unique<StoreTraps>(child_);
  traps_->plant();
  for (std::uint64_t at = instruction();;) {
    const StoreTraps::Pace pace = traps_->reach(at);
    if (pace == StoreTraps::Pace::kRun) {
      if (go_on(PTRACE_CONT)) return;
      // Behind the breakpoint's one byte.
      at = instruction() - 1;
      if (!traps_->trapped(at)) give_up("a trap that nobody asked for", 0);
      set_instruction(at);
      continue;
    }
    const std::uint64_t from = at;
    do {  // a repeated string instruction stores again and again
      const bool paused = go_on(PTRACE_SINGLESTEP);
      if (paused) traps_->rearm(from);
      if (paused) return;
      if (pace == StoreTraps::Pace::kLook) look();
      at = instruction();
    } while (at == from);
    traps_->rearm(from);
  }
}

}  // namespace tandem::test
