// SPDX-License-Identifier: Apache-2.0
// Every way in which a watched thread can die is marked, once, after its last store.
#include <sys/mman.h>

#include <array>
#include <thread>

#include "tests/fence/fixture.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

struct Stage {
  std::atomic<pid_t> tid{0};
  std::atomic<bool> go{false};
  std::atomic<std::uint64_t> counter{0};
};

void bad_store() {
  void* page = ::mmap(nullptr, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  *static_cast<volatile char*>(page) = 1;
}

void store_past_file() {
  const int file = ::memfd_create("short", 0);
  auto* page = static_cast<volatile char*>(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  page[0] = 1;
}

void run_other_program() { ::execl("/bin/true", "true", static_cast<char*>(nullptr)); }

struct Death {
  const char* name;
  void (*act)();
  tandem_fence_cause cause;
  std::uint32_t signal;
  bool own_doing = false;
};

const std::array kDeaths = {
    Death{"bad store", bad_store, TANDEM_FENCE_SIGNAL, SIGSEGV, true},
    Death{"store past the end of a file", store_past_file, TANDEM_FENCE_SIGNAL, SIGBUS, true},
    Death{"abort", [] { std::abort(); }, TANDEM_FENCE_SIGNAL, SIGABRT, true},
    Death{"breakpoint", [] { __builtin_trap(); }, TANDEM_FENCE_SIGNAL, SIGILL, true},
    Death{"SIGKILL", [] { ::raise(SIGKILL); }, TANDEM_FENCE_SIGNAL, SIGKILL},
    // No core is dumped for these: complete_signal() turns them into SIGKILL for each thread before delivery.
    Death{"SIGTERM", [] { ::raise(SIGTERM); }, TANDEM_FENCE_SIGNAL, SIGKILL},
    Death{"real-time signal", [] { ::raise(SIGRTMIN + 3); }, TANDEM_FENCE_SIGNAL, SIGKILL},
    Death{"exit", [] { ::_exit(3); }, TANDEM_FENCE_EXIT, 0},
    Death{"exec", run_other_program, TANDEM_FENCE_EXIT, 0},
};

}  // namespace

TEST_CASE("each cause of death is marked with cause, signal and tid") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  std::uint64_t tag = 100;
  for (const bool own_thread : {false, true}) {
    for (const Death& death : kDeaths) {
      INFO(death.name << (own_thread ? " in a thread" : " in the leader"));
      Shared<Stage> stage;
      Child victim([&] {
        const auto die = [&] {
          stage->tid = own_tid();
          while (!stage->go) ::sched_yield();
          death.act();
        };
        if (own_thread) std::thread{die}.join();
        if (!own_thread) die();
      });
      REQUIRE(wait_until([&] { return stage->tid != 0; }));
      REQUIRE_OK(fence.watch(stage->tid, ++tag, TANDEM_FENCE_NO_RING, victim.pid()));
      CHECK_FALSE(fence.dead(tag));
      stage->go = true;
      REQUIRE(wait_until([&] { return fence.dead(tag); }));
      const auto slot = fence.read_slot(tag);
      CHECK(slot.cause == static_cast<std::uint32_t>(death.cause));
      CHECK(slot.signal == death.signal);
      CHECK((slot.own_doing != 0) == death.own_doing);
      CHECK(slot.tid == static_cast<std::uint32_t>(stage->tid.load()));
      CHECK(slot.time_ns > 0);
    }
  }
}

TEST_CASE("a fault's signal that somebody else sent is not the thread's own doing") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  std::uint64_t tag = 200;
  for (const int number : {SIGSEGV, SIGABRT, SIGFPE}) {
    INFO(number);
    Shared<Stage> stage;
    Child victim([&] {
      std::thread{[&] {
        stage->tid = own_tid();
        for (;;) ::pause();
      }}.join();
    });
    REQUIRE(wait_until([&] { return stage->tid != 0; }));
    REQUIRE_OK(fence.watch(stage->tid, ++tag, TANDEM_FENCE_NO_RING, victim.pid()));
    REQUIRE(::syscall(SYS_tgkill, victim.pid(), stage->tid.load(), number) == 0);
    REQUIRE(wait_until([&] { return fence.dead(tag); }));
    CHECK(fence.read_slot(tag).signal == static_cast<std::uint32_t>(number));
    CHECK(fence.read_slot(tag).own_doing == 0);
  }
}

