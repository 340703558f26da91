// SPDX-License-Identifier: Apache-2.0
// Frames through the rings, driven by a process that has nothing but descriptors.
#include <sys/epoll.h>
#include <sys/prctl.h>

#include <algorithm>

#include "tests/uplink/world.hpp"
#include "tests/uplink/xsk_user.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

/// No uid 0, no capabilities, no locked memory, no way back.
void drop_everything() {
  const rlimit none{0, 0};
  ::setrlimit(RLIMIT_MEMLOCK, &none);
  if (::setresgid(65534, 65534, 65534) != 0 || ::setresuid(65534, 65534, 65534) != 0) ::_exit(90);
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) ::_exit(91);
}

/// Sends every numbered frame back to where it came from, on all queues, asleep in epoll in between.
void echo(const std::vector<XskDescription>& descriptions, const std::vector<int>& descriptors) {
  drop_everything();
  std::vector<XskUser> users;
  const UniqueFd epoll{::epoll_create1(EPOLL_CLOEXEC)};
  for (std::size_t i = 0; i < descriptions.size(); ++i) {
    auto user = XskUser::map(descriptions[i], descriptors[2 * i], descriptors[2 * i + 1]);
    if (!user) ::_exit(1);
    users.push_back(std::move(*user));
    epoll_event event{};
    event.events = EPOLLIN;
    if (::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, descriptors[2 * i], &event) != 0) ::_exit(2);
  }
  for (;;) {
    epoll_event event{};
    ::epoll_wait(epoll.get(), &event, 1, -1);
    for (XskUser& user : users) {
      user.receive([&](std::uint32_t, const std::uint8_t* data, std::size_t size) {
        if (!is_numbered(data, size)) return;
        Frame reply(data, data + size);
        std::swap_ranges(reply.begin(), reply.begin() + ETH_ALEN, reply.begin() + ETH_ALEN);
        while (!user.post(reply.data(), reply.size())) user.flush();
      });
      user.flush();
    }
  }
}

}  // namespace

TEST_CASE("frames cross both ways through a process that has only the descriptors") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  const Uplink uplink = open_uplink(bridge_config());
  CHECK(uplink.mtu() == 1500);
  CHECK(uplink.notes().empty());
  Child consumer([&] { echo(uplink.descriptions(), uplink.descriptors()); });
  const RawSocket outside{"host0"};
  constexpr std::uint32_t kFrames = 5000;
  constexpr std::uint32_t kWindow = 64;
  std::uint32_t sent = 0;
  for (std::uint32_t expected = 0; expected < kFrames; ++expected) {
    for (; sent < std::min(kFrames, expected + kWindow); ++sent) outside.send(numbered(sent, 60 + sent % 1455));
    const Frame reply = outside.receive();
    REQUIRE(is_numbered(reply.data(), reply.size()));
    REQUIRE(number_of(reply.data()) == expected);
    REQUIRE(reply.size() == 60 + expected % 1455);
  }
  CHECK(outside.receive(0).empty());
  const auto statistics = uplink.statistics();
  REQUIRE_OK(statistics);
  CHECK(statistics->at(0).rx_dropped + statistics->at(0).rx_ring_full + statistics->at(0).rx_fill_ring_empty == 0);
  CHECK(statistics->at(0).tx_invalid_descs + statistics->at(0).rx_invalid_descs == 0);
}

TEST_CASE("several queue pairs serve one uplink") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  const Uplink uplink = open_uplink(bridge_config(4));
  const auto descriptions = uplink.descriptions();
  REQUIRE(descriptions.size() == 4);
  REQUIRE(uplink.descriptors().size() == 8);
  for (std::uint32_t queue = 0; queue < 4; ++queue) {
    CHECK(descriptions[queue].queue == queue);
    CHECK(descriptions[queue].ifindex == ::if_nametoindex(uplink.netdev().c_str()));
  }
  Child consumer([&] { echo(uplink.descriptions(), uplink.descriptors()); });
  const RawSocket outside{"host0"};
  std::vector<bool> seen(500);
  for (std::uint32_t number = 0; number < seen.size(); ++number) {
    outside.send(numbered(number));
    const Frame reply = outside.receive();
    REQUIRE(reply.size() == 64);
    seen[number_of(reply.data())] = true;
  }
  CHECK(std::all_of(seen.begin(), seen.end(), [](bool one) { return one; }));
}

