// SPDX-License-Identifier: Apache-2.0
// Lets a stepped child run at full speed between the instructions that can change what it shares.
//
// Only an instruction that stores outside its own stack frame, or a system call, can change memory that others see.
// What the child executes is decoded as it is reached (Zydis), and a breakpoint (int3) stands at each instruction that
// can store and at each that is not known yet, so that nothing executes unseen: a branch to unknown code traps at its
// first instruction. Indirect jumps, indirect calls and returns trap too, for where they lead is not in their bytes.
//
// "Its own stack frame": an operand whose address is RSP and a displacement. That no such store reaches shared memory,
// nor any instruction taken for harmless, is not taken on trust: whoever steps every instruction can compare
// (CrashTrial does, for every owner).
//
// x86-64. The child is a fork of this process whose code has not changed since, so that its code can be read here.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <unordered_map>

#include "common/unique_fd.hpp"

namespace tandem::test {

/// True if the instruction at `address`, in this process, can change memory outside its stack frame. Aborts if there is
/// none.
bool can_store(std::uint64_t address);

/// Breakpoints in one ptrace-stopped child. Not thread-safe. All calls: while the child stands still; aborts if ptrace
/// refuses.
class StoreTraps {
 public:
  explicit StoreTraps(pid_t child);

  /// Puts in place what lift() took away.
  void plant();
  void lift();

  /// How the child is to go on from the instruction at `address`.
  enum class Pace {
    kRun,   ///< PTRACE_CONT: a breakpoint stands before whatever must be seen
    kStep,  ///< this one has to be stepped over: its breakpoint is lifted; rearm() after the step
    kLook,  ///< as kStep, and it can store
  };
  Pace reach(std::uint64_t address);
  void rearm(std::uint64_t address);
  /// Whether a breakpoint of ours stands at `address`.
  [[nodiscard]] bool trapped(std::uint64_t address) const;

 private:
  enum class Kind : std::uint8_t { kUnknown, kPlain, kLeads, kStores };

  /// Decodes from `address` to the end of its straight line.
  void explore(std::uint64_t address);
  /// A place from which execution may go on: trapped until it is reached.
  void expect(std::uint64_t address);
  void settle(std::uint64_t address, Kind kind);
  void write(std::uint64_t address, std::uint8_t byte) const;

  UniqueFd memory_;  // /proc/PID/mem
  std::unordered_map<std::uint64_t, Kind> places_;
  bool planted_ = true;
};

}  // namespace tandem::test
