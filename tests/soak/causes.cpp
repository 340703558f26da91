// SPDX-License-Identifier: Apache-2.0
// The table.
#include "tests/soak/causes.hpp"

#include <csignal>
#include <cstdint>
#include <string_view>

namespace tandem::test {

const std::vector<Cause>& causes() {
  static const std::vector<Cause> kCauses{
      {"SIGKILL", Means::kSignal, SIGKILL, nullptr, "SIGKILL", nullptr},
      {"SIGSEGV (bad store)", Means::kDrill, 0, "segv", "SIGSEGV", nullptr},
      {"SIGABRT", Means::kDrill, 0, "abort", "SIGABRT", nullptr},
      {"SIGBUS", Means::kDrill, 0, "bus", "SIGBUS", nullptr},
      {"exit", Means::kDrill, 0, "exit", "exit 1", nullptr},
      // A stopped owner may have been asleep at that moment.
      {"SIGSTOP", Means::kSignal, SIGSTOP, nullptr, "SIGKILL", "some"},
      {"spin", Means::kDrill, 0, "spin", "SIGKILL", "spinning"},
      {"blocked", Means::kDrill, 0, "block", "SIGKILL", "blocked"},
      {"livelock", Means::kDrill, 0, "livelock", "SIGKILL", "no progress"},
      // The OOM killer may take longer over it than an owner may stand still.
      {"OOM kill", Means::kMemory, 0, nullptr, "SIGKILL", "any"},
  };
  return kCauses;
}

namespace {

std::string differs(const Cause& cause, const nlohmann::json& incident) {
  // "exit" without a status is the fence's word for it, when the process could not be reaped in time.
  const std::string died_of = incident.value("cause", "");
  const bool known = died_of == cause.died_of || (died_of == "exit" && std::string(cause.died_of) == "exit 1");
  if (!known) return "died of " + incident.value("cause", "nothing");
  const nlohmann::json& replayed = incident["replayed"];
  if (replayed.value("armed", false) && !replayed.value("valid", false)) return "its record was not valid";
  return {};
}

// A livelock beats. Where its thread was kept from its CPU (by other threads, or the CPU from this machine) for longer
// than the limit, "spinning" is what its heir had to see; the incident has the heartbeat that says so.
bool beats_no_more(const Cause& cause, const nlohmann::json& verdict, const nlohmann::json& incident) {
  constexpr std::int64_t kSpinLimitNs = 5'000'000;  // the XML option's default, which these NICs have
  return cause.fault != nullptr && std::string_view(cause.fault) == "livelock" && verdict == "spinning" &&
         incident["timeline_ns"].value("last_heartbeat", std::int64_t{0}) <= -kSpinLimitNs;
}

}  // namespace

std::string differs(const Cause& cause, const std::vector<nlohmann::json>& incidents) {
  const std::string_view hang = cause.hang == nullptr ? "" : cause.hang;
  bool found = hang.empty() || hang == "any";
  for (const nlohmann::json& incident : incidents) {
    if (std::string text = differs(cause, incident); !text.empty()) return text;
    const nlohmann::json verdict = incident.value("hang", nlohmann::json());
    if (verdict.is_null()) continue;
    // A drill hangs the thread of shard 0; what a starved one of another shard was taken for says nothing about it.
    if (cause.means == Means::kDrill && !hang.empty() && incident.value("shard", 0) != 0) continue;
    if (hang != "any" && hang != "some" && verdict != hang && !beats_no_more(cause, verdict, incident))
      return "hang verdict " + verdict.dump();
    found = true;
  }
  return found ? "" : "no hang verdict";
}

}  // namespace tandem::test
