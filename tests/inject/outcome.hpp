// SPDX-License-Identifier: Apache-2.0
// What a fault led to, and the table of all runs.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/support/load.hpp"

namespace tandem::test {

enum class OutcomeClass {
  kNoEffect,        ///< nothing to be seen until the victim was ended, nor afterwards
  kCrashRecovered,  ///< it died of it; everything went on
  kHangRecovered,   ///< it was ended by its heir's watchdog; everything went on
  kWindowHit,       ///< a store through the writable window, which this CPU cannot protect: the guest may have seen it
  kPacketHarm,      ///< packets lost, duplicated, reordered, corrupt, or a queue that stopped
  kOtherHarmed,     ///< a device of another pair noticed
  kGuestHarmed,     ///< guest memory that was nobody's to write, or the front end's connection
  kNotInjected,     ///< the victim was gone before
  kCount
};

const char* outcome_name(OutcomeClass outcome);

/// What was seen of one run.
struct Observed {
  bool injected = false;
  bool window_hit = false;        ///< a store that was seen to go through a window
  bool windows_have_key = false;  ///< this CPU has protection keys
  bool died = false;              ///< an incident before the victim was ended on purpose
  bool hung = false;              ///< with a hang verdict
  Load::Count harm;               ///< of the devices of the victim's pair
  bool queues_go_on = true;       ///< every flow of the victim's pair moved again in the end
  bool other_harmed = false;      ///< packets of the other pair
  std::uint64_t damaged_bytes = 0;
  bool front_ends_connected = true;
};
/// The worst that applies; but a store that a window let through is a class of its own, whatever became of the guest's
/// own packets.
OutcomeClass classify(const Observed& seen);

struct Run {
  std::uint64_t number = 0;
  std::string kind;
  nlohmann::json fault;
  Observed seen;
  nlohmann::json incident;       ///< null: none
  unsigned other_failovers = 0;  ///< of the other pair meanwhile
  std::string text;              ///< log lines of this run that may explain it
};

class InjectReport {
 public:
  void add(const Run& run);
  /// At least 99 % of what manifested was recovered, no guest or other device was harmed.
  [[nodiscard]] bool good() const;
  /// No guest and no other device was harmed; what became of the victim's own packets is not judged.
  [[nodiscard]] bool contained() const;
  [[nodiscard]] nlohmann::json to_json() const;
  void print() const;
  void set_complete() { complete_ = true; }

 private:
  [[nodiscard]] std::uint64_t sum(OutcomeClass outcome) const;
  std::map<std::string, std::map<OutcomeClass, std::uint64_t>> table_;
  std::uint64_t weaker_ = 0;  // takeovers that said they fell back to a weaker guarantee
  nlohmann::json unrecovered_ = nlohmann::json::array();
  nlohmann::json runs_ = nlohmann::json::array();
  bool complete_ = false;
};

}  // namespace tandem::test
