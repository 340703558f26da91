// SPDX-License-Identifier: Apache-2.0
// Busy polling: who owns the rings runs the netdev's queue, and its interrupts wait.
#include "tests/uplink/world.hpp"
#include "tests/uplink/xsk_user.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

constexpr std::uint64_t kForeverNs = 1'000'000'000'000;

UplinkConfig polled(UplinkConfig config) {
  config.busy_poll = 64;
  return config;
}

int option_of(int socket, int option) {
  int value = -1;
  socklen_t size = sizeof value;
  return ::getsockopt(socket, SOL_SOCKET, option, &value, &size) == 0 ? value : -1;
}

/// Leaves the test as skipped where the kernel cannot poll a veth. It has to say so.
#define SKIP_UNLESS_POLLED(uplink)                                                                      \
  do {                                                                                                  \
    if ((uplink).is_polled_by_owner()) break;                                                           \
    REQUIRE((uplink).notes().size() == 1);                                                              \
    REQUIRE((uplink).notes()[0].find("pair.busy_poll has no effect on eth9: the kernel does not") !=    \
            std::string::npos);                                                                         \
    CHECK(option_of((uplink).descriptors()[0], SO_PREFER_BUSY_POLL) <= 0);                              \
    CHECK_FALSE((uplink).record().deferral_before);                                                     \
    TANDEM_SKIP("needs a kernel that polls a veth busily: Linux 6.4 to 6.12, CONFIG_NET_RX_BUSY_POLL"); \
  } while (false)

}  // namespace

TEST_CASE("busy polling: sockets ask for it, and the netdev gets its interrupts back") {
  SKIP_UNLESS_UPLINK();
  make_dev(1);
  const InterruptDeferral before{7, 12'345};
  REQUIRE_OK(set_interrupt_deferral("eth9", before));
  {
    const Uplink plain = open_uplink(dev_config());
    CHECK_FALSE(plain.is_polled_by_owner());
    CHECK(option_of(plain.descriptors()[0], SO_PREFER_BUSY_POLL) == 0);
    CHECK(*interrupt_deferral("eth9") == before);
    CHECK_FALSE(plain.record().deferral_before);
  }
  std::vector<XskDescription> queues;
  std::vector<UniqueFd> fds;
  UplinkRecord record;
  {
    Uplink uplink = open_uplink(polled(dev_config(2)));
    SKIP_UNLESS_POLLED(uplink);
    CHECK(uplink.notes().empty());
    for (std::size_t i = 0; i < 2; ++i) {
      CHECK((uplink.descriptions()[i].flags & XskDescription::kBusyPoll) != 0);
      CHECK(option_of(uplink.descriptors()[2 * i], SO_PREFER_BUSY_POLL) == 1);
      CHECK(option_of(uplink.descriptors()[2 * i], SO_BUSY_POLL) > 0);
    }
    CHECK(*interrupt_deferral("eth9") == InterruptDeferral{2, kInterruptDelayNs});
    queues = uplink.descriptions();
    for (const std::vector<int>& group : {uplink.descriptors(), uplink.keep_fds()})
      for (const int fd : group) fds.emplace_back(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    record = uplink.record();
    uplink.leave_in_place();
  }
  // Whoever takes it over puts back what there was before the first.
  CHECK(*interrupt_deferral("eth9") == InterruptDeferral{2, kInterruptDelayNs});
  auto adopted = Uplink::adopt(polled(dev_config(2)), record, queues, std::move(fds));
  REQUIRE_OK(adopted);
  CHECK(adopted->is_polled_by_owner());
  REQUIRE_OK(adopted->close());
  CHECK(*interrupt_deferral("eth9") == before);
}

TEST_CASE("busy polling: a call brings the frames that wait, and nothing else does") {
  SKIP_UNLESS_UPLINK();
  make_dev(1);
  const Uplink uplink = open_uplink(polled(dev_config()));
  SKIP_UNLESS_POLLED(uplink);
  const int socket = uplink.descriptors()[0];
  XskUser user = std::move(*XskUser::map(uplink.descriptions()[0], socket, uplink.descriptors()[1]));
  const RawSocket outside{"host0"};
  // The first frame tells the socket which queue is its own; an interrupt brings it.
  outside.send(numbered(0));
  REQUIRE(wait_until([&] { return user.delivered() == 1; }));
  // From here on the kernel would wait for a quarter of an hour.
  REQUIRE_OK(set_interrupt_deferral("eth9", {1, kForeverNs}));
  const auto poll = [&] { return ::recvfrom(socket, nullptr, 0, MSG_DONTWAIT, nullptr, nullptr); };
  REQUIRE(wait_until([&] {
    poll();
    const std::uint32_t before = user.delivered();
    outside.send(numbered(before));
    // Not until interrupts are off does it wait, and not only for a softirq that is late.
    if (user.delivered() == before) ::usleep(20'000);
    return user.delivered() == before;
  }));
  const std::uint32_t before = user.delivered();
  for (std::uint32_t more = 1; more <= 199; ++more) outside.send(numbered(before + more));
  CHECK(user.delivered() == before);
  poll();
  // The budget, and once more when it ends (net/core/dev.c, busy_poll_stop()).
  CHECK(user.delivered() >= before + 64);
  CHECK(user.delivered() <= before + 128);
  poll();
  CHECK(user.delivered() == before + 200);
  std::uint32_t expected = 0;
  user.receive([&](std::uint32_t, const std::uint8_t* data, std::size_t size) {
    CHECK(is_numbered(data, size));
    CHECK(number_of(data) == expected++);
  });
  CHECK(expected == before + 200);
  // Sending polls too.
  outside.send(numbered(expected));
  const Frame frame = numbered(1);
  REQUIRE(user.post(frame.data(), frame.size()));
  user.flush();
  CHECK(outside.receive().size() == frame.size());
  CHECK(user.delivered() == expected + 1);
}

TEST_CASE("busy polling: where it cannot be, a note says so and interrupts go on") {
  SKIP_UNLESS_UPLINK();
  make_dev(1);
  // Above 3500 a veth has generic XDP only.
  REQUIRE(run("ip link set eth9 mtu 3700 && ip link set host0 mtu 3700"));
  {
    const Uplink uplink = open_uplink(polled(dev_config()));
    CHECK_FALSE(uplink.is_polled_by_owner());
    REQUIRE(uplink.notes().size() == 2);
    CHECK(uplink.notes()[1].find("pair.busy_poll has no effect on eth9") != std::string::npos);
    CHECK(*interrupt_deferral("eth9") == InterruptDeferral{});
  }
  REQUIRE(run("ip link set eth9 mtu 1500 && ip link set host0 mtu 1500"));
  // A /sys of another network namespace has no such netdev.
  REQUIRE(run("umount /sys/fs/bpf; umount /sys; mount -t bpf bpf /sys/fs/bpf"));
  const Uplink uplink = open_uplink(polled(dev_config()));
  SKIP_UNLESS_POLLED(uplink);
  REQUIRE(uplink.notes().size() == 1);
  CHECK(uplink.notes()[0].find("/sys must show the network namespace") != std::string::npos);
  CHECK_FALSE(uplink.record().deferral_before);
}
