// SPDX-License-Identifier: Apache-2.0
// The ledger's judgement on orders of arrival.
#include "tests/traffic/ledger.hpp"

#include <catch2/catch.hpp>

using tandem::traffic::Ledger;

namespace {

struct Row {
  const char* name;
  std::vector<std::uint64_t> arrivals;
  std::uint64_t sent, received, missing, duplicated, reordered, surplus;
};

const Row kRows[] = {
    {"nothing sent", {}, 0, 0, 0, 0, 0, 0},
    {"all in order", {0, 1, 2, 3}, 4, 4, 0, 0, 0, 0},
    {"all lost", {}, 3, 0, 3, 0, 0, 0},
    {"first lost", {1, 2}, 3, 2, 1, 0, 0, 0},
    {"last lost", {0, 1}, 3, 2, 1, 0, 0, 0},
    {"one twice", {0, 1, 1, 2}, 3, 3, 0, 1, 0, 0},
    {"one three times", {0, 0, 0}, 1, 1, 0, 2, 0, 0},
    {"two swapped", {1, 0, 2}, 3, 3, 0, 0, 1, 0},
    {"late copy is a duplicate, not reordered", {0, 1, 2, 0}, 3, 3, 0, 1, 0, 0},
    {"one late and one lost", {0, 3, 1}, 4, 3, 1, 0, 1, 0},
    {"a number nobody sent", {0, 1, 9}, 2, 3, 0, 0, 0, 1},
};

}  // namespace

TEST_CASE("the ledger counts what became of each number") {
  for (const Row& row : kRows) {
    INFO(row.name);
    Ledger ledger;
    for (const std::uint64_t sequence : row.arrivals) REQUIRE(ledger.enter(sequence));
    CHECK(ledger.received() == row.received);
    CHECK(ledger.missing(row.sent) == row.missing);
    CHECK(ledger.duplicated() == row.duplicated);
    CHECK(ledger.reordered() == row.reordered);
    CHECK(ledger.surplus(row.sent) == row.surplus);
  }
}

TEST_CASE("an absurd number is refused and leaves no trace") {
  Ledger ledger;
  CHECK_FALSE(ledger.enter(std::uint64_t{1} << 40));
  CHECK(ledger.received() == 0);
}
