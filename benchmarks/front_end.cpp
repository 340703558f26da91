// SPDX-License-Identifier: Apache-2.0
// The start sequence of a front end, and the guest's memory.
#include "benchmarks/front_end.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cstring>

#include "vmm/vhost_user_device.hpp"

namespace tandem::benchmark {

namespace {

using R = VhostUserRequest;

// Where the guest's memory lies in the front end's address space; no mapping of ours, only a number both sides use.
constexpr std::uint64_t kUser = 0x7f1200000000;
constexpr std::uint64_t kGuest = 0x100000000;
constexpr std::uint64_t kWantedFeatures =
    virtio_feature::kVersion1 | virtio_feature::kMrgRxbuf | virtio_feature::kMq | kVhostUserFProtocolFeatures;
constexpr int kReplyLimitMs = 10'000;

tl::unexpected<Error> gone(const std::string& what) { return fail(ErrorKind::kGone, what + ": the back end is gone"); }

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  return address;
}

template <class T>
std::span<const std::byte> bytes_of(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}

}  // namespace

Result<std::unique_ptr<FrontEnd>> FrontEnd::make(std::string path, const FrontEndShape& shape) {
  if (path.size() >= sizeof(sockaddr_un::sun_path))
    return fail(ErrorKind::kInvalid, "use the socket " + path + ": its path is too long");
  std::unique_ptr<FrontEnd> made{new FrontEnd(std::move(path), shape)};
  if (auto memory = made->make_memory(); !memory) return tl::make_unexpected(std::move(memory.error()));
  if (shape.listen)
    if (auto listening = made->listen(); !listening) return tl::make_unexpected(std::move(listening.error()));
  return made;
}

