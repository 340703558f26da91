// SPDX-License-Identifier: Apache-2.0
// Inject, wait, end, look.
#include "tests/inject/trial.hpp"

#include <poll.h>
#include <signal.h>

#include <fstream>
#include <sstream>

namespace tandem::test {

namespace {

using namespace std::chrono_literals;
using json = nlohmann::json;

// How long a fault has to show itself before its victim is ended: some thousand rounds of the poll loop, and the heir's
// slow look (docs/fence.md).
constexpr auto kWindow = 150ms;
// A flow that has not moved for so long has stopped, however busy the machine is.
constexpr auto kSilence = 10s;

bool cpu_has_keys() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string word; file >> word;)
    if (word == "ospke") return true;
  return false;
}

// The end of the log since `from`, without what every failover says.
std::string log_since(const PairHost& host, std::size_t from) {
  const std::string log = host.log();
  std::istringstream lines(log.substr(std::min(from, log.size())));
  std::string kept;
  for (std::string line; std::getline(lines, line) && kept.size() < 4000;)
    if (line.find("[debug]") == std::string::npos && line.find("[info]") == std::string::npos) kept += line + "\n";
  return kept;
}

}  // namespace

Run run_trial(World& world, FaultKind kind, std::uint64_t seed, std::uint64_t number) {
  std::seed_seq both{seed, number};
  std::mt19937_64 random(both);
  PairHost& host = world.host();
  Run run;
  run.number = number;
  run.kind = fault_name(kind);
  run.seen.windows_have_key = cpu_has_keys();
  const Tally victims_before = world.victims_tally(), other_before = world.other_tally();
  const Load::Count count_before = world.load().count();
  const std::size_t log_before = host.log().size();
  const json pair = host.pair();
  const auto pid = pair["active"]["pid"].get<pid_t>();
  const auto tid = pair["active"]["tid"].get<pid_t>();

  // The victim's own incident ends the wait.
  const auto look = [&] {
    for (json incident = world.next_incident(); !incident.is_null(); incident = world.next_incident()) {
      if (incident["pair"] != "default")
        ++run.other_failovers;  // a verdict on a starved owner; harmless by itself
      else if (incident["victim_pid"] == pid)
        run.incident = std::move(incident);
    }
    return run.incident.is_object();
  };
  ::poll(nullptr, 0, static_cast<int>(random() % 10));
  bool end_at_once = false;
  {
    const Victim victim(pid);
    Injected injected = inject(kind, victim, tid, random);
    run.fault = std::move(injected.what);
    run.seen.injected = injected.done;
    run.seen.window_hit = injected.window_hit;
    end_at_once = injected.end_at_once;
  }
  if (kind == FaultKind::kDescriptors || kind == FaultKind::kMemory) world.describe_anew();
  if (!end_at_once) eventually(look, kWindow);
  run.seen.died = look();
  // Also what has not shown itself ends, so that the next run has a whole victim, and its heir looks at what it left.
  if (!run.seen.died) ::kill(pid, SIGKILL);
  const bool incident = eventually(look);
  if (incident) {
    // On a busy machine an incident may be complete late: what it died of says whether that was us.
    run.seen.hung = run.incident["hang"].is_string();
    run.seen.died = run.seen.died || run.seen.hung || run.incident["cause"] != "SIGKILL";
  }
  const bool paired = incident && host.wait_paired(pid);
  run.seen.queues_go_on = paired && world.flows_go_on(20, kSilence);
  look();
  const Load::Count count = world.load().count() - count_before;
  run.seen.harm = count;
  const Tally victims = world.victims_tally(), other = world.other_tally();
  run.seen.harm.tally = {victims.lost - std::min(victims.lost, victims_before.lost),
                         victims.duplicated - victims_before.duplicated, victims.reordered - victims_before.reordered,
                         victims.corrupt - victims_before.corrupt};
  run.seen.other_harmed = run.seen.other_harmed || other.lost > other_before.lost ||
                          other.duplicated > other_before.duplicated || other.reordered > other_before.reordered ||
                          other.corrupt > other_before.corrupt;
  run.seen.damaged_bytes = world.damaged_bytes();
  run.seen.front_ends_connected = world.front_ends_connected();
  run.text = log_since(host, log_before);
  return run;
}

}  // namespace tandem::test
