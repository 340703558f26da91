// SPDX-License-Identifier: Apache-2.0
// CRC-32C against the vectors of RFC 3720, appendix B.4.
#include "common/crc32c.hpp"

#include <catch2/catch.hpp>
#include <numeric>
#include <string_view>
#include <vector>

using tandem::crc32c_extend;

namespace {

std::uint32_t whole(const std::vector<unsigned char>& bytes) { return ~crc32c_extend(~0u, bytes.data(), bytes.size()); }

// The definition, bit by bit.
std::uint32_t by_bits(const std::vector<unsigned char>& bytes) {
  std::uint32_t crc = ~0u;
  for (const unsigned char byte : bytes) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1u) != 0 ? 0x82f63b78u : 0u);
  }
  return ~crc;
}

}  // namespace

TEST_CASE("crc32c: known vectors") {
  CHECK(whole(std::vector<unsigned char>(32, 0x00)) == 0x8a9136aau);
  CHECK(whole(std::vector<unsigned char>(32, 0xff)) == 0x62a8ab43u);
  std::vector<unsigned char> rising(32);
  std::iota(rising.begin(), rising.end(), static_cast<unsigned char>(0));
  CHECK(whole(rising) == 0x46dd794eu);
  CHECK(whole({rising.rbegin(), rising.rend()}) == 0x113fdb5cu);
  const std::string_view digits = "123456789";
  CHECK(whole({digits.begin(), digits.end()}) == 0xe3069283u);
  CHECK(whole({}) == 0u);
}

TEST_CASE("crc32c: every length and split gives the value of the definition") {
  std::vector<unsigned char> bytes;
  for (unsigned i = 0; i < 70; ++i) {
    CHECK(whole(bytes) == by_bits(bytes));
    for (std::size_t cut = 0; cut <= bytes.size(); cut += 5) {
      const std::uint32_t head = crc32c_extend(~0u, bytes.data(), cut);
      CHECK(~crc32c_extend(head, bytes.data() + cut, bytes.size() - cut) == by_bits(bytes));
    }
    bytes.push_back(static_cast<unsigned char>(i * 37 + 11));
  }
}
