// SPDX-License-Identifier: Apache-2.0
// VaultClient: tandemd's end of the channel to tandem-vault.
//
// Requests never block and keep their order: what the socket does not take at once is queued here (with duplicates of
// its descriptors) and written when dispatch() runs; what was accepted is lost only with this process. Order matters:
// put() the new device description, then applied(). Only connect() and fetch_all() wait, with a limit. One thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/fd_channel.hpp"
#include "common/result.hpp"
#include "recovery/vault/protocol.hpp"

namespace tandem {

/// One vhost-user message in tandemd's hands until VaultClient::applied(nic, sequence).
struct RelayedMessage {
  std::string nic;
  std::uint64_t connection = 0;
  std::uint64_t sequence = 0;
  std::vector<std::byte> frame;  ///< header and payload; framing and version are checked, nothing else
  std::vector<UniqueFd> fds;
};

/// Called from dispatch(). A handler may call the client's requests, fetch_all() included. After a restart everything
/// that is not applied comes again, so handlers are idempotent.
class VaultHandler {
 public:
  virtual ~VaultHandler() = default;
  /// The vault holds this nic's listening socket (said on attach only).
  virtual void on_listening(const std::string& nic) { static_cast<void>(nic); }
  /// `held`: the front end sees its connection end only once this is closed, too. Never read from it. Empty when it is
  /// over already.
  virtual void on_connected(const std::string& nic, std::uint64_t connection, UniqueFd held) = 0;
  virtual void on_message(RelayedMessage message) = 0;
  /// Must be answered with applied(nic, sequence); until then no other front end is accepted on this nic.
  virtual void on_disconnected(const std::string& nic, std::uint64_t connection, std::uint64_t sequence) = 0;
  /// Everything the vault held when this client attached has been said.
  virtual void on_announced() {}
  /// The vault refused a request of ours: a bug on our side, or it is out of descriptors.
  virtual void on_error(const std::string& text) = 0;
};

struct VaultItem {
  std::string key;
  std::vector<std::byte> blob;
  std::vector<UniqueFd> fds;
};

class VaultClient {
 public:
  using Milliseconds = std::chrono::milliseconds;

  /// Attaches to the vault at `path`. Retries until `limit` while nothing listens there yet or a dying predecessor
  /// still holds the vault. kGone: nobody there, or refused; kUnsupported: the vault speaks another version.
  static Result<VaultClient> connect(const std::string& path, Milliseconds limit = Milliseconds{2000});
  /// The same on a connected SOCK_SEQPACKET socket, without retries.
  static Result<VaultClient> adopt(UniqueFd socket, Milliseconds limit = Milliseconds{2000});

  /// For an event loop: readable when dispatch() has something to do.
  [[nodiscard]] int fd() const noexcept { return epoll_.get(); }
  /// Writes what is queued, hands what has arrived to `handler`. kGone: the vault is gone; kInvalid: it broke the
  /// protocol.
  Status dispatch(VaultHandler& handler);
  /// Requests not yet written to the socket; dispatch() until 0 before a clean exit.
  [[nodiscard]] std::size_t queued() const noexcept { return outgoing_.size(); }

  Status put(std::string_view key, std::span<const std::byte> blob, std::span<const int> fds = {});
  Status del(std::string_view key);
  Status del_prefix(std::string_view prefix);
  /// All items, in the order of their keys. Events that arrive meanwhile wait for dispatch().
  Result<std::vector<VaultItem>> fetch_all(Milliseconds limit = Milliseconds{5000});
  /// `fd`: a listening SOCK_STREAM unix socket; the caller may close its own copy. Replaces an earlier one of that nic.
  Status listen(std::string_view nic, int fd);
  Status unlisten(std::string_view nic);
  Status close(std::string_view nic, std::uint64_t connection);
  Status applied(std::string_view nic, std::uint64_t sequence, std::span<const std::byte> reply = {},
                 int reply_fd = -1);

 private:
  struct Outgoing {
    std::vector<std::byte> bytes;
    std::vector<UniqueFd> fds;
  };

  VaultClient() = default;
  Status start(UniqueFd socket, Milliseconds limit);
  Status request(VaultType type, std::string_view name, std::uint64_t connection = 0, std::uint64_t sequence = 0,
                 std::span<const std::byte> body = {}, std::span<const int> fds = {});
  Status flush();
  Status watch();
  Status wait(std::chrono::steady_clock::time_point deadline, const char* what);
  Result<bool> receive(VaultMessage& message);
  void deliver(VaultMessage message, VaultHandler& handler);

  FdChannel channel_;
  UniqueFd wake_;   ///< eventfd, readable while backlog_ is not empty
  UniqueFd epoll_;  ///< channel_ and wake_
  std::uint32_t watched_ = 0;
  std::deque<Outgoing> outgoing_;
  std::deque<VaultMessage> backlog_;  ///< events that arrived during fetch_all()
};

}  // namespace tandem
