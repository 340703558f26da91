// SPDX-License-Identifier: Apache-2.0
// What does not kill a thread must not mark it; tags and tids that come again.
#include <linux/sched.h>
#include <sys/prctl.h>

#include <csignal>

#include "tests/fence/fixture.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

struct Stage {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::atomic<int> handled{0};
};

Shared<Stage>* stage_of_handler = nullptr;
void count_signal(int) { (*stage_of_handler)->handled++; }

/// Blocks every signal, so that those sent before `go` are queued and then really pass get_signal(); ends in pause().
void take_signals_when_told(Stage& stage) {
  sigset_t all;
  ::sigfillset(&all);
  ::sigprocmask(SIG_BLOCK, &all, nullptr);
  stage.ready = 1;
  while (!stage.go) ::sched_yield();
  ::sigprocmask(SIG_UNBLOCK, &all, nullptr);
  stage.ready = 2;
  for (;;) ::pause();
}

}  // namespace

TEST_CASE("signals that are handled, ignored, or ignored by default leave the thread unmarked") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  Shared<Stage> stage;
  stage_of_handler = &stage;
  Child survivor([&] {
    for (const int number : {SIGUSR1, SIGTERM, SIGSEGV, SIGTSTP, SIGRTMIN + 1}) ::signal(number, count_signal);
    for (const int number : {SIGUSR2, SIGHUP, SIGTTIN, SIGRTMIN + 2}) ::signal(number, SIG_IGN);
    take_signals_when_told(*stage);
  });
  REQUIRE(wait_until([&] { return stage->ready == 1; }));
  REQUIRE_OK(fence.watch(survivor.pid(), 1, TANDEM_FENCE_NO_RING));
  // Not SIGCONT, which would take queued stop signals out again; the next test sends it.
  for (const int number : {SIGUSR1, SIGTERM, SIGSEGV, SIGTSTP, SIGRTMIN + 1, SIGUSR2, SIGHUP, SIGTTIN, SIGRTMIN + 2,
                           SIGCHLD, SIGURG, SIGWINCH})
    survivor.kill(number);
  stage->go = true;
  REQUIRE(wait_until([&] { return stage->ready == 2 && stage->handled == 5; }));
  CHECK_FALSE(fence.dead(1));
  survivor.kill(SIGKILL);
  CHECK(wait_until([&] { return fence.dead(1); }));
}

TEST_CASE("stopping and continuing leaves the thread unmarked") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  Child survivor([] {
    for (;;) ::pause();
  });
  REQUIRE_OK(fence.watch(survivor.pid(), 1, TANDEM_FENCE_NO_RING));
  siginfo_t event{};
  survivor.kill(SIGSTOP);
  REQUIRE(::waitid(P_PID, static_cast<id_t>(survivor.pid()), &event, WSTOPPED) == 0);
  survivor.kill(SIGCONT);
  REQUIRE(::waitid(P_PID, static_cast<id_t>(survivor.pid()), &event, WCONTINUED) == 0);
  CHECK_FALSE(fence.dead(1));
  // Stopped threads die of SIGKILL like others.
  survivor.kill(SIGSTOP);
  REQUIRE(::waitid(P_PID, static_cast<id_t>(survivor.pid()), &event, WSTOPPED) == 0);
  survivor.kill(SIGKILL);
  CHECK(wait_until([&] { return fence.dead(1); }));
}

TEST_CASE("init of a pid namespace, which default actions do not kill, is not marked by them") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  Shared<Stage> stage;
  Child parent([&] {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::unshare(CLONE_NEWPID) != 0) ::_exit(1);
    const pid_t init = ::fork();
    if (init == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      take_signals_when_told(*stage);
    }
    stage->handled = init;
    ::waitpid(init, nullptr, 0);
  });
  REQUIRE(wait_until([&] { return stage->ready == 1 && stage->handled != 0; }));
  const pid_t init = stage->handled;
  REQUIRE_OK(fence.watch(init, 1, TANDEM_FENCE_NO_RING));
  ::kill(init, SIGTERM);
  stage->go = true;
  REQUIRE(wait_until([&] { return stage->ready == 2; }));
  CHECK_FALSE(fence.dead(1));
  ::kill(init, SIGKILL);
  CHECK(wait_until([&] { return fence.dead(1); }));
}

