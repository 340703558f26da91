// SPDX-License-Identifier: Apache-2.0
// Confinement: what a backend gives up before it touches a guest's memory.
#pragma once

#include "common/result.hpp"

namespace tandem {

/// For the whole process, all threads: no new privileges; fork, vfork, clone, exec, bpf, ptrace, mount and module calls
/// answer EPERM (no child may keep a mapping, nobody may forge a death: docs/fence.md). Call after EAL and all threads
/// have started.
Status confine_backend();

/// Threads and capabilities that must be gone: fails if the process still has effective capabilities and `allow_root`
/// is false.
Status check_unprivileged(bool allow_root);

}  // namespace tandem
