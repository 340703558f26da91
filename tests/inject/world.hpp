// SPDX-License-Identifier: Apache-2.0
// World: two pairs under traffic: the one whose owner gets the faults, with two NICs, and another one, which must not
// notice.
//
// Made anew after harm. Thread: one; the traffic has its own.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "tests/support/load.hpp"
#include "tests/support/pair_host.hpp"

namespace tandem::test {

class World {
 public:
  using json = nlohmann::json;
  static constexpr std::size_t kVictims = 2;  ///< guests of the pair with the faults: 0 and 1; the other pair's is 2

  explicit World(std::uint64_t rate);
  ~World();

  PairHost& host() { return host_; }
  Load& load() { return *load_; }
  [[nodiscard]] Tally victims_tally() const;
  [[nodiscard]] Tally other_tally() const { return load_->tally_of(kVictims); }
  LoadGuest& guest(std::size_t index) { return *guests_[index]; }
  [[nodiscard]] std::size_t guests() const { return guests_.size(); }
  [[nodiscard]] std::uint64_t damaged_bytes() const;

  /// The next complete incident of any pair; null if there is none.
  json next_incident();
  /// Whether every flow moves `frames` more within the limit.
  bool flows_go_on(std::uint64_t frames, std::chrono::milliseconds limit) const;
  /// Whether all front ends are connected and nothing was said to them that they had not asked for.
  bool front_ends_connected();
  /// The first guest's memory table again: the owner has to take descriptors and map memory.
  void describe_anew();

 private:
  PairHost host_;
  std::vector<std::unique_ptr<LoadGuest>> guests_;
  std::unique_ptr<Load> load_;
  std::uint64_t next_incident_ = 1;
};

}  // namespace tandem::test
