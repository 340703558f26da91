// SPDX-License-Identifier: Apache-2.0
// An heir in another process, without privileges: it is woken every time, and can neither forge nor hide a death.
#include <linux/bpf.h>
#include <sys/epoll.h>
#include <sys/prctl.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "common/wake_ring.hpp"
#include "tests/fence/fixture.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

constexpr std::uint64_t kDeaths = 1200;

struct Stage {
  std::atomic<pid_t> tid{0};
  std::atomic<std::uint64_t> go{0};
  std::atomic<std::uint64_t> sleeping_for{0};
  std::atomic<std::uint64_t> seen{0};
  std::atomic<std::uint64_t> last_store_ns{0};
  std::atomic<int> failures{0};
  std::atomic<std::uint64_t> latency_ns[kDeaths + 1] = {};
};

std::uint64_t now_ns() {
  timespec time{};
  ::clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<std::uint64_t>(time.tv_sec) * 1'000'000'000u + static_cast<std::uint64_t>(time.tv_nsec);
}

void become_nobody() {
  if (::setresgid(65534, 65534, 65534) != 0 || ::setresuid(65534, 65534, 65534) != 0) ::_exit(90);
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) ::_exit(91);
  const rlimit none{0, 0};
  ::setrlimit(RLIMIT_MEMLOCK, &none);
}

/// Sleeps in epoll until each incarnation 1..kDeaths is dead, in turn.
void be_heir(Stage& stage, int slots_fd, UniqueFd ring_fd) {
  become_nobody();
  auto view = FenceView::map(slots_fd);
  auto ring = WakeRing::open(std::move(ring_fd));
  const UniqueFd epoll{::epoll_create1(EPOLL_CLOEXEC)};
  epoll_event event{};
  event.events = EPOLLIN;
  if (!view || !ring || ::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, ring->fd(), &event) != 0) ::_exit(1);
  for (std::uint64_t tag = 1; tag <= kDeaths; ++tag) {
    stage.sleeping_for = tag;
    while (!view->dead(tag)) {
      if (::epoll_wait(epoll.get(), &event, 1, 10'000) != 1) ::_exit(2);  // a stall: the failsafe ran out
      if (!ring->drain()) ++stage.failures;
    }
    stage.latency_ns[tag] = now_ns() - stage.last_store_ns;
    ring->drain();
    stage.seen = tag;
  }
}

/// One process whose threads die one after another, each when its number comes up.
void be_victims(Stage& stage) {
  for (std::uint64_t turn = 1; turn <= kDeaths; ++turn) {
    std::thread{[&] {
      stage.tid = own_tid();
      while (stage.go != turn) ::sched_yield();
      stage.last_store_ns = now_ns();
      ::syscall(SYS_exit, 0);
    }}.detach();
    while (stage.seen != turn) ::usleep(50);
  }
}

}  // namespace

TEST_CASE("an unprivileged heir asleep in epoll is woken by every one of 1200 deaths") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  Shared<Stage> stage;
  auto slots = fence.slots_fd();
  auto index = fence.make_ring();
  REQUIRE_OK(slots);
  REQUIRE_OK(index);
  auto ring = fence.ring_fd(*index);
  REQUIRE_OK(ring);
  Child victims([&] { be_victims(*stage); });
  Child heir([&] { be_heir(*stage, slots->get(), std::move(*ring)); });
  for (std::uint64_t tag = 1; tag <= kDeaths; ++tag) {
    REQUIRE(wait_until([&] { return stage->tid != 0 && stage->sleeping_for == tag; }));
    REQUIRE_OK(fence.watch(stage->tid.exchange(0), tag, *index, victims.pid()));
    stage->go = tag;
    REQUIRE(wait_until([&] { return stage->seen == tag; }));
  }
  CHECK(heir.reap() == 0);
  CHECK(stage->failures == 0);
  std::vector<std::uint64_t> latencies(stage->latency_ns + 1, stage->latency_ns + kDeaths + 1);
  std::sort(latencies.begin(), latencies.end());
  std::printf("info: last store to heir awake: median %.1f us, p99 %.1f us\n",
              static_cast<double>(latencies[kDeaths / 2]) / 1000,
              static_cast<double>(latencies[kDeaths * 99 / 100]) / 1000);
}

