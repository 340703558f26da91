// SPDX-License-Identifier: Apache-2.0
// What the vault gives up before it serves: root, new privileges, core dumps, ptrace by its peers, most system calls.
#pragma once

#include <sys/types.h>

#include <string>

#include "common/result.hpp"

namespace tandem {

/// Whom the vault becomes. Give it a user of its own: whoever shares its uid may attach to it.
struct VaultUser {
  uid_t uid = 0;
  gid_t gid = 0;
};

/// Looks up `name`. kInvalid: no such user.
Result<VaultUser> find_vault_user(const std::string& name);

/// Raises the descriptor limit (needs root to go beyond the hard limit; what the kernel allows is taken). Before
/// drop_privileges().
void raise_descriptor_limit();

/// Becomes `user` for good: supplementary groups, gids, uids, then no_new_privs, not dumpable.
Status drop_privileges(const VaultUser& user);

/// no_new_privs, not dumpable (so no ptrace and no pidfd_getfd from a process of the same uid), no core files.
Status forbid_gains();

/// Lets through only what the vault's loop calls; the rest fails with EPERM. It does not kill: the vault's death costs
/// every guest a reconnect. Sanitized builds go without, for their runtimes call more.
Status restrict_system_calls();

}  // namespace tandem
