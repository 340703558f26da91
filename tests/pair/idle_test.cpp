// SPDX-License-Identifier: Apache-2.0
// What an idle pair costs, and what its processes may not do.
#include <poll.h>
#include <unistd.h>

#include <fstream>
#include <sstream>

#include "tests/pair/fixture.hpp"
#include "tests/pair/probe_file.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

/// User and system time in clock ticks, and voluntary context switches, of all threads.
struct Cost {
  std::uint64_t ticks = 0, switches = 0;
};

Cost cost_of(pid_t pid) {
  Cost cost;
  std::ostringstream stat;
  stat << std::ifstream("/proc/" + std::to_string(pid) + "/stat").rdbuf();
  std::istringstream fields(stat.str().substr(stat.str().rfind(')') + 1));
  std::string skipped;
  for (int field = 3; field < 14; ++field) fields >> skipped;
  std::uint64_t user = 0, system = 0;
  fields >> user >> system;
  cost.ticks = user + system;
  for (const std::string& tid : entries("/proc/" + std::to_string(pid) + "/task")) {
    std::ifstream status("/proc/" + std::to_string(pid) + "/task/" + tid + "/status");
    for (std::string line; std::getline(status, line);)
      if (line.starts_with("voluntary_ctxt_switches:")) cost.switches += std::stoull(line.substr(24));
  }
  return cost;
}

}  // namespace

TEST_CASE("an idle pair with an idle guest sleeps") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(100));
    REQUIRE(traffic.finish().clean());
    REQUIRE(eventually([&] { return host.pair()["active"]["state"] == "asleep"; }));
    const std::vector<pid_t> pids{host.active(), host.standby()};
    // The one place where time passes on purpose: there is no event for "nothing happens".
    constexpr int kSeconds = 3;
    Cost before, after;
    const auto sum = [&](Cost& total) {
      for (const pid_t pid : pids) {
        const Cost cost = cost_of(pid);
        total.ticks += cost.ticks;
        total.switches += cost.switches;
      }
    };
    sum(before);
    ::poll(nullptr, 0, kSeconds * 1000);
    sum(after);
    const auto percent = 100.0 * static_cast<double>(after.ticks - before.ticks) /
                         (kSeconds * static_cast<double>(::sysconf(_SC_CLK_TCK)));
    std::printf("idle pair: %.2f %% of a core, %.1f wake-ups a second, both backends together (target: under 2 %%)\n",
                percent, static_cast<double>(after.switches - before.switches) / kSeconds);
    // The standby looks ten times a second whether its owner sleeps through work; nothing else wakes either of them.
    CHECK(after.switches - before.switches <= 12 * kSeconds);
    CHECK(percent <= 2.0);
    CHECK(host.pair()["active"]["state"] == "asleep");
    // It wakes at a packet from either side.
    REQUIRE(traffic.pump_frames(1));
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("backends and the vault have no privileges") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  const auto backends = host.processes("tandem-backend");
  REQUIRE(backends.size() == 2);
  for (const pid_t pid : backends) {
    for (const std::string& tid : entries("/proc/" + std::to_string(pid) + "/task")) {
      const auto thread = static_cast<pid_t>(std::stol(tid));
      for (const char* set : {"CapInh", "CapPrm", "CapEff", "CapAmb"})
        CHECK(proc_status(thread, set) == "0000000000000000");
      CHECK(proc_status(thread, "NoNewPrivs") == "1");
      CHECK(proc_status(thread, "Seccomp") == "2");
      CHECK(proc_status(thread, "Uid") == "65534\t65534\t65534\t65534");
      CHECK(proc_status(thread, "Gid") == "65534\t65534\t65534\t65534");
      CHECK(proc_status(thread, "Groups").find_first_not_of(" \t") == std::string::npos);
    }
  }
  int without = 0;
  for (const pid_t pid : host.processes("tandem-vault"))
    without += proc_status(pid, "CapEff") == "0000000000000000" && proc_status(pid, "Seccomp") == "2";
  CHECK(without == 1);  // the other is the parent, which starts tandemd
  require_clean_end(host, {"one"});
}

TEST_CASE("a backend has no thread that nobody needs") {
  SKIP_UNLESS_PAIR();
  PairHost host({.shards = 2});
  host.start();
  require_domain(host, "one", {{}});
  // One for control and one a shard: a process that dies wakes each of its threads before its heir has the CPU.
  for (const pid_t pid : host.processes("tandem-backend"))
    CHECK(eventually([&] { return entries("/proc/" + std::to_string(pid) + "/task").size() == 3; }));
  require_clean_end(host, {"one"});
}

TEST_CASE("a backend cannot fork, execute programs or use BPF") {
  SKIP_UNLESS_PAIR();
  const Probes probes;
  PairHost host({.backend = TANDEM_PROBED_BACKEND_BINARY});
  host.environment["TANDEM_PROBE_FILE"] = probes.path();
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    probes->attempt = 1;
    REQUIRE(traffic.pump_until([&] { return probes->attempt.load() == 2; }));
    CHECK(probes->fork_error.load() == EPERM);
    CHECK(probes->exec_error.load() == EPERM);
    CHECK(probes->bpf_error.load() == EPERM);
    CHECK(traffic.finish().clean());
  }
  require_clean_end(host, {"one"});
}