TEST_CASE("a ring nobody reads stays readable, and works again once drained") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  auto index = fence.make_ring();
  REQUIRE_OK(index);
  auto ring = WakeRing::open(std::move(*fence.ring_fd(*index)));
  REQUIRE_OK(ring);
  CHECK_FALSE(ring->drain());
  const UniqueFd epoll{::epoll_create1(EPOLL_CLOEXEC)};
  epoll_event event{};
  event.events = EPOLLIN;
  REQUIRE(::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, ring->fd(), &event) == 0);
  CHECK(::epoll_wait(epoll.get(), &event, 1, 0) == 0);
  // 4096 bytes hold 255 records of 16.
  std::uint64_t tag = 0;
  const auto let_one_die = [&] {
    Child victim([] {
      for (;;) ::pause();
    });
    REQUIRE_OK(fence.watch(victim.pid(), ++tag, *index));
    victim.kill(SIGKILL);
    victim.reap();
    REQUIRE(fence.dead(tag));
  };
  while (tag < 300) let_one_die();
  CHECK(::epoll_wait(epoll.get(), &event, 1, 0) == 1);
  CHECK(ring->drain());
  CHECK(::epoll_wait(epoll.get(), &event, 1, 0) == 0);
  let_one_die();
  CHECK(::epoll_wait(epoll.get(), &event, 1, 10'000) == 1);
}

TEST_CASE("when the heir changes, the new one is woken") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  auto before = fence.make_ring();
  auto after = fence.make_ring();
  REQUIRE_OK(before);
  REQUIRE_OK(after);
  CHECK(*before != *after);
  auto old_heir = WakeRing::open(std::move(*fence.ring_fd(*before)));
  auto new_heir = WakeRing::open(std::move(*fence.ring_fd(*after)));
  Child victim([] {
    for (;;) ::pause();
  });
  REQUIRE_OK(fence.watch(victim.pid(), 1, *before));
  REQUIRE_OK(fence.set_ring(victim.pid(), 1, *after));
  victim.kill(SIGKILL);
  victim.reap();
  CHECK(fence.dead(1));
  CHECK(new_heir->drain());
  CHECK_FALSE(old_heir->drain());
}

TEST_CASE("rings are finite, found by index, and freed") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  for (std::uint32_t i = 0; i < TANDEM_FENCE_RINGS; ++i) {
    auto index = fence.make_ring();
    REQUIRE_OK(index);
    REQUIRE(*index == i);
  }
  CHECK(fence.make_ring().error().kind == ErrorKind::kInvalid);
  REQUIRE_OK(fence.free_ring(17));
  REQUIRE_OK(fence.free_ring(17));
  CHECK(fence.ring_fd(17).error().kind == ErrorKind::kGone);
  CHECK(fence.make_ring() == 17u);
}

TEST_CASE("who holds the slots can neither write them nor have them written") {
  SKIP_UNLESS_FENCE();
  Fence fence = load_fence();
  auto slots = fence.slots_fd();
  REQUIRE_OK(slots);
  for (const bool root : {true, false}) {
    Child holder([&] {
      if (!root) become_nobody();
      constexpr std::size_t kSize = TANDEM_FENCE_SLOTS * sizeof(tandem_fence_slot);
      if (::mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED, slots->get(), 0) != MAP_FAILED) ::_exit(1);
      void* view = ::mmap(nullptr, kSize, PROT_READ, MAP_SHARED, slots->get(), 0);
      if (view == MAP_FAILED) ::_exit(2);
      if (::mprotect(view, kSize, PROT_READ | PROT_WRITE) == 0) ::_exit(3);
      const std::uint32_t key = 1;
      const tandem_fence_slot forged{1, TANDEM_FENCE_SIGNAL, SIGKILL, 1, 0, 1, {}};
      bpf_attr attributes{};
      attributes.map_fd = static_cast<std::uint32_t>(slots->get());
      attributes.key = reinterpret_cast<std::uint64_t>(&key);
      attributes.value = reinterpret_cast<std::uint64_t>(&forged);
      if (::syscall(SYS_bpf, BPF_MAP_UPDATE_ELEM, &attributes, sizeof attributes) == 0) ::_exit(4);
    });
    CHECK(holder.reap() == 0);
    CHECK_FALSE(fence.dead(1));
  }
}
