// SPDX-License-Identifier: Apache-2.0
// The vault's event handling, in the order of a message's life: attach, requests, telling tandemd, front ends.
#include "recovery/vault/vault.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <bit>

#include "recovery/vault/log.hpp"

namespace tandem {
namespace {

constexpr std::uint64_t kAttachTag = 0;
constexpr std::uint64_t kChannelTag = 1;
// A nic's tags are its id << 1, plus 1 for its front end; ids begin at 1.

constexpr int kRequestsPerEvent = 64;
/// More than a unix socket's buffer can hold: enough to empty what a dead tandemd left.
constexpr int kRequestsOfTheDead = 4096;
constexpr std::size_t kMaxComplaints = 16;
constexpr std::chrono::milliseconds kRetryDelay{100};

bool is_listening_stream(int fd) {
  const auto option = [fd](int name) {
    int value = -1;
    socklen_t size = sizeof value;
    return ::getsockopt(fd, SOL_SOCKET, name, &value, &size) == 0 ? value : -1;
  };
  return option(SO_DOMAIN) == AF_UNIX && option(SO_TYPE) == SOCK_STREAM && option(SO_ACCEPTCONN) == 1;
}

bool set_nonblocking(int fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  return flags >= 0 && ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
}

/// Whether one more message fits. A unix socket that polls writable has at most a quarter of its buffer in use and then
/// takes a message of any size we send (net/unix/af_unix.c, unix_writable).
bool writable(int fd) {
  pollfd ready{fd, POLLOUT, 0};
  return ::poll(&ready, 1, 0) == 1 && (ready.revents & (POLLOUT | POLLHUP | POLLERR)) != 0;
}

std::vector<int> numbers_of(const std::vector<UniqueFd>& fds) {
  std::vector<int> numbers;
  for (const UniqueFd& fd : fds) numbers.push_back(fd.get());
  return numbers;
}

}  // namespace

void Interest::set(std::uint32_t events) {
  if (events == events_) return;
  epoll_event event{};
  event.events = events;
  event.data.u64 = tag_;
  const int operation = events == 0 ? EPOLL_CTL_DEL : events_ == 0 ? EPOLL_CTL_ADD : EPOLL_CTL_MOD;
  if (::epoll_ctl(epoll_, operation, fd_, &event) == 0) events_ = events;
}

Vault::~Vault() = default;

Result<std::unique_ptr<Vault>> Vault::create(Options options) {
  std::unique_ptr<Vault> vault{new Vault{std::move(options)}};
  vault->epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!vault->epoll_) return fail_errno("create the vault's epoll instance");
  const int listener = vault->options_.listener.get();
  if (!set_nonblocking(listener))
    return fail_errno("prepare the vault's socket", "pass a listening SOCK_SEQPACKET socket");
  vault->attaching_.emplace(vault->epoll_.get(), listener, kAttachTag);
  vault->attaching_->set(EPOLLIN);
  return vault;
}

Result<bool> Vault::step(int timeout) {
  if (retry_at_ && Clock::now() >= *retry_at_) retry_now();
  // One event at a time: what its handler closes cannot be waiting in the same batch.
  epoll_event event{};
  const int got = ::epoll_wait(epoll_.get(), &event, 1, timeout);
  if (got < 0 && errno != EINTR) return fail_errno("wait for events");
  if (got <= 0) return false;
  if (event.data.u64 == kAttachTag)
    on_attach();
  else if (event.data.u64 == kChannelTag)
    on_channel(kRequestsPerEvent);
  else
    on_nic_event(event.data.u64, event.events);
  pump();
  return true;
}

int Vault::timeout() const {
  if (!retry_at_) return -1;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(*retry_at_ - Clock::now()).count();
  return left > 0 ? static_cast<int>(left) : 0;
}

bool Vault::finished() const {
  return options_.exit_when_empty && was_attached_ && !channel_ && items_.empty() && nics_.empty();
}

// --- tandemd attaches
// -------------------------------------------------------------------------------------------------------

