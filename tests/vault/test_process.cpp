// SPDX-License-Identifier: Apache-2.0
// The real tandem-vault process: tandemds killed at every point, front ends that misbehave, nothing lost, doubled or
// leaked.
#include <sys/wait.h>

#include <catch2/catch.hpp>
#include <csignal>
#include <fstream>
#include <random>
#include <sstream>

#include "recovery/vault/supervise.hpp"
#include "tests/support/skip.hpp"
#include "tests/vault/support.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

/// Waits for `pid` with the failsafe; the wait status, or -1 after killing it.
int wait_for(pid_t pid) {
  const auto deadline = std::chrono::steady_clock::now() + kFailsafe;
  int status = 0;
  while (::waitpid(pid, &status, WNOHANG) == 0) {
    if (std::chrono::steady_clock::now() >= deadline) {
      ::kill(pid, SIGKILL);
      ::waitpid(pid, &status, 0);
      return -1;
    }
    ::poll(nullptr, 0, 2);
  }
  return status;
}

bool eventually(const std::function<bool()>& done) {
  const auto deadline = std::chrono::steady_clock::now() + kFailsafe;
  while (!done()) {
    if (std::chrono::steady_clock::now() >= deadline) return false;
    ::poll(nullptr, 0, 2);
  }
  return true;
}

class VaultProcess {
 public:
  explicit VaultProcess(std::vector<std::string> more = {}) {
    std::vector<std::string> words{TANDEM_VAULT_BINARY, "--socket", path()};
    words.insert(words.end(), more.begin(), more.end());
    start(words);
  }
  VaultProcess(const VaultProcess&) = delete;
  VaultProcess& operator=(const VaultProcess&) = delete;
  ~VaultProcess() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGTERM);
    wait_for(pid_);
  }
  [[nodiscard]] pid_t pid() const { return pid_; }
  [[nodiscard]] std::string path() const { return folder_ / "vault.sock"; }
  [[nodiscard]] std::string nic_path(const std::string& nic) const { return folder_ / (nic + ".sock"); }

  VaultClient attach() const {
    auto client = VaultClient::connect(path(), std::chrono::milliseconds{8000});
    if (!client) throw std::runtime_error(client.error().text);
    return std::move(*client);
  }
  void listen(VaultClient& client, const std::string& nic) const {
    const UniqueFd listener = listen_unix(nic_path(nic), SOCK_STREAM);
    require(client.listen(nic, listener.get()).has_value(), "listen");
  }
  /// Ends on its own: the wait status.
  int join() { return wait_for(std::exchange(pid_, -1)); }

 private:
  void start(const std::vector<std::string>& words) {
    std::vector<char*> values;
    for (const std::string& word : words) values.push_back(const_cast<char*>(word.c_str()));
    values.push_back(nullptr);
    pid_ = ::fork();
    require(pid_ >= 0, "fork");
    if (pid_ == 0) {
      ::setenv("ASAN_OPTIONS", "detect_leaks=0", 1);  // the leak checker needs ptrace, which the vault forbids
      ::execv(values[0], values.data());
      ::_exit(127);
    }
  }

  TemporaryFolder folder_;
  pid_t pid_ = -1;
};

/// Runs `body` as a tandemd of its own and waits until it has died of SIGKILL.
void doomed_tandemd(const std::function<void()>& body) {
  const pid_t pid = ::fork();
  require(pid >= 0, "fork");
  if (pid == 0) {
    try {
      body();
    } catch (...) {
      ::_exit(1);
    }
    ::kill(::getpid(), SIGKILL);
    ::_exit(1);
  }
  const int status = wait_for(pid);
  REQUIRE(WIFSIGNALED(status));
  REQUIRE(WTERMSIG(status) == SIGKILL);
}

std::string status_field(pid_t pid, const std::string& field) {
  std::ifstream status{"/proc/" + std::to_string(pid) + "/status"};
  for (std::string line; std::getline(status, line);)
    if (line.starts_with(field + ":")) {
      const auto value = line.find_first_not_of("\t ", field.size() + 1);
      return value == std::string::npos ? "" : line.substr(value);
    }
  return {};
}

std::vector<pid_t> children_of(pid_t pid) {
  std::ifstream list{"/proc/" + std::to_string(pid) + "/task/" + std::to_string(pid) + "/children"};
  std::vector<pid_t> children;
  for (pid_t child = 0; list >> child;) children.push_back(child);
  return children;
}

