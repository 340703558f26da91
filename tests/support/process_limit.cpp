// SPDX-License-Identifier: Apache-2.0
// prlimit(2) under another account.
#include "tests/support/process_limit.hpp"

#include <grp.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <string>

namespace tandem::test {

int set_soft_limit(pid_t pid, int resource, rlim_t value) {
  struct stat owner {};
  if (::stat(("/proc/" + std::to_string(pid)).c_str(), &owner) != 0) return errno;
  const auto which = static_cast<__rlimit_resource>(resource);
  const pid_t child = ::fork();
  if (child < 0) return errno;
  if (child == 0) {
    rlimit limits{};
    const bool set = ::setgroups(0, nullptr) == 0 && ::setresgid(owner.st_gid, owner.st_gid, owner.st_gid) == 0 &&
                     ::setresuid(owner.st_uid, owner.st_uid, owner.st_uid) == 0 &&
                     ::prlimit(pid, which, nullptr, &limits) == 0 && (limits.rlim_cur = value, true) &&
                     ::prlimit(pid, which, &limits, nullptr) == 0;
    ::_exit(set ? 0 : errno);
  }
  int status = 0;
  if (::waitpid(child, &status, 0) != child || !WIFEXITED(status)) return ECHILD;
  return WEXITSTATUS(status);
}

}  // namespace tandem::test
