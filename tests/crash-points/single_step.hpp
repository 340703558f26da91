// SPDX-License-Identifier: Apache-2.0
// SteppedProcess: a child whose chosen stretch of code runs one machine instruction at a time (ptrace(2)).
//
// The child calls stepped::pause() at the places where the parent takes over. Between two pauses the parent lets it
// either run, or step; after each step the child stands still and whatever it shares can be looked at. Dies with its
// parent. Stepping only the instructions that can store is some ten times as fast, and misses nothing that is shared.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>

#include "tests/crash-points/store_traps.hpp"

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
  /// Steps to the next pause; `look` is called after every instruction, and is told whether that one could store.
  void step(const std::function<void(bool could_store)>& look);
  /// The same, `look` being called only after instructions that could store (store_traps.hpp).
  void step_stores(const std::function<void()>& look);

 private:
  // True at a pause, false at a trap; aborts if the child is gone.
  [[nodiscard]] bool go_on(int request);
  [[nodiscard]] bool wait() const;
  [[nodiscard]] std::uint64_t instruction() const;
  void set_instruction(std::uint64_t address);
  pid_t child_ = -1;
  std::unique_ptr<StoreTraps> traps_;
};

}  // namespace tandem::test
