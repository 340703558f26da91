// SPDX-License-Identifier: Apache-2.0
// PrimeFrames: one flow of numbered UDP frames whose payload is a pattern with a prime period, quick to make and to
// check.
//
// A prime period coincides with no buffer, page or ring size: bytes that come from another place, another number or
// another flow differ. Everything in a frame, its length too, follows from flow and number, so a frame is checked by
// making it again. Thread: each object one at a time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace tandem::test {

using MacAddress = std::array<std::uint8_t, 6>;
/// Of "52:54:00:12:34:56".
MacAddress parse_mac(const char* text);

class PrimeFrames {
 public:
  static constexpr std::size_t kShortest = 64, kLongest = 1500;
  static constexpr std::size_t kPrime = 1021;  ///< period of the pattern

  PrimeFrames(std::uint16_t flow, const MacAddress& to, const MacAddress& from);

  /// Writes frame `number`; `room` has kLongest bytes. Returns the frame's length.
  std::size_t write(std::uint64_t number, std::span<std::byte> room) const;
  /// Whether `frame` is frame `number`, byte for byte.
  [[nodiscard]] bool intact(std::uint64_t number, std::span<const std::byte> frame) const;
  [[nodiscard]] std::uint16_t flow() const { return flow_; }

  /// What a frame says it is, before anything is believed; nothing if it is no frame of ours.
  struct Name {
    std::uint16_t flow;
    std::uint64_t number;
  };
  static std::optional<Name> name(std::span<const std::byte> frame);

 private:
  static std::size_t length(std::uint64_t number);

  std::uint16_t flow_;
  std::array<std::byte, 42> header_{};
};

}  // namespace tandem::test
