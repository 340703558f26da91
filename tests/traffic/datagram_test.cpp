// SPDX-License-Identifier: Apache-2.0
// Numbered datagrams: what is composed is accepted, and any single change is noticed.
#include "tests/traffic/datagram.hpp"

#include <array>
#include <catch2/catch.hpp>
#include <set>
#include <string_view>

using namespace tandem::traffic;

TEST_CASE("CRC-32 gives the published check value") {
  constexpr std::string_view kCheck = "123456789";
  CHECK(crc32(0, std::as_bytes(std::span{kCheck})) == 0xcbf43926u);
}

TEST_CASE("a composed datagram is intact and carries its number") {
  std::array<std::byte, kMaxDatagram> buffer;
  std::set<std::size_t> lengths;
  for (std::uint64_t sequence = 0; sequence < kLengthPeriod; ++sequence) {
    const std::size_t size = compose(buffer, 3, sequence, 42);
    lengths.insert(size);
    const auto header = inspect(std::span{buffer}.first(size), 3);
    REQUIRE(header);
    REQUIRE(header->sequence == sequence);
    REQUIRE(header->sent_ns == 42);
  }
  CHECK(lengths.size() == kLengthPeriod);  // every length from a bare header to the longest
  CHECK(*lengths.rbegin() == kMaxDatagram);
}

TEST_CASE("every changed byte is noticed") {
  std::array<std::byte, kMaxDatagram> buffer;
  const std::size_t size = compose(buffer, 0, 77, 1);
  for (std::size_t i = 0; i < size; ++i) {
    buffer[i] ^= std::byte{0x10};
    REQUIRE_FALSE(inspect(std::span{buffer}.first(size), 0));
    buffer[i] ^= std::byte{0x10};
  }
  CHECK(inspect(std::span{buffer}.first(size), 0));
}

TEST_CASE("a datagram cut short, padded, or of another flow is not intact") {
  std::array<std::byte, kMaxDatagram + 1> buffer{};
  const std::size_t size = compose(buffer, 0, 5, 1);
  CHECK_FALSE(inspect(std::span{buffer}.first(size - 1), 0));
  CHECK_FALSE(inspect(std::span{buffer}.first(size + 1), 0));
  CHECK_FALSE(inspect(std::span{buffer}.first(8), 0));
  CHECK_FALSE(inspect({}, 0));
  CHECK_FALSE(inspect(std::span{buffer}.first(size), 1));
}
