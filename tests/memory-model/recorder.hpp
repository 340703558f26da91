// SPDX-License-Identifier: Apache-2.0
// Recorder: the sequence of stores, fences and loads that the shipping engine makes, with the memory orders its source
// asks for.
//
// The engine's sources are compiled with -fsanitize=thread, which makes the compiler call a hook before every access
// and instead of every atomic one, with its order as an argument. Here those hooks are not ThreadSanitizer's but the
// recorder's (recorder.cpp): no annotation in the engine, so nothing can drift from it. What a plain store or a memcpy
// wrote is found by comparing the shared memory with a shadow at the next hook. One thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tandem::test {

enum class AccessKind : std::uint8_t { kPlainStore, kRelaxedStore, kReleaseStore, kFullFence, kLoad };

/// Stores: at most 4 aligned bytes that changed, at an offset in one of the watched parts. Loads: atomic ones only, by
/// width; they and fences have no place.
struct Access {
  AccessKind kind{};
  std::uint32_t part = 0;
  std::uint32_t offset = 0;
  std::uint8_t size = 0;
  std::byte bytes[4]{};

  [[nodiscard]] bool is_store() const { return kind <= AccessKind::kReleaseStore; }
};

class Recorder {
 public:
  /// Watches `parts`, which must stay where they are until stop().
  void start(const std::vector<std::span<std::byte>>& parts);
  std::vector<Access> stop();

  // For the hooks.
  void settle(AccessKind kind);
  void note(AccessKind kind, std::uint8_t size = 0);
  [[nodiscard]] static Recorder* active();

 private:
  std::vector<std::span<std::byte>> parts_;
  std::vector<std::vector<std::byte>> shadows_;
  std::vector<Access> accesses_;
};

}  // namespace tandem::test
