// SPDX-License-Identifier: Apache-2.0
// The vault's core beside a VaultClient and scripted front ends, in one process.
#include <sys/resource.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <thread>

#include "recovery/vault/vault.hpp"
#include "tests/vault/support.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

/// A vault on its own thread, which alone touches it until stop().
class VaultThread {
 public:
  explicit VaultThread(bool running = true) {
    Vault::Options options;
    options.listener = listen_unix(path(), SOCK_SEQPACKET);
    auto made = Vault::create(std::move(options));
    require(made.has_value(), "create vault");
    vault_ = std::move(*made);
    if (running) start();
  }
  VaultThread(const VaultThread&) = delete;
  VaultThread& operator=(const VaultThread&) = delete;
  ~VaultThread() { stop(); }

  void start() {
    stopping_ = false;
    thread_ = std::thread{[this] {
      while (!stopping_) {
        const int limit = vault_->timeout();
        static_cast<void>(vault_->step(limit < 0 ? 20 : std::min(limit, 20)));
      }
    }};
  }
  void stop() {
    stopping_ = true;
    if (thread_.joinable()) thread_.join();
  }
  Vault& stopped() {
    stop();
    return *vault_;
  }
  [[nodiscard]] std::string path() const { return folder_ / "vault.sock"; }
  [[nodiscard]] std::string nic_path(const std::string& nic) const { return folder_ / (nic + ".sock"); }

  VaultClient attach() {
    auto client = VaultClient::connect(path());
    if (!client) throw std::runtime_error(client.error().text);
    return std::move(*client);
  }
  void listen(VaultClient& client, const std::string& nic) {
    const UniqueFd listener = listen_unix(nic_path(nic), SOCK_STREAM);
    require(client.listen(nic, listener.get()).has_value(), "listen");
  }

 private:
  TemporaryFolder folder_;
  std::unique_ptr<Vault> vault_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

std::span<const std::byte> text(const char* value) { return std::as_bytes(std::span{value, std::strlen(value)}); }

}  // namespace

TEST_CASE("a message is relayed with its descriptors, answered once, then the next comes") {
  VaultThread vault;
  auto client = vault.attach();
  vault.listen(client, "nic");
  ScriptedFrontEnd front_end{vault.nic_path("nic")};
  const UniqueFd file = some_file();
  front_end.send(frame(5, 32), {file.get()});
  front_end.send(frame(6));

  Recorder got;
  REQUIRE(dispatch_until(client, got, [&] { return got.messages.size() == 1; }));
  CHECK(got.announced);
  REQUIRE(got.connected.size() == 1);
  CHECK(got.messages[0].frame == frame(5, 32));
  REQUIRE(got.messages[0].fds.size() == 1);
  CHECK(inode(got.messages[0].fds[0].get()) == inode(file.get()));

  const std::uint64_t first = got.messages[0].sequence;
  const UniqueFd reply_file = some_file();
  REQUIRE(client.applied("nic", first + 1000, frame(99)));  // never existed
  REQUIRE(client.applied("nic", first, frame(5, 8, 5), reply_file.get()));
  REQUIRE(client.applied("nic", first, frame(5, 8, 5)));  // twice
  REQUIRE(dispatch_until(client, got, [&] { return got.messages.size() == 2; }));
  CHECK(got.messages[1].sequence > first);
  CHECK(request_of(got.messages[1].frame) == 6);

  FrontEnd reader{UniqueFd{::dup(front_end.fd())}};
  REQUIRE(reader.read() == FrontEnd::Progress::kComplete);
  const VhostUserFrame reply = reader.take();
  CHECK(reply.bytes == frame(5, 8, 5));
  REQUIRE(reply.fds.size() == 1);
  CHECK(inode(reply.fds[0].get()) == inode(reply_file.get()));
  CHECK(front_end.quiet());
  CHECK(got.errors.empty());
}

TEST_CASE("the next front end is accepted when the disconnection is applied") {
  VaultThread vault;
  auto client = vault.attach();
  vault.listen(client, "nic");
  ScriptedFrontEnd first{vault.nic_path("nic")};
  ScriptedFrontEnd second{vault.nic_path("nic")};
  second.send(frame(2));
  first.send(frame(1));
  first.close();

  Recorder got;
  REQUIRE(dispatch_until(client, got, [&] { return got.messages.size() == 1; }));
  CHECK(got.ends.empty());
  REQUIRE(client.applied("nic", got.messages[0].sequence, frame(1)));
  REQUIRE(dispatch_until(client, got, [&] { return got.ends.size() == 1; }));
  CHECK(got.ends[0].connection == got.connected[0].second);
  CHECK(got.connected.size() == 1);
  REQUIRE(client.applied("nic", got.ends[0].sequence));
  REQUIRE(dispatch_until(client, got, [&] { return got.messages.size() == 2; }));
  REQUIRE(got.connected.size() == 2);
  CHECK(got.messages[1].connection == got.connected[1].second);
  CHECK(got.connected[1].second != got.connected[0].second);
}

