// SPDX-License-Identifier: Apache-2.0
// Limits of a running process of another account.
#pragma once

#include <sys/resource.h>
#include <sys/types.h>

namespace tandem::test {

/// Sets the soft limit `resource` (RLIMIT_AS, ...) of process `pid` in the name of its own account, from a child: that
/// needs no CAP_SYS_RESOURCE (prlimit(2)). Returns 0, or the error.
int set_soft_limit(pid_t pid, int resource, rlim_t value);

}  // namespace tandem::test
