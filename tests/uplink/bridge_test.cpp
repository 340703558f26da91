// SPDX-License-Identifier: Apache-2.0
// bridge=: what is refused, what arrives in which form, and how its end is noticed.
#include <netinet/in.h>
#include <netinet/udp.h>

#include <fstream>

#include "tests/uplink/world.hpp"
#include "tests/uplink/xsk_user.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

void refuse(const UplinkConfig& config, const std::string& because) {
  const auto refused = Uplink::open(config);
  REQUIRE_FALSE(refused);
  INFO(refused.error().text);
  CHECK(refused.error().kind == ErrorKind::kInvalid);
  CHECK(refused.error().text.find(because) != std::string::npos);
}

std::uint32_t add_words(const std::uint8_t* data, std::size_t size, std::uint32_t sum) {
  for (std::size_t i = 0; i + 1 < size; i += 2) sum += static_cast<std::uint32_t>(data[i] << 8 | data[i + 1]);
  if (size % 2 != 0) sum += static_cast<std::uint32_t>(data[size - 1] << 8);
  return sum;
}

/// UDP over IPv4 without options in an Ethernet frame: pseudo header and datagram add up to all ones (RFC 768, RFC
/// 1071).
bool udp_checksum_is_right(const std::uint8_t* frame) {
  const std::uint8_t* ip = frame + ETH_HLEN;
  const std::uint8_t* udp = ip + 20;
  const auto length = static_cast<std::size_t>(udp[4] << 8 | udp[5]);
  std::uint32_t sum = add_words(ip + 12, 8, static_cast<std::uint32_t>(IPPROTO_UDP + length));
  sum = add_words(udp, length, sum);
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >> 16);
  return sum == 0xffff && (udp[6] != 0 || udp[7] != 0);
}

std::string read_file(const std::string& path) {
  std::ifstream file{path};
  std::string text;
  std::getline(file, text);
  return text;
}

/// Receives until `wanted` frames that satisfy `matches` were handed to `take`.
bool receive_matching(XskUser& user, std::size_t wanted,
                      const std::function<bool(const std::uint8_t*, std::size_t)>& matches) {
  std::size_t got = 0;
  return wait_until([&] {
    user.receive(
        [&](std::uint32_t, const std::uint8_t* data, std::size_t size) { got += matches(data, size) ? 1 : 0; });
    return got >= wanted;
  });
}

}  // namespace

TEST_CASE("a wrong option is refused with what to change") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  UplinkConfig config = bridge_config();
  config.name = "nobridge";
  refuse(config, "does not exist");
  config.name = "a-name-that-no-netdev-can-have";
  refuse(config, "does not exist");
  config.name = "host0";
  refuse(config, "not a bridge");
  config = bridge_config();
  config.mac = "52:54:00";
  refuse(config, "MAC");
  config = bridge_config();
  config.mtu = 1501;
  refuse(config, "MTU");
  config = bridge_config(0);
  refuse(config, "queue pairs");
  config = bridge_config(65);
  refuse(config, "queue pairs");
  REQUIRE(run("ip link set host0p nomaster"));
  REQUIRE(run("ip link set br0 mtu 9000"));
  refuse(bridge_config(), "3818");
  // Nothing is left of what was tried.
  CHECK(::if_nametoindex("tdm123456a") == 0);
  CHECK(::access(kUplinkPins.c_str(), F_OK) != 0);
}

TEST_CASE("both ends are silent, the port is in the bridge, its transmit offloads are off") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  const Uplink uplink = open_uplink(bridge_config(2));
  CHECK(uplink.netdev() == "tdm123456a");
  CHECK(uplink.port() == "tdm123456b");
  for (const std::string& end : {uplink.netdev(), uplink.port()})
    CHECK(read_file("/proc/sys/net/ipv6/conf/" + end + "/disable_ipv6") == "1");
  auto rtnetlink = Rtnetlink::open();
  REQUIRE_OK(rtnetlink);
  const auto port = rtnetlink->find(uplink.port());
  REQUIRE_OK(port);
  CHECK((*port)->master == ::if_nametoindex("br0"));
  CHECK((*port)->up);
  CHECK((*port)->alias == "tandem:test:" + kMac);
  CHECK((*port)->rx_queues == 2);
  const auto features = netdev_features(uplink.port());
  REQUIRE_OK(features);
  std::size_t known = 0;
  for (const NetdevFeature& feature : *features) {
    for (const char* off :
         {"tx-checksum-ip-generic", "tx-tcp-segmentation", "tx-generic-segmentation", "tx-scatter-gather",
          "tx-tcp6-segmentation", "tx-udp-segmentation", "tx-vlan-hw-insert", "tx-vlan-stag-hw-insert"}) {
      if (feature.name != off) continue;
      INFO(feature.name);
      CHECK_FALSE(feature.active);
      ++known;
    }
  }
  CHECK(known == 8);
  const auto ours = netdev_features(uplink.netdev());
  REQUIRE_OK(ours);
  for (const NetdevFeature& feature : *ours)
    if (feature.name == "rx-gro") CHECK_FALSE(feature.active);
}

