// SPDX-License-Identifier: Apache-2.0
// Spawning a backend without privileges, and messages to it.
#include "recovery/supervisor/member.hpp"

#include <grp.h>
#include <pwd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <fstream>
#include <string_view>

namespace tandem {

namespace {

constexpr int kChildControlFd = 3;
// As a shell says it: the program is not there, or cannot be executed.
constexpr int kExitMissing = 127;
constexpr int kExitNotExecutable = 126;
// CPU time at real-time priority without a blocking system call.
constexpr rlim_t kRealTimeLimitUs = 2'000'000;

// Everything a child does between fork and exec; returns only on failure. Async-signal-safe calls only.
int become_backend(const char* program, char* const* arguments, char* const* environment, const passwd* account,
                   int control) {
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  const int null = ::open("/dev/null", O_RDWR);
  if (null < 0 || ::dup2(null, 0) < 0 || ::dup2(control, kChildControlFd) < 0) return errno;
  if (control == kChildControlFd && ::fcntl(control, F_SETFD, 0) != 0) return errno;
  ::syscall(SYS_close_range, kChildControlFd + 1, ~0u, 0);
  if (account != nullptr) {
    if (::setgroups(0, nullptr) != 0 || ::setgid(account->pw_gid) != 0 || ::setuid(account->pw_uid) != 0) return errno;
  }
  // Heirs sleep with real-time priority (common/thread_priority.hpp). One that does not sleep must not keep a CPU.
  const rlimit real_time{kRealTimeLimitUs, kRealTimeLimitUs};
  if (::setrlimit(RLIMIT_RTTIME, &real_time) != 0) return errno;
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return errno;
  if (::chdir("/") != 0) return errno;
  ::execve(program, arguments, environment);
  return errno;
}

}  // namespace

Result<Member> Member::spawn(const Config& config, const std::string& backend_path, bool hugepages) {
  const std::string doing = "start a backend (" + backend_path + ")";
  const passwd* account = ::getpwnam(config.backend_user.c_str());
  if (account == nullptr || account->pw_uid == 0)
    return fail(ErrorKind::kInvalid, doing + ": there is no unprivileged account \"" + config.backend_user +
                                         "\"; create it with: adduser --system --group --no-create-home " +
                                         config.backend_user + ", or set backend.user in the configuration");
  auto channels = FdChannel::make_pair();
  if (!channels) return within(doing, std::move(channels.error()));
  // A start sends a description of every device at once; the default buffer would hold a few dozen.
  const int buffer = 4 * 1024 * 1024;
  ::setsockopt(channels->first.fd(), SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof buffer);

  ::mkdir(config.dpdk_dir().c_str(), 0700);
  if (::chown(config.dpdk_dir().c_str(), account->pw_uid, account->pw_gid) != 0)
    return fail_errno(doing + ": give it " + config.dpdk_dir());
  std::vector<std::string> words{backend_path,
                                 "--control-fd",
                                 std::to_string(kChildControlFd),
                                 "--shards",
                                 std::to_string(config.shards),
                                 "--file-prefix",
                                 "tandem-" + config.instance};
  if (hugepages) words.emplace_back("--hugepages");
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);

  // DPDK makes a directory for its process even if it shares nothing; /tmp is not ours to share with other users.
  const std::string runtime = "XDG_RUNTIME_DIR=" + config.dpdk_dir();
  std::vector<char*> environment{const_cast<char*>(runtime.c_str())};
  for (char** entry = environ; *entry != nullptr; ++entry)
    if (!std::string_view(*entry).starts_with("XDG_RUNTIME_DIR=")) environment.push_back(*entry);
  environment.push_back(nullptr);
  const int control = channels->second.fd();
  // Not vfork(), although it would save half of what a failover costs us: its child runs as the backends' user and in
  // our memory, and we stand still until it has called exec. Whoever of that user stops it stops us.
  const pid_t pid = ::fork();
  if (pid < 0) return fail_errno(doing);
  if (pid == 0) {
    const int error = become_backend(backend_path.c_str(), arguments.data(), environment.data(), account, control);
    ::_exit(error == ENOENT ? kExitMissing : kExitNotExecutable);
  }
  Member member;
  member.pid_ = pid;
  member.pidfd_ = UniqueFd{static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))};
  if (!member.pidfd_) {
    const int error = errno;
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    return fail_errno(doing + ": open its pidfd", {}, error);
  }
  member.channel_ = std::move(channels->first);
  return member;
}

Member Member::adopt(pid_t pid, UniqueFd pidfd, UniqueFd channel) {
  Member member;
  member.pid_ = pid;
  member.pidfd_ = std::move(pidfd);
  member.channel_ = FdChannel{std::move(channel)};
  member.adopted = true;
  return member;
}

void Member::kill() const {
  if (pidfd_) ::syscall(SYS_pidfd_send_signal, pidfd_.get(), SIGKILL, nullptr, 0);
}

char Member::thread_state(pid_t tid) const {
  std::ifstream file("/proc/" + std::to_string(pid_) + "/task/" + std::to_string(tid) + "/stat");
  std::string line;
  std::getline(file, line);
  const std::size_t name_end = line.rfind(')');
  return name_end == std::string::npos || name_end + 2 >= line.size() ? 'X' : line[name_end + 2];
}

bool Member::stands_still() const {
  const auto moves = [this](pid_t tid) {
    const char state = thread_state(tid);
    return state == 'R' || state == 'D';
  };
  return !moves(pid_) && std::none_of(threads.begin(), threads.end(), moves);
}

ExitStatus Member::reap() {
  siginfo_t info{};
  stage = Stage::kDead;
  if (::waitid(P_PIDFD, static_cast<id_t>(pidfd_.get()), &info, WEXITED) != 0) return {0, 0, false};
  if (info.si_code == CLD_EXITED) return {0, info.si_status, true};
  return {info.si_status, 0, true};
}

Status Member::send_bytes(ControlType type, std::span<const std::byte> body, std::span<const std::byte> more,
                          std::span<const int> fds) {
  ControlHeader header;
  header.type = type;
  header.body_size = static_cast<std::uint32_t>(body.size() + more.size());
  std::vector<std::byte> message(sizeof header);
  std::memcpy(message.data(), &header, sizeof header);
  message.insert(message.end(), body.begin(), body.end());
  message.insert(message.end(), more.begin(), more.end());
  auto sent = channel_.send(message, fds);
  if (!sent) return within("tell backend " + std::to_string(pid_), std::move(sent.error()));
  return {};
}

}  // namespace tandem
