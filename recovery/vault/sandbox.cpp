// SPDX-License-Identifier: Apache-2.0
// Dropping privileges and the system call allowlist.
#include "recovery/vault/sandbox.hpp"

#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <memory>

namespace tandem {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

constexpr rlim_t kDescriptorLimit = 1u << 20;

// The loop: epoll, accept, messages, checks on sockets, stderr, signalfd. The end: the socket's path, exit, abort. The
// C library: heap, time, signals.
constexpr int kAllowed[] = {
    SCMP_SYS(epoll_wait),   SCMP_SYS(epoll_pwait),  SCMP_SYS(epoll_ctl),      SCMP_SYS(poll),
    SCMP_SYS(ppoll),        SCMP_SYS(accept4),      SCMP_SYS(recvmsg),        SCMP_SYS(sendmsg),
    SCMP_SYS(getsockopt),   SCMP_SYS(read),         SCMP_SYS(write),          SCMP_SYS(close),
    SCMP_SYS(unlink),       SCMP_SYS(geteuid),      SCMP_SYS(exit),           SCMP_SYS(exit_group),
    SCMP_SYS(rt_sigreturn), SCMP_SYS(rt_sigaction), SCMP_SYS(rt_sigprocmask), SCMP_SYS(restart_syscall),
    SCMP_SYS(brk),          SCMP_SYS(munmap),       SCMP_SYS(mremap),         SCMP_SYS(madvise),
    SCMP_SYS(futex),        SCMP_SYS(getrandom),    SCMP_SYS(clock_gettime),  SCMP_SYS(gettid),
    SCMP_SYS(getpid),       SCMP_SYS(tgkill),       SCMP_SYS(unlinkat),
};

int add_rules(scmp_filter_ctx filter) {
  int failed = 0;
  for (const int call : kAllowed) failed = failed != 0 ? failed : seccomp_rule_add(filter, SCMP_ACT_ALLOW, call, 0);
  // Memory, never executable.
  for (const int call : {SCMP_SYS(mmap), SCMP_SYS(mprotect)})
    if (failed == 0)
      failed = seccomp_rule_add(filter, SCMP_ACT_ALLOW, call, 1, SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0));
  for (const int command : {F_GETFL, F_SETFL})
    if (failed == 0)
      failed = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(fcntl), 1,
                                SCMP_A1(SCMP_CMP_EQ, static_cast<scmp_datum_t>(command)));
  return failed;
}

}  // namespace

Result<VaultUser> find_vault_user(const std::string& name) {
  errno = 0;
  const passwd* entry = ::getpwnam(name.c_str());
  if (entry == nullptr)
    return fail(ErrorKind::kInvalid,
                "run the vault as " + name + ": no such user; create it, or name another with --user");
  return VaultUser{entry->pw_uid, entry->pw_gid};
}

void raise_descriptor_limit() {
  rlimit limit{kDescriptorLimit, kDescriptorLimit};
  if (::setrlimit(RLIMIT_NOFILE, &limit) == 0 || ::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

Status drop_privileges(const VaultUser& user) {
  if (::setgroups(0, nullptr) != 0 || ::setresgid(user.gid, user.gid, user.gid) != 0 ||
      ::setresuid(user.uid, user.uid, user.uid) != 0)
    return fail_errno("become user " + std::to_string(user.uid), "start the vault as root, or without --user");
  if (user.uid != 0 && ::setresuid(0, 0, 0) == 0)
    return fail(ErrorKind::kSystem,
                "become user " + std::to_string(user.uid) + ": root can be regained; refusing to run");
  return {};
}

Status forbid_gains() {
  const rlimit none{0, 0};
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || ::prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0 ||
      ::setrlimit(RLIMIT_CORE, &none) != 0)
    return fail_errno("forbid the vault to gain privileges");
  return {};
}

Status restrict_system_calls() {
  if (kSanitized) return {};
  const std::unique_ptr<void, decltype(&seccomp_release)> filter{seccomp_init(SCMP_ACT_ERRNO(EPERM)), &seccomp_release};
  if (!filter) return fail(ErrorKind::kSystem, "restrict system calls: no memory for the filter");
  int failed = add_rules(filter.get());
  if (failed == 0) failed = seccomp_load(filter.get());
  if (failed != 0) return fail_errno("restrict system calls", "the kernel needs CONFIG_SECCOMP_FILTER", -failed);
  return {};
}

}  // namespace tandem