TEST_CASE("an incarnation's number decides, not its slot") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  const auto pause_forever = [] {
    for (;;) ::pause();
  };
  CHECK(fence.dead(0));
  CHECK(fence.read_slot(0).cause == TANDEM_FENCE_ALIVE);
  Child first{pause_forever};
  Child second{pause_forever};
  REQUIRE_OK(fence.watch(first.pid(), 5, TANDEM_FENCE_NO_RING));
  const auto shared_slot = fence.watch(second.pid(), 5 + TANDEM_FENCE_SLOTS, TANDEM_FENCE_NO_RING);
  REQUIRE_FALSE(shared_slot);
  CHECK(shared_slot.error().kind == ErrorKind::kInvalid);
  CHECK_FALSE(fence.watch(first.pid(), 6, TANDEM_FENCE_NO_RING));
  CHECK_FALSE(fence.watch(second.pid(), 0, TANDEM_FENCE_NO_RING));

  first.kill(SIGKILL);
  REQUIRE(wait_until([&] { return fence.dead(5); }));
  REQUIRE_OK(fence.watch(second.pid(), 5 + TANDEM_FENCE_SLOTS, TANDEM_FENCE_NO_RING));
  CHECK(fence.dead(5));
  CHECK_FALSE(fence.dead(5 + TANDEM_FENCE_SLOTS));
  second.kill(SIGKILL);
  CHECK(wait_until([&] { return fence.dead(5 + TANDEM_FENCE_SLOTS); }));
}

TEST_CASE("the dead, the dying and strangers cannot be watched, an ended watch marks nothing") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  Child zombie([] {});
  siginfo_t event{};
  REQUIRE(::waitid(P_PID, static_cast<id_t>(zombie.pid()), &event, WEXITED | WNOWAIT) == 0);
  const auto watch_zombie = fence.watch(zombie.pid(), 1, TANDEM_FENCE_NO_RING);
  REQUIRE_FALSE(watch_zombie);
  CHECK(watch_zombie.error().kind == ErrorKind::kGone);
  const pid_t gone = zombie.pid();
  zombie.reap();
  CHECK(fence.watch(gone, 2, TANDEM_FENCE_NO_RING).error().kind == ErrorKind::kGone);

  Child live([] {
    for (;;) ::pause();
  });
  CHECK(fence.watch(live.pid(), 3, TANDEM_FENCE_NO_RING, ::getpid()).error().kind == ErrorKind::kGone);
  REQUIRE_OK(fence.watch(live.pid(), 4, TANDEM_FENCE_NO_RING, live.pid()));
  CHECK(fence.set_ring(live.pid(), 5, 0).error().kind == ErrorKind::kGone);
  REQUIRE_OK(fence.unwatch(live.pid()));
  REQUIRE_OK(fence.unwatch(live.pid()));
  CHECK(fence.set_ring(live.pid(), 4, 0).error().kind == ErrorKind::kGone);
  live.kill(SIGKILL);
  live.reap();
  CHECK_FALSE(fence.dead(4));
}

TEST_CASE("a thread that got a dead one's tid is a new incarnation") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  Child first([] {
    for (;;) ::pause();
  });
  pid_t tid = first.pid();
  REQUIRE_OK(fence.watch(tid, 1, TANDEM_FENCE_NO_RING));
  first.kill(SIGKILL);
  first.reap();
  REQUIRE(fence.dead(1));
  const std::uint64_t died = fence.read_slot(1).time_ns;

  // clone3 can ask for a tid (clone(2), set_tid), so nothing depends on luck.
  for (std::uint64_t tag = 2; tag < 4; ++tag) {
    clone_args arguments{};
    arguments.exit_signal = SIGCHLD;
    arguments.set_tid = reinterpret_cast<std::uint64_t>(&tid);
    arguments.set_tid_size = 1;
    const long again = ::syscall(SYS_clone3, &arguments, sizeof arguments);
    if (again == 0) {
      ::signal(SIGTERM, SIG_DFL);
      for (;;) ::pause();
    }
    REQUIRE(again == tid);
    // The first newcomer is not watched: its death is nobody's.
    if (tag == 3) REQUIRE_OK(fence.watch(tid, tag, TANDEM_FENCE_NO_RING));
    ::kill(tid, SIGKILL);
    ::waitpid(tid, nullptr, 0);
    CHECK(fence.read_slot(1).time_ns == died);
    CHECK(fence.dead(tag) == (tag == 3));
  }
}