std::size_t count_lines(const std::string& path) {
  std::ifstream file{path};
  std::size_t lines = 0;
  for (std::string line; std::getline(file, line);) ++lines;
  return lines;
}

}  // namespace

TEST_CASE("tandemd killed before APPLIED: the successor gets the message again, the reply comes once") {
  const VaultProcess vault;
  {
    auto first = vault.attach();
    vault.listen(first, "nic");
    REQUIRE(first.fetch_all());
  }
  ScriptedFrontEnd front_end{vault.nic_path("nic")};
  const UniqueFd file = some_file();
  front_end.send(frame(11, 64), {file.get()});
  std::array<int, 2> pipe{};
  REQUIRE(::pipe(pipe.data()) == 0);
  const UniqueFd sequence_in{pipe[0]};
  const UniqueFd sequence_out{pipe[1]};
  doomed_tandemd([&] {
    auto client = vault.attach();
    Recorder got;
    require(dispatch_until(client, got, [&] { return got.messages.size() == 1; }), "message");
    require(::write(sequence_out.get(), &got.messages[0].sequence, 8) == 8, "write");
  });
  std::uint64_t sequence = 0;
  REQUIRE(::read(sequence_in.get(), &sequence, 8) == 8);
  auto successor = vault.attach();
  Recorder got;
  REQUIRE(dispatch_until(successor, got, [&] { return got.announced; }));
  REQUIRE(got.messages.size() == 1);
  CHECK(got.messages[0].sequence == sequence);
  CHECK(got.messages[0].frame == frame(11, 64));
  REQUIRE(got.messages[0].fds.size() == 1);
  CHECK(inode(got.messages[0].fds[0].get()) == inode(file.get()));
  CHECK(front_end.quiet());
  REQUIRE(successor.applied("nic", sequence, frame(11)));
  CHECK(front_end.read(12) == frame(11));
  REQUIRE(successor.fetch_all());
  CHECK(front_end.quiet());
}

TEST_CASE("tandemd killed right after APPLIED: the reply comes once, the item put before is there") {
  const VaultProcess vault;
  {
    auto first = vault.attach();
    for (const char* nic : {"nic", "noise"}) vault.listen(first, nic);
    REQUIRE(first.fetch_all());
  }
  ScriptedFrontEnd front_end{vault.nic_path("nic")};
  ScriptedFrontEnd noise{vault.nic_path("noise")};
  noise.send(frame(77));  // stays unread in the dying tandemd's socket: its death is a reset, not an end of stream
  for (std::uint32_t round = 1; round <= 30; ++round) {
    front_end.send(frame(round));
    doomed_tandemd([&] {
      auto client = vault.attach();
      Recorder got;
      require(dispatch_until(client, got,
                             [&] {
                               return std::ranges::any_of(got.messages,
                                                          [](const auto& message) { return message.nic == "nic"; });
                             }),
              "message");
      for (const RelayedMessage& message : got.messages) {
        if (message.nic != "nic") continue;
        require(client.put("last", std::span{message.frame}.first(4)).has_value(), "put");
        require(client.applied("nic", message.sequence, frame(request_of(message.frame))).has_value(), "applied");
      }
    });
    CHECK(front_end.read(12) == frame(round));
    auto successor = vault.attach();
    Recorder got;
    REQUIRE(dispatch_until(successor, got, [&] { return got.announced; }));
    for (const RelayedMessage& message : got.messages) CHECK(message.nic == "noise");
    const auto items = successor.fetch_all();
    REQUIRE(items);
    REQUIRE(items->size() == 1);
    std::uint32_t last = 0;
    std::memcpy(&last, items->at(0).blob.data(), 4);
    CHECK(last == round);
    CHECK(front_end.quiet());
  }
}

