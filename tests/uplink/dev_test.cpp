// SPDX-License-Identifier: Apache-2.0
// dev=: a whole netdev, taken and given back as it was.
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
  CHECK(refused.error().text.find(because) != std::string::npos);
}

std::string shown(const std::string& command) {
  std::string text;
  FILE* pipe = ::popen(command.c_str(), "r");
  for (int c = std::fgetc(pipe); c != EOF; c = std::fgetc(pipe)) text += static_cast<char>(c);
  ::pclose(pipe);
  return text;
}

}  // namespace

TEST_CASE("a netdev serves as uplink and is given back as it was") {
  SKIP_UNLESS_UPLINK();
  make_dev();
  const auto before = channels("eth9");
  REQUIRE_OK(before);
  const std::string features_before = shown("ethtool -k eth9");
  for (const std::uint32_t pairs : {1u, 3u}) {
    Uplink uplink = open_uplink(dev_config(pairs));
    CHECK(channels("eth9")->rx_queues() == pairs);
    CHECK(shown("ip -d link show eth9").find("promiscuity 1") != std::string::npos);
    CHECK(uplink.keep_fds().size() == 1);
    std::vector<XskUser> users;
    for (std::size_t i = 0; i < pairs; ++i)
      users.push_back(std::move(
          *XskUser::map(uplink.descriptions()[i], uplink.descriptors()[2 * i], uplink.descriptors()[2 * i + 1])));
    const RawSocket outside{"host0"};
    for (std::uint32_t number = 0; number < 100; ++number) {
      outside.send(numbered(number));
      bool arrived = false;
      REQUIRE(wait_until([&] {
        for (XskUser& user : users)
          user.receive([&](std::uint32_t, const std::uint8_t* data, std::size_t size) {
            arrived = arrived || (is_numbered(data, size) && number_of(data) == number);
          });
        return arrived;
      }));
      const Frame frame = numbered(number);
      XskUser& sender = users[number % pairs];
      REQUIRE(sender.post(frame.data(), frame.size()));
      sender.flush();
      REQUIRE(outside.receive().size() == frame.size());
    }
    REQUIRE_OK(uplink.check());
    REQUIRE_OK(uplink.close());
    CHECK(channels("eth9")->rx_queues() == before->rx_queues());
    CHECK(shown("ip -d link show eth9").find("promiscuity 0") != std::string::npos);
    CHECK(shown("ip link show up").find("eth9@") == std::string::npos);
    CHECK(shown("ethtool -k eth9") == features_before);
    CHECK(::access(kUplinkPins.c_str(), F_OK) != 0);
  }
}

TEST_CASE("a netdev that somebody else uses is refused") {
  SKIP_UNLESS_UPLINK();
  make_dev();
  UplinkConfig config = dev_config();
  config.name = "lo";
  refuse(config, "loopback");
  config.name = "eth8";
  refuse(config, "does not exist");
  refuse(dev_config(5), "queues='4'");
  REQUIRE(run("ip link set eth9 up && ip addr add 192.0.2.9/24 dev eth9"));
  refuse(dev_config(), "address");
  config = dev_config();
  config.pass_host_traffic = true;
  CHECK(Uplink::open(config));
  REQUIRE(run("ip addr flush dev eth9"));
  REQUIRE(run("ip link add br0 type bridge && ip link set eth9 master br0"));
  refuse(dev_config(), "nomaster");
  config = dev_config();
  config.name = "br0";
  refuse(config, "bridge=");
}

TEST_CASE("two uplinks cannot share a netdev") {
  SKIP_UNLESS_UPLINK();
  make_dev();
  const Uplink first = open_uplink(dev_config());
  UplinkConfig config = dev_config();
  config.mac = "52:54:00:99:99:99";
  refuse(config, "XDP program");
  // The failed one has not undone anything of the first.
  CHECK(shown("ip -d link show eth9").find("promiscuity 1") != std::string::npos);
  CHECK(::access((kUplinkPins + "/eth9/link").c_str(), F_OK) == 0);
}

TEST_CASE("with a MAC filter the netdev takes all multicast besides") {
  SKIP_UNLESS_UPLINK();
  make_dev();
  UplinkConfig config = dev_config();
  config.promiscuous = false;
  const Uplink uplink = open_uplink(config);
  // veth has no unicast filter, so the kernel itself falls back to promiscuous mode for the MAC; real drivers do not.
  CHECK(shown("ip -d link show eth9").find("allmulti 1") != std::string::npos);
}
