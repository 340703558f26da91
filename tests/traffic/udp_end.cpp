// SPDX-License-Identifier: Apache-2.0
// Paced sending and checked receiving of numbered datagrams.
#include "tests/traffic/udp_end.hpp"

#include <arpa/inet.h>
#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>

#include <array>
#include <cstring>
#include <ctime>
#include <memory>

#include "tests/traffic/datagram.hpp"
#include "tests/traffic/net.hpp"

namespace tandem::traffic {
namespace {

// Seconds of traffic at the default pace: the receiving socket is never the place where something is lost.
constexpr int kBufferBytes = 32 << 20;
constexpr std::int64_t kSecond = 1'000'000'000;
// A sender that was not scheduled catches up for at most this long, so that it never makes a burst that overruns a
// ring.
constexpr std::int64_t kMaxCatchUp = 20'000'000;

Result<UniqueFd> open_flow(const sockaddr_in& peer, std::uint16_t port) {
  const std::string doing = "open UDP flow on port " + std::to_string(port);
  UniqueFd socket{::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)};
  if (!socket) return fail_errno(doing);
  if (::setsockopt(socket.get(), SOL_SOCKET, SO_RCVBUFFORCE, &kBufferBytes, sizeof kBufferBytes) != 0)
    return fail_errno(doing + ": enlarge the receive buffer", "run as root");
  const int on = 1;
  // Without IP_RECVERR Linux reports a full device queue as success and the datagram would count as sent.
  ::setsockopt(socket.get(), IPPROTO_IP, IP_RECVERR, &on, sizeof on);
  ::setsockopt(socket.get(), SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
  ::setsockopt(socket.get(), SOL_SOCKET, SO_RXQ_OVFL, &on, sizeof on);
  sockaddr_in local{};
  local.sin_family = AF_INET;
  local.sin_port = htons(port);
  sockaddr_in remote = peer;
  remote.sin_port = htons(port);
  if (::bind(socket.get(), reinterpret_cast<const sockaddr*>(&local), sizeof local) != 0 ||
      ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&remote), sizeof remote) != 0)
    return fail_errno(doing);
  return socket;
}

/// Keeps the calling thread on the processor it runs on: a sender that moves between processors can overtake its own
/// datagrams in the host's per-processor packet queues, long before they reach what is under test.
void stay_on_this_processor() {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<std::size_t>(::sched_getcpu()), &set);
  ::sched_setaffinity(0, sizeof set, &set);
}

void discard_pending_error(int socket) {
  std::array<char, 256> data;
  std::array<char, 512> control;
  iovec part{data.data(), data.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ::recvmsg(socket, &message, MSG_ERRQUEUE | MSG_DONTWAIT);
}

}  // namespace

Result<std::unique_ptr<UdpEnd>> UdpEnd::open(const FlowSetup& setup) {
  std::unique_ptr<UdpEnd> end{new UdpEnd{setup}};
  for (std::uint32_t flow = 0; flow < setup.flows; ++flow) {
    auto socket = open_flow(setup.peer, static_cast<std::uint16_t>(setup.base_port + flow));
    if (!socket) return tl::make_unexpected(std::move(socket.error()));
    end->sockets_.push_back(std::move(*socket));
  }
  end->receive_thread_ = std::jthread{[raw = end.get()](const std::stop_token& stop) { raw->receive_loop(stop); }};
  return end;
}

UdpEnd::UdpEnd(const FlowSetup& setup) : setup_(setup), drops_seen_(setup.flows) {
  sender_.sent.resize(setup.flows);
  receiver_.ledgers.resize(setup.flows);
  arrivals_.reserve(1u << 16);
}

UdpEnd::~UdpEnd() { stop(); }

void UdpEnd::send() {
  send_thread_ = std::jthread{[this](const std::stop_token& stop) { send_loop(stop); }};
}

void UdpEnd::stop_sending() {
  send_thread_.request_stop();
  if (send_thread_.joinable()) send_thread_.join();
}

void UdpEnd::stop() {
  stop_sending();
  receive_thread_.request_stop();
  if (receive_thread_.joinable()) receive_thread_.join();
}

