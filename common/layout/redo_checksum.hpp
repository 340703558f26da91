// SPDX-License-Identifier: Apache-2.0
// The checksum in a redo record's arm word: over everything that its heir will go by.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "common/crc32c.hpp"
#include "common/layout/redo_record.hpp"

namespace tandem {

/// Over what stands between the arm word and the used elements, over these, and over the frames, or a forward's
/// destination, as far as they are filled. Counts that are larger than their arrays are taken as the arrays' sizes.
/// Frames and used elements have a CRC of their own, side by side: one alone would wait for each word's result before it
/// took the next.
inline std::uint32_t redo_checksum(const RedoRecord& record) {
  const std::uint32_t crc =
      crc32c_extend(~0u, &record.version, offsetof(RedoRecord, used) - offsetof(RedoRecord, version));
  const std::uint32_t used_count = std::min<std::uint32_t>(record.used_count, kBurstUsed);
  if (record.kind == RedoKind::kForward) {
    const RedoDestination& to = record.destination;
    const std::size_t taken = std::min<std::uint32_t>(to.used_count, kBurstFrames) * sizeof(RedoUsed);
    return crc32c_extend(crc32c_extend(crc, record.used, used_count * sizeof(RedoUsed)), &to,
                         offsetof(RedoDestination, used) + taken);
  }
  const std::uint32_t frame_count = std::min<std::uint32_t>(record.frame_count, kBurstFrames);
  const std::uint32_t common = std::min(used_count, frame_count);
  std::uint32_t used = ~0u, frames = ~0u;
  for (std::uint32_t i = 0; i < common; ++i) {
    used = crc32c_word(used, std::bit_cast<std::uint64_t>(record.used[i]));
    frames = crc32c_word(frames, std::bit_cast<std::uint64_t>(record.frames[i]));
  }
  used = crc32c_extend(used, record.used + common, (used_count - common) * sizeof(RedoUsed));
  frames = crc32c_extend(frames, record.frames + common, (frame_count - common) * sizeof(RedoFrame));
  return crc32c_word(crc, std::uint64_t{used} << 32 | frames);
}

}  // namespace tandem