TEST_CASE("a stream of requests over many killed tandemds: each is answered exactly once, in order") {
  const VaultProcess vault;
  {
    auto first = vault.attach();
    vault.listen(first, "nic");
    REQUIRE(first.fetch_all());
  }
  constexpr std::uint32_t kRequests = 200;
  ScriptedFrontEnd front_end{vault.nic_path("nic")};
  const UniqueFd file = some_file();
  for (std::uint32_t i = 0; i < kRequests; ++i)
    front_end.send(frame(i, i % 50), i % 3 == 0 ? std::vector{file.get()} : std::vector<int>{});
  const unsigned seed = 20240501;
  std::mt19937 random{seed};
  std::uint32_t answered = 0;
  for (int life = 0; life < 400 && answered < kRequests; ++life) {
    const auto replies = static_cast<std::size_t>(random() % 8);
    const bool read_one_more = random() % 2 == 0;
    doomed_tandemd([&] {
      auto client = vault.attach();
      Recorder got;
      for (std::size_t done = 0; done < replies; ++done) {
        if (!dispatch_until(client, got, [&] { return got.messages.size() > done; })) return;
        const RelayedMessage& message = got.messages[done];
        require((message.fds.size() == 1) == (request_of(message.frame) % 3 == 0), "descriptors of the right message");
        require(client.applied("nic", message.sequence, frame(request_of(message.frame))).has_value(), "applied");
        if (request_of(message.frame) + 1 == kRequests) return;
      }
      if (read_one_more) static_cast<void>(dispatch_until(client, got, [&] { return got.messages.size() > replies; }));
    });
    const std::uint32_t expected = std::min<std::uint32_t>(answered + static_cast<std::uint32_t>(replies), kRequests);
    for (; answered < expected; ++answered) REQUIRE(front_end.read(12) == frame(answered));
    auto check = vault.attach();  // the dead one's requests are all done when this returns
    CHECK(front_end.quiet());
  }
  CHECK(answered == kRequests);
}

TEST_CASE("items and their descriptors outlive tandemd") {
  const VaultProcess vault;
  const UniqueFd file = some_file();
  REQUIRE(::ftruncate(file.get(), 4096) == 0);
  REQUIRE(::pwrite(file.get(), "kept", 4, 100) == 4);
  doomed_tandemd([&] {
    auto client = vault.attach();
    require(client.put("segment", Bytes(10), std::vector{file.get(), file.get()}).has_value(), "put");
  });
  auto successor = vault.attach();
  const auto items = successor.fetch_all();
  REQUIRE(items);
  REQUIRE(items->size() == 1);
  REQUIRE(items->at(0).fds.size() == 2);
  std::array<char, 4> content{};
  REQUIRE(::pread(items->at(0).fds[1].get(), content.data(), 4, 100) == 4);
  CHECK(std::memcmp(content.data(), "kept", 4) == 0);
  CHECK(inode(items->at(0).fds[0].get()) == inode(file.get()));
}

TEST_CASE("misbehaving front ends cost only their connection and leave no descriptor behind") {
  const VaultProcess vault;
  auto client = vault.attach();
  for (const char* nic : {"bad", "good"}) vault.listen(client, nic);
  ScriptedFrontEnd good{vault.nic_path("good")};
  Recorder got;
  REQUIRE(dispatch_until(client, got, [&] { return got.connected.size() == 1; }));
  const std::size_t before = count_fds(vault.pid());
  const UniqueFd file = some_file();
  const auto many = [&](std::size_t count) { return std::vector<int>(count, file.get()); };
  Bytes half = frame(1, 100);
  half.resize(50);
  const std::vector<std::pair<Bytes, std::vector<int>>> rows{{frame(1, kMaxRelayedPayload + 1), many(8)},
                                                             {frame(1, 0, 0), many(8)},
                                                             {frame(1, 0, 3), many(1)},
                                                             {half, many(8)},
                                                             {Bytes(3), many(8)},
                                                             {frame(1), many(9)},
                                                             {frame(1), many(253)},
                                                             {frame(1, 10), many(8)}};
  for (int round = 0; round < 5; ++round)
    for (const auto& [bytes, fds] : rows) {
      Recorder seen;
      {
        ScriptedFrontEnd bad{vault.nic_path("bad")};
        bad.send(bytes, fds);
      }
      while (seen.ends.empty()) {
        REQUIRE(dispatch_until(client, seen, [&] { return !seen.messages.empty() || !seen.ends.empty(); }));
        for (const RelayedMessage& message : seen.messages) REQUIRE(client.applied("bad", message.sequence));
        seen.messages.clear();
      }
      REQUIRE(client.applied("bad", seen.ends[0].sequence));
    }
  good.send(frame(4));
  REQUIRE(dispatch_until(client, got, [&] { return got.messages.size() == 1; }));
  REQUIRE(client.applied("good", got.messages[0].sequence, frame(4)));
  CHECK(good.read(12) == frame(4));
  REQUIRE(client.fetch_all());
  CHECK(count_fds(vault.pid()) == before);
}

