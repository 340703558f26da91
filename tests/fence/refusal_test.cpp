// SPDX-License-Identifier: Apache-2.0
// Hosts on which the fence cannot be: each is refused with a sentence that says what to do. Children play those hosts:
// an old kernel through personality(2), no BPF through a system call filter, the rest through namespaces.
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cerrno>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "recovery/fence/fence.hpp"
#include "tests/support/skip.hpp"

using namespace tandem;

namespace {

constexpr int kCannotPlay = 77;

// bpf() fails with `error`, as in a kernel without it (ENOSYS) or in a container (EPERM).
bool forbid_bpf(unsigned error) {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_bpf, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{4, program};
  return ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

bool hide(const char* path) {
  return ::unshare(CLONE_NEWNS) == 0 && ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         ::mount("none", path, "tmpfs", 0, nullptr) == 0;
}

// What Fence::load() says in a child that `play` turned into another host; empty if the fence could be loaded.
std::string refusal(const std::function<bool()>& play, bool in_grandchild, bool& played) {
  int ends[2] = {-1, -1};
  REQUIRE(::pipe(ends) == 0);
  const pid_t child = ::fork();
  if (child == 0) {
    if (!play()) ::_exit(kCannotPlay);
    const pid_t inner = in_grandchild ? ::fork() : 0;  // a new pid namespace begins with the next child
    if (inner == 0) {
      const auto fence = Fence::load("/sys/fs/bpf/tandem-refusal-" + std::to_string(::getpid()));
      const std::string text = fence ? std::string{} : fence.error().text;
      [[maybe_unused]] const ssize_t written = ::write(ends[1], text.data(), std::min<std::size_t>(text.size(), 4096));
      ::_exit(0);
    }
    int status = 0;
    ::waitpid(inner, &status, 0);
    ::_exit(0);
  }
  ::close(ends[1]);
  std::string text(4096, '\0');
  const ssize_t got = ::read(ends[0], text.data(), text.size());
  text.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
  ::close(ends[0]);
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  played = !(WIFEXITED(status) && WEXITSTATUS(status) == kCannotPlay);
  return text;
}

}  // namespace

TEST_CASE("hosts that cannot have a fence are refused with a remedy") {
  if (::geteuid() != 0) TANDEM_SKIP("not root: other hosts are played with namespaces and system call filters");
  struct Row {
    const char* host;
    std::function<bool()> play;
    bool in_grandchild;
    std::vector<std::string> says;
  };
  const std::vector<Row> rows{
      {"a kernel before 6.4", [] { return ::personality(UNAME26) >= 0; }, false, {"too old", "6.4", "backports"}},
      {"a kernel without bpf()", [] { return forbid_bpf(ENOSYS); }, false, {"no bpf()", "CONFIG_BPF_SYSCALL"}},
      {"a container that forbids bpf()", [] { return forbid_bpf(EPERM); }, false, {"outside containers", "CAP_BPF"}},
      {"a kernel without type information", [] { return hide("/sys/kernel/btf"); }, false, {"CONFIG_DEBUG_INFO_BTF"}},
      {"another pid namespace", [] { return ::unshare(CLONE_NEWPID) == 0; }, true, {"pid namespace", "on the host"}},
      {"no root", [] { return ::setresuid(65534, 65534, 65534) == 0; }, false, {"not root"}},
  };
  for (const Row& row : rows) {
    INFO(row.host);
    bool played = false;
    const std::string text = refusal(row.play, row.in_grandchild, played);
    if (!played) {
      WARN("cannot be played here: " << row.host);
      continue;
    }
    INFO(text);
    for (const std::string& part : row.says) CHECK(text.find(part) != std::string::npos);
  }
}
