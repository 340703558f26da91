// SPDX-License-Identifier: Apache-2.0
// Names that are taken, makers that are killed, and what stays behind: nothing.
#include <filesystem>

#include "tests/uplink/world.hpp"
#include "tests/uplink/xsk_user.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

std::size_t count_links() {
  auto rtnetlink = Rtnetlink::open();
  REQUIRE_OK(rtnetlink);
  const auto links = rtnetlink->all();
  REQUIRE_OK(links);
  return links->size();
}

struct Stage {
  std::atomic<bool> ready{false};
};

}  // namespace

TEST_CASE("closing leaves no netdev and no pin") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  const std::size_t before = count_links();
  {
    Uplink uplink = open_uplink(bridge_config());
    CHECK(count_links() == before + 2);
    CHECK(std::filesystem::exists(kUplinkPins + "/tdm123456a/link"));
    Uplink moved{std::move(uplink)};
    REQUIRE_OK(uplink.close());  // what was moved from undoes nothing
    CHECK(count_links() == before + 2);
  }
  CHECK(count_links() == before);
  CHECK_FALSE(std::filesystem::exists("/sys/fs/bpf/tandem"));
}

TEST_CASE("a name that is taken is evaded, a NIC that exists is refused") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  REQUIRE(run("ip link add tdm123456a type bridge"));
  Uplink evading = open_uplink(bridge_config());
  CHECK(evading.netdev() != "tdm123456a");
  CHECK(evading.check());
  REQUIRE_OK(evading.close());
  REQUIRE(run("ip link del tdm123456a && ip link add tdm123456b type bridge"));
  Uplink evading_peer = open_uplink(bridge_config());
  CHECK(evading_peer.port() != "tdm123456b");
  REQUIRE_OK(evading_peer.close());
  REQUIRE(run("ip link del tdm123456b"));

  const Uplink first = open_uplink(bridge_config());
  const auto second = Uplink::open(bridge_config());
  REQUIRE_FALSE(second);
  CHECK(second.error().text.find("own MAC") != std::string::npos);
  // Same last three bytes, another maker's: another NIC with another name.
  UplinkConfig config = bridge_config();
  config.mac = "52:54:01:12:34:56";
  const Uplink other = open_uplink(config);
  CHECK(other.netdev() != first.netdev());
}

TEST_CASE("what a killed maker left is found and removed, and nothing of others") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  const std::size_t before = count_links();
  UplinkConfig others = bridge_config();
  others.instance = "other";
  others.mac = "52:54:00:00:00:01";
  others.pin_dir = "/sys/fs/bpf/tandem/other/uplink";
  Uplink other = open_uplink(others);
  Shared<Stage> stage;
  Child maker([&] {
    auto uplink = Uplink::open(bridge_config(2));
    if (!uplink) ::_exit(1);
    stage->ready = true;
    for (;;) ::pause();
  });
  REQUIRE(wait_until([&] { return stage->ready.load(); }));
  maker.kill(SIGKILL);
  maker.reap();
  // One that died before it could set an alias.
  REQUIRE(run("ip link add tdmabcdefa type veth peer name tdmabcdefb"));
  CHECK(count_links() == before + 6);
  const auto removed = Uplink::remove_stale("test", kUplinkPins);
  REQUIRE_OK(removed);
  CHECK(removed->size() >= 3);
  CHECK(count_links() == before + 2);
  CHECK_FALSE(std::filesystem::exists("/sys/fs/bpf/tandem/test"));
  CHECK(other.check());
  CHECK(Uplink::remove_stale("test", kUplinkPins)->empty());
  CHECK(Uplink::open(bridge_config()));
}

TEST_CASE("traffic flows when the maker is gone, as long as somebody holds the sockets") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  const RawSocket outside{"host0"};
  std::vector<XskDescription> descriptions;
  std::vector<UniqueFd> held;
  {
    Uplink uplink = open_uplink(bridge_config());
    descriptions = uplink.descriptions();
    for (const int fd : uplink.descriptors()) held.push_back(UniqueFd{::fcntl(fd, F_DUPFD_CLOEXEC, 0)});
    uplink.leave_in_place();
  }
  auto user = XskUser::map(descriptions[0], held[0].get(), held[1].get());
  REQUIRE_OK(user);
  outside.send(numbered(42));
  CHECK(wait_until([&] {
    bool arrived = false;
    user->receive([&](std::uint32_t, const std::uint8_t* data, std::size_t size) {
      arrived = arrived || (is_numbered(data, size) && number_of(data) == 42);
    });
    return arrived;
  }));
  REQUIRE_OK(Uplink::remove_stale("test", kUplinkPins));
}