TEST_CASE("whole sessions leave no descriptor in the vault") {
  const VaultProcess vault;
  { auto client = vault.attach(); }
  REQUIRE(eventually([&] { return count_fds(vault.pid()) > 0; }));
  std::size_t before = 0;
  {
    auto client = vault.attach();
    before = count_fds(vault.pid());
  }
  for (int round = 0; round < 20; ++round) {
    auto client = vault.attach();
    vault.listen(client, "nic");
    const UniqueFd file = some_file();
    ScriptedFrontEnd front_end{vault.nic_path("nic")};
    front_end.send(frame(1), {file.get(), file.get()});
    REQUIRE(client.put("item", Bytes(1), std::vector{file.get(), file.get(), file.get()}));
    Recorder got;
    REQUIRE(dispatch_until(client, got, [&] { return got.messages.size() == 1; }));
    REQUIRE(client.del_prefix(""));
    REQUIRE(client.unlisten("nic"));  // with a message in hand and a connection open
    REQUIRE(client.fetch_all());
    CHECK(count_fds(vault.pid()) == before);
  }
}

TEST_CASE("the vault runs without privileges") {
  if (::geteuid() != 0) TANDEM_SKIP("needs root, to see privileges dropped");
  const VaultProcess vault{{"--user", "nobody"}};
  auto client = vault.attach();
  const std::string uid = status_field(vault.pid(), "Uid");
  CHECK(uid.find("0\t") != 0);
  CHECK(status_field(vault.pid(), "Groups").find_first_not_of(" ") == std::string::npos);
  CHECK(status_field(vault.pid(), "CapEff") == "0000000000000000");
  CHECK(status_field(vault.pid(), "CapPrm") == "0000000000000000");
  CHECK(status_field(vault.pid(), "NoNewPrivs") == "1");
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  CHECK(status_field(vault.pid(), "Seccomp") == "2");
#endif
  // Everything works inside the sandbox, a listening socket made by root included.
  vault.listen(client, "nic");
  ScriptedFrontEnd front_end{vault.nic_path("nic")};
  front_end.send(frame(1));
  Recorder got;
  REQUIRE(dispatch_until(client, got, [&] { return got.messages.size() == 1; }));
  REQUIRE(client.applied("nic", got.messages[0].sequence, frame(2)));
  CHECK(front_end.read(12) == frame(2));
}

TEST_CASE("only root and the vault's user may attach") {
  if (::geteuid() != 0) TANDEM_SKIP("needs root, to become another user");
  const VaultProcess vault;
  { auto client = vault.attach(); }
  struct stat status {};
  REQUIRE(::stat(vault.path().c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0600);
  REQUIRE(::chmod(vault.path().c_str(), 0666) == 0);
  const pid_t pid = ::fork();
  if (pid == 0) {
    if (::setresgid(65534, 65534, 65534) != 0 || ::setresuid(65534, 65534, 65534) != 0) ::_exit(2);
    const auto client = VaultClient::connect(vault.path(), std::chrono::milliseconds{50});
    ::_exit(!client && client.error().text.find("only root") != std::string::npos ? 0 : 1);
  }
  CHECK(wait_for(pid) == 0);
}

TEST_CASE("SIGTERM is a clean exit that removes the socket") {
  VaultProcess vault;
  { auto client = vault.attach(); }
  ::kill(vault.pid(), SIGTERM);
  CHECK(vault.join() == 0);
  CHECK(::access(vault.path().c_str(), F_OK) != 0);
}

TEST_CASE("option --exit-when-empty waits for the first tandemd and leaves after the last thing is gone") {
  VaultProcess vault{{"--exit-when-empty"}};
  {
    auto client = vault.attach();
    REQUIRE(client.put("k", {}));
    vault.listen(client, "nic");
    REQUIRE(client.fetch_all());
  }
  auto client = vault.attach();  // still there: it holds something
  REQUIRE(client.del("k"));
  REQUIRE(client.unlisten("nic"));
  REQUIRE(client.fetch_all());
  CHECK(::kill(vault.pid(), 0) == 0);
  { auto drop = std::move(client); }
  CHECK(vault.join() == 0);
}

TEST_CASE("a path in use is not taken over, a stale one is") {
  VaultProcess vault;
  { auto client = vault.attach(); }
  const auto second = [&] {
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::setenv("ASAN_OPTIONS", "detect_leaks=0", 1);
      ::execl(TANDEM_VAULT_BINARY, TANDEM_VAULT_BINARY, "--socket", vault.path().c_str(), "--exit-when-empty", nullptr);
      ::_exit(127);
    }
    return pid;
  };
  CHECK(WEXITSTATUS(wait_for(second())) == 1);
  { auto client = vault.attach(); }
  ::kill(vault.pid(), SIGKILL);
  vault.join();
  REQUIRE(::access(vault.path().c_str(), F_OK) == 0);
  const pid_t heir = second();
  { auto client = vault.attach(); }
  CHECK(wait_for(heir) == 0);
}

