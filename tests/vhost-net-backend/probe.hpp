// SPDX-License-Identifier: Apache-2.0
// Kills this process at a chosen visit of a probe point of the engine.
#pragma once

#include <sys/types.h>

#include <functional>

#include "vhost-net-backend/probe.hpp"

namespace tandem::test {

/// SIGKILL at the `visit`-th time (from 1) that this process comes to `point` from now on.
void die_at(ProbePoint point, int visit);

/// Forks a child that runs `act` and leaves. True if SIGKILL ended it, false if it came to its end; anything else
/// aborts.
bool killed(const std::function<void()>& act);

/// The same with an act that may end in other ways: its status, or 128 and the signal that ended it.
int status_of(const std::function<int()>& act);

/// For a child in killed(): stops itself until its parent says resume(); and the parent's two halves.
void wait_for_parent();
pid_t start(const std::function<void()>& act);  ///< forks a child; returns when it has stopped in wait_for_parent(); 0:
                                                ///< SIGKILL ended it before
bool resume(pid_t child);                       ///< goes on, waits for its end; as killed()

const char* name(ProbePoint point);

}  // namespace tandem::test
