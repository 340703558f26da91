// SPDX-License-Identifier: Apache-2.0
// Batches over a packet socket.
#include "tests/support/load_outside.hpp"

#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>

#include <catch2/catch.hpp>

namespace tandem::test {

LoadOutside::LoadOutside(const char* netdev)
    : socket_(::socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) {
  REQUIRE(socket_);
  const int bytes = 64 << 20, one = 1;
  ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes);
  ::setsockopt(socket_.get(), SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes);
  ::setsockopt(socket_.get(), SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof one);
  sockaddr_ll address{};
  address.sll_family = AF_PACKET;
  address.sll_protocol = htons(ETH_P_IP);
  address.sll_ifindex = static_cast<int>(::if_nametoindex(netdev));
  REQUIRE(::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  for (std::size_t i = 0; i < kBatch; ++i) {
    send_pieces_[i] = {send_buffers_[i].data(), 0};
    receive_pieces_[i] = {receive_buffers_[i].data(), kRoom};
    send_messages_[i].msg_hdr.msg_iov = &send_pieces_[i];
    receive_messages_[i].msg_hdr.msg_iov = &receive_pieces_[i];
    send_messages_[i].msg_hdr.msg_iovlen = receive_messages_[i].msg_hdr.msg_iovlen = 1;
  }
}

void LoadOutside::queue(std::size_t length) { send_pieces_[queued_++].iov_len = length; }

void LoadOutside::flush() {
  for (std::size_t done = 0; done < queued_;) {
    const int sent =
        ::sendmmsg(socket_.get(), send_messages_.data() + done, static_cast<unsigned>(queued_ - done), MSG_DONTWAIT);
    if (sent > 0) {
      done += static_cast<std::size_t>(sent);
    } else if (errno == EAGAIN || errno == ENOBUFS) {
      pollfd wait{socket_.get(), POLLOUT, 0};
      ::poll(&wait, 1, 1);
    } else if (errno != EINTR) {
      ++send_errors_;
      ++done;
    }
  }
  queued_ = 0;
}

std::size_t LoadOutside::receive(const std::function<void(std::span<const std::byte>)>& take) {
  std::size_t frames = 0;
  // Bounded, so that whoever sends at the same time gets its turn.
  for (int batch = 0; batch < 8; ++batch) {
    const int got = ::recvmmsg(socket_.get(), receive_messages_.data(), kBatch, MSG_DONTWAIT, nullptr);
    if (got <= 0) break;
    for (int i = 0; i < got; ++i) {
      const auto index = static_cast<std::size_t>(i);
      take({receive_buffers_[index].data(), receive_messages_[index].msg_len});
    }
    frames += static_cast<std::size_t>(got);
    if (got < static_cast<int>(kBatch)) break;
  }
  return frames;
}

std::uint64_t LoadOutside::take_drops() {
  tpacket_stats statistics{};
  socklen_t size = sizeof statistics;
  if (::getsockopt(socket_.get(), SOL_PACKET, PACKET_STATISTICS, &statistics, &size) != 0) return 0;
  return statistics.tp_drops;
}

}  // namespace tandem::test
