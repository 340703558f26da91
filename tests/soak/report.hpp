// SPDX-License-Identifier: Apache-2.0
// What a soak saw, kill by kill, and its summary by cause.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/support/load.hpp"

namespace tandem::test {

/// Times of one kind; ns.
class Samples {
 public:
  void add(std::int64_t value) { values_.push_back(value); }
  [[nodiscard]] std::size_t size() const { return values_.size(); }
  /// Smallest value that is not exceeded by the share `p` of all (nearest rank); 0 of none.
  [[nodiscard]] std::int64_t quantile(double p) const;
  /// {"median", "p99", "max"} in microseconds; null of none.
  [[nodiscard]] nlohmann::json to_json() const;

 private:
  std::vector<std::int64_t> values_;
};

/// One kill.
struct Kill {
  std::string cause;
  std::int64_t gap_ns = 0;      ///< longest silence of any flow in the stretch around it
  std::int64_t control_ns = 0;  ///< the same in an equally long stretch without a kill
  std::int64_t pause_ns = 0;    ///< longest time in the first stretch in which the traffic thread itself got no CPU
  std::int64_t struck_ns = 0;   ///< CLOCK_MONOTONIC, just before a signal was sent; 0: it was no signal
  Load::Count harm;             ///< what the books of all flows show more than before it
  std::vector<nlohmann::json> incidents;  ///< one of each shard
  std::string unexpected;                 ///< what differs from what such a death must look like; empty if nothing
};

class SoakReport {
 public:
  void add(const Kill& kill);
  void skip(const std::string& cause, const std::string& reason) { skipped_[cause] = reason; }
  /// What the whole run showed, after the last frame.
  struct Totals {
    Load::Count count;
    std::uint64_t overflow = 0;           ///< frames that found a ring or queue on the way full, and never entered
    std::uint64_t sent_to_bridge = 0;     ///< frames that guests sent through their uplinks
    std::uint64_t unasked_failovers = 0;  ///< incidents without a kill: hang verdicts on an owner nobody had touched
    std::vector<std::string> overflows;   ///< where, in words
    std::vector<std::string> stalls;      ///< in words
    double seconds = 0, kill_seconds = 0;
    bool complete = false;
    std::string left_behind;
  };
  void finish(const Totals& totals) { totals_ = totals; }

  /// Zeros where zeros belong, all kills done, each as it should be.
  [[nodiscard]] bool clean() const;
  [[nodiscard]] nlohmann::json to_json() const;
  void print() const;

 private:
  struct Row {
    std::uint64_t count = 0, replayed = 0, replayed_forwards = 0, unexpected = 0;
    Samples detection, takeover, gap, control, pause;
    Load::Count harm;
  };
  static nlohmann::json row_json(const Row& row);
  void add_to(Row& row, const Kill& kill);

  std::map<std::string, Row> rows_;
  Row all_;
  std::map<std::string, std::string> skipped_;
  std::vector<std::string> unexpected_;
  std::multimap<std::int64_t, nlohmann::json> outliers_;  // the longest gaps, with all that is known of them
  Totals totals_;
};

}  // namespace tandem::test
