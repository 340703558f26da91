// SPDX-License-Identifier: Apache-2.0
// Soak: a pair at full speed whose owner is killed again and again.
//
// Thread: one; the traffic has its own (Load). Failures of the scenery (no pair again, no answer) are Catch2's.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <map>
#include <string>
#include <vector>

#include "tests/soak/causes.hpp"
#include "tests/soak/memory_cgroup.hpp"
#include "tests/soak/report.hpp"
#include "tests/support/load.hpp"
#include "tests/support/pair_host.hpp"

namespace tandem::test {

struct SoakOptions {
  unsigned kills = 200;
  std::uint64_t seed = 1;
  unsigned devices = 3, queue_pairs = 2, shards = 2;
  std::string rings = "mixed";  ///< "split", "packed", or "mixed": every second NIC packed
  bool between_guests = true;   ///< traffic from guest to guest, which goes from ring to ring
  std::uint64_t rate = 0;
  std::string only;       ///< one cause by its name; empty: all
  bool progress = false;  ///< a line every now and then
};

class Soak {
 public:
  explicit Soak(const SoakOptions& options);
  /// The whole run; the report is complete afterwards, also if an assertion ended it.
  void run(SoakReport& report);

 private:
  using json = nlohmann::json;
  void begin();
  std::vector<Cause> deck(SoakReport& report);
  Kill kill_once(const Cause& cause);
  std::string strike(const Cause& cause, pid_t victim);
  json next_incident();
  std::vector<json> incidents_of(pid_t victim);
  /// By place.
  std::map<std::string, std::uint64_t> overflow() const;
  std::uint64_t sent_to_bridge() const;
  bool packed(unsigned device) const;

  SoakOptions options_;
  std::mt19937_64 random_;
  PairHost host_;
  std::vector<std::string> macs_;
  std::vector<std::unique_ptr<LoadGuest>> guests_;
  std::unique_ptr<Load> load_;
  std::optional<MemoryController> memory_;
  std::unique_ptr<MemoryCgroup> cgroup_;  // of the kill in hand, if it is an OOM kill
  std::uint64_t next_incident_ = 1;
  std::uint64_t unasked_ = 0;
  pid_t owner_ = 0, heir_ = 0;
};

}  // namespace tandem::test