void Vault::on_attach() {
  UniqueFd socket{::accept4(options_.listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)};
  if (!socket) {
    if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) retry_later();
    return;
  }
  if (!may_attach(socket.get())) return refuse(std::move(socket), "only root or the vault's own user may attach");
  // The dead predecessor's last words come first: it may have applied a message and died.
  if (channel_) on_channel(kRequestsOfTheDead);
  if (channel_ && greeted_) return refuse(std::move(socket), "another tandemd is attached");
  if (channel_) detach("never said HELLO");
  channel_.emplace(std::move(socket));
  talking_.emplace(epoll_.get(), channel_->fd(), kChannelTag);
  talking_->set(EPOLLIN);
}

bool Vault::may_attach(int socket) {
  ucred peer{};
  socklen_t size = sizeof peer;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return false;
  return peer.uid == 0 || peer.uid == ::geteuid();
}

void Vault::refuse(UniqueFd socket, const std::string& why) {
  vault_log("refused an attach: " + why);
  FdChannel channel{std::move(socket)};
  const auto text = std::as_bytes(std::span{why});
  if (const auto bytes = encode_vault_message(VaultType::kError, {}, 0, 0, text, 0)) [[maybe_unused]]
    const auto sent = channel.send(*bytes);
}

void Vault::detach(const std::string& why) {
  vault_log("tandemd detached: " + why);
  talking_.reset();
  channel_.reset();
  greeted_ = welcome_told_ = announced_ = false;
  fetch_after_.reset();
  complaints_.clear();
  for (auto& [name, nic] : nics_) nic.told_listening = nic.told_connected = nic.told_event = false;
}

// --- tandemd's requests
// -----------------------------------------------------------------------------------------------------

void Vault::on_channel(int limit) {
  for (int i = 0; i < limit && channel_; ++i) {
    bool would_block = false;
    auto received = receive_to_the_end(*channel_, &would_block);
    if (would_block) return;
    if (!received && received.error().kind != ErrorKind::kInvalid) return detach(received.error().text);
    auto message = received ? decode_vault_message(std::move(*received), VaultSender::kTandemd)
                            : Result<VaultMessage>{tl::make_unexpected(received.error())};
    if (!greeted_) {
      if (!greet(message)) return;
    } else if (!message) {
      complain(message.error().text);
    } else if (!handle(std::move(*message))) {
      complain("HELLO was said before");
    }
  }
}

/// The first message must be a HELLO of our version; otherwise the attach is over.
bool Vault::greet(const Result<VaultMessage>& first) {
  if (first && first->type == VaultType::kHello) {
    greeted_ = was_attached_ = true;
    vault_log("tandemd attached");
    return true;
  }
  const std::string why = first ? "the first message must be HELLO" : first.error().text;
  talking_.reset();
  refuse(channel_->release(), why);
  detach(why);
  return false;
}

bool Vault::handle(VaultMessage message) {
  const auto nic = nics_.find(message.name);
  switch (message.type) {
    case VaultType::kPut:
      put(std::move(message));
      return true;
    case VaultType::kDelete:
      items_.erase(message.name);
      return true;
    case VaultType::kDeletePrefix:
      delete_prefix(message.name);
      return true;
    case VaultType::kFetch:
      fetch_after_.emplace();
      return true;
    case VaultType::kListen:
      listen(std::move(message));
      return true;
    case VaultType::kApplied:
      applied(std::move(message));
      return true;
    case VaultType::kUnlisten:
      if (nic == nics_.end()) return true;
      if (nic->second.front_end) count_close(nic->first, CloseReason::kAsked);
      // The listener first: nobody may connect once the front end has seen the end.
      nic->second.accepting.reset();
      nic->second.listener.reset();
      nics_.erase(nic);
      return true;
    case VaultType::kClose:
      if (nic != nics_.end() && nic->second.front_end && nic->second.connection_id == message.connection)
        close_front_end(nic->first, nic->second, CloseReason::kAsked);
      return true;
    default:
      return false;  // HELLO: decode let nothing else through
  }
}

void Vault::put(VaultMessage message) {
  items_.insert_or_assign(std::move(message.name), Item{std::move(message.body), std::move(message.fds)});
}

void Vault::delete_prefix(const std::string& prefix) {
  auto item = items_.lower_bound(prefix);
  while (item != items_.end() && item->first.starts_with(prefix)) item = items_.erase(item);
}