TEST_CASE("one call sends 32 frames, calling until TX is empty sends all, in order") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  const Uplink uplink = open_uplink(bridge_config());
  const RawSocket outside{"host0"};
  auto user = XskUser::map(uplink.descriptions()[0], uplink.descriptors()[0], uplink.descriptors()[1]);
  REQUIRE_OK(user);
  constexpr std::uint32_t kFrames = 1000;
  for (std::uint32_t number = 0; number < kFrames; ++number) {
    Frame frame = numbered(number);
    std::swap_ranges(frame.begin(), frame.begin() + ETH_ALEN, frame.begin() + ETH_ALEN);
    REQUIRE(user->post(frame.data(), frame.size()));
  }
  const auto flush = user->flush();
  // Before Linux 6.16 the kernel moves the consumer index only when it comes back (net/xdp/xsk.c, xsk_generic_xmit()).
  CHECK((flush.sent_by_first == 32 || flush.sent_by_first == 0));
  CHECK(flush.again >= kFrames / 32);
  for (std::uint32_t number = 0; number < kFrames; ++number) {
    const Frame frame = outside.receive();
    REQUIRE(frame.size() == 64);
    REQUIRE(number_of(frame.data()) == number);
  }
}

TEST_CASE("frames longer than an ordinary one fit when the bridge's MTU asks for it") {
  SKIP_UNLESS_UPLINK();
  for (const auto& [mtu, largest] : {std::pair{"3000", 3000u}, std::pair{"3818", 3818u}}) {
    REQUIRE(enter_network());
    make_bridge(mtu);
    const Uplink uplink = open_uplink(bridge_config());
    CHECK(uplink.descriptions()[0].frame_size == kXskLargeFrame);
    // veth has native XDP up to about 3500 only.
    CHECK(uplink.notes().empty() == (largest == 3000));
    Child consumer([&] { echo(uplink.descriptions(), uplink.descriptors()); });
    const RawSocket outside{"host0"};
    for (std::uint32_t number = 0; number < 100; ++number) {
      outside.send(numbered(number, largest + ETH_HLEN));
      const Frame reply = outside.receive();
      REQUIRE(reply.size() == largest + ETH_HLEN);
      REQUIRE(number_of(reply.data()) == number);
    }
  }
}

TEST_CASE("what nobody consumes is counted as overflow, and traffic goes on after it") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  const Uplink uplink = open_uplink(bridge_config());
  auto user = XskUser::map(uplink.descriptions()[0], uplink.descriptors()[0], uplink.descriptors()[1]);
  REQUIRE_OK(user);
  const RawSocket outside{"host0"};
  std::uint32_t number = 0;
  const auto overflow = [&] {
    const auto statistics = uplink.statistics();
    REQUIRE(statistics);
    return statistics->at(0).rx_ring_full + statistics->at(0).rx_fill_ring_empty + statistics->at(0).rx_dropped;
  };
  while (overflow() == 0 && number < 10'000) outside.send(numbered(number++));
  CHECK(overflow() > 0);
  CHECK(user->delivered() - user->consumed() == kXskRxFrames);
  CHECK(user->receive([](std::uint32_t, const std::uint8_t*, std::size_t) {}) == kXskRxFrames);
  outside.send(numbered(number));
  bool arrived = false;
  CHECK(wait_until([&] {
    user->receive([&](std::uint32_t, const std::uint8_t* data, std::size_t size) {
      arrived = arrived || (is_numbered(data, size) && number_of(data) == number);
    });
    return arrived;
  }));
}
