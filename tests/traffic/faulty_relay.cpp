// SPDX-License-Identifier: Apache-2.0
// tandem-faulty-relay: copies Ethernet frames between two interfaces and commits one fault on every Nth numbered
// datagram of each direction.
//
// It proves the measuring: whatever it does to the datagrams, the traffic program must notice, in the right column.
#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "common/result.hpp"
#include "common/unique_fd.hpp"
#include "tests/traffic/control.hpp"
#include "tests/traffic/datagram.hpp"

namespace {

using tandem::Result;
using tandem::UniqueFd;
using Frame = std::vector<std::byte>;

constexpr std::size_t kUdpOffset = ETH_HLEN + 20;  // our own senders use no IP options
constexpr std::size_t kPayloadOffset = kUdpOffset + 8;

Result<UniqueFd> open_interface(const char* name) {
  const std::string doing = std::string{"open interface "} + name;
  UniqueFd socket{::socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(ETH_P_ALL))};
  if (!socket) return tandem::fail_errno(doing, "run as root");
  const int on = 1;
  ::setsockopt(socket.get(), SOL_PACKET, PACKET_IGNORE_OUTGOING, &on, sizeof on);
  const int size = 8 << 20;
  ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
  sockaddr_ll address{};
  address.sll_family = AF_PACKET;
  address.sll_protocol = htons(ETH_P_ALL);
  address.sll_ifindex = static_cast<int>(::if_nametoindex(name));
  if (::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    return tandem::fail_errno(doing);
  return socket;
}

std::uint16_t read_u16(const Frame& frame, std::size_t offset) {
  std::uint16_t value = 0;
  std::memcpy(&value, frame.data() + offset, sizeof value);
  return ntohs(value);
}

bool is_numbered_datagram(const Frame& frame) {
  using namespace tandem::traffic;
  if (frame.size() <= kPayloadOffset || read_u16(frame, 12) != ETH_P_IP || frame[23] != std::byte{IPPROTO_UDP})
    return false;
  const std::uint16_t port = read_u16(frame, kUdpOffset + 2);
  return port >= kFlowPort && port < kFlowPort + kMaxFlows;
}

/// One direction of the relay.
class Relay {
 public:
  Relay(std::string fault, unsigned every, int to) : fault_(std::move(fault)), every_(every), to_(to) {}

  void pass(Frame frame) {
    if (fault_ == "none" || !is_numbered_datagram(frame) || ++count_ % every_ != 0) {
      transmit(frame);
      release();
      return;
    }
    if (fault_ == "loss") return;
    if (fault_ == "reordering" && held_.empty()) {
      held_ = std::move(frame);
      return;
    }
    if (fault_ == "corruption") damage(frame);
    transmit(frame);
    if (fault_ == "duplicates") transmit(frame);
  }

 private:
  /// A held frame goes after later ones. The next one may be of another flow, so several go first.
  void release() {
    if (held_.empty() || ++overtaken_ < 8) return;
    transmit(held_);
    held_.clear();
    overtaken_ = 0;
  }

  /// Changes a byte and withdraws the UDP checksum: the kernel lets it pass and only the traffic program can tell.
  static void damage(Frame& frame) {
    frame[kPayloadOffset] ^= std::byte{0xff};
    frame[kUdpOffset + 6] = frame[kUdpOffset + 7] = std::byte{0};
  }

  void transmit(const Frame& frame) const { static_cast<void>(::send(to_, frame.data(), frame.size(), 0)); }

  std::string fault_;
  unsigned every_;
  int to_;
  std::uint64_t count_ = 0;
  Frame held_;
  unsigned overtaken_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fputs("Usage: tandem-faulty-relay INTERFACE INTERFACE none|loss|duplicates|reordering|corruption EVERY\n",
               stderr);
    return 2;
  }
  std::array<UniqueFd, 2> ports;
  for (std::size_t i = 0; i < ports.size(); ++i) {
    auto port = open_interface(argv[i + 1]);
    if (!port) {
      std::fprintf(stderr, "tandem-faulty-relay: %s\n", port.error().text.c_str());
      return 1;
    }
    ports[i] = std::move(*port);
  }
  const auto every = static_cast<unsigned>(std::max(1, std::atoi(argv[4])));
  std::array<Relay, 2> relays{Relay{argv[3], every, ports[1].get()}, Relay{argv[3], every, ports[0].get()}};
  std::puts("ready");
  std::fflush(stdout);
  std::array<std::byte, 65536> buffer;
  for (;;) {
    std::array<pollfd, 2> waiting{pollfd{ports[0].get(), POLLIN, 0}, pollfd{ports[1].get(), POLLIN, 0}};
    if (::poll(waiting.data(), waiting.size(), -1) < 0) continue;
    for (std::size_t i = 0; i < ports.size(); ++i) {
      if ((waiting[i].revents & POLLIN) == 0) continue;
      const ssize_t got = ::recv(ports[i].get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
      if (got > 0) relays[i].pass(Frame(buffer.begin(), buffer.begin() + got));
    }
  }
}
