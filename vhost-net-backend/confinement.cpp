// SPDX-License-Identifier: Apache-2.0
// seccomp deny list and privilege checks of a backend.
#include "vhost-net-backend/confinement.hpp"

#include <linux/capability.h>
#include <seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>

namespace tandem {

Status confine_backend() {
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return fail_errno("confine the backend: set no_new_privs");
  const std::unique_ptr<void, void (*)(void*)> filter(::seccomp_init(SCMP_ACT_ALLOW), ::seccomp_release);
  if (!filter) return fail(ErrorKind::kSystem, "confine the backend: no memory for the system call filter");
  ::seccomp_attr_set(filter.get(), SCMP_FLTATR_CTL_TSYNC, 1);
  // A deny list, because DPDK's own needs change with its release: what must never happen is named here.
  for (const int call : {SCMP_SYS(fork), SCMP_SYS(vfork), SCMP_SYS(clone), SCMP_SYS(clone3), SCMP_SYS(execve),
                         SCMP_SYS(execveat), SCMP_SYS(bpf), SCMP_SYS(ptrace), SCMP_SYS(process_vm_writev),
                         SCMP_SYS(mount), SCMP_SYS(umount2), SCMP_SYS(init_module), SCMP_SYS(finit_module),
                         SCMP_SYS(setns), SCMP_SYS(unshare), SCMP_SYS(userfaultfd), SCMP_SYS(perf_event_open)}) {
    const int added = ::seccomp_rule_add(filter.get(), SCMP_ACT_ERRNO(EPERM), call, 0);
    if (added != 0 && added != -EDOM) return fail_errno("confine the backend: forbid a system call", {}, -added);
  }
  if (const int loaded = ::seccomp_load(filter.get()); loaded != 0)
    return fail_errno("confine the backend: load the system call filter", "the kernel needs CONFIG_SECCOMP_FILTER",
                      -loaded);
  return {};
}

Status check_unprivileged(bool allow_root) {
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2]{};
  if (::syscall(SYS_capget, &header, data) != 0) return fail_errno("read the backend's capabilities");
  if (!allow_root && (data[0].effective | data[1].effective) != 0)
    return fail(ErrorKind::kInvalid,
                "start backend: it still has capabilities; start it as an unprivileged user (tandemd does), or give "
                "--allow-root for a test");
  return {};
}

}  // namespace tandem