TEST_CASE("a new tandemd is told what the vault holds, unapplied events under their sequence") {
  VaultThread vault;
  Recorder before;
  ino_t file_inode = 0;
  std::optional<ScriptedFrontEnd> talking, gone;
  {
    auto client = vault.attach();
    for (const char* nic : {"idle", "talking", "gone"}) vault.listen(client, nic);
    talking.emplace(vault.nic_path("talking"));
    gone.emplace(vault.nic_path("gone"));
    const UniqueFd file = some_file();
    file_inode = inode(file.get());
    talking->send(frame(7, 4), {file.get()});
    gone->close();
    REQUIRE(dispatch_until(client, before, [&] { return before.messages.size() == 1 && before.ends.size() == 1; }));
  }
  auto successor = vault.attach();
  Recorder after;
  REQUIRE(dispatch_until(successor, after, [&] { return after.announced; }));
  CHECK(after.listening == std::vector<std::string>{"gone", "idle", "talking"});
  CHECK(after.connected.size() == 2);
  REQUIRE(after.messages.size() == 1);
  CHECK(after.messages[0].sequence == before.messages[0].sequence);
  CHECK(after.messages[0].frame == before.messages[0].frame);
  REQUIRE(after.messages[0].fds.size() == 1);
  CHECK(inode(after.messages[0].fds[0].get()) == file_inode);
  REQUIRE(after.ends.size() == 1);
  CHECK(after.ends[0].sequence == before.ends[0].sequence);
}

TEST_CASE("items are put, replaced, deleted and fetched with their descriptors") {
  VaultThread vault;
  auto client = vault.attach();
  std::vector<UniqueFd> files;
  std::vector<int> numbers;
  for (int i = 0; i < 253; ++i) numbers.push_back(files.emplace_back(some_file()).get());
  REQUIRE(client.put("a/1", text("old"), std::vector{numbers[0]}));
  REQUIRE(client.put("a/1", text("new"), std::vector{numbers[1]}));
  REQUIRE(client.put("a/2", text("x")));
  REQUIRE(client.put("b/1", Bytes(kMaxVaultBlob), numbers));
  REQUIRE(client.put("b/2", {}));
  REQUIRE(client.del("b/2"));
  REQUIRE(client.del("absent"));
  auto items = client.fetch_all();
  REQUIRE(items);
  REQUIRE(items->size() == 3);
  CHECK(items->at(0).key == "a/1");
  CHECK(std::ranges::equal(items->at(0).blob, text("new")));
  REQUIRE(items->at(0).fds.size() == 1);
  CHECK(inode(items->at(0).fds[0].get()) == inode(numbers[1]));
  CHECK(items->at(2).blob.size() == kMaxVaultBlob);
  REQUIRE(items->at(2).fds.size() == 253);
  for (std::size_t i = 0; i < 253; ++i) CHECK(inode(items->at(2).fds[i].get()) == inode(numbers[i]));
  REQUIRE(client.del_prefix("a/"));
  items = client.fetch_all();
  REQUIRE(items);
  CHECK(items->size() == 1);
  REQUIRE(client.del_prefix(""));
  items = client.fetch_all();
  REQUIRE(items);
  CHECK(items->empty());
}

TEST_CASE("events that arrive during fetch_all are dispatched after it, and wake the event loop") {
  VaultThread vault;
  auto client = vault.attach();
  vault.listen(client, "nic");
  ScriptedFrontEnd front_end{vault.nic_path("nic")};
  front_end.send(frame(3));
  // Wait until the message is in the client's socket, unread: then fetch_all() must meet it.
  pollfd ready{client.fd(), POLLIN, 0};
  REQUIRE(::poll(&ready, 1, 10000) == 1);
  REQUIRE(client.put("k", {}));
  Recorder got;
  for (int i = 0; i < 100; ++i) REQUIRE(client.fetch_all()->size() == 1);
  REQUIRE(::poll(&ready, 1, 0) == 1);
  REQUIRE(dispatch_until(client, got, [&] { return got.messages.size() == 1; }));
  CHECK(got.announced);
  ready.revents = 0;
  CHECK(::poll(&ready, 1, 0) == 0);
}

