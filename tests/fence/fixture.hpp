// SPDX-License-Identifier: Apache-2.0
// What every fence test needs: a loaded fence in a private mount namespace, and victims: processes whose threads die on
// demand.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <functional>
#include <memory>
#include <new>

#include "recovery/fence/fence.hpp"
#include "tests/support/skip.hpp"

namespace tandem::test {

/// Failsafe only: every wait is for an event that comes at once or never.
inline bool wait_until(const std::function<bool()>& event) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds{20};
  while (!event()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    ::sched_yield();
  }
  return true;
}

/// An object in memory shared with children that are forked later.
template <class T>
class Shared {
 public:
  Shared() : object_(new (::mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) T{}) {}
  ~Shared() { ::munmap(object_, sizeof(T)); }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  T* operator->() const noexcept { return object_; }
  T& operator*() const noexcept { return *object_; }

 private:
  T* object_;
};

/// A child process running `body`, killed and reaped at the latest when this object goes. The test's signal handlers
/// (Catch2's) are undone in it, and it dumps no core.
class Child {
 public:
  explicit Child(const std::function<void()>& body) : pid_(::fork()) {
    if (pid_ != 0) return;
    for (int number = 1; number < NSIG; ++number) ::signal(number, SIG_DFL);
    const rlimit none{0, 0};
    ::setrlimit(RLIMIT_CORE, &none);
    body();
    ::_exit(0);
  }
  ~Child() {
    kill(SIGKILL);
    reap();
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  void kill(int number) const {
    if (pid_ > 0) ::kill(pid_, number);
  }
  /// Wait status of the child; 0 if it was reaped before.
  int reap() {
    int status = 0;
    if (pid_ > 0) ::waitpid(std::exchange(pid_, -1), &status, 0);
    return status;
  }
  [[nodiscard]] pid_t pid() const noexcept { return pid_; }

 private:
  pid_t pid_;
};

inline pid_t own_tid() { return static_cast<pid_t>(::syscall(SYS_gettid)); }

/// Why the fence cannot be tested here; empty if it can. Gives the process its own /sys/fs/bpf, so that nothing stays
/// behind.
inline std::string prepare_host() {
  static const std::string reason = []() -> std::string {
    if (::geteuid() != 0) return "needs root for BPF and mounts";
    if (::unshare(CLONE_NEWNS) != 0) return "needs a private mount namespace (CAP_SYS_ADMIN)";
    ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
    if (::mount("bpf", "/sys/fs/bpf", "bpf", 0, nullptr) != 0) return "needs a kernel with bpffs";
    if (::access("/sys/kernel/btf/vmlinux", R_OK) != 0) return "needs a kernel with BTF (CONFIG_DEBUG_INFO_BTF)";
    return {};
  }();
  return reason;
}

inline const std::string kPinDir = "/sys/fs/bpf/tandem/test";

inline Fence load_fence() {
  auto fence = Fence::load(kPinDir);
  if (!fence) FAIL(fence.error().text);
  return std::move(*fence);
}

}  // namespace tandem::test

#define REQUIRE_OK(expression)                  \
  do {                                          \
    const auto& outcome_ = (expression);        \
    if (!outcome_) FAIL(outcome_.error().text); \
  } while (false)

#define SKIP_UNLESS_FENCE()                                   \
  do {                                                        \
    const std::string reason_ = tandem::test::prepare_host(); \
    if (!reason_.empty()) TANDEM_SKIP(reason_);               \
  } while (false)
