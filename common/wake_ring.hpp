// SPDX-License-Identifier: Apache-2.0
// WakeRing: an heir's end of a BPF ring buffer used as a wake-up only. Needs neither libbpf nor the bpf() system call.
//
// A wake-up is a hint; the fence's slots decide. The rule that loses none: after epoll reports the ring, drain() it
// *first*, then read the slots. The fence marks the slot, then produces the record: a drain that swallows the record
// has acquired the producer position stored after the mark, so the slots read next show it. Layout
// (kernel/bpf/ringbuf.c): one page whose first word is the consumer position, writable; then, read-only, one page whose
// first word is the producer position, then the data. Both positions count bytes and only grow. One thread per ring.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

#include "common/mapping.hpp"
#include "common/result.hpp"
#include "common/unique_fd.hpp"

namespace tandem {

class WakeRing {
 public:
  WakeRing() noexcept = default;

  /// Takes the ring's fd (Fence::ring_fd()) and maps its positions.
  static Result<WakeRing> open(UniqueFd fd) {
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    auto consumer = Mapping::map(fd.get(), page, PROT_READ | PROT_WRITE, 0, "wake ring consumer page");
    if (!consumer) return tl::make_unexpected(std::move(consumer.error()));
    // The data pages are not looked at, so only the position's page is mapped.
    auto producer = Mapping::map(fd.get(), page, PROT_READ, static_cast<off_t>(page), "wake ring producer page");
    if (!producer) return tl::make_unexpected(std::move(producer.error()));
    if (::madvise(consumer->data(), page, MADV_DONTFORK) != 0 || ::madvise(producer->data(), page, MADV_DONTFORK) != 0)
      return fail_errno("keep the wake ring out of children");
    return WakeRing{std::move(fd), std::move(*consumer), std::move(*producer)};
  }

  /// Consumes everything produced so far, so that epoll sleeps until the next death. True if there was anything.
  bool drain() noexcept {
    const std::uint64_t produced = __atomic_load_n(position(producer_), __ATOMIC_ACQUIRE);
    if (__atomic_load_n(position(consumer_), __ATOMIC_RELAXED) == produced) return false;
    __atomic_store_n(position(consumer_), produced, __ATOMIC_RELEASE);
    return true;
  }

  /// For epoll: EPOLLIN while something is not drained (level triggered).
  [[nodiscard]] int fd() const noexcept { return fd_.get(); }

 private:
  WakeRing(UniqueFd fd, Mapping consumer, Mapping producer) noexcept
      : fd_(std::move(fd)), consumer_(std::move(consumer)), producer_(std::move(producer)) {}
  static std::uint64_t* position(const Mapping& page) noexcept { return reinterpret_cast<std::uint64_t*>(page.data()); }

  UniqueFd fd_;
  Mapping consumer_;
  Mapping producer_;
};

}  // namespace tandem