TEST_CASE("a second attach is refused while the first is alive") {
  VaultThread vault;
  auto client = vault.attach();
  auto second = VaultClient::connect(vault.path(), std::chrono::milliseconds{300});
  REQUIRE_FALSE(second);
  CHECK(second.error().kind == ErrorKind::kGone);
  CHECK(second.error().text.find("another tandemd is attached") != std::string::npos);
  CHECK(client.fetch_all());
}

TEST_CASE("an attach that does not begin with a HELLO of this version costs nobody else anything") {
  VaultThread vault;
  const auto knock = [&](Bytes first) {
    UniqueFd socket{::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)};
    const sockaddr_un address = address_of(vault.path());
    require(::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0, "connect");
    if (!first.empty()) write_raw(socket.get(), first);
    return FdChannel{std::move(socket)};
  };
  const FdChannel silent = knock({});
  auto hello = encode_vault_message(VaultType::kHello, {}, 0, 0, {}, 0);
  REQUIRE(hello);
  hello->at(0) = std::byte{77};
  const Bytes fetch = *encode_vault_message(VaultType::kFetch, {}, 0, 0, {}, 0);
  for (const Bytes& first : {*hello, Bytes(2), fetch}) {
    FdChannel refused = knock(first);
    bool would_block = false;
    auto answer = receive_to_the_end(refused, &would_block);
    REQUIRE(answer);
    const auto error = decode_vault_message(std::move(*answer), VaultSender::kVault);
    REQUIRE(error);
    CHECK(error->type == VaultType::kError);
    CHECK_FALSE(receive_to_the_end(refused, &would_block));
  }
  auto client = vault.attach();
  CHECK(client.fetch_all());
}

