// SPDX-License-Identifier: Apache-2.0
// The parent of `tandem-vault --supervise CMD`: keeps the vault and CMD (tandemd) running on hosts without systemd.
//
// It stays root, for it must start CMD as root, and does nothing but fork, wait and pass signals on: it reads no
// socket. It holds the vault's listening socket, so that an attach waits while a vault that died is replaced.
// Single-threaded; must be called before any thread exists.
#pragma once

#include <chrono>
#include <functional>

namespace tandem {

/// What follows from CMD's end: exit 0 ends everything, 126 and 127 (cannot be run) too, anything else restarts it.
enum class CommandEnd { kDone, kRestart, kCannotRun };
CommandEnd judge_command_end(int wait_status);

/// Pause before the next start: doubles from 100 ms to 5 s; a run of 10 s or more makes it 100 ms again.
std::chrono::milliseconds next_back_off(std::chrono::milliseconds previous, std::chrono::milliseconds ran_for);

/// Runs `vault` in a child (its return value is the exit status) and `command` (null-terminated, for execvp) in
/// another. SIGTERM or SIGINT stop CMD (SIGKILL after 30 s), then the vault. Returns the exit status for main().
int supervise(const std::function<int()>& vault, char* const* command);

}  // namespace tandem
