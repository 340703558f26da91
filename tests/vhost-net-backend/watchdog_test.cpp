// SPDX-License-Identifier: Apache-2.0
// Verdicts: every state of an owner's thread, and loops that turn without working.
#include "vhost-net-backend/watchdog.hpp"

#include <poll.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/timerfd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <string>
#include <thread>

#include "common/thread_priority.hpp"
#include "tests/support/skip.hpp"
#include "tests/support/takeover_check.hpp"
#include "tests/vhost-net-backend/bench.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

constexpr std::uint64_t kSpin = 5'000'000, kBlocked = 7'000'000;

struct Row {
  const char* name;
  OwnerView view;
  HangVerdict verdict;
};

OwnerView awake(char state, std::uint64_t still_ns, bool uses_cpu = false) {
  OwnerView view;
  view.state = state;
  view.still_ns = still_ns;
  view.uses_cpu = uses_cpu;
  view.spin_limit_ns = kSpin;
  view.blocked_limit_ns = kBlocked;
  return view;
}

OwnerView asleep(bool work, std::uint64_t work_ns, std::uint64_t still_ns) {
  OwnerView view = awake('S', still_ns);
  view.marked_asleep = true;
  view.work_pending = work;
  view.asleep_work_ns = work_ns;
  return view;
}

OwnerView starved_awakening(std::uint64_t work_ns) {
  OwnerView view = asleep(true, work_ns, work_ns);
  view.state = 'R';
  return view;
}

OwnerView passing_by() {
  OwnerView view = awake('?', 1000);
  view.passes_work_by = true;
  return view;
}

}  // namespace

TEST_CASE("verdicts by what is seen of the owner") {
  constexpr std::uint64_t kHour = 3'600'000'000'000;
  const Row rows[] = {
      {"runs, within the limit", awake('R', kSpin, true), HangVerdict::kNone},
      {"runs, beyond it", awake('R', kSpin + 1, true), HangVerdict::kSpinning},
      {"waits for a CPU: starved, and left alone", awake('R', kStarvedLimitNs), HangVerdict::kNone},
      {"starved for too long", awake('R', kStarvedLimitNs + 1), HangVerdict::kStarved},
      {"sleeps unannounced, within the limit", awake('S', kBlocked), HangVerdict::kNone},
      {"sleeps unannounced, beyond it", awake('S', kBlocked + 1), HangVerdict::kBlocked},
      {"in the kernel for too long, or frozen (v1)", awake('D', kBlocked + 1), HangVerdict::kBlocked},
      {"stopped", awake('T', kBlocked + 1), HangVerdict::kBlocked},
      {"traced", awake('t', kBlocked + 1), HangVerdict::kBlocked},
      {"dying: the fence decides", awake('Z', kHour), HangVerdict::kNone},
      {"dead: the fence decides", awake('X', kHour), HangVerdict::kNone},
      {"gone: the fence decides", awake('?', kHour), HangVerdict::kNone},
      {"asleep and idle for an hour", asleep(false, 0, kHour), HangVerdict::kNone},
      {"asleep, work has just come", asleep(true, kBlocked, kHour), HangVerdict::kNone},
      {"asleep through work", asleep(true, kBlocked + 1, kHour), HangVerdict::kAsleepWithWork},
      {"woken for work, waits for a CPU", starved_awakening(kStarvedLimitNs), HangVerdict::kNone},
      {"woken for work, starved for too long", starved_awakening(kStarvedLimitNs + 1), HangVerdict::kStarved},
      {"beats and passes work by", passing_by(), HangVerdict::kNoProgress},
  };
  for (const Row& row : rows) {
    INFO(row.name);
    CHECK(judge(row.view) == row.verdict);
  }
}

TEST_CASE("idle rounds: only work that waits through several whole rounds counts") {
  IdleRounds rounds;
  std::uint64_t beat = 1;
  const auto looks = [&](int count, bool work, std::uint64_t moved, bool beats = true) {
    bool found = false;
    for (int i = 0; i < count; ++i) found = rounds.look(work, beats ? ++beat : beat, moved) || found;
    return found;
  };
  CHECK_FALSE(looks(100, false, 0));       // idle
  CHECK_FALSE(looks(4, true, 0));          // work has just come
  CHECK_FALSE(looks(1, false, 0));         // and was done
  CHECK_FALSE(looks(4, true, 0));          // the next: counted from anew
  CHECK_FALSE(looks(1, true, 1));          // something moved
  CHECK_FALSE(looks(50, true, 1, false));  // no heartbeat: another matter
  for (std::uint64_t moved = 2; moved < 50; ++moved) CHECK_FALSE(looks(2, true, moved));  // busy
  CHECK(rounds.suspicious());
  CHECK(looks(5, true, 49));
  rounds = {};
  CHECK_FALSE(rounds.suspicious());
  CHECK_FALSE(looks(4, true, 49));
}

