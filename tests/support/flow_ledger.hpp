// SPDX-License-Identifier: Apache-2.0
// FlowLedger: what became of an endless flow of numbered frames, known at once and in little memory.
//
// A flow keeps its order, so a number that is skipped counts as lost as soon as a later one arrives; should it come
// after all, it was reordered instead. Thread: one at a time.
#pragma once

#include <cstdint>
#include <set>

#include "tests/support/packets.hpp"

namespace tandem::test {

class FlowLedger {
 public:
  /// A frame arrived; numbers below `sent` have been sent.
  void note(std::uint64_t number, bool intact, std::uint64_t sent);
  /// Nothing more will come of what was sent so far: what is missing is lost.
  void write_off(std::uint64_t sent);

  /// Every number below is accounted for; sent - next() are on their way.
  [[nodiscard]] std::uint64_t next() const { return next_; }
  [[nodiscard]] std::uint64_t arrived() const { return arrived_; }
  [[nodiscard]] Tally tally() const;

 private:
  std::uint64_t next_ = 0;
  std::uint64_t arrived_ = 0;
  std::uint64_t given_up_ = 0;       // lost for good, no longer in missing_
  std::set<std::uint64_t> missing_;  // numbers below next_ that have not come: nobody knows yet whether they will
  Tally tally_;
};

}  // namespace tandem::test