TEST_CASE("what the host's stack sends arrives with its checksum done and cut to the MTU") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  REQUIRE(run("ip addr add 192.0.2.1/24 dev host0"));
  REQUIRE(run("ip neigh replace 192.0.2.2 lladdr " + kMac + " dev host0 nud permanent"));
  const Uplink uplink = open_uplink(bridge_config());
  auto user = XskUser::map(uplink.descriptions()[0], uplink.descriptors()[0], uplink.descriptors()[1]);
  REQUIRE_OK(user);
  const UniqueFd socket{::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)};
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(9);
  to.sin_addr.s_addr = htonl(0xc0000202);
  // One send of 5 segments: a super-sized frame (UDP GSO) that leaves its checksum to the netdev.
  const int segment = 1000;
  REQUIRE(::setsockopt(socket.get(), IPPROTO_UDP, 103 /* UDP_SEGMENT */, &segment, sizeof segment) == 0);
  std::vector<char> payload(5000, 'x');
  REQUIRE(::sendto(socket.get(), payload.data(), payload.size(), 0, reinterpret_cast<const sockaddr*>(&to),
                   sizeof to) == 5000);
  bool all_right = true;
  CHECK(receive_matching(*user, 5, [&](const std::uint8_t* data, std::size_t size) {
    const bool ours = size == ETH_HLEN + 20 + 8 + 1000 && data[12] == 8 && data[13] == 0;
    if (ours) all_right = all_right && udp_checksum_is_right(data);
    return ours;
  }));
  CHECK(all_right);
}

TEST_CASE("VLAN tags stay in the frame") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  const Uplink uplink = open_uplink(bridge_config());
  auto user = XskUser::map(uplink.descriptions()[0], uplink.descriptors()[0], uplink.descriptors()[1]);
  REQUIRE_OK(user);
  const RawSocket outside{"host0"};
  for (const std::uint8_t kind : {std::uint8_t{0x81}, std::uint8_t{0x88}}) {
    Frame frame = numbered(7);
    const std::uint8_t tag[] = {kind, kind == 0x81 ? std::uint8_t{0x00} : std::uint8_t{0xa8}, 0x20, 0x64};
    frame.insert(frame.begin() + 2 * ETH_ALEN, std::begin(tag), std::end(tag));
    outside.send(frame);
    CHECK(receive_matching(*user, 1, [&](const std::uint8_t* data, std::size_t size) {
      return size == frame.size() && std::memcmp(data, frame.data(), size) == 0;
    }));
  }
}

TEST_CASE("the end of an uplink in use is noticed and explained") {
  SKIP_UNLESS_UPLINK();
  struct Row {
    const char* command;
    const char* says;
  };
  for (const Row& row :
       {Row{"ip link del tdm123456a", "was removed"}, Row{"ip link del br0", "bridge was removed"},
        Row{"ip link set tdm123456b nomaster", "taken out of the bridge"},
        Row{"ip link set tdm123456b down", "set down"}, Row{"ip link set tdm123456a down", "set down"}}) {
    INFO(row.command);
    REQUIRE(enter_network());
    make_bridge();
    Uplink uplink = open_uplink(bridge_config());
    REQUIRE_OK(uplink.check());
    REQUIRE(run(row.command));
    pollfd waiting{uplink.monitor_fd(), POLLIN, 0};
    CHECK(::poll(&waiting, 1, 10'000) == 1);
    const auto gone = uplink.check();
    REQUIRE_FALSE(gone);
    CHECK(gone.error().kind == ErrorKind::kGone);
    CHECK(gone.error().text.find(row.says) != std::string::npos);
    REQUIRE_OK(uplink.close());
  }
}
