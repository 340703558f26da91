// SPDX-License-Identifier: Apache-2.0
// tandem-vault: the command line, the socket, and the loop around class Vault.
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <charconv>
#include <cstdio>
#include <iterator>
#include <optional>
#include <string>

#include "recovery/vault/log.hpp"
#include "recovery/vault/sandbox.hpp"
#include "recovery/vault/supervise.hpp"
#include "recovery/vault/vault.hpp"

namespace tandem {
namespace {

constexpr const char* kUsage =
    "Usage: tandem-vault (--socket PATH | --fd N) [OPTIONS]\n"
    "       tandem-vault --socket PATH [OPTIONS] --supervise COMMAND [ARGUMENT...]\n"
    "Holds tandemd's file descriptors and its connections to QEMU while tandemd restarts.\n\n"
    "  --socket PATH      where tandemd attaches; created with mode 0600\n"
    "  --fd N             an inherited listening SOCK_SEQPACKET unix socket instead\n"
    "  --user NAME        become this user (one of its own: its processes may attach)\n"
    "  --exit-when-empty  exit when nothing is held and tandemd has gone\n"
    "  --supervise        run COMMAND as well, restart it when it fails, end with it when it ends well\n"
    "  --help, --version\n";

struct Arguments {
  std::string socket;
  int fd = -1;
  std::optional<VaultUser> user;
  bool exit_when_empty = false;
  bool supervise = false;
  char** command = nullptr;
  bool done = false;  ///< --help or --version was answered
};

Status parse_fd(const char* text, int& fd) {
  const std::string_view number{text};
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), fd);
  if (error == std::errc{} && end == number.data() + number.size() && fd >= 0) return {};
  return fail(ErrorKind::kInvalid, "--fd " + std::string{number} + ": not a descriptor number");
}

Status apply_option(int option, Arguments& arguments) {
  switch (option) {
    case 's':
      arguments.socket = optarg;
      return {};
    case 'f':
      return parse_fd(optarg, arguments.fd);
    case 'e':
      arguments.exit_when_empty = true;
      return {};
    case 'S':
      arguments.supervise = true;
      return {};
    case 'h':
      arguments.done = true;
      std::fputs(kUsage, stdout);
      return {};
    case 'v':
      arguments.done = true;
      std::puts("tandem-vault " TANDEM_VERSION);
      return {};
    case 'u': {
      auto user = find_vault_user(optarg);
      if (!user) return tl::make_unexpected(user.error());
      arguments.user = *user;
      return {};
    }
    default:
      return fail(ErrorKind::kInvalid, "wrong usage; see tandem-vault --help");
  }
}

Result<Arguments> parse(int count, char** values) {
  static constexpr option kOptions[] = {
      {"socket", required_argument, nullptr, 's'}, {"fd", required_argument, nullptr, 'f'},
      {"user", required_argument, nullptr, 'u'},   {"exit-when-empty", no_argument, nullptr, 'e'},
      {"supervise", no_argument, nullptr, 'S'},    {"help", no_argument, nullptr, 'h'},
      {"version", no_argument, nullptr, 'v'},      {nullptr, 0, nullptr, 0}};
  Arguments arguments;
  for (int option = 0; (option = ::getopt_long(count, values, "+", kOptions, nullptr)) != -1;) {
    if (auto applied = apply_option(option, arguments); !applied) return tl::make_unexpected(applied.error());
    if (arguments.done) return arguments;
  }
  if (arguments.socket.empty() == (arguments.fd < 0))
    return fail(ErrorKind::kInvalid, "give either --socket or --fd; see tandem-vault --help");
  if (arguments.supervise != (optind < count))
    return fail(ErrorKind::kInvalid, "--supervise and a command belong together; see tandem-vault --help");
  arguments.command = values + optind;
  return arguments;
}

