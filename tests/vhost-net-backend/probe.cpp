// SPDX-License-Identifier: Apache-2.0
// The probe that test builds of the engine call, and children that die there.
#include "tests/vhost-net-backend/probe.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

namespace tandem::test {

namespace {
ProbePoint target = ProbePoint::kCount;
int visits_left = 0;

bool ended_by_kill(pid_t child) {
  int status = 0;
  if (::waitpid(child, &status, 0) != child) std::abort();
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) return true;
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) std::abort();
  return false;
}

pid_t run_in_child(const std::function<void()>& act) {
  const pid_t child = ::fork();
  if (child < 0) std::abort();
  if (child == 0) {
    act();
    ::_exit(0);
  }
  return child;
}
}  // namespace

void die_at(ProbePoint point, int visit) {
  target = point;
  visits_left = visit;
}

bool killed(const std::function<void()>& act) { return ended_by_kill(run_in_child(act)); }

int status_of(const std::function<int()>& act) {
  const pid_t child = run_in_child([&] {
    ::signal(SIGABRT, SIG_DFL);  // not the test framework's
    ::_exit(act());
  });
  int status = 0;
  if (::waitpid(child, &status, 0) != child) std::abort();
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

void wait_for_parent() { ::raise(SIGSTOP); }

pid_t start(const std::function<void()>& act) {
  const pid_t child = run_in_child(act);
  int status = 0;
  if (::waitpid(child, &status, WUNTRACED) != child) std::abort();
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) return 0;
  if (!WIFSTOPPED(status)) std::abort();
  return child;
}

bool resume(pid_t child) {
  ::kill(child, SIGCONT);
  return ended_by_kill(child);
}

const char* name(ProbePoint point) {
  static constexpr const char* kNames[] = {"staged",
                                           "armed",
                                           "frames marked",
                                           "destination written",
                                           "destination published",
                                           "source written",
                                           "source published",
                                           "cursors advanced",
                                           "disarmed",
                                           "notified",
                                           "completion cleared",
                                           "takeover: epoch",
                                           "takeover: replayed",
                                           "handover: asked",
                                           "handover: granted",
                                           "handover: let go"};
  static_assert(std::size(kNames) == static_cast<std::size_t>(ProbePoint::kCount));
  return kNames[static_cast<int>(point)];
}

}  // namespace tandem::test

extern "C" void tandem_probe(tandem::ProbePoint point) noexcept {
  using namespace tandem::test;
  if (point == target && --visits_left == 0) ::kill(::getpid(), SIGKILL);
}
