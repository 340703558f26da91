// SPDX-License-Identifier: Apache-2.0
// The owner of the rings is killed again and again in mid-stream; the next one maps them and goes on without a gap.
#include "tests/uplink/world.hpp"
#include "tests/uplink/xsk_user.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

constexpr std::uint32_t kFrames = 20'000;
constexpr std::uint32_t kKills = 10;

/// One entry per RX index: setting it twice, as an heir may, sets the same value.
struct Log {
  std::atomic<std::uint32_t> number_at[kFrames + 4096];
};

void consume(const Uplink& uplink, Log& log) {
  auto user = XskUser::map(uplink.descriptions()[0], uplink.descriptors()[0], uplink.descriptors()[1]);
  if (!user) ::_exit(1);
  for (;;) {
    const auto got = user->receive([&](std::uint32_t index, const std::uint8_t* data, std::size_t size) {
      log.number_at[index % (kFrames + 4096)] = is_numbered(data, size) ? number_of(data) : 0;
    });
    if (got == 0) ::sched_yield();
  }
}

}  // namespace

TEST_CASE("ten owners in a row are killed in mid-stream, and no frame is lost or repeated") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  const Uplink uplink = open_uplink(bridge_config());
  auto indices = XskUser::map(uplink.descriptions()[0], uplink.descriptors()[0], uplink.descriptors()[1]);
  REQUIRE_OK(indices);
  const RawSocket outside{"host0"};
  Shared<Log> log;
  auto owner = std::make_unique<Child>([&] { consume(uplink, *log); });
  std::uint32_t kills = 0;
  std::uint32_t gap_until = 0;  // with the owner dead, this many frames are sent before the heir starts
  for (std::uint32_t number = 1; number <= kFrames; ++number) {
    // At most what veth queues (256) in flight before the ring, and what the ring holds (2048) in it; others' frames
    // (MLD of the bridge) may be among them.
    REQUIRE(wait_until([&] { return number - indices->delivered() < 100 || indices->delivered() > number; }));
    if (owner) REQUIRE(wait_until([&] { return indices->delivered() - indices->consumed() < 500; }));
    outside.send(numbered(number));
    if (owner && kills < kKills && number == (kills + 1) * (kFrames / (kKills + 1))) {
      owner.reset();
      ++kills;
      gap_until = number + 1000;
    }
    if (!owner && number >= gap_until) owner = std::make_unique<Child>([&] { consume(uplink, *log); });
  }
  CHECK(kills == kKills);
  const auto last_seen = [&] {
    const std::uint32_t consumed = indices->consumed();
    for (std::uint32_t back = 1; back <= 64 && back <= consumed; ++back)
      if (log->number_at[(consumed - back) % (kFrames + 4096)] == kFrames) return true;
    return false;
  };
  REQUIRE(wait_until(last_seen));
  std::uint32_t expected = 0;
  for (std::uint32_t index = 0; index != indices->consumed(); ++index) {
    const std::uint32_t number = log->number_at[index];
    if (number != 0) REQUIRE(number == ++expected);
  }
  CHECK(expected == kFrames);
}

TEST_CASE("what one owner posted and never sent, the next one sends") {
  SKIP_UNLESS_UPLINK();
  make_bridge();
  const Uplink uplink = open_uplink(bridge_config());
  const RawSocket outside{"host0"};
  std::uint32_t next = 0;
  for (int owner = 0; owner < 5; ++owner) {
    Child poster([&] {
      auto user = XskUser::map(uplink.descriptions()[0], uplink.descriptors()[0], uplink.descriptors()[1]);
      if (!user) ::_exit(1);
      user->flush();  // the duty of an heir
      for (std::uint32_t number = next; number < next + 100; ++number) {
        Frame frame = numbered(number);
        frame[0] = 2;
        if (!user->post(frame.data(), frame.size())) ::_exit(2);
      }
      ::raise(SIGKILL);
    });
    CHECK(WIFSIGNALED(poster.reap()));
    next += 100;
  }
  auto user = XskUser::map(uplink.descriptions()[0], uplink.descriptors()[0], uplink.descriptors()[1]);
  REQUIRE_OK(user);
  user->flush();
  for (std::uint32_t number = 0; number < next; ++number) {
    const Frame frame = outside.receive();
    REQUIRE(frame.size() == 64);
    REQUIRE(number_of(frame.data()) == number);
  }
  CHECK(outside.receive(0).empty());
}
