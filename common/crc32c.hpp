// SPDX-License-Identifier: Apache-2.0
// CRC-32C (Castagnoli, RFC 3720 appendix B.4), with the CPU's instruction where there is one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE4_2__)
#include <nmmintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace tandem {

namespace detail {
constexpr std::array<std::uint32_t, 256> make_crc32c_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1u) != 0 ? 0x82f63b78u : 0u);
    table[i] = value;
  }
  return table;
}
inline constexpr std::array<std::uint32_t, 256> kCrc32cTable = make_crc32c_table();
}  // namespace detail

/// crc32c_extend() over the eight bytes of `word`, as this CPU stores it.
inline std::uint32_t crc32c_word(std::uint32_t crc, std::uint64_t word);

/// Extends `crc` (start with ~0u, no final inversion: only equality matters here) over `size` bytes; same value on
/// every CPU.
inline std::uint32_t crc32c_extend(std::uint32_t crc, const void* data, std::size_t size) {
  const auto* bytes = static_cast<const unsigned char*>(data);
#if defined(__SSE4_2__) || defined(__ARM_FEATURE_CRC32)
  for (; size >= 8; size -= 8, bytes += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes, sizeof word);
#if defined(__SSE4_2__)
    crc = static_cast<std::uint32_t>(_mm_crc32_u64(crc, word));
#else
    crc = __crc32cd(crc, word);
#endif
  }
#endif
  for (; size > 0; --size, ++bytes) crc = (crc >> 8) ^ detail::kCrc32cTable[(crc ^ *bytes) & 0xffu];
  return crc;
}

inline std::uint32_t crc32c_word(std::uint32_t crc, std::uint64_t word) {
  return crc32c_extend(crc, &word, sizeof word);
}

}  // namespace tandem
