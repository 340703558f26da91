// SPDX-License-Identifier: Apache-2.0
// VaultClient: queueing of requests, dispatch of events.
#include "recovery/vault/vault_client.hpp"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>

namespace tandem {
namespace {

using Clock = std::chrono::steady_clock;

/// A vault that does not read for so long is stuck; its owner must learn it instead of growing without bound.
constexpr std::size_t kMaxOutgoing = 4096;
constexpr int kEventsPerDispatch = 64;
constexpr std::chrono::milliseconds kRetryPause{20};

Result<UniqueFd> connect_socket(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path)
    return fail(ErrorKind::kInvalid, "attach to the vault: path " + path + " is too long for a unix socket");
  std::memcpy(address.sun_path, path.data(), path.size());
  UniqueFd socket{::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  if (!socket) return fail_errno("attach to the vault: make a socket");
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return socket;
  const int error = errno;
  auto failure = fail_errno("attach to the vault at " + path, "start tandem-vault, or check its --socket", error);
  if (error == ECONNREFUSED || error == ENOENT || error == EAGAIN) failure.value().kind = ErrorKind::kGone;
  return failure;
}

Clock::duration until(Clock::time_point deadline) { return std::max(Clock::duration::zero(), deadline - Clock::now()); }

}  // namespace

Result<VaultClient> VaultClient::connect(const std::string& path, Milliseconds limit) {
  const auto deadline = Clock::now() + limit;
  Result<VaultClient> refusal = tl::make_unexpected(Error{});
  for (bool refused = false;;) {
    Result<VaultClient> client = tl::make_unexpected(Error{});
    if (auto socket = connect_socket(path)) {
      client = adopt(std::move(*socket), std::chrono::ceil<Milliseconds>(until(deadline)));
    } else {
      client = tl::make_unexpected(socket.error());
    }
    // When the last try merely runs out of time, the refusal before it is the better answer.
    if (client || client.error().kind != ErrorKind::kGone)
      return refused && !client && client.error().kind == ErrorKind::kSystem ? std::move(refusal) : std::move(client);
    if (Clock::now() + kRetryPause >= deadline) return client;
    refusal = tl::make_unexpected(client.error());
    refused = true;
    ::poll(nullptr, 0, static_cast<int>(kRetryPause.count()));
  }
}

Result<VaultClient> VaultClient::adopt(UniqueFd socket, Milliseconds limit) {
  VaultClient client;
  if (auto started = client.start(std::move(socket), limit); !started)
    return within("attach to the vault", std::move(started.error()));
  return client;
}

Status VaultClient::start(UniqueFd socket, Milliseconds limit) {
  channel_ = FdChannel{std::move(socket)};
  wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  epoll_event event{};
  event.events = EPOLLIN;
  if (!wake_ || !epoll_ || ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event) != 0)
    return fail_errno("make descriptors for its events");
  const auto deadline = Clock::now() + limit;
  // A refusal may be in the socket already, and then HELLO cannot be sent any more: the answer counts, not the send.
  Status said = request(VaultType::kHello, {});
  if (!said && said.error().kind != ErrorKind::kGone) return said;
  for (;;) {
    VaultMessage answer;
    auto received = receive(answer);
    if (!received) return tl::make_unexpected(received.error());
    if (*received && answer.type == VaultType::kWelcome) return watch();
    if (*received && answer.type == VaultType::kError)
      return fail(ErrorKind::kGone,
                  "refused: " + std::string{reinterpret_cast<const char*>(answer.body.data()), answer.body.size()});
    if (*received) return fail(ErrorKind::kInvalid, "the answer to HELLO is not WELCOME");
    if (auto waited = wait(deadline, "WELCOME"); !waited) return waited;
  }
}

// --- requests
// ---------------------------------------------------------------------------------------------------------------

Status VaultClient::put(std::string_view key, std::span<const std::byte> blob, std::span<const int> fds) {
  return request(VaultType::kPut, key, 0, 0, blob, fds);
}
Status VaultClient::del(std::string_view key) { return request(VaultType::kDelete, key); }
Status VaultClient::del_prefix(std::string_view prefix) { return request(VaultType::kDeletePrefix, prefix); }
Status VaultClient::listen(std::string_view nic, int fd) {
  return request(VaultType::kListen, nic, 0, 0, {}, std::span{&fd, 1});
}
Status VaultClient::unlisten(std::string_view nic) { return request(VaultType::kUnlisten, nic); }
Status VaultClient::close(std::string_view nic, std::uint64_t connection) {
  return request(VaultType::kClose, nic, connection);
}
Status VaultClient::applied(std::string_view nic, std::uint64_t sequence, std::span<const std::byte> reply,
                            int reply_fd) {
  return request(VaultType::kApplied, nic, 0, sequence, reply, std::span{&reply_fd, reply_fd < 0 ? 0u : 1u});
}

