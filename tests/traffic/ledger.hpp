// SPDX-License-Identifier: Apache-2.0
// Ledger: what became of each number of one flow in one direction.
//
// Plain data, no I/O, one thread. A number counts as reordered when it is new but a higher one was seen before it, and
// as duplicated each time it is seen again. What is missing can only be told once the sender has said how much it sent.
#pragma once

#include <cstdint>
#include <vector>

namespace tandem::traffic {

class Ledger {
 public:
  /// Enters a datagram that arrived intact. False for a number so far ahead that no sender can have used it: the caller
  /// counts that as corrupt (the ledger's memory follows from the highest number).
  [[nodiscard]] bool enter(std::uint64_t sequence);

  [[nodiscard]] std::uint64_t received() const { return received_; }  ///< distinct numbers
  [[nodiscard]] std::uint64_t duplicated() const { return duplicated_; }
  [[nodiscard]] std::uint64_t reordered() const { return reordered_; }
  /// How many of the numbers 0 to `sent` - 1 never came.
  [[nodiscard]] std::uint64_t missing(std::uint64_t sent) const;
  /// How many numbers came that were never sent.
  [[nodiscard]] std::uint64_t surplus(std::uint64_t sent) const;

 private:
  static constexpr std::uint64_t kMaxAhead = 1u << 24;

  std::vector<bool> seen_;
  std::uint64_t received_ = 0;
  std::uint64_t duplicated_ = 0;
  std::uint64_t reordered_ = 0;
};

}  // namespace tandem::traffic