/// Binds PATH, mode 0600. A path whose owner died is taken over; one that answers is not.
Result<UniqueFd> listen_at(const std::string& path) {
  const std::string doing = "listen at " + path;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path)
    return fail(ErrorKind::kInvalid, doing + ": path too long for a unix socket");
  path.copy(address.sun_path, path.size());
  const auto* name = reinterpret_cast<const sockaddr*>(&address);
  UniqueFd probe{::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)};
  if (::connect(probe.get(), name, sizeof address) == 0)
    return fail(ErrorKind::kInvalid, doing + ": another tandem-vault serves it; stop that one first");
  if (errno == ECONNREFUSED) ::unlink(path.c_str());
  UniqueFd socket{::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  if (!socket) return fail_errno(doing);
  const mode_t mask = ::umask(0177);
  const int bound = ::bind(socket.get(), name, sizeof address);
  const int error = errno;
  ::umask(mask);
  if (bound != 0) return fail_errno(doing, "check that the folder exists and is writable", error);
  if (::listen(socket.get(), 8) != 0) return fail_errno(doing);
  return socket;
}

Result<UniqueFd> inherited(int fd) {
  int type = 0;
  int listening = 0;
  socklen_t size = sizeof type;
  if (::getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) != 0 || type != SOCK_SEQPACKET ||
      ::getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) != 0 || listening != 1)
    return fail(ErrorKind::kInvalid, "--fd " + std::to_string(fd) + ": not a listening SOCK_SEQPACKET unix socket");
  ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  return UniqueFd{fd};
}

Status enter_sandbox(const Arguments& arguments) {
  if (!arguments.user && ::geteuid() == 0) vault_log("runs as root: name an unprivileged user with --user");
  raise_descriptor_limit();
  if (arguments.user)
    if (auto dropped = drop_privileges(*arguments.user); !dropped) return dropped;
  if (auto forbidden = forbid_gains(); !forbidden) return forbidden;
  return restrict_system_calls();
}

/// Serves until SIGTERM, SIGINT or, if asked, until nothing is held.
Status serve(const Arguments& arguments, UniqueFd listener) {
  sigset_t ends;
  sigemptyset(&ends);
  sigaddset(&ends, SIGTERM);
  sigaddset(&ends, SIGINT);
  ::sigprocmask(SIG_BLOCK, &ends, nullptr);
  const UniqueFd signals{::signalfd(-1, &ends, SFD_CLOEXEC | SFD_NONBLOCK)};
  if (!signals) return fail_errno("prepare for signals");
  auto vault = Vault::create({std::move(listener), arguments.exit_when_empty});
  if (!vault) return tl::make_unexpected(vault.error());
  if (auto entered = enter_sandbox(arguments); !entered) return entered;
  while (!(*vault)->finished()) {
    pollfd ready[] = {{signals.get(), POLLIN, 0}, {(*vault)->fd(), POLLIN, 0}};
    if (::poll(ready, std::size(ready), (*vault)->timeout()) < 0 && errno != EINTR)
      return fail_errno("wait for events");
    if (ready[0].revents != 0) return {};
    if (auto stepped = (*vault)->step(0); !stepped) return tl::make_unexpected(stepped.error());
  }
  return {};
}

int report(const Status& status) {
  if (!status) vault_log(status.error().text);
  return status ? 0 : 1;
}

int run(int count, char** values) {
  auto arguments = parse(count, values);
  if (!arguments) return report(tl::make_unexpected(arguments.error()));
  if (arguments->done) return 0;
  auto listener = arguments->fd >= 0 ? inherited(arguments->fd) : listen_at(arguments->socket);
  if (!listener) return report(tl::make_unexpected(listener.error()));
  int status = 0;
  if (arguments->supervise) {
    status = supervise([&] { return report(serve(*arguments, listener->duplicate())); }, arguments->command);
  } else {
    status = report(serve(*arguments, std::move(*listener)));
  }
  // Fails quietly where the vault's user may not write the folder; the next start takes the stale path over.
  if (!arguments->socket.empty()) ::unlink(arguments->socket.c_str());
  return status;
}

}  // namespace
}  // namespace tandem

int main(int count, char** values) { return tandem::run(count, values); }
