// SPDX-License-Identifier: Apache-2.0
// Descriptors of every kind that somebody may attach to a message.
#pragma once

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <string>
#include <vector>

#include "common/unique_fd.hpp"
#include "tests/fuzz/targets/input.hpp"

namespace tandem::fuzz {

inline constexpr std::uint64_t kGuestMemoryBytes = 8u << 20;

enum FdChoice : std::uint8_t {
  kGuestMemory,
  kEvent,
  kOtherEvent,
  kSmallMemory,
  kReadOnlyMemory,
  kSealedMemory,
  kShrinkingMemory,
  kPipe,
  kSocketEnd,
  kListener,
  kTimer,
  kEpoll,
  kDevNull,
  kNothing,  ///< no descriptor where one should be
  kFdChoices
};

/// One of each, made once.
class Descriptors {
 public:
  Descriptors() {
    fds_[kGuestMemory] = memory("fuzz-guest", kGuestMemoryBytes);
    fds_[kEvent] = UniqueFd{::eventfd(0, EFD_CLOEXEC)};
    fds_[kOtherEvent] = UniqueFd{::eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE)};
    fds_[kSmallMemory] = memory("fuzz-small", 4096);
    fds_[kReadOnlyMemory] =
        UniqueFd{::open(("/proc/self/fd/" + std::to_string(fds_[kGuestMemory].get())).c_str(), O_RDONLY | O_CLOEXEC)};
    fds_[kSealedMemory] = memory("fuzz-sealed", kGuestMemoryBytes);
    ::fcntl(fds_[kSealedMemory].get(), F_ADD_SEALS, F_SEAL_WRITE);
    fds_[kShrinkingMemory] = memory("fuzz-shrinking", 16384);
    int ends[2] = {-1, -1};
    if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0) {
      fds_[kPipe] = UniqueFd{ends[0]};
      others_.emplace_back(ends[1]);
    }
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0) {
      fds_[kSocketEnd] = UniqueFd{ends[0]};
      others_.emplace_back(ends[1]);
    }
    fds_[kListener] = UniqueFd{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
    ::listen(fds_[kListener].get(), 1);
    fds_[kTimer] = UniqueFd{::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)};
    fds_[kEpoll] = UniqueFd{::epoll_create1(EPOLL_CLOEXEC)};
    fds_[kDevNull] = UniqueFd{::open("/dev/null", O_RDWR | O_CLOEXEC)};
  }

  [[nodiscard]] int get(std::uint8_t choice) const { return fds_[choice % kFdChoices].get(); }
  [[nodiscard]] UniqueFd copy(std::uint8_t choice) const {
    return get(choice) < 0 ? UniqueFd{} : fds_[choice % kFdChoices].duplicate();
  }
  [[nodiscard]] std::vector<UniqueFd> copies(std::span<const std::byte> choices) const {
    std::vector<UniqueFd> result;
    for (const std::byte choice : choices) result.push_back(copy(std::to_integer<std::uint8_t>(choice)));
    return result;
  }

 private:
  static UniqueFd memory(const char* name, std::uint64_t bytes) {
    UniqueFd fd{::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING)};
    must_hold(fd && ::ftruncate(fd.get(), static_cast<off_t>(bytes)) == 0, "a memfd can be made");
    return fd;
  }

  std::array<UniqueFd, kFdChoices> fds_;
  std::vector<UniqueFd> others_;
};

}  // namespace tandem::fuzz
