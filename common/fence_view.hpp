// SPDX-License-Identifier: Apache-2.0
// FenceView: the fence's slots as a reader sees them, mapped read-only. Needs neither libbpf nor the bpf() system call.
//
// Any thread may read at any time; nothing here blocks or enters the kernel after map(). The slots are written by BPF
// programs only (layout/fence_slot.h), and a store through this mapping is a fault.
#pragma once

#include <sys/mman.h>

#include <cstdint>

#include "common/layout/fence_slot.h"
#include "common/mapping.hpp"
#include "common/result.hpp"

namespace tandem {

class FenceView {
 public:
  FenceView() noexcept = default;

  /// Maps the slots from `fd` (Fence::slots_fd()), which stays the caller's and may be closed afterwards.
  static Result<FenceView> map(int fd) {
    auto mapping = Mapping::map(fd, kBytes, PROT_READ, 0, "fence slots");
    if (!mapping) return tl::make_unexpected(std::move(mapping.error()));
    // A child of a backend must not keep a view (backends do not fork; this is the second lock on that door).
    if (::madvise(mapping->data(), kBytes, MADV_DONTFORK) != 0) return fail_errno("keep fence slots out of children");
    return FenceView{std::move(*mapping)};
  }

  /// True once incarnation `tag` can never run user code again; every store it made is then visible to the caller
  /// (acquire, pairs with the BPF program's exchange). Tag 0 is nobody, and dead.
  [[nodiscard]] bool dead(std::uint64_t tag) const noexcept {
    return tag == 0 || __atomic_load_n(&at(tag).tag, __ATOMIC_ACQUIRE) == tag;
  }

  /// What the fence recorded of a dead incarnation; all zero (cause TANDEM_FENCE_ALIVE) for one that lives, and for tag
  /// 0.
  [[nodiscard]] tandem_fence_slot slot(std::uint64_t tag) const noexcept {
    return tag != 0 && dead(tag) ? at(tag) : tandem_fence_slot{};
  }

 private:
  static constexpr std::size_t kBytes = TANDEM_FENCE_SLOTS * sizeof(tandem_fence_slot);

  explicit FenceView(Mapping mapping) noexcept : mapping_(std::move(mapping)) {}
  [[nodiscard]] const tandem_fence_slot& at(std::uint64_t tag) const noexcept {
    return reinterpret_cast<const tandem_fence_slot*>(mapping_.data())[tag % TANDEM_FENCE_SLOTS];
  }

  Mapping mapping_;
};

}  // namespace tandem
