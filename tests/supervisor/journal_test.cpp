// SPDX-License-Identifier: Apache-2.0
// The log's way to the journal, with a socket of ours in a mount namespace of its own in the journal's place.
#include "recovery/supervisor/journal.hpp"

#include <sched.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "common/unique_fd.hpp"
#include "tests/support/skip.hpp"

using namespace tandem;

namespace {

constexpr char kJournal[] = "/run/systemd/journal/socket";

std::string stream_of(int fd) {
  struct stat status {};
  REQUIRE(::fstat(fd, &status) == 0);
  return std::to_string(status.st_dev) + ":" + std::to_string(status.st_ino);
}

// In a child whose /run is its own: a journal that tandemd's log line is sent to. Prints the datagram to `out`.
[[noreturn]] void play_journal(int out) {
  if (::unshare(CLONE_NEWNS) != 0 || ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
      ::mount("none", "/run", "tmpfs", 0, nullptr) != 0)
    ::_exit(77);
  std::filesystem::create_directories("/run/systemd/journal");
  const UniqueFd journal{::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)};
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strcpy(address.sun_path, kJournal);
  if (::bind(journal.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) ::_exit(1);
  ::setenv("JOURNAL_STREAM", stream_of(STDERR_FILENO).c_str(), 1);
  set_up_log("info");
  Incident incident;
  incident.id = 17;
  incident.pair = "default";
  incident.timeline.fence_ns = 1000;
  incident.timeline.replayed_ns = 91'000;
  log_failover(incident);
  char text[4096];
  const ssize_t got = ::recv(journal.get(), text, sizeof text, MSG_DONTWAIT);
  ::_exit(got > 0 && ::write(out, text, static_cast<std::size_t>(got)) == got ? 0 : 2);
}

}  // namespace

TEST_CASE("standard error is the journal only if JOURNAL_STREAM names it") {
  int ends[2];
  REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
  const UniqueFd read_end{ends[0]}, write_end{ends[1]};
  CHECK(is_journal_stream(stream_of(write_end.get()).c_str(), write_end.get()));
  CHECK_FALSE(is_journal_stream(nullptr, write_end.get()));
  CHECK_FALSE(is_journal_stream("", write_end.get()));
  CHECK_FALSE(is_journal_stream("1:1", write_end.get()));
  CHECK_FALSE(is_journal_stream(stream_of(write_end.get()).c_str(), -1));
}

TEST_CASE("a failover is one journal entry with fields") {
  int ends[2];
  REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
  const UniqueFd read_end{ends[0]};
  UniqueFd write_end{ends[1]};
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) play_journal(write_end.get());
  write_end.reset();
  char text[4096] = {};
  const ssize_t got = ::read(read_end.get(), text, sizeof text - 1);
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 77) TANDEM_SKIP("needs root, to make a mount namespace");
  REQUIRE(got > 0);
  const std::string entry(text, static_cast<std::size_t>(got));
  for (const char* field : {"TANDEM_PAIR=default\n", "TANDEM_INCIDENT=17\n", "TANDEM_TAKEOVER_NS=90000\n",
                            "PRIORITY=4\n", "MESSAGE=pair default: failover 17 done", "MESSAGE_ID="})
    CHECK(entry.find(field) != std::string::npos);
}
