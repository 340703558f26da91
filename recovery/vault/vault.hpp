// SPDX-License-Identifier: Apache-2.0
// Vault: holds every descriptor that must outlive tandemd and relays vhost-user messages one at a time.
//
// Without policy: it knows items (name, blob, descriptors), nics (a listening socket, at most one front end) and per
// nic at most one event (a message, or the end of its connection) that tandemd has not applied yet. Everything survives
// tandemd; what a successor must know is said again from that state, so there is no queue that could be lost.
//
// Trust: a front end is hostile and costs only its own connection. tandemd is trusted with privilege, not with form:
// what breaks the format is refused with ERROR. Known limit: closing a descriptor that a front end passed may block in
// the kernel if that file does so on close (a FUSE server, a TCP socket with SO_LINGER); confine QEMU (sVirt) to keep
// it from such files.
//
// One thread; never blocks outside step(). Times in milliseconds.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/fd_channel.hpp"
#include "common/result.hpp"
#include "recovery/vault/front_end.hpp"
#include "recovery/vault/protocol.hpp"

namespace tandem {

/// A descriptor's registration in an epoll instance; does not own the descriptor and must go before it. An explicit
/// removal is needed because closing alone does not end it: other processes hold the same open file.
class Interest {
 public:
  Interest(int epoll, int fd, std::uint64_t tag) : epoll_(epoll), fd_(fd), tag_(tag) {}
  Interest(const Interest&) = delete;
  Interest& operator=(const Interest&) = delete;
  ~Interest() { set(0); }
  /// `events` 0 removes the descriptor: epoll reports EPOLLHUP even for an empty mask.
  void set(std::uint32_t events);

 private:
  int epoll_;
  int fd_;
  std::uint64_t tag_;
  std::uint32_t events_ = 0;
};

class Vault {
 public:
  struct Options {
    UniqueFd listener;             ///< SOCK_SEQPACKET, listening: tandemd attaches here
    bool exit_when_empty = false;  ///< finished() once nothing is held and tandemd, having been here, is gone
  };

  static Result<std::unique_ptr<Vault>> create(Options options);
  ~Vault();
  Vault(const Vault&) = delete;
  Vault& operator=(const Vault&) = delete;

  /// Waits at most `timeout` (negative: for ever) for one event and handles it. False: nothing happened.
  Result<bool> step(int timeout);
  /// Readable when step() has work; poll it with timeout().
  [[nodiscard]] int fd() const noexcept { return epoll_.get(); }
  /// How long the owner may wait before the next step(); -1: for ever.
  [[nodiscard]] int timeout() const;
  [[nodiscard]] bool finished() const;
  [[nodiscard]] std::uint64_t closed(CloseReason reason) const { return closed_[static_cast<std::size_t>(reason)]; }

 private:
  using Clock = std::chrono::steady_clock;

  struct Item {
    std::vector<std::byte> blob;
    std::vector<UniqueFd> fds;
  };
  /// What tandemd has to apply next on a nic.
  struct Event {
    VaultType type = VaultType::kMessage;
    std::uint64_t sequence = 0;
    VhostUserFrame frame;
  };
  struct Nic {
    std::uint64_t id = 0;
    UniqueFd listener;
    std::optional<Interest> accepting;
    std::uint64_t connection_id = 0;  ///< of the connection, or of the event that ends it; 0: neither
    std::optional<FrontEnd> front_end;
    std::optional<Interest> reading;
    std::optional<Event> event;
    bool told_listening = false, told_connected = false, told_event = false;  ///< to the tandemd attached now
  };
  using Nics = std::map<std::string, Nic, std::less<>>;

  explicit Vault(Options options) : options_(std::move(options)) {}

  // tandemd's side
  void on_attach();
  bool may_attach(int socket);
  void refuse(UniqueFd socket, const std::string& why);
  void on_channel(int limit);
  void detach(const std::string& why);
  bool handle(VaultMessage message);
  bool greet(const Result<VaultMessage>& first);
  void put(VaultMessage message);
  void delete_prefix(const std::string& prefix);
  void listen(VaultMessage message);
  void applied(VaultMessage message);
  void complain(const std::string& text);

  // what tandemd has not been told yet
  void pump();
  enum class Told : std::uint8_t { kAllSaid, kSaid, kStuck };
  Told tell_next();
  Told tell_nic(const std::string& name, Nic& nic);
  Told tell_item();
  Told tell(VaultType type, std::string_view name = {}, std::uint64_t connection = 0, std::uint64_t sequence = 0,
            std::span<const std::byte> body = {}, const std::vector<int>& fds = {});

  // front ends' side
  void on_nic_event(std::uint64_t tag, std::uint32_t events);
  void accept_front_end(const std::string& name, Nic& nic);
  void read_front_end(const std::string& name, Nic& nic);
  void close_front_end(const std::string& name, Nic& nic, CloseReason reason);
  void count_close(const std::string& name, CloseReason reason);
  void watch(Nic& nic);
  void retry_later();
  void retry_now();

  Options options_;
  UniqueFd epoll_;
  std::optional<Interest> attaching_;
  std::optional<FdChannel> channel_;
  std::optional<Interest> talking_;
  bool greeted_ = false, welcome_told_ = false, announced_ = false, was_attached_ = false;
  std::deque<std::string> complaints_;
  std::optional<std::string> fetch_after_;  ///< a FETCH is being answered: the last key sent
  std::map<std::string, Item, std::less<>> items_;
  Nics nics_;
  std::uint64_t next_nic_ = 1, next_connection_ = 1, next_sequence_ = 1;
  std::optional<Clock::time_point> retry_at_;  ///< out of descriptors or memory: try again then
  std::array<std::uint64_t, static_cast<std::size_t>(CloseReason::kCount)> closed_{};
};

}  // namespace tandem
