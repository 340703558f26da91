// SPDX-License-Identifier: Apache-2.0
// SteppedProcess: a child whose chosen stretch of code runs one machine instruction at a time (ptrace(2)).
//
// The child calls stepped::pause() at the places where the parent takes over. Between two pauses the parent lets it
// either run, or step; after each step the child stands still and whatever it shares can be looked at. Dies with its
// parent.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>

namespace tandem::test {

namespace stepped {
/// In the child: stops until the parent goes on.
void pause();
}  // namespace stepped

class SteppedProcess {
 public:
  /// Forks; returns when the child is at its first pause.
  explicit SteppedProcess(const std::function<void()>& act);
  ~SteppedProcess();
  SteppedProcess(const SteppedProcess&) = delete;
  SteppedProcess& operator=(const SteppedProcess&) = delete;

  /// Runs freely to the next pause.
  void run();
  /// Steps to the next pause; `look` is called after every instruction. Returns their number.
  std::uint64_t step(const std::function<void()>& look);

 private:
  // True at a pause, false after a step; aborts if the child is gone.
  [[nodiscard]] bool wait() const;
  pid_t child_ = -1;
};

}  // namespace tandem::test