/// A nic that exists keeps its connection and gets a new listening socket.
void Vault::listen(VaultMessage message) {
  UniqueFd listener = std::move(message.fds.front());
  if (!is_listening_stream(listener.get()))
    return complain("LISTEN " + message.name + ": the descriptor is not a listening SOCK_STREAM unix socket");
  if (!set_nonblocking(listener.get()))
    return complain("LISTEN " + message.name + ": cannot make the socket non-blocking");
  const auto [entry, is_new] = nics_.try_emplace(message.name);
  Nic& nic = entry->second;
  if (is_new) nic.id = next_nic_++;
  nic.accepting.reset();
  nic.listener = std::move(listener);
  nic.accepting.emplace(epoll_.get(), nic.listener.get(), nic.id << 1);
  nic.told_listening = true;
  watch(nic);
}

/// The one place where a message leaves the vault's hands. A sequence that is not the outstanding one was applied
/// before.
void Vault::applied(VaultMessage message) {
  const auto entry = nics_.find(message.name);
  if (entry == nics_.end()) return;
  Nic& nic = entry->second;
  if (!nic.event || nic.event->sequence != message.sequence) return;
  const VaultType done = nic.event->type;
  nic.event.reset();
  nic.told_event = false;
  if (done == VaultType::kDisconnected) {
    nic.connection_id = 0;
    nic.told_connected = false;
    return watch(nic);
  }
  UniqueFd reply_fd = message.fds.empty() ? UniqueFd{} : std::move(message.fds.front());
  if (!message.body.empty() && !nic.front_end->reply(std::move(message.body), std::move(reply_fd)))
    return close_front_end(entry->first, nic, nic.front_end->reason());
  watch(nic);
}

void Vault::complain(const std::string& text) {
  vault_log("refused a request: " + text);
  if (complaints_.size() < kMaxComplaints) complaints_.push_back(text);
}

// --- telling tandemd
// --------------------------------------------------------------------------------------------------------

/// Says what is unsaid while the channel takes it; the rest when it is writable again.
void Vault::pump() {
  if (!channel_ || !greeted_) return;
  Told told = Told::kSaid;
  while (told == Told::kSaid) told = tell_next();
  const bool wait_for_room = told == Told::kStuck && !retry_at_;
  talking_->set(std::uint32_t{EPOLLIN} | (wait_for_room ? std::uint32_t{EPOLLOUT} : 0u));
}

Vault::Told Vault::tell_next() {
  Told told = Told::kAllSaid;
  if (!welcome_told_) {
    told = tell(VaultType::kWelcome);
    welcome_told_ = told == Told::kSaid;
    return told;
  }
  if (!complaints_.empty()) {
    told = tell(VaultType::kError, {}, 0, 0, std::as_bytes(std::span{complaints_.front()}));
    if (told == Told::kSaid) complaints_.pop_front();
    return told;
  }
  for (auto& [name, nic] : nics_)
    if ((told = tell_nic(name, nic)) != Told::kAllSaid) return told;
  if (!announced_) {
    told = tell(VaultType::kAnnounced);
    announced_ = told == Told::kSaid;
    return told;
  }
  return fetch_after_ ? tell_item() : Told::kAllSaid;
}

Vault::Told Vault::tell_nic(const std::string& name, Nic& nic) {
  Told told = Told::kAllSaid;
  if (!nic.told_listening) {
    told = tell(VaultType::kListening, name);
    nic.told_listening = told == Told::kSaid;
  } else if (nic.connection_id != 0 && !nic.told_connected) {
    std::vector<int> connection;
    if (nic.front_end) connection.push_back(nic.front_end->fd());
    told = tell(VaultType::kConnected, name, nic.connection_id, 0, {}, connection);
    nic.told_connected = told == Told::kSaid;
  } else if (nic.event && !nic.told_event) {
    const Event& event = *nic.event;
    told = tell(event.type, name, nic.connection_id, event.sequence, event.frame.bytes, numbers_of(event.frame.fds));
    nic.told_event = told == Told::kSaid;
  }
  return told;
}

/// The next item by key, so that PUT and DELETE in between do no harm; END after the last.
Vault::Told Vault::tell_item() {
  const auto item = items_.upper_bound(*fetch_after_);
  if (item == items_.end()) {
    const Told told = tell(VaultType::kEnd);
    if (told == Told::kSaid) fetch_after_.reset();
    return told;
  }
  const Told told = tell(VaultType::kItem, item->first, 0, 0, item->second.blob, numbers_of(item->second.fds));
  if (told == Told::kSaid) fetch_after_ = item->first;
  return told;
}