TEST_CASE("a single thread that leaves is marked, its siblings are not") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  Shared<std::array<Stage, 2>> stages;
  Child victim([&] {
    const auto live = [](Stage& stage) {
      stage.tid = own_tid();
      while (!stage.go) ::sched_yield();
      ::pthread_exit(nullptr);
    };
    std::thread one{live, std::ref((*stages)[0])};
    std::thread two{live, std::ref((*stages)[1])};
    one.join();
    two.join();
    ::pause();
  });
  REQUIRE(wait_until([&] { return (*stages)[0].tid != 0 && (*stages)[1].tid != 0; }));
  REQUIRE_OK(fence.watch((*stages)[0].tid, 1, TANDEM_FENCE_NO_RING));
  REQUIRE_OK(fence.watch((*stages)[1].tid, 2, TANDEM_FENCE_NO_RING));
  REQUIRE_OK(fence.watch(victim.pid(), 3, TANDEM_FENCE_NO_RING));
  (*stages)[0].go = true;
  REQUIRE(wait_until([&] { return fence.dead(1); }));
  CHECK(fence.read_slot(1).cause == TANDEM_FENCE_EXIT);
  CHECK_FALSE(fence.dead(2));
  (*stages)[1].go = true;
  REQUIRE(wait_until([&] { return fence.dead(2); }));
  CHECK_FALSE(fence.dead(3));
}

TEST_CASE("when a group dies every watched thread is marked, the culprit with its own signal") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  constexpr std::size_t kThreads = 5;
  Shared<std::array<Stage, kThreads>> stages;
  Child victim([&] {
    std::array<std::thread, kThreads> threads;
    for (std::size_t i = 0; i < kThreads; ++i)
      threads[i] = std::thread{[&stage = (*stages)[i]] {
        stage.tid = own_tid();
        while (!stage.go) ::usleep(100);
        bad_store();
      }};
    ::pause();
  });
  for (std::size_t i = 0; i < kThreads; ++i) {
    REQUIRE(wait_until([&] { return (*stages)[i].tid != 0; }));
    REQUIRE_OK(fence.watch((*stages)[i].tid, 10 + i, TANDEM_FENCE_NO_RING, victim.pid()));
  }
  (*stages)[2].go = true;
  for (std::size_t i = 0; i < kThreads; ++i) {
    REQUIRE(wait_until([&] { return fence.dead(10 + i); }));
    CHECK(fence.read_slot(10 + i).signal == (i == 2 ? SIGSEGV : SIGKILL));
  }
}

TEST_CASE("exec by one thread marks the leader it replaces too") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  Shared<Stage> stage;
  Child victim([&] {
    std::thread{[&] {
      stage->tid = own_tid();
      while (!stage->go) ::sched_yield();
      ::execl("/bin/sleep", "sleep", "1000", static_cast<char*>(nullptr));
    }}.join();
  });
  REQUIRE(wait_until([&] { return stage->tid != 0; }));
  REQUIRE_OK(fence.watch(stage->tid, 1, TANDEM_FENCE_NO_RING, victim.pid()));
  REQUIRE_OK(fence.watch(victim.pid(), 2, TANDEM_FENCE_NO_RING, victim.pid()));
  stage->go = true;
  CHECK(wait_until([&] { return fence.dead(1) && fence.dead(2); }));
  CHECK(::kill(victim.pid(), 0) == 0);
}

TEST_CASE("a mark is visible strictly after the thread's last store") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  for (std::uint64_t tag = 1; tag <= 300; ++tag) {
    Shared<Stage> stage;
    Child victim([&] {
      stage->tid = own_tid();
      for (std::uint64_t value = 1;; ++value) stage->counter.store(value, std::memory_order_relaxed);
    });
    REQUIRE(wait_until([&] { return stage->counter > 0; }));
    REQUIRE_OK(fence.watch(stage->tid, tag, TANDEM_FENCE_NO_RING));
    victim.kill(SIGKILL);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds{20};
    while (!fence.dead(tag) && std::chrono::steady_clock::now() < deadline) {
    }
    const std::uint64_t last = stage->counter.load(std::memory_order_relaxed);
    REQUIRE(fence.dead(tag));
    for (int look = 0; look < 2000; ++look) REQUIRE(stage->counter.load(std::memory_order_relaxed) == last);
    victim.reap();
    REQUIRE(stage->counter.load(std::memory_order_relaxed) == last);
  }
}
