// SPDX-License-Identifier: Apache-2.0
// Frames are a header template, a name, and a piece of one long pattern.
#include "tests/support/prime_frames.hpp"

#include <cstdio>
#include <cstring>
#include <vector>

namespace tandem::test {

namespace {

constexpr std::size_t kNameAt = 42, kPatternAt = 56;
constexpr std::uint32_t kMagic = 0x6d72'7074;
constexpr std::uint16_t kFirstPort = 20'000;

struct __attribute__((packed)) NameBytes {
  std::uint32_t magic;
  std::uint16_t flow;
  std::uint64_t number;
};
static_assert(kNameAt + sizeof(NameBytes) == kPatternAt);

// kPrime bytes without structure, repeated far enough for a whole frame from any of them.
const std::byte* pattern() {
  static const std::vector<std::byte> bytes = [] {
    std::vector<std::byte> made(PrimeFrames::kPrime + PrimeFrames::kLongest);
    std::uint32_t state = 0x2545'f491;
    for (std::size_t i = 0; i < made.size(); ++i) {
      state = state * 1'664'525 + 1'013'904'223;
      made[i] = i < PrimeFrames::kPrime ? static_cast<std::byte>(state >> 24) : made[i - PrimeFrames::kPrime];
    }
    return made;
  }();
  return bytes.data();
}

void put16(std::byte* at, std::size_t value) {
  at[0] = static_cast<std::byte>(value >> 8);
  at[1] = static_cast<std::byte>(value);
}

}  // namespace

MacAddress parse_mac(const char* text) {
  unsigned bytes[6] = {};
  std::sscanf(text, "%x:%x:%x:%x:%x:%x", &bytes[0], &bytes[1], &bytes[2], &bytes[3], &bytes[4], &bytes[5]);
  MacAddress mac{};
  for (std::size_t i = 0; i < mac.size(); ++i) mac[i] = static_cast<std::uint8_t>(bytes[i]);
  return mac;
}

PrimeFrames::PrimeFrames(std::uint16_t flow, const MacAddress& to, const MacAddress& from) : flow_(flow) {
  std::memcpy(header_.data(), to.data(), to.size());
  std::memcpy(header_.data() + 6, from.data(), from.size());
  // IPv4 without options, UDP without checksum (RFC 768 allows 0); lengths and the header's sum come with each frame.
  constexpr std::uint8_t kIp[] = {8, 0, 0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 9, 8, 1, 10, 9, 8, 2};
  std::memcpy(header_.data() + 12, kIp, sizeof kIp);
  put16(header_.data() + 34, 1000u + flow * 37u);
  put16(header_.data() + 36, kFirstPort + flow);
}

// Mostly short frames, for the rate; every fifth has any length at all.
std::size_t PrimeFrames::length(std::uint64_t number) {
  return number % 5 == 0 ? kShortest + number * 97 % (kLongest - kShortest) : kShortest + number * 31 % 67;
}

std::size_t PrimeFrames::write(std::uint64_t number, std::span<std::byte> room) const {
  const std::size_t size = length(number);
  std::memcpy(room.data(), header_.data(), header_.size());
  put16(room.data() + 16, size - 14);
  put16(room.data() + 38, size - 34);
  std::uint32_t sum = 0;
  for (std::size_t i = 14; i < 34; i += 2)
    sum += std::to_integer<std::uint32_t>(room[i]) << 8 | std::to_integer<std::uint32_t>(room[i + 1]);
  while (sum >> 16 != 0) sum = (sum & 0xffff) + (sum >> 16);
  put16(room.data() + 24, ~sum & 0xffff);
  const NameBytes name{kMagic, flow_, number};
  std::memcpy(room.data() + kNameAt, &name, sizeof name);
  const std::size_t begin = (number * 389 + flow_ * 151u) % kPrime;
  std::memcpy(room.data() + kPatternAt, pattern() + begin, size - kPatternAt);
  return size;
}

bool PrimeFrames::intact(std::uint64_t number, std::span<const std::byte> frame) const {
  std::array<std::byte, kLongest> expected;
  if (frame.size() != length(number)) return false;
  return std::memcmp(expected.data(), frame.data(), write(number, expected)) == 0;
}

std::optional<PrimeFrames::Name> PrimeFrames::name(std::span<const std::byte> frame) {
  NameBytes bytes;
  if (frame.size() < kPatternAt) return std::nullopt;
  std::memcpy(&bytes, frame.data() + kNameAt, sizeof bytes);
  if (bytes.magic != kMagic) return std::nullopt;
  return Name{bytes.flow, bytes.number};
}

}  // namespace tandem::test
