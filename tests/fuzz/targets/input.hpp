// SPDX-License-Identifier: Apache-2.0
// Input: what libFuzzer made up, read from front to back; past its end everything is zero. And what all targets need:
// the verdict.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <type_traits>

namespace tandem::fuzz {

/// A property that must hold for any input; libFuzzer keeps the input for which it does not.
inline void must_hold(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : rest_(std::as_bytes(std::span{data, size})) {}

  [[nodiscard]] bool empty() const { return rest_.empty(); }
  [[nodiscard]] std::size_t left() const { return rest_.size(); }
  /// The next `size` bytes, or as many as there are.
  std::span<const std::byte> take(std::size_t size) {
    const auto taken = rest_.first(std::min(size, rest_.size()));
    rest_ = rest_.subspan(taken.size());
    return taken;
  }
  template <class T>
  T next() {
    static_assert(std::is_trivially_copyable_v<T>);
    T value{};
    const auto bytes = take(sizeof value);
    // An enumeration or a bool has fewer values than bit patterns: callers ask for integers.
    std::memcpy(&value, bytes.data(), bytes.size());
    return value;
  }
  std::uint8_t u8() { return next<std::uint8_t>(); }
  std::uint16_t u16() { return next<std::uint16_t>(); }
  std::uint32_t u32() { return next<std::uint32_t>(); }
  std::uint64_t u64() { return next<std::uint64_t>(); }

 private:
  std::span<const std::byte> rest_;
};

/// Notices a descriptor that was left open: the lowest free number is then another one.
class DescriptorCheck {
 public:
  DescriptorCheck() : lowest_(lowest()) {}
  ~DescriptorCheck() { must_hold(lowest() == lowest_, "a descriptor was left open, or one too many was closed"); }
  DescriptorCheck(const DescriptorCheck&) = delete;
  DescriptorCheck& operator=(const DescriptorCheck&) = delete;

 private:
  static int lowest() {
    const int fd = ::dup(0);
    ::close(fd);
    return fd;
  }
  int lowest_;
};

}  // namespace tandem::fuzz
