// SPDX-License-Identifier: Apache-2.0
// The books of soak and fault injection notice what they are there for.
#include "tests/support/flow_ledger.hpp"

#include <catch2/catch.hpp>
#include <vector>

#include "tests/support/prime_frames.hpp"

using namespace tandem::test;

TEST_CASE("a flow that arrives whole leaves nothing to report") {
  FlowLedger ledger;
  for (std::uint64_t number = 0; number < 1000; ++number) ledger.note(number, true, 1000);
  CHECK(ledger.tally().clean());
  CHECK(ledger.next() == 1000);
  CHECK(ledger.arrived() == 1000);
}

TEST_CASE("what is missing is lost, what comes late reordered, what comes twice duplicated") {
  FlowLedger ledger;
  for (const std::uint64_t number : {0u, 1u, 4u}) ledger.note(number, true, 10);
  CHECK(ledger.tally().lost == 2);
  ledger.note(2, true, 10);
  CHECK(ledger.tally().lost == 1);
  CHECK(ledger.tally().reordered == 1);
  ledger.note(4, true, 10);
  ledger.note(2, true, 10);
  CHECK(ledger.tally().duplicated == 2);
  ledger.write_off(10);
  CHECK(ledger.tally().lost == 6);
  CHECK(ledger.next() == 10);
}

TEST_CASE("a number that was never sent, or a frame that is not what it was, is corrupt") {
  FlowLedger ledger;
  ledger.note(5, true, 5);
  ledger.note(0, false, 5);
  CHECK(ledger.tally().corrupt == 2);
  CHECK(ledger.tally().lost == 0);
  ledger.note(1, true, 5);
  CHECK(ledger.tally().lost == 1);
}

TEST_CASE("frames with a prime pattern: every changed byte is seen") {
  const MacAddress to = parse_mac("52:54:00:12:34:56"), from = parse_mac("02:00:00:00:00:01");
  const PrimeFrames frames(7, to, from), other(8, to, from);
  std::vector<std::byte> room(PrimeFrames::kLongest);
  for (const std::uint64_t number : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{5}, std::uint64_t{1} << 40}) {
    CAPTURE(number);
    const std::size_t size = frames.write(number, room);
    REQUIRE(size >= PrimeFrames::kShortest);
    REQUIRE(size <= PrimeFrames::kLongest);
    const std::span<std::byte> frame(room.data(), size);
    const auto name = PrimeFrames::name(frame);
    REQUIRE(name);
    CHECK(name->flow == 7);
    CHECK(name->number == number);
    CHECK(frames.intact(number, frame));
    CHECK_FALSE(frames.intact(number + 1, frame));
    CHECK_FALSE(other.intact(number, frame));
    CHECK_FALSE(frames.intact(number, frame.first(size - 1)));
    for (std::size_t at = 0; at < size; ++at) {
      frame[at] ^= std::byte{1};
      CHECK_FALSE(frames.intact(number, frame));
      frame[at] ^= std::byte{1};
    }
  }
}
