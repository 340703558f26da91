// SPDX-License-Identifier: Apache-2.0
// Fence tags: never the same twice, never two living ones in one slot.
#include <catch2/catch.hpp>
#include <set>

#include "recovery/supervisor/pair.hpp"

using namespace tandem;

TEST_CASE("tags that retire leave their slot, not their number") {
  TagSource tags;
  std::set<std::uint32_t> seen;
  for (std::uint32_t n = 0; n < 3 * TANDEM_FENCE_SLOTS; ++n) {
    const std::uint32_t tag = tags.next();
    CHECK(tag != 0);
    if (!seen.insert(tag).second) FAIL("tag " << tag << " came twice");
    tags.retire(tag);
  }
}

TEST_CASE("a living tag keeps its slot to itself") {
  TagSource tags;
  const std::uint32_t living = tags.next();
  for (std::uint32_t n = 0; n < 2 * TANDEM_FENCE_SLOTS; ++n) {
    const std::uint32_t tag = tags.next();
    if (tag % TANDEM_FENCE_SLOTS == living % TANDEM_FENCE_SLOTS)
      FAIL("tag " << tag << " shares the slot of " << living);
    tags.retire(tag);
  }
  // Retiring what does not live, or a stranger that had the same slot, changes nothing.
  tags.retire(living + TANDEM_FENCE_SLOTS);
  tags.retire(0);
  for (std::uint32_t n = 0; n < TANDEM_FENCE_SLOTS; ++n) {
    const std::uint32_t tag = tags.next();
    if (tag % TANDEM_FENCE_SLOTS == living % TANDEM_FENCE_SLOTS)
      FAIL("tag " << tag << " shares the slot of " << living);
    tags.retire(tag);
  }
}
