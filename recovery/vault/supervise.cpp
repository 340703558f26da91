// SPDX-License-Identifier: Apache-2.0
// fork, wait, restart, pass on SIGTERM.
#include "recovery/vault/supervise.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <optional>
#include <string>

#include "recovery/vault/log.hpp"

namespace tandem {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kFirstBackOff{100};
constexpr milliseconds kLongestBackOff{5000};
constexpr milliseconds kHealthyRun{10000};
constexpr milliseconds kStopLimit{30000};
constexpr int kCannotRunStatus = 127;

sigset_t handled_signals() {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGTERM, SIGINT, SIGCHLD}) sigaddset(&set, signal);
  return set;
}

std::string describe(int status) {
  if (WIFSIGNALED(status)) return std::string{"killed by "} + ::strsignal(WTERMSIG(status));
  return "exit status " + std::to_string(WEXITSTATUS(status));
}

/// One supervised process and when it may be started again.
class Child {
 public:
  Child(const char* title, std::function<int()> body) : title_(title), body_(std::move(body)) {}

  [[nodiscard]] bool running() const { return pid_ > 0; }
  [[nodiscard]] pid_t pid() const { return pid_; }
  [[nodiscard]] std::optional<Clock::time_point> due() const { return running() ? std::nullopt : restart_at_; }

  void start(const sigset_t& mask) {
    restart_at_.reset();
    started_ = Clock::now();
    pid_ = ::fork();
    if (pid_ == 0) {
      ::sigprocmask(SIG_SETMASK, &mask, nullptr);
      ::_exit(body_());
    }
    if (pid_ < 0) {
      vault_log(std::string{"start "} + title_ + ": " + std::strerror(errno));
      schedule();
    }
  }
  void send(int signal) const {
    if (running()) ::kill(pid_, signal);
  }
  /// It has ended with `status`.
  void ended(int status) {
    pid_ = -1;
    vault_log(std::string{title_} + " ended: " + describe(status));
  }
  void schedule() {
    back_off_ = next_back_off(back_off_, std::chrono::duration_cast<milliseconds>(Clock::now() - started_));
    restart_at_ = Clock::now() + back_off_;
  }

 private:
  const char* title_;
  std::function<int()> body_;
  pid_t pid_ = -1;
  Clock::time_point started_;
  milliseconds back_off_{0};
  std::optional<Clock::time_point> restart_at_;
};

class Supervisor {
 public:
  Supervisor(const std::function<int()>& vault, char* const* command)
      : vault_("the vault",
               [vault] {
                 ::setsid();  // Ctrl-C is for the parent: the vault goes last
                 return vault();
               }),
        command_(command[0], [command] {
          ::execvp(command[0], command);
          vault_log(std::string{"run "} + command[0] + ": " + std::strerror(errno));
          return kCannotRunStatus;
        }) {}

  int run() {
    const sigset_t signals = handled_signals();
    ::sigprocmask(SIG_BLOCK, &signals, &outer_mask_);
    start(vault_);
    start(command_);
    while (!stopping_ || vault_.running() || command_.running()) {
      const timespec limit = time_left();
      const int signal = ::sigtimedwait(&signals, nullptr, &limit);
      if (signal == SIGTERM || signal == SIGINT) stop(0);
      reap();
      start_due();
    }
    return status_;
  }

 private:
  /// Ends CMD first; the vault when CMD is gone.
  void stop(int status) {
    if (!stopping_) {
      stopping_ = true;
      status_ = status;
      kill_at_ = Clock::now() + kStopLimit;
      command_.send(SIGTERM);
    }
    if (!command_.running()) vault_.send(SIGTERM);
  }

  void reap() {
    int status = 0;
    for (pid_t pid = ::waitpid(-1, &status, WNOHANG); pid > 0; pid = ::waitpid(-1, &status, WNOHANG)) {
      if (pid == vault_.pid()) {
        vault_.ended(status);
        if (!stopping_) vault_.schedule();
      } else if (pid == command_.pid()) {
        command_.ended(status);
        command_ended(judge_command_end(status));
      }
    }
  }

  void command_ended(CommandEnd end) {
    if (stopping_) return vault_.send(SIGTERM);
    if (end == CommandEnd::kRestart) return command_.schedule();
    stop(end == CommandEnd::kDone ? 0 : kCannotRunStatus);
  }

  void start_due() {
    const auto now = Clock::now();
    if (stopping_) {
      if (now >= kill_at_) command_.send(SIGKILL);
      return;
    }
    for (Child* child : {&vault_, &command_})
      if (const auto due = child->due(); due && *due <= now) start(*child);
  }

  /// The vault begins with these signals blocked: it takes them from a descriptor, however early they come.
  void start(Child& child) { child.start(&child == &vault_ ? handled_signals() : outer_mask_); }

  [[nodiscard]] timespec time_left() const {
    auto next = Clock::now() + std::chrono::hours{1};
    if (stopping_)
      next = std::min(next, kill_at_);
    else
      for (const Child* child : {&vault_, &command_})
        if (const auto due = child->due()) next = std::min(next, *due);
    const auto left = std::max<std::int64_t>(1, std::chrono::ceil<milliseconds>(next - Clock::now()).count());
    return {left / 1000, left % 1000 * 1000000};
  }

  sigset_t outer_mask_{};
  Child vault_;
  Child command_;
  bool stopping_ = false;
  int status_ = 0;
  Clock::time_point kill_at_;
};

}  // namespace

CommandEnd judge_command_end(int wait_status) {
  if (!WIFEXITED(wait_status)) return CommandEnd::kRestart;
  const int status = WEXITSTATUS(wait_status);
  if (status == 126 || status == kCannotRunStatus) return CommandEnd::kCannotRun;
  return status == 0 ? CommandEnd::kDone : CommandEnd::kRestart;
}

milliseconds next_back_off(milliseconds previous, milliseconds ran_for) {
  if (ran_for >= kHealthyRun || previous < kFirstBackOff) return kFirstBackOff;
  return std::min(previous * 2, kLongestBackOff);
}

int supervise(const std::function<int()>& vault, char* const* command) { return Supervisor{vault, command}.run(); }

}  // namespace tandem