TEST_CASE("malformed requests are refused with a text, the attachment goes on") {
  VaultThread vault;
  auto client = vault.attach();
  const TemporaryFolder folder;
  const UniqueFd file = some_file();
  const UniqueFd unconnected{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  const UniqueFd wrong_type = listen_unix(folder / "seq", SOCK_SEQPACKET);
  REQUIRE(client.listen("n", file.get()));
  REQUIRE(client.listen("n", unconnected.get()));
  REQUIRE(client.listen("n", wrong_type.get()));
  REQUIRE(client.close("n", 1));
  REQUIRE(client.unlisten("n"));
  REQUIRE(client.applied("n", 1, frame(1)));
  Recorder got;
  REQUIRE(dispatch_until(client, got, [&] { return got.errors.size() == 3; }));
  CHECK(client.fetch_all());
}

TEST_CASE("CLOSE ends the named connection only, UNLISTEN everything of the nic") {
  VaultThread vault;
  auto client = vault.attach();
  vault.listen(client, "nic");
  ScriptedFrontEnd front_end{vault.nic_path("nic")};
  front_end.send(frame(1));
  Recorder got;
  REQUIRE(dispatch_until(client, got, [&] { return got.messages.size() == 1; }));
  REQUIRE(client.close("nic", got.connected[0].second + 1));
  REQUIRE(client.fetch_all());
  CHECK(front_end.quiet());
  REQUIRE(client.close("nic", got.connected[0].second));
  REQUIRE(dispatch_until(client, got, [&] { return got.ends.size() == 1; }));
  CHECK(front_end.read(1).empty());
  REQUIRE(client.applied("nic", got.messages[0].sequence, frame(1)));  // its message went with it
  REQUIRE(client.applied("nic", got.ends[0].sequence));
  ScriptedFrontEnd next{vault.nic_path("nic")};
  REQUIRE(dispatch_until(client, got, [&] { return got.connected.size() == 2; }));
  REQUIRE(client.unlisten("nic"));
  CHECK(next.read(1).empty());
  CHECK_THROWS(ScriptedFrontEnd{vault.nic_path("nic")});
}

TEST_CASE("a tandemd that does not read loses nothing and stops nobody") {
  VaultThread vault;
  auto client = vault.attach();
  constexpr std::size_t kItems = 60;
  for (std::size_t i = 0; i < kItems; ++i) {
    REQUIRE(client.put("item/" + std::to_string(i), Bytes(kMaxVaultBlob)));
    Recorder ignored;
    REQUIRE(dispatch_until(client, ignored, [&] { return client.queued() == 0; }));
  }
  for (const char* nic : {"a", "b"}) vault.listen(client, nic);
  REQUIRE(client.fetch_all());  // everything queued has reached the vault
  { auto drop = std::move(client); }

  UniqueFd socket{::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)};
  const sockaddr_un address = address_of(vault.path());
  REQUIRE(::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  FdChannel lazy{std::move(socket)};
  REQUIRE(lazy.send(*encode_vault_message(VaultType::kHello, {}, 0, 0, {}, 0)));
  REQUIRE(lazy.send(*encode_vault_message(VaultType::kFetch, {}, 0, 0, {}, 0)));
  ScriptedFrontEnd front_end{vault.nic_path("a")};
  const UniqueFd file = some_file();
  front_end.send(frame(1), {file.get()});
  // Proof that the vault is alive though this channel is full: it still refuses others.
  CHECK_FALSE(VaultClient::connect(vault.path(), std::chrono::milliseconds{50}));

  std::map<VaultType, std::size_t> seen;
  while (seen[VaultType::kEnd] == 0 || seen[VaultType::kMessage] == 0) {
    pollfd ready{lazy.fd(), POLLIN, 0};
    REQUIRE(::poll(&ready, 1, 10000) == 1);
    auto received = lazy.receive();
    REQUIRE(received);
    const auto message = decode_vault_message(std::move(*received), VaultSender::kVault);
    REQUIRE(message);
    ++seen[message->type];
  }
  CHECK(seen[VaultType::kItem] == kItems);
  CHECK(seen[VaultType::kMessage] == 1);
  CHECK(seen[VaultType::kListening] == 2);
  CHECK(seen[VaultType::kConnected] == 1);
}

TEST_CASE("requests to a vault that does not read are queued, never block and keep their order") {
  VaultThread vault;
  auto client = vault.attach();
  vault.stop();
  constexpr std::size_t kItems = 100;
  const UniqueFd file = some_file();
  for (std::size_t i = 0; i < kItems; ++i) {
    REQUIRE(client.put("k" + std::to_string(i), Bytes(kMaxVaultBlob), std::vector{file.get()}));
    if (i % 2 == 1) REQUIRE(client.del("k" + std::to_string(i)));
  }
  CHECK(client.queued() > 0);
  vault.start();
  const auto items = client.fetch_all();
  REQUIRE(items);
  CHECK(items->size() == kItems / 2);
  CHECK(client.queued() == 0);
  for (const VaultItem& item : *items) CHECK(item.fds.size() == 1);
}

TEST_CASE("a front end that never reads its replies costs only itself") {
  VaultThread vault;
  auto client = vault.attach();
  for (const char* nic : {"deaf", "good"}) vault.listen(client, nic);
  ScriptedFrontEnd deaf{vault.nic_path("deaf")};
  ScriptedFrontEnd good{vault.nic_path("good")};
  Recorder got;
  std::size_t done = 0;
  while (got.ends.empty()) {
    const ssize_t wrote = ::send(deaf.fd(), frame(1).data(), 12, MSG_NOSIGNAL);
    REQUIRE((wrote == 12 || errno == EPIPE || errno == ECONNRESET));
    REQUIRE(dispatch_until(client, got, [&] { return got.messages.size() > done || !got.ends.empty(); }));
    for (; done < got.messages.size(); ++done)
      REQUIRE(client.applied("deaf", got.messages[done].sequence, frame(1, kMaxRelayedPayload)));
    REQUIRE(done < 10000);
  }
  good.send(frame(9));
  REQUIRE(dispatch_until(client, got, [&] { return got.messages.size() > done; }));
  REQUIRE(client.applied("good", got.messages[done].sequence, frame(9)));
  CHECK(good.read(12) == frame(9));
  CHECK(vault.stopped().closed(CloseReason::kUnreadReplies) == 1);
}

TEST_CASE("out of descriptors: the vault tries again later, without spinning") {
  VaultThread thread;
  auto client = thread.attach();
  thread.listen(client, "nic");
  REQUIRE(client.fetch_all());
  Vault& vault = thread.stopped();
  ScriptedFrontEnd front_end{thread.nic_path("nic")};
  rlimit limit{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &limit) == 0);
  const rlimit none{3, limit.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &none) == 0);
  REQUIRE(vault.step(1000));
  CHECK(vault.timeout() > 0);
  const auto spun = vault.step(0);
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &limit) == 0);
  REQUIRE(spun);
  CHECK_FALSE(*spun);
  thread.start();
  Recorder got;
  CHECK(dispatch_until(client, got, [&] { return got.connected.size() == 1; }));
}