Status FrontEnd::make_memory() {
  test::NicShape nic;
  nic.queue_size = shape_.queue_size;
  nic.slot_size = shape_.slot_size;
  nic.features = kWantedFeatures;
  constexpr std::uint64_t kPage = 4096;
  const std::uint64_t each = (test::GuestNic::bytes(nic) + kPage - 1) / kPage * kPage;
  const std::uint64_t size = each * shape_.queue_pairs;
  memory_ = UniqueFd{::memfd_create("tandem-benchmark-guest", MFD_CLOEXEC | MFD_ALLOW_SEALING)};
  if (!memory_ || ::ftruncate(memory_.get(), static_cast<off_t>(size)) != 0) return fail_errno("make guest memory");
  auto mapping =
      Mapping::map(memory_.get(), size, PROT_READ | PROT_WRITE, 0, "guest memory", MAP_SHARED | MAP_POPULATE);
  if (!mapping) return tl::make_unexpected(std::move(mapping.error()));
  mapping_ = std::move(*mapping);
  space_.add(kGuest, size, mapping_.data());
  for (std::uint32_t pair = 0; pair < shape_.queue_pairs; ++pair) {
    nics_.emplace_back(space_, kGuest + pair * each, nic);
    nics_.back().receive.calls_off(true);
    nics_.back().transmit.calls_off(true);
    nics_.back().post();
  }
  for (std::uint32_t vring = 0; vring < 2 * shape_.queue_pairs; ++vring) {
    kicks_.emplace_back(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    calls_.emplace_back(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!kicks_.back() || !calls_.back()) return fail_errno("make an eventfd", "raise the limit of open files");
  }
  return {};
}

Status FrontEnd::listen() {
  const sockaddr_un address = address_of(path_);
  ::unlink(path_.c_str());
  listener_ = UniqueFd{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  if (!listener_ || ::bind(listener_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      ::listen(listener_.get(), 1) != 0)
    return fail_errno("listen on " + path_);
  return {};
}

Status FrontEnd::connect() {
  Status done;
  if (listener_) {
    socket_ = UniqueFd{::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC)};
    if (!socket_) done = gone("wait for a connection on " + path_);
  } else {
    const sockaddr_un address = address_of(path_);
    socket_ = UniqueFd{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    if (!socket_ || ::connect(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
      done = gone("connect to " + path_);
  }
  if (done) done = converse();
  if (!done) socket_.reset();
  return done;
}

Status FrontEnd::converse() {
  const auto features = ask(R::kGetFeatures);
  if (!features) return tl::make_unexpected(features.error());
  const std::uint64_t common = *features & kWantedFeatures;
  Status step;
  if ((common & kVhostUserFProtocolFeatures) != 0) {
    const auto offered = ask(R::kGetProtocolFeatures);
    if (!offered) return tl::make_unexpected(offered.error());
    step = send(R::kSetProtocolFeatures, bytes_of(*offered & protocol_feature::kMq));
  }
  if (step) step = send(R::kSetOwner, {});
  if (step) step = send(R::kSetFeatures, bytes_of(common));
  struct {
    VhostUserMemoryHeader header{1, 0};
    VhostUserMemoryRegion region;
  } table;
  table.region = {kGuest, mapping_.size(), kUser, 0};
  const int memory[] = {memory_.get()};
  if (step) step = send(R::kSetMemTable, bytes_of(table), memory);
  for (std::uint32_t vring = 0; step && vring < 2 * shape_.queue_pairs; ++vring) step = start_vring(vring);
  // A round trip: everything before has been applied.
  if (step)
    if (const auto settled = ask(R::kGetFeatures); !settled) step = tl::make_unexpected(settled.error());
  return step;
}

Status FrontEnd::start_vring(std::uint32_t vring) {
  const test::GuestQueue& ring = queue(vring);
  const auto user = [](std::uint64_t guest) { return guest - kGuest + kUser; };
  const VhostUserVringAddress address{
      vring, 0, user(ring.place().descriptors), user(ring.place().used), user(ring.place().avail), 0};
  const std::uint64_t index = vring;
  const int call[] = {calls_[vring].get()}, kick_fd[] = {kicks_[vring].get()};
  Status step = send(R::kSetVringNum, bytes_of(VhostUserVringState{vring, ring.size()}));
  // What the last back end did not finish is done again: used.idx is all that outlived it.
  if (step) step = send(R::kSetVringBase, bytes_of(VhostUserVringState{vring, ring.used_index()}));
  if (step) step = send(R::kSetVringAddr, bytes_of(address));
  if (step) step = send(R::kSetVringCall, bytes_of(index), call);
  if (step) step = send(R::kSetVringKick, bytes_of(index), kick_fd);
  if (step) step = send(R::kSetVringEnable, bytes_of(VhostUserVringState{vring, 1}));
  if (step) kick(vring);
  return step;
}

Status FrontEnd::send(R request, std::span<const std::byte> payload, std::span<const int> fds) {
  const auto bytes = make_vhost_user_message(request, 0, payload);
  alignas(cmsghdr) std::byte control[CMSG_SPACE(8 * sizeof(int))] = {};
  iovec data{const_cast<std::byte*>(bytes.data()), bytes.size()};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* entry = CMSG_FIRSTHDR(&message);
    entry->cmsg_level = SOL_SOCKET;
    entry->cmsg_type = SCM_RIGHTS;
    entry->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(entry), fds.data(), fds.size_bytes());
  }
  if (::sendmsg(socket_.get(), &message, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size())) return {};
  return gone("send " + vhost_user_message_name(static_cast<std::uint32_t>(request)));
}

Result<std::uint64_t> FrontEnd::ask(R request) {
  if (auto sent = send(request, {}); !sent) return tl::make_unexpected(std::move(sent.error()));
  struct {
    VhostUserHeader header;
    std::uint32_t value[2];
  } answer;
  std::size_t have = 0;
  while (have < sizeof answer) {
    pollfd wait{socket_.get(), POLLIN, 0};
    if (::poll(&wait, 1, kReplyLimitMs) != 1) return gone("wait for an answer");
    const ssize_t got = ::recv(socket_.get(), reinterpret_cast<std::byte*>(&answer) + have, sizeof answer - have, 0);
    if (got <= 0) return gone("wait for an answer");
    have += static_cast<std::size_t>(got);
  }
  if (answer.header.request != static_cast<std::uint32_t>(request) || answer.header.size != sizeof answer.value)
    return fail(ErrorKind::kInvalid, "an unexpected answer from the back end at " + path_);
  return std::uint64_t{answer.value[1]} << 32 | answer.value[0];
}

void FrontEnd::look() {
  pollfd state{socket_.get(), POLLIN, 0};
  if (::poll(&state, 1, 0) != 1) return;
  std::byte byte{};
  if ((state.revents & (POLLHUP | POLLERR)) != 0 || ::recv(socket_.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0)
    socket_.reset();
}

void FrontEnd::kick(std::uint32_t vring) {
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(kicks_[vring].get(), &one, sizeof one);
}

void FrontEnd::publish_transmit(std::uint32_t pair) {
  nics_[pair].transmit.publish();
  if (nics_[pair].transmit.kick_wanted()) kick(2 * pair + 1);
}

void FrontEnd::publish_receive(std::uint32_t pair) {
  nics_[pair].post();
  if (nics_[pair].receive.kick_wanted()) kick(2 * pair);
}

}  // namespace tandem::benchmark
