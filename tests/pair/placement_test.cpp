// SPDX-License-Identifier: Apache-2.0
// Where the threads of a pair run: poll threads on the CPUs that they were given, everything else elsewhere.
#include <sched.h>
#include <signal.h>

#include <algorithm>

#include "common/thread_priority.hpp"
#include "tests/pair/fixture.hpp"

using namespace tandem;
using namespace tandem::test;
using nlohmann::json;

namespace {

std::vector<std::uint32_t> cpus_of(pid_t tid) {
  std::vector<std::uint32_t> cpus;
  for (std::uint32_t cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (runs_on(tid, cpu)) cpus.push_back(cpu);
  return cpus;
}

std::string written(const std::vector<std::uint32_t>& cpus) {
  std::string text;
  for (const std::uint32_t cpu : cpus) text += (text.empty() ? "" : ", ") + std::to_string(cpu);
  return "cpus = [" + text + "]\n";
}

/// No thread of `pid` but the one named runs on one of `cpus`.
void check_keeps_off(pid_t pid, pid_t poll_thread, const std::vector<std::uint32_t>& cpus) {
  for (const std::string& entry : entries("/proc/" + std::to_string(pid) + "/task")) {
    const auto tid = static_cast<pid_t>(std::stol(entry));
    INFO("pid " << pid << ", thread " << tid);
    if (tid == poll_thread) continue;
    CHECK(std::none_of(cpus.begin(), cpus.end(), [tid](std::uint32_t cpu) { return runs_on(tid, cpu); }));
  }
}

}  // namespace

TEST_CASE("poll threads run on the CPU that is theirs, tandemd and other threads of backends do not") {
  SKIP_UNLESS_PAIR();
  const std::vector<std::uint32_t> allowed = cpus_of(0);
  if (allowed.size() < 2) TANDEM_SKIP("one CPU only: nothing can keep off it");
  const std::vector<std::uint32_t> theirs{allowed.back()};
  PairHost host({.configuration = written(theirs)});
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    // The first pair, and one with a standby that was started after a failover.
    for (int round = 0; round < 2; ++round) {
      REQUIRE(traffic.pump_frames(100));
      const json pair = host.pair();
      for (const char* member : {"active", "standby"}) {
        const pid_t tid = pair[member]["tid"].get<pid_t>();
        CHECK(cpus_of(tid) == theirs);
        check_keeps_off(pair[member]["pid"].get<pid_t>(), tid, theirs);
      }
      for (const pid_t pid : host.processes("tandemd")) check_keeps_off(pid, 0, theirs);
      const pid_t victim = host.active();
      REQUIRE(::kill(victim, SIGKILL) == 0);
      pump_until_paired(host, traffic, victim);
      switch_over_for_good(host, traffic);
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("heirs that poll have the CPU that their owners do not have") {
  SKIP_UNLESS_PAIR();
  const std::vector<std::uint32_t> allowed = cpus_of(0);
  if (allowed.size() < 2) TANDEM_SKIP("one CPU only: it cannot be two backends'");
  const std::vector<std::uint32_t> theirs{allowed[allowed.size() - 2], allowed.back()};
  PairHost host({.heirs = "polling", .configuration = written(theirs)});
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    for (int round = 0; round < 3; ++round) {
      REQUIRE(traffic.pump_frames(100));
      const json pair = host.pair();
      std::vector<std::uint32_t> taken;
      for (const char* member : {"active", "standby"}) {
        const std::vector<std::uint32_t> cpus = cpus_of(pair[member]["tid"].get<pid_t>());
        REQUIRE(cpus.size() == 1);
        taken.push_back(cpus.front());
      }
      std::sort(taken.begin(), taken.end());
      CHECK(taken == theirs);
      const pid_t victim = host.active();
      REQUIRE(::kill(victim, SIGKILL) == 0);
      pump_until_paired(host, traffic, victim);
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}