Vault::Told Vault::tell(VaultType type, std::string_view name, std::uint64_t connection, std::uint64_t sequence,
                        std::span<const std::byte> body, const std::vector<int>& fds) {
  if (!writable(channel_->fd())) return Told::kStuck;
  const auto bytes = encode_vault_message(type, name, connection, sequence, body, fds.size());
  const Status sent = bytes ? channel_->send(*bytes, fds) : Status{tl::make_unexpected(bytes.error())};
  if (sent) return Told::kSaid;
  // Gone: the end of the stream will be read, after what it still holds. Otherwise too many descriptors are in flight
  // (ETOOMANYREFS, unix(7)) or memory is short.
  if (sent.error().kind != ErrorKind::kGone) {
    vault_log(sent.error().text);
    retry_later();
  }
  return Told::kStuck;
}

// --- front ends
// -------------------------------------------------------------------------------------------------------------

void Vault::on_nic_event(std::uint64_t tag, std::uint32_t events) {
  for (auto& [name, nic] : nics_) {
    if (nic.id != tag >> 1) continue;
    if ((tag & 1) == 0) return accept_front_end(name, nic);
    if (!nic.front_end) return;
    if ((events & EPOLLOUT) != 0 && !nic.front_end->flush()) return close_front_end(name, nic, nic.front_end->reason());
    if (!nic.event)
      read_front_end(name, nic);
    else
      watch(nic);
    return;
  }
}

void Vault::accept_front_end(const std::string& name, Nic& nic) {
  if (nic.connection_id != 0) return;
  UniqueFd socket{::accept4(nic.listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)};
  if (!socket) {
    if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) return;
    vault_log(fail_errno("accept a front end of " + name, "raise the descriptor limit (ulimit -n)").value().text);
    retry_later();
    return watch(nic);
  }
  nic.connection_id = next_connection_++;
  nic.told_connected = false;
  nic.front_end.emplace(std::move(socket));
  nic.reading.emplace(epoll_.get(), nic.front_end->fd(), nic.id << 1 | 1);
  watch(nic);
}

void Vault::read_front_end(const std::string& name, Nic& nic) {
  switch (nic.front_end->read()) {
    case FrontEnd::Progress::kIncomplete:
      break;
    case FrontEnd::Progress::kClosed:
      return close_front_end(name, nic, nic.front_end->reason());
    case FrontEnd::Progress::kComplete:
      nic.event.emplace(Event{VaultType::kMessage, next_sequence_++, nic.front_end->take()});
      nic.told_event = false;
      break;
  }
  watch(nic);
}

/// The connection ends; the event that says so replaces a message that was not applied.
void Vault::close_front_end(const std::string& name, Nic& nic, CloseReason reason) {
  count_close(name, reason);
  nic.reading.reset();
  nic.front_end.reset();
  nic.event.emplace(Event{VaultType::kDisconnected, next_sequence_++, {}});
  nic.told_event = false;
  watch(nic);
}

/// Logs the 1st, 2nd, 4th, 8th ... of each reason: a front end in a loop must not flood the log.
void Vault::count_close(const std::string& name, CloseReason reason) {
  const std::uint64_t count = ++closed_[static_cast<std::size_t>(reason)];
  if (!std::has_single_bit(count)) return;
  vault_log("nic " + name + ": connection over: " + close_reason_text(reason) + " (" + std::to_string(count) +
            " times since start)");
}

/// What a nic waits for follows from its state alone: nothing is read while a message is in tandemd's hands.
void Vault::watch(Nic& nic) {
  nic.accepting->set(nic.connection_id == 0 && !retry_at_ ? std::uint32_t{EPOLLIN} : 0u);
  if (!nic.front_end) return;
  nic.reading->set((nic.event ? 0u : std::uint32_t{EPOLLIN}) |
                   (nic.front_end->has_unwritten() ? std::uint32_t{EPOLLOUT} : 0u));
}

void Vault::retry_later() {
  if (!retry_at_) retry_at_ = Clock::now() + kRetryDelay;
  attaching_->set(0);
}

void Vault::retry_now() {
  retry_at_.reset();
  attaching_->set(EPOLLIN);
  for (auto& [name, nic] : nics_) watch(nic);
  pump();
}

}  // namespace tandem
