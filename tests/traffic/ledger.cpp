// SPDX-License-Identifier: Apache-2.0
// Bookkeeping of numbered datagrams.
#include "tests/traffic/ledger.hpp"

#include <algorithm>

namespace tandem::traffic {

bool Ledger::enter(std::uint64_t sequence) {
  if (sequence >= seen_.size() + kMaxAhead) return false;
  if (sequence >= seen_.size()) {
    seen_.resize(sequence + 1);
  } else if (seen_[sequence]) {
    ++duplicated_;
    return true;
  } else {
    ++reordered_;
  }
  seen_[sequence] = true;
  ++received_;
  return true;
}

std::uint64_t Ledger::missing(std::uint64_t sent) const { return sent - (received_ - surplus(sent)); }

std::uint64_t Ledger::surplus(std::uint64_t sent) const {
  if (sent >= seen_.size()) return 0;
  return static_cast<std::uint64_t>(std::count(seen_.begin() + static_cast<std::ptrdiff_t>(sent), seen_.end(), true));
}

}  // namespace tandem::traffic