void UdpEnd::send_loop(const std::stop_token& stop) {
  stay_on_this_processor();
  ::prctl(PR_SET_TIMERSLACK, 1);
  const std::int64_t interval = kSecond / setup_.rate;
  std::int64_t due = now_ns();
  std::uint32_t flow = 0;
  while (!stop.stop_requested()) {
    const timespec until{due / kSecond, due % kSecond};
    ::clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr);
    if (send_one(flow)) flow = (flow + 1) % setup_.flows;
    due = std::max(due + interval, now_ns() - kMaxCatchUp);
  }
}

bool UdpEnd::send_one(std::uint32_t flow) {
  std::array<std::byte, kMaxDatagram> buffer;
  const std::uint64_t sequence = sender_.sent[flow];  // only this thread writes it
  const std::size_t size = compose(buffer, flow, sequence, static_cast<std::uint64_t>(now_ns()));
  const bool accepted = ::send(sockets_[flow].get(), buffer.data(), size, MSG_DONTWAIT) >= 0;
  const std::lock_guard guard{lock_};
  if (accepted)
    ++sender_.sent[flow];
  else
    ++sender_.refused;
  return accepted;
}

void UdpEnd::receive_loop(const std::stop_token& stop) {
  std::vector<pollfd> waiting;
  for (const UniqueFd& socket : sockets_) waiting.push_back({socket.get(), POLLIN, 0});
  while (!stop.stop_requested()) {
    if (::poll(waiting.data(), waiting.size(), 50) <= 0) continue;
    // The kernel stamps arrivals with CLOCK_REALTIME; the two clocks are compared anew each time.
    const std::int64_t realtime_to_monotonic = now_ns() - now_ns(CLOCK_REALTIME);
    for (std::uint32_t flow = 0; flow < waiting.size(); ++flow) {
      if ((waiting[flow].revents & POLLERR) != 0) discard_pending_error(waiting[flow].fd);
      if ((waiting[flow].revents & POLLIN) != 0) receive_ready(flow, realtime_to_monotonic);
    }
  }
}

void UdpEnd::receive_ready(std::uint32_t flow, std::int64_t realtime_to_monotonic) {
  for (int budget = 0; budget < 64; ++budget) {
    std::array<std::byte, kMaxDatagram + 1> buffer;
    alignas(cmsghdr) std::array<char, 128> control;
    iovec part{buffer.data(), buffer.size()};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    const ssize_t got = ::recvmsg(sockets_[flow].get(), &message, MSG_DONTWAIT);
    if (got < 0) return;

    Arrival arrival{now_ns(), 0};
    std::uint32_t drops = static_cast<std::uint32_t>(drops_seen_[flow]);
    for (cmsghdr* item = CMSG_FIRSTHDR(&message); item != nullptr; item = CMSG_NXTHDR(&message, item)) {
      if (item->cmsg_level != SOL_SOCKET) continue;
      if (item->cmsg_type == SCM_TIMESTAMPNS) {
        timespec stamp;
        std::memcpy(&stamp, CMSG_DATA(item), sizeof stamp);
        arrival.time_ns = stamp.tv_sec * kSecond + stamp.tv_nsec + realtime_to_monotonic;
      } else if (item->cmsg_type == SO_RXQ_OVFL) {
        std::memcpy(&drops, CMSG_DATA(item), sizeof drops);
      }
    }
    const auto header = inspect(std::span{buffer}.first(static_cast<std::size_t>(got)), flow);
    const std::lock_guard guard{lock_};
    receiver_.socket_drops += drops - drops_seen_[flow];
    drops_seen_[flow] = drops;
    if (!header || !receiver_.ledgers[flow].enter(header->sequence)) {
      ++receiver_.corrupt;
      continue;
    }
    arrival.flow_and_sequence = std::uint64_t{flow} << 48 | header->sequence;
    arrivals_.push_back(arrival);
  }
}

SenderTotals UdpEnd::sender_totals() const {
  const std::lock_guard guard{lock_};
  return sender_;
}

ReceiverTotals UdpEnd::receiver_totals() const {
  const std::lock_guard guard{lock_};
  return receiver_;
}

std::uint64_t UdpEnd::received() const {
  const std::lock_guard guard{lock_};
  std::uint64_t sum = 0;
  for (const Ledger& ledger : receiver_.ledgers) sum += ledger.received();
  return sum;
}

}  // namespace tandem::traffic
