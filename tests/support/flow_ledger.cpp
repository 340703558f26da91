// SPDX-License-Identifier: Apache-2.0
// Bookkeeping of one flow.
#include "tests/support/flow_ledger.hpp"

namespace tandem::test {

namespace {
// More than any window: what is missing for so long is lost, and need not be remembered one by one.
constexpr std::size_t kRemembered = 65'536;
}  // namespace

void FlowLedger::note(std::uint64_t number, bool intact, std::uint64_t sent) {
  if (!intact || number >= sent) {
    // Its number cannot be believed; the one it had will be found missing as well.
    ++tally_.corrupt;
    return;
  }
  ++arrived_;
  if (number >= next_) {
    for (; next_ < number; ++next_) missing_.insert(missing_.end(), next_);
    next_ = number + 1;
    for (; missing_.size() > kRemembered; ++given_up_) missing_.erase(missing_.begin());
  } else if (missing_.erase(number) != 0) {
    ++tally_.reordered;
  } else {
    ++tally_.duplicated;
  }
}

void FlowLedger::write_off(std::uint64_t sent) {
  for (; next_ < sent; ++next_) ++given_up_;
}

Tally FlowLedger::tally() const {
  Tally tally = tally_;
  tally.lost = given_up_ + missing_.size();
  return tally;
}

}  // namespace tandem::test