Status VaultClient::request(VaultType type, std::string_view name, std::uint64_t connection, std::uint64_t sequence,
                            std::span<const std::byte> body, std::span<const int> fds) {
  auto bytes = encode_vault_message(type, name, connection, sequence, body, fds.size());
  if (!bytes) return tl::make_unexpected(bytes.error());
  if (outgoing_.size() >= kMaxOutgoing)
    return fail(ErrorKind::kSystem, "talk to the vault: it has not read for " + std::to_string(kMaxOutgoing) +
                                        " requests; check that tandem-vault is not stopped");
  Outgoing outgoing{std::move(*bytes), {}};
  for (const int fd : fds) {
    outgoing.fds.emplace_back(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!outgoing.fds.back()) return fail_errno("hand a descriptor to the vault", "raise the limit (ulimit -n)");
  }
  outgoing_.push_back(std::move(outgoing));
  return flush();
}

Status VaultClient::flush() {
  while (!outgoing_.empty()) {
    pollfd ready{channel_.fd(), POLLOUT, 0};
    if (::poll(&ready, 1, 0) != 1) break;
    std::vector<int> fds;
    for (const UniqueFd& fd : outgoing_.front().fds) fds.push_back(fd.get());
    if (auto sent = channel_.send(outgoing_.front().bytes, fds); !sent)
      return within("talk to the vault", sent.error());
    outgoing_.pop_front();
  }
  return watch();
}

Status VaultClient::watch() {
  const std::uint32_t wanted = outgoing_.empty() ? std::uint32_t{EPOLLIN} : EPOLLIN | EPOLLOUT;
  if (wanted == watched_) return {};
  epoll_event event{};
  event.events = wanted;
  if (::epoll_ctl(epoll_.get(), watched_ == 0 ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, channel_.fd(), &event) != 0)
    return fail_errno("watch the channel to the vault");
  watched_ = wanted;
  return {};
}

// --- events
// -----------------------------------------------------------------------------------------------------------------

/// True: `message` is filled. False: nothing waiting.
Result<bool> VaultClient::receive(VaultMessage& message) {
  bool would_block = false;
  auto received = receive_to_the_end(channel_, &would_block);
  if (would_block) return false;
  if (!received) return within("listen to the vault", received.error());
  auto decoded = decode_vault_message(std::move(*received), VaultSender::kVault);
  if (!decoded) return tl::make_unexpected(decoded.error());
  message = std::move(*decoded);
  return true;
}

Status VaultClient::wait(Clock::time_point deadline, const char* what) {
  pollfd ready{channel_.fd(), POLLIN, 0};
  if (!outgoing_.empty()) ready.events |= POLLOUT;
  const auto left = std::chrono::ceil<Milliseconds>(until(deadline)).count();
  const int got = ::poll(&ready, 1, static_cast<int>(left));
  if (got < 0 && errno != EINTR) return fail_errno("wait for the vault");
  if (got == 0)
    return fail(ErrorKind::kSystem, std::string{"wait for the vault's "} + what +
                                        ": no answer in time; check that tandem-vault is not stopped");
  return outgoing_.empty() ? Status{} : flush();
}

Result<std::vector<VaultItem>> VaultClient::fetch_all(Milliseconds limit) {
  const auto deadline = Clock::now() + limit;
  if (auto asked = request(VaultType::kFetch, {}); !asked) return within("fetch items", asked.error());
  std::vector<VaultItem> items;
  for (;;) {
    VaultMessage message;
    auto received = receive(message);
    if (!received) return within("fetch items", received.error());
    if (!*received) {
      if (auto waited = wait(deadline, "items"); !waited) return within("fetch items", waited.error());
    } else if (message.type == VaultType::kItem) {
      items.push_back({std::move(message.name), std::move(message.body), std::move(message.fds)});
    } else if (message.type == VaultType::kEnd) {
      return items;
    } else {
      backlog_.push_back(std::move(message));
      ::eventfd_write(wake_.get(), 1);
    }
  }
}

Status VaultClient::dispatch(VaultHandler& handler) {
  // A failing write must not hide what the vault said before it went.
  Status written = flush();
  for (int i = 0; i < kEventsPerDispatch; ++i) {
    VaultMessage message;
    if (!backlog_.empty()) {
      message = std::move(backlog_.front());
      backlog_.pop_front();
      eventfd_t count = 0;
      if (backlog_.empty()) ::eventfd_read(wake_.get(), &count);
    } else {
      auto received = receive(message);
      if (!received) return tl::make_unexpected(received.error());
      if (!*received) return written;
    }
    deliver(std::move(message), handler);
  }
  return written;
}

void VaultClient::deliver(VaultMessage message, VaultHandler& handler) {
  switch (message.type) {
    case VaultType::kListening:
      return handler.on_listening(message.name);
    case VaultType::kConnected:
      return handler.on_connected(message.name, message.connection,
                                  message.fds.empty() ? UniqueFd{} : std::move(message.fds.front()));
    case VaultType::kMessage:
      return handler.on_message({std::move(message.name), message.connection, message.sequence, std::move(message.body),
                                 std::move(message.fds)});
    case VaultType::kDisconnected:
      return handler.on_disconnected(message.name, message.connection, message.sequence);
    case VaultType::kAnnounced:
      return handler.on_announced();
    case VaultType::kError:
      return handler.on_error({reinterpret_cast<const char*>(message.body.data()), message.body.size()});
    default:
      return;  // WELCOME, ITEM and END outside their dialogue say nothing new
  }
}

}  // namespace tandem
