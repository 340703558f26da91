// SPDX-License-Identifier: Apache-2.0
// A network of its own for each test: a namespace with a bridge, and a raw socket behind one of its ports as the
// outside world.
#pragma once

#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <sys/socket.h>

#include <cstring>
#include <string>
#include <vector>

#include "recovery/uplink/uplink.hpp"
#include "tests/fence/fixture.hpp"

namespace tandem::test {

inline const std::string kUplinkPins = "/sys/fs/bpf/tandem/test/uplink";
inline const std::string kMac = "52:54:00:12:34:56";
using Frame = std::vector<std::uint8_t>;

inline bool run(const std::string& command) { return std::system((command + " >/dev/null 2>&1").c_str()) == 0; }

/// A network namespace of this process's own, and a /sys that shows it (its queues' settings are there).
inline bool enter_network() {
  return ::unshare(CLONE_NEWNET) == 0 && run("mount -t sysfs sysfs /sys") && run("mount -t bpf bpf /sys/fs/bpf");
}

/// Why uplinks cannot be tested here; empty if they can.
inline std::string prepare_network() {
  if (std::string reason = prepare_host(); !reason.empty()) return reason;
  if (!enter_network()) return "needs network namespaces (CONFIG_NET_NS)";
  if (!run("ip link add br0 type bridge") || !run("ip link del br0")) return "needs the ip command and bridges";
  const UniqueFd socket{::socket(AF_XDP, SOCK_RAW, 0)};
  return socket ? std::string{} : std::string{"needs AF_XDP (CONFIG_XDP_SOCKETS)"};
}

#define SKIP_UNLESS_UPLINK()                                     \
  do {                                                           \
    const std::string reason_ = tandem::test::prepare_network(); \
    if (!reason_.empty()) TANDEM_SKIP(reason_);                  \
  } while (false)

/// br0 with port host0p, whose other end host0 is the outside.
inline void make_bridge(const std::string& mtu = "1500") {
  REQUIRE(run("ip link add br0 mtu " + mtu + " type bridge"));
  REQUIRE(run("ip link add host0 mtu " + mtu + " type veth peer name host0p mtu " + mtu));
  REQUIRE(run("ip link set host0p master br0 up"));
  REQUIRE(run("ip link set br0 up"));
  REQUIRE(run("ip link set host0 up"));
  // Carriers come from a kernel work item; until then the port drops.
  REQUIRE(wait_until([] { return run("bridge link show dev host0p | grep -q 'state forwarding'"); }));
}

inline UplinkConfig bridge_config(std::uint32_t queue_pairs = 1) {
  UplinkConfig config;
  config.name = "br0";
  config.mac = kMac;
  config.queue_pairs = queue_pairs;
  config.instance = "test";
  config.pin_dir = kUplinkPins;
  return config;
}

/// A veth eth9 plays the hardware: it has channels, and native XDP if its other end, host0, which is the outside, has
/// no more queues than the uplink (else generic).
inline void make_dev(unsigned outside_queues = 4) {
  const std::string outside = std::to_string(outside_queues);
  REQUIRE(run("ip link add eth9 numrxqueues 4 numtxqueues 4 type veth peer name host0 numrxqueues " + outside +
              " numtxqueues " + outside));
  // No frames but the test's: neither end speaks IPv6 by itself.
  run("for end in eth9 host0; do echo 1 > /proc/sys/net/ipv6/conf/$end/disable_ipv6; done");
  REQUIRE(run("ip link set host0 up"));
}

inline UplinkConfig dev_config(std::uint32_t queue_pairs = 1) {
  UplinkConfig config = bridge_config(queue_pairs);
  config.kind = UplinkKind::kDev;
  config.name = "eth9";
  return config;
}

inline Uplink open_uplink(const UplinkConfig& config) {
  auto uplink = Uplink::open(config);
  if (!uplink) FAIL(uplink.error().text);
  return std::move(*uplink);
}

constexpr std::uint16_t kTestProtocol = 0x88b5;  // IEEE: local experimental

/// A numbered frame to the guest's side.
inline Frame numbered(std::uint32_t number, std::size_t size = 64) {
  Frame frame(size);
  const std::uint8_t header[] = {
      0x52, 0x54, 0, 0x12, 0x34, 0x56, 2, 0, 0, 0, 0, 1, kTestProtocol >> 8, kTestProtocol & 0xff};
  std::memcpy(frame.data(), header, sizeof header);
  std::memcpy(frame.data() + sizeof header, &number, sizeof number);
  return frame;
}

inline bool is_numbered(const std::uint8_t* data, std::size_t size) {
  return size >= 18 && data[12] == (kTestProtocol >> 8) && data[13] == (kTestProtocol & 0xff);
}

inline std::uint32_t number_of(const std::uint8_t* data) {
  std::uint32_t number = 0;
  std::memcpy(&number, data + ETH_HLEN, sizeof number);
  return number;
}

/// A packet socket on one netdev. It sees the test's own protocol only, and not what it sent.
class RawSocket {
 public:
  explicit RawSocket(const char* netdev) : socket_(::socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0)) {
    const int bytes = 64 << 20;
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes);
    const int one = 1;
    ::setsockopt(socket_.get(), SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof one);
    sockaddr_ll address{};
    address.sll_family = AF_PACKET;
    address.sll_protocol = htons(kTestProtocol);
    address.sll_ifindex = static_cast<int>(::if_nametoindex(netdev));
    REQUIRE(::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  }
  void send(const Frame& frame) const {
    const auto sent = ::send(socket_.get(), frame.data(), frame.size(), 0);
    if (sent != static_cast<ssize_t>(frame.size())) FAIL("send on the raw socket: " << std::strerror(errno));
  }
  /// Empty when nothing came within the failsafe time.
  [[nodiscard]] Frame receive(int timeout_ms = 10'000) const {
    pollfd waiting{socket_.get(), POLLIN, 0};
    if (::poll(&waiting, 1, timeout_ms) != 1) return {};
    Frame frame(4096);
    const auto got = ::recv(socket_.get(), frame.data(), frame.size(), 0);
    frame.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
    return frame;
  }

 private:
  UniqueFd socket_;
};

}  // namespace tandem::test
