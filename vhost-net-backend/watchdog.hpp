// SPDX-License-Identifier: Apache-2.0
// Watchdog: how an heir notices that its owner lives but does not work (docs/fence.md, "Hangs").
//
// A dead man's switch: owner and heir share a timer descriptor. The owner pushes the timer ahead about every
// millisecond while its loop turns and makes progress; an owner that stands still lets it expire, and the expiry wakes
// the heir out of epoll. So watching costs the heir nothing, and the owner one system call a millisecond. The expiry is
// a question, not a verdict: the heir then looks at what the owner's thread is doing. A wrong verdict costs one
// failover, never correctness: the owner is killed through a pidfd, and only its death, seen by the fence, lets the
// heir take over.
#pragma once

#include <sched.h>
#include <sys/types.h>

#include <cstdint>

#include "common/layout/segment.hpp"
#include "common/unique_fd.hpp"

namespace tandem {

/// The owner's end. One thread.
class DeadManSwitch {
 public:
  DeadManSwitch() = default;
  explicit DeadManSwitch(UniqueFd timer) : timer_(std::move(timer)) {}
  /// From now the timer expires after `limit_ns`, unless pushed again.
  void push(std::uint64_t limit_ns) const;
  /// For the heir's epoll: readable once expired; drain() makes it silent until the next expiry.
  [[nodiscard]] int fd() const { return timer_.get(); }
  /// True if it had expired.
  bool drain() const;

 private:
  UniqueFd timer_;
};

/// What the kernel says of a thread, and how to judge it. Pure, so that every case is tested.
struct OwnerView {
  bool marked_asleep = false;
  bool work_pending = false;
  bool passes_work_by = false;       ///< went round its loop again and again with work pending, and moved nothing
  std::uint64_t still_ns = 0;        ///< since its last heartbeat
  std::uint64_t asleep_work_ns = 0;  ///< how long it has slept through pending work
  char state = '?';                  ///< proc(5)
  bool uses_cpu = false;             ///< its CPU time grew just now
  std::uint64_t spin_limit_ns = 0, blocked_limit_ns = 0;
};
/// Starved threads (runnable, no CPU) are left alone this long.
inline constexpr std::uint64_t kStarvedLimitNs = 1'000'000'000;
HangVerdict judge(const OwnerView& view);

/// What an heir remembers from look to look to tell a loop that turns without working.
class IdleRounds {
 public:
  /// `beat` changes once a round; `moved` whenever anything has crossed. True once so many rounds began with work
  /// pending and moved nothing that the work cannot have come too late for all of them.
  bool look(bool work_pending, std::uint64_t beat, std::uint64_t moved) {
    if (!work_pending || !watching_ || moved != moved_) {
      watching_ = work_pending;
      moved_ = moved;
      rounds_ = 0;
    } else if (beat != beat_) {
      ++rounds_;
    }
    beat_ = beat;
    return rounds_ >= kRounds;
  }
  [[nodiscard]] bool suspicious() const { return watching_; }

 private:
  // Two would do: between two new heartbeats lies a whole round. A nap beats once more without one.
  static constexpr unsigned kRounds = 4;
  bool watching_ = false;
  std::uint64_t beat_ = 0, moved_ = 0;
  unsigned rounds_ = 0;
};

/// The heir's end: the one thread that it watches while that owns the shard.
class Watchdog {
 public:
  Watchdog() = default;
  /// `pidfd` of process `pid`, whose thread `tid` is incarnation `tag`.
  Watchdog(UniqueFd pidfd, pid_t pid, pid_t tid, std::uint32_t tag)
      : pidfd_(std::move(pidfd)), pid_(pid), tid_(tid), tag_(tag) {}
  explicit operator bool() const { return static_cast<bool>(pidfd_); }
  [[nodiscard]] std::uint32_t tag() const { return tag_; }

  /// Thread state letter and whether it uses CPU; takes some hundred microseconds for a runnable thread.
  void look(OwnerView& view) const;
  /// SIGKILL. The fence says when it is dead.
  void kill() const;
  /// Once the fence has said so: it is to leave on one of `cpus`, out of the caller's way. Nothing happens if it has
  /// gone.
  void put_aside(const cpu_set_t& cpus) const;

 private:
  UniqueFd pidfd_;
  pid_t pid_ = 0;
  pid_t tid_ = 0;
  std::uint32_t tag_ = 0;
};

}  // namespace tandem