TEST_CASE("the dead man's switch says whether it expired") {
  const DeadManSwitch none;
  none.push(1);
  CHECK_FALSE(none.drain());
  const DeadManSwitch timer(UniqueFd{::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)});
  CHECK_FALSE(timer.drain());
  timer.push(1);
  pollfd wait{timer.fd(), POLLIN, 0};
  REQUIRE(::poll(&wait, 1, 10'000) == 1);
  CHECK(timer.drain());
  CHECK_FALSE(timer.drain());
}

TEST_CASE("work that waits: not what the uplink or the guest is to blame for") {
  WorldShape shape = small_world();
  shape.xsk.tx_entries = 4;
  EngineWorld world(shape);
  FakeFence fence;
  const PacketFlow flow{};
  ShardStepper owner(world.segment(), fence.view(), 1), heir(world.segment(), fence.view(), 2);
  for (ShardStepper* member : {&owner, &heir}) member->hold(world.make_ports(), {world.make_device(world.describe(1))});
  CHECK_FALSE(heir.work_waits());  // nothing is in force yet
  REQUIRE(owner.take_over());
  CHECK_FALSE(heir.work_waits());

  SECTION("packets of the guest") {
    REQUIRE(send_from_guest(world, flow, 0, 8) == 8);
    CHECK(heir.work_waits());
    while (owner.poll_once()) {
    }
    CHECK_FALSE(heir.work_waits());  // four are left, but the TX ring is full
    REQUIRE(world.kernels[0].send());
    CHECK(heir.work_waits());
    while (owner.poll_once()) {
    }
    // A stopped queue has no work.
    REQUIRE(world.kernels[0].send());
    CHECK(heir.work_waits());
    world.state().transmit.fault.store(QueueFault::kAvailJump);
    CHECK_FALSE(heir.work_waits());
  }
  SECTION("every frame is with the kernel") {
    REQUIRE(send_from_guest(world, flow, 0, 1) == 1);
    CHECK(heir.work_waits());
    for (std::uint64_t& word : world.state().transmit_busy) word = ~std::uint64_t{0};
    CHECK_FALSE(heir.work_waits());
  }
  SECTION("packets for a guest without buffers") {
    REQUIRE(send_from_uplink(world, flow, 0, 3) == 3);
    CHECK_FALSE(heir.work_waits());
    CHECK_FALSE(owner.poll_once());
    world.nics[0].post(1);
    CHECK(heir.work_waits());
    while (owner.poll_once()) {
    }
    CHECK_FALSE(heir.work_waits());  // starved again
    world.nics[0].post();
    CHECK(heir.work_waits());
  }
  SECTION("a device that is not connected") {
    DeviceDescription description = world.describe(2);
    for (VringDescription& vring : description.vrings) vring.flags &= ~VringDescription::kRunning;
    const auto stopped = world.make_device(description);
    for (ShardStepper* member : {&heir, &owner}) {
      member->post(DescribeCommand{stopped});
      member->run_commands();
    }
    send_from_guest(world, flow, 0, 3);
    send_from_uplink(world, flow, 0, 3);
    CHECK_FALSE(heir.work_waits());
  }
}

TEST_CASE("a thread that is to leave is put aside") {
  const cpu_set_t allowed = allowed_cpus();
  std::atomic<pid_t> tid = 0;
  std::atomic<bool> stop = false;
  std::jthread leaver([&] {
    tid = ::gettid();
    tid.notify_one();
    stop.wait(false);
  });
  tid.wait(0);
  // The caller stays where it is while it asks.
  const auto here = static_cast<unsigned>(::sched_getcpu());
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(here, &only);
  const bool pinned =
      ::sched_setaffinity(0, sizeof only, &only) == 0 && ::sched_setaffinity(tid, sizeof only, &only) == 0;
  Watchdog({}, ::getpid(), tid, 1).put_aside(allowed);
  const int nice = ::getpriority(PRIO_PROCESS, static_cast<id_t>(tid.load()));
  cpu_set_t now;
  CPU_ZERO(&now);
  ::sched_getaffinity(tid, sizeof now, &now);
  ::sched_setaffinity(0, sizeof allowed, &allowed);
  stop = true;
  stop.notify_one();
  REQUIRE(pinned);
  CHECK(nice == 19);
  cpu_set_t elsewhere = allowed;
  CPU_CLR(here, &elsewhere);
  CHECK(CPU_EQUAL(&now, CPU_COUNT(&elsewhere) == 0 ? &only : &elsewhere));
}

TEST_CASE("a thread of another process is not put aside under an id that it has now") {
  const cpu_set_t before = allowed_cpus();
  // Our own thread, but not of that process.
  Watchdog({}, ::getppid(), ::gettid(), 1).put_aside(before);
  CHECK(::getpriority(PRIO_PROCESS, 0) != 19);
  const cpu_set_t after = allowed_cpus();
  CHECK(CPU_EQUAL(&before, &after));
}

TEST_CASE("a thread keeps off CPUs that others are given") {
  const cpu_set_t allowed = allowed_cpus();
  if (CPU_COUNT(&allowed) < 2) TANDEM_SKIP("one CPU only: nothing can keep off it");
  std::uint32_t last = 0;
  for (std::uint32_t cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &allowed)) last = cpu;
  cpu_set_t others = allowed;
  CPU_CLR(last, &others);
  std::vector<cpu_set_t> found;
  std::vector<Status> said;
  // In a thread of its own, whose affinity ends with it.
  std::jthread([&] {
    const auto keep = [&](std::vector<std::uint32_t> cpus) {
      said.push_back(keep_off(cpus));
      found.push_back(allowed_cpus());
    };
    keep({CPU_SETSIZE - 1});
    keep({last});
    keep({last});  // which it may not run on any more, as if it had been isolated
    std::vector<std::uint32_t> all;
    for (std::uint32_t cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &allowed)) all.push_back(cpu);
    keep(all);
  }).join();
  CHECK(said[0].error().kind == ErrorKind::kSystem);
  CHECK(said[0].error().text.find("CPU 1023") != std::string::npos);
  CHECK(CPU_EQUAL(&found[0], &allowed));
  for (const std::size_t i : {1u, 2u}) {
    CHECK(said[i].has_value());
    CHECK(CPU_EQUAL(&found[i], &others));
  }
  CHECK(said[3].error().kind == ErrorKind::kUnsupported);
  CHECK(CPU_EQUAL(&found[3], &others));
}