TEST_CASE("wrong usage is refused with status 1") {
  for (const std::vector<std::string>& more : {std::vector<std::string>{"--user", "no-such-user-here"},
                                               {"--fd", "0"},
                                               {"--fd", "x"},
                                               {"--nonsense"},
                                               {"--supervise"},
                                               {"stray"}}) {
    VaultProcess vault{more};
    const int status = vault.join();
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 1);
  }
}

TEST_CASE("what follows from a command's end, and how long to wait") {
  using std::chrono::milliseconds;
  CHECK(judge_command_end(0) == CommandEnd::kDone);
  CHECK(judge_command_end(1 << 8) == CommandEnd::kRestart);
  CHECK(judge_command_end(126 << 8) == CommandEnd::kCannotRun);
  CHECK(judge_command_end(127 << 8) == CommandEnd::kCannotRun);
  CHECK(judge_command_end(SIGKILL) == CommandEnd::kRestart);
  CHECK(judge_command_end(SIGTERM) == CommandEnd::kRestart);
  CHECK(next_back_off(milliseconds{0}, milliseconds{0}) == milliseconds{100});
  CHECK(next_back_off(milliseconds{100}, milliseconds{0}) == milliseconds{200});
  CHECK(next_back_off(milliseconds{4000}, milliseconds{9999}) == milliseconds{5000});
  CHECK(next_back_off(milliseconds{5000}, milliseconds{10000}) == milliseconds{100});
}

TEST_CASE("option --supervise restarts a failing command and ends when it ends well") {
  const TemporaryFolder folder;
  const std::string log = folder / "starts";
  const std::string script =
      "echo x >> " + log + "; n=$(wc -l < " + log + "); [ $n = 1 ] && exit 3; [ $n = 2 ] && kill -SEGV $$; exit 0";
  VaultProcess vault{{"--supervise", "/bin/sh", "-c", script}};
  const int status = vault.join();
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  CHECK(count_lines(log) == 3);
  CHECK(::access(vault.path().c_str(), F_OK) != 0);
}

TEST_CASE("option --supervise gives up on a command that cannot be run") {
  VaultProcess vault{{"--supervise", "/no/such/command"}};
  CHECK(WEXITSTATUS(vault.join()) == 127);
}

TEST_CASE("option --supervise passes SIGTERM to the command, then ends the vault") {
  VaultProcess parent{{"--supervise", "/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done"}};
  { auto client = parent.attach(); }
  REQUIRE(eventually([&] { return children_of(parent.pid()).size() == 2; }));
  const auto children = children_of(parent.pid());
  ::kill(parent.pid(), SIGTERM);
  CHECK(parent.join() == 0);
  for (const pid_t child : children) CHECK(::kill(child, 0) != 0);
}

TEST_CASE("option --supervise keeps the vault while the command dies, and replaces a dead vault") {
  const TemporaryFolder folder;
  const std::string starts = folder / "starts";
  VaultProcess parent{{"--supervise", "/bin/sh", "-c", "echo x >> " + starts + "; exec sleep 1000"}};
  {
    auto client = parent.attach();
    REQUIRE(client.put("kept", {}));
    REQUIRE(client.fetch_all()->size() == 1);
  }
  REQUIRE(eventually([&] { return count_lines(starts) == 1; }));
  const auto vault_pid = children_of(parent.pid()).at(0);
  ::kill(children_of(parent.pid()).at(1), SIGKILL);
  REQUIRE(eventually([&] { return count_lines(starts) == 2; }));
  CHECK(children_of(parent.pid()).at(0) == vault_pid);
  {
    auto client = parent.attach();
    CHECK(client.fetch_all()->size() == 1);
  }
  ::kill(vault_pid, SIGKILL);
  auto client = parent.attach();
  CHECK(client.fetch_all()->empty());
}
