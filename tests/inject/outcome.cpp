// SPDX-License-Identifier: Apache-2.0
// Classes and table.
#include "tests/inject/outcome.hpp"

#include <cstdio>

namespace tandem::test {

namespace {

constexpr auto kClasses = static_cast<std::size_t>(OutcomeClass::kCount);

bool unrecovered(OutcomeClass outcome) {
  return outcome == OutcomeClass::kPacketHarm || outcome == OutcomeClass::kOtherHarmed ||
         outcome == OutcomeClass::kGuestHarmed;
}

}  // namespace

const char* outcome_name(OutcomeClass outcome) {
  constexpr const char* kNames[] = {"no effect",   "crash recovered", "hang recovered", "window hit",
                                    "packet harm", "other harmed",    "guest harmed",   "not injected"};
  static_assert(std::size(kNames) == kClasses);
  return kNames[static_cast<std::size_t>(outcome)];
}

OutcomeClass classify(const Observed& seen) {
  if (!seen.injected) return OutcomeClass::kNotInjected;
  if (!seen.front_ends_connected) return OutcomeClass::kGuestHarmed;
  // The view cannot be written, so whatever was written went through a window. Without protection keys nothing stops
  // that.
  if (seen.damaged_bytes != 0 && seen.windows_have_key) return OutcomeClass::kGuestHarmed;
  if (seen.other_harmed) return OutcomeClass::kOtherHarmed;
  if (seen.damaged_bytes != 0 || seen.window_hit) return OutcomeClass::kWindowHit;
  if (!seen.harm.clean() || seen.harm.stalls != 0 || !seen.queues_go_on) return OutcomeClass::kPacketHarm;
  if (!seen.died) return OutcomeClass::kNoEffect;
  return seen.hung ? OutcomeClass::kHangRecovered : OutcomeClass::kCrashRecovered;
}

void InjectReport::add(const Run& run) {
  const OutcomeClass outcome = classify(run.seen);
  ++table_[run.kind][outcome];
  const bool weaker =
      run.incident.is_object() && run.incident.contains("fallback") && !run.incident["fallback"].empty();
  weaker_ += weaker;
  nlohmann::json entry{{"run", run.number},
                       {"kind", run.kind},
                       {"fault", run.fault},
                       {"outcome", outcome_name(outcome)},
                       {"other_failovers", run.other_failovers},
                       {"cause", run.incident.is_object() ? run.incident.value("cause", "") : ""},
                       {"hang", run.incident.is_object() ? run.incident["hang"] : nlohmann::json()},
                       {"fallback", weaker ? run.incident["fallback"] : nlohmann::json::array()}};
  if (unrecovered(outcome) || outcome == OutcomeClass::kWindowHit) {
    nlohmann::json full = entry;
    full["lost"] = run.seen.harm.tally.lost;
    full["duplicated"] = run.seen.harm.tally.duplicated;
    full["reordered"] = run.seen.harm.tally.reordered;
    full["corrupt"] = run.seen.harm.tally.corrupt;
    full["ring_errors"] = run.seen.harm.ring_errors;
    full["stalls"] = run.seen.harm.stalls;
    full["queues_go_on"] = run.seen.queues_go_on;
    full["damaged_bytes"] = run.seen.damaged_bytes;
    full["incident"] = run.incident;
    full["log"] = run.text;
    if (unrecovered(outcome)) unrecovered_.push_back(std::move(full));
  }
  runs_.push_back(std::move(entry));
}

std::uint64_t InjectReport::sum(OutcomeClass outcome) const {
  std::uint64_t total = 0;
  for (const auto& [kind, row] : table_)
    if (const auto found = row.find(outcome); found != row.end()) total += found->second;
  return total;
}

bool InjectReport::good() const {
  const std::uint64_t recovered = sum(OutcomeClass::kCrashRecovered) + sum(OutcomeClass::kHangRecovered);
  const std::uint64_t not_recovered = unrecovered_.size();
  return contained() && not_recovered * 100 <= recovered + not_recovered;
}

bool InjectReport::contained() const {
  return complete_ && sum(OutcomeClass::kGuestHarmed) == 0 && sum(OutcomeClass::kOtherHarmed) == 0;
}

nlohmann::json InjectReport::to_json() const {
  nlohmann::json kinds = nlohmann::json::object(), totals = nlohmann::json::object();
  for (std::size_t i = 0; i < kClasses; ++i) {
    const auto outcome = static_cast<OutcomeClass>(i);
    totals[outcome_name(outcome)] = sum(outcome);
    for (const auto& [kind, row] : table_)
      kinds[kind][outcome_name(outcome)] = row.contains(outcome) ? row.at(outcome) : 0;
  }
  const std::uint64_t recovered = sum(OutcomeClass::kCrashRecovered) + sum(OutcomeClass::kHangRecovered);
  const std::uint64_t manifested = recovered + unrecovered_.size();
  return {{"kinds", std::move(kinds)},
          {"totals", std::move(totals)},
          {"manifested", manifested},
          {"recovered", recovered},
          {"recovered_share", manifested == 0 ? 1.0 : static_cast<double>(recovered) / static_cast<double>(manifested)},
          {"weaker_guarantee", weaker_},
          {"unrecovered", unrecovered_},
          {"runs", runs_},
          {"complete", complete_},
          {"good", good()}};
}

void InjectReport::print() const {
  std::printf("%-30s", "");
  for (std::size_t i = 0; i < kClasses; ++i) std::printf(" %15s", outcome_name(static_cast<OutcomeClass>(i)));
  std::printf("\n");
  const auto line = [](const char* name, const auto& count) {
    std::printf("%-30s", name);
    for (std::size_t i = 0; i < kClasses; ++i)
      std::printf(" %15llu", static_cast<unsigned long long>(count(static_cast<OutcomeClass>(i))));
    std::printf("\n");
  };
  for (const auto& [kind, row] : table_)
    line(kind.c_str(), [&](OutcomeClass outcome) { return row.contains(outcome) ? row.at(outcome) : 0; });
  line("total", [&](OutcomeClass outcome) { return sum(outcome); });
  for (const auto& entry : unrecovered_)
    std::printf("unrecovered: run %llu, %s %s: %s; lost %llu, duplicated %llu, reordered %llu, corrupt %llu\n",
                static_cast<unsigned long long>(entry["run"].get<std::uint64_t>()),
                entry["kind"].get<std::string>().c_str(), entry["fault"].dump().c_str(),
                entry["outcome"].get<std::string>().c_str(),
                static_cast<unsigned long long>(entry["lost"].get<std::uint64_t>()),
                static_cast<unsigned long long>(entry["duplicated"].get<std::uint64_t>()),
                static_cast<unsigned long long>(entry["reordered"].get<std::uint64_t>()),
                static_cast<unsigned long long>(entry["corrupt"].get<std::uint64_t>()));
  const nlohmann::json figures = to_json();
  std::printf("%llu manifested, %.1f %% recovered; %llu takeovers with a weaker guarantee\n%s\n",
              static_cast<unsigned long long>(figures["manifested"].get<std::uint64_t>()),
              100 * figures["recovered_share"].get<double>(), static_cast<unsigned long long>(weaker_),
              good() ? "good" : "FAILED");
  std::fflush(stdout);
}

}  // namespace tandem::test
