// SPDX-License-Identifier: Apache-2.0
// Member: one backend process of a pair, from the supervisor's side: spawn, talk, watch, kill.
//
// Owns the process's pidfd and the control channel's end. Destroying a Member kills nothing: call kill() and wait for
// exit first.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "common/fd_channel.hpp"
#include "common/layout/control_message.hpp"
#include "common/result.hpp"
#include "common/unique_fd.hpp"
#include "recovery/supervisor/config.hpp"
#include "recovery/supervisor/event_loop.hpp"

namespace tandem {

/// How a process ended.
struct ExitStatus {
  int signal = 0;  ///< 0 if it exited by itself
  int status = 0;
  bool known = true;  ///< false for a process that another supervisor started
};

class Member {
  // First, so that they close last: the vault holds the same open files, and an event source whose descriptor is closed
  // but whose file is not would go on to fire.
  pid_t pid_ = -1;
  UniqueFd pidfd_;
  FdChannel channel_;

 public:
  /// Executes tandem-backend as the configured user: no capabilities, no_new_privs, nothing inherited but the channel.
  static Result<Member> spawn(const Config& config, const std::string& backend_path, bool hugepages);

  /// A process that a dead supervisor started; its exit status will not be known here.
  static Member adopt(pid_t pid, UniqueFd pidfd, UniqueFd channel);

  Member(Member&&) = default;
  Member& operator=(Member&&) = delete;

  [[nodiscard]] pid_t pid() const { return pid_; }
  [[nodiscard]] int pidfd() const { return pidfd_.get(); }
  FdChannel& channel() { return channel_; }

  template <class Body>
  Status send(ControlType type, const Body& body, std::span<const int> fds = {}, std::span<const std::byte> more = {}) {
    return send_bytes(type, std::as_bytes(std::span(&body, 1)), more, fds);
  }
  /// SIGKILL through the pidfd.
  void kill() const;
  /// State letter of a thread of its (proc(5)), or 'X' if that is gone.
  [[nodiscard]] char thread_state(pid_t tid) const;
  /// Whether no thread of it runs or waits for a CPU, or is on its way through the kernel: such are starved, not hung.
  [[nodiscard]] bool stands_still() const;
  /// After the pidfd became readable.
  ExitStatus reap();

  enum class Stage { kStarting, kReady, kArmed, kOwner, kDead } stage = Stage::kStarting;
  std::vector<pid_t> threads;                   ///< poll threads' tids, one per shard
  std::vector<std::uint32_t> tags;              ///< their fence tags
  std::vector<std::uint32_t> rings;             ///< their wake rings
  std::map<std::uint32_t, std::uint64_t> held;  ///< newest generation held, by device
  /// It has held, at one time since it was armed, what was in force for every device: from then on it is told of
  /// changes before the owner is. An heir that has not caught up takes over late, once it has.
  bool caught_up = false;
  std::uint64_t spawned_ns = 0;
  bool adopted = false;               ///< started by a supervisor before this one
  std::uint32_t reported_shards = 0;  ///< a bit for each shard of which it has said, as an heir, that it took it over
  bool dead_at_adoption = false;      ///< its heir's report, which names it, may be on its way to this supervisor
  std::uint64_t heir_since_ns = 0;
  std::uint64_t ended_as_hung_ns = 0;  ///< 0: it was not
  EventLoop::Source on_message, on_exit;
  EventLoop::Timer start_limit;  ///< a member that does not become ready is ended

 private:
  Member() = default;
  Status send_bytes(ControlType type, std::span<const std::byte> body, std::span<const std::byte> more,
                    std::span<const int> fds);
};

}  // namespace tandem
