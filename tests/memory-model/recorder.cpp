// SPDX-License-Identifier: Apache-2.0
// The hooks that -fsanitize=thread calls, and what they record. This file is compiled without it.
#include "tests/memory-model/recorder.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace tandem::test {

namespace {
Recorder* recorder = nullptr;
constexpr std::size_t kUnit = 4;
}  // namespace

Recorder* Recorder::active() { return recorder; }

void Recorder::start(const std::vector<std::span<std::byte>>& parts) {
  parts_ = parts;
  shadows_.clear();
  for (const auto part : parts_) shadows_.emplace_back(part.begin(), part.end());
  accesses_.clear();
  recorder = this;
}

std::vector<Access> Recorder::stop() {
  settle(AccessKind::kPlainStore);
  recorder = nullptr;
  return std::move(accesses_);
}

// What changed since the last hook was stored by stores of this kind.
void Recorder::settle(AccessKind kind) {
  for (std::uint32_t n = 0; n < parts_.size(); ++n) {
    const auto part = parts_[n];
    auto& shadow = shadows_[n];
    if (std::memcmp(part.data(), shadow.data(), part.size()) == 0) continue;
    for (std::size_t at = 0; at < part.size(); at += kUnit) {
      const std::size_t size = std::min(kUnit, part.size() - at);
      std::size_t first = 0, last = size;
      while (first < size && part[at + first] == shadow[at + first]) ++first;
      while (last > first && part[at + last - 1] == shadow[at + last - 1]) --last;
      if (first == last) continue;
      Access access;
      access.kind = kind;
      access.part = n;
      access.offset = static_cast<std::uint32_t>(at + first);
      access.size = static_cast<std::uint8_t>(last - first);
      std::memcpy(access.bytes, part.data() + at + first, last - first);
      std::memcpy(shadow.data() + at + first, part.data() + at + first, last - first);
      accesses_.push_back(access);
    }
  }
}

void Recorder::note(AccessKind kind, std::uint8_t size) {
  settle(AccessKind::kPlainStore);
  Access access;
  access.kind = kind;
  access.size = size;
  accesses_.push_back(access);
}

namespace {

void before_access() {
  if (recorder != nullptr) recorder->settle(AccessKind::kPlainStore);
}

template <class T>
T load(const volatile T* from) {
  if (recorder != nullptr) recorder->note(AccessKind::kLoad, sizeof(T));
  return __atomic_load_n(from, __ATOMIC_SEQ_CST);
}

// The orders as GCC and the C++ library number them (__ATOMIC_RELAXED and so on).
template <class T>
void store(volatile T* to, T value, int order) {
  before_access();
  __atomic_store_n(to, value, __ATOMIC_SEQ_CST);
  if (recorder == nullptr) return;
  const bool release = order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
  recorder->settle(release ? AccessKind::kReleaseStore : AccessKind::kRelaxedStore);
}

}  // namespace

}  // namespace tandem::test

using namespace tandem::test;

// NOLINTBEGIN(bugprone-reserved-identifier): the names are the compiler's
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) { before_access(); }
void __tsan_func_exit() { before_access(); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define TANDEM_PLAIN(name) \
  void name(void*) { before_access(); }
TANDEM_PLAIN(__tsan_read1)
TANDEM_PLAIN(__tsan_read2)
TANDEM_PLAIN(__tsan_read4)
TANDEM_PLAIN(__tsan_read8)
TANDEM_PLAIN(__tsan_read16)
TANDEM_PLAIN(__tsan_write1)
TANDEM_PLAIN(__tsan_write2)
TANDEM_PLAIN(__tsan_write4)
TANDEM_PLAIN(__tsan_write8)
TANDEM_PLAIN(__tsan_write16)
TANDEM_PLAIN(__tsan_unaligned_read2)
TANDEM_PLAIN(__tsan_unaligned_read4)
TANDEM_PLAIN(__tsan_unaligned_read8)
TANDEM_PLAIN(__tsan_unaligned_write2)
TANDEM_PLAIN(__tsan_unaligned_write4)
TANDEM_PLAIN(__tsan_unaligned_write8)
#undef TANDEM_PLAIN
void __tsan_read_range(void*, unsigned long) { before_access(); }
void __tsan_write_range(void*, unsigned long) { before_access(); }

#define TANDEM_ATOMIC(bits, type)                                                                                  \
  type __tsan_atomic##bits##_load(const volatile type* from, int) { return load(from); }                           \
  void __tsan_atomic##bits##_store(volatile type* to, type value, int order) { store(to, value, order); }          \
  /* Read-modify-writes: none of the engine's stores between stage and disarm is one; taken as release stores. */  \
  type __tsan_atomic##bits##_fetch_add(volatile type* to, type value, int) {                                       \
    before_access();                                                                                               \
    const type before = __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);                                           \
    if (Recorder::active() != nullptr) Recorder::active()->settle(AccessKind::kReleaseStore);                      \
    return before;                                                                                                 \
  }                                                                                                                \
  type __tsan_atomic##bits##_exchange(volatile type* to, type value, int) {                                        \
    before_access();                                                                                               \
    const type before = __atomic_exchange_n(to, value, __ATOMIC_SEQ_CST);                                          \
    if (Recorder::active() != nullptr) Recorder::active()->settle(AccessKind::kReleaseStore);                      \
    return before;                                                                                                 \
  }                                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* to, type* expected, type value, int, int) {     \
    before_access();                                                                                               \
    const bool done = __atomic_compare_exchange_n(to, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    if (Recorder::active() != nullptr) Recorder::active()->settle(AccessKind::kReleaseStore);                      \
    return done ? 1 : 0;                                                                                           \
  }
TANDEM_ATOMIC(8, std::uint8_t)
TANDEM_ATOMIC(16, std::uint16_t)
TANDEM_ATOMIC(32, std::uint32_t)
TANDEM_ATOMIC(64, std::uint64_t)
#undef TANDEM_ATOMIC

void __tsan_atomic_thread_fence(int order) {
  // What is weaker than seq_cst orders no store against a later load; the engine has none, so there is no kind for it.
  if (Recorder::active() != nullptr && order == __ATOMIC_SEQ_CST) Recorder::active()->note(AccessKind::kFullFence);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}
void __tsan_atomic_signal_fence(int) {}
}
// NOLINTEND(bugprone-reserved-identifier)
