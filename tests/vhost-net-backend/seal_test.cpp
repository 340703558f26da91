// SPDX-License-Identifier: Apache-2.0
// A pointer of the owner's own is moved: it ends itself before anything is promised, and its heir loses nothing.
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <csignal>
#include <cstddef>
#include <cstring>
#include <functional>
#include <string>
#include <variant>

#include "tests/support/takeover_check.hpp"
#include "tests/vhost-net-backend/bench.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

WorldShape shape(std::uint64_t layout) { return small_world(feature::kVersion1 | feature::kEventIndex | layout); }

// Flips each bit of `object`, one at a time, and puts it back.
template <class Object>
void with_each_bit(const Object& object, const std::function<void(std::size_t)>& look) {
  auto* bytes = const_cast<std::byte*>(reinterpret_cast<const std::byte*>(&object));
  for (std::size_t bit = 0; bit < 8 * sizeof object; ++bit) {
    const auto mask = static_cast<std::byte>(1u << bit % 8);
    bytes[bit / 8] ^= mask;
    look(bit);
    bytes[bit / 8] ^= mask;
  }
}

template <class Object>
void every_bit_shows(const Object& object, const std::function<bool()>& is_whole) {
  REQUIRE(is_whole());
  with_each_bit(object, [&](std::size_t bit) {
    INFO("bit " << bit << " of " << 8 * sizeof object);
    CHECK_FALSE(is_whole());
  });
  CHECK(is_whole());
}

}  // namespace

TEST_CASE("seals: every bit of a virtqueue's and of a ring's pointers shows") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  Bench bench(shape(layout));
  const QueuePair& pair = bench.pair();
  const auto whole = [&pair] { return pair.is_whole(); };
  for (const BoundQueue* bound : {&pair.receive, &pair.transmit})
    bound->queue.visit([&](const auto& queue) { every_bit_shows(queue, whole); });
  every_bit_shows(pair.port->rx, whole);
  every_bit_shows(pair.port->tx, whole);
  every_bit_shows(pair.port->fill, whole);
  every_bit_shows(pair.port->completion, whole);
}

TEST_CASE("seals: every bit of what leads to rings, segment and guest shows") {
  Bench bench(shape(0));
  const QueuePair& pair = bench.pair();
  // A changed pointer is not followed here: it is compared.
  const auto sealed = [&pair] { return pair.seal == pair.checksum(); };
  every_bit_shows(pair.state, sealed);
  every_bit_shows(pair.shard, sealed);
  every_bit_shows(pair.memory, sealed);
  every_bit_shows(pair.port, sealed);
  every_bit_shows(pair.generation, sealed);
  every_bit_shows(pair.epoch, sealed);
  every_bit_shows(pair.index, sealed);
  every_bit_shows(pair.receive.call_fd, sealed);
  every_bit_shows(pair.transmit.call_fd, sealed);
}

namespace {

struct Victim {
  const char* what;
  std::function<void(QueuePair&)> move;
};

// Moves a word by a little: what it points to is still mapped, and looks plausible.
template <class Object>
void nudge(const Object& object, std::size_t word, std::uint64_t by) {
  auto* words = const_cast<std::uint64_t*>(reinterpret_cast<const std::uint64_t*>(&object));
  words[word] ^= by;
}

}  // namespace

TEST_CASE("seals: an owner whose pointers moved ends itself, and nothing is lost") {
  const std::uint64_t layout = GENERATE(from_range(kLayouts));
  const auto both = [](QueuePair& pair, std::size_t word, std::uint64_t by) {
    for (const BoundQueue* bound : {&pair.receive, &pair.transmit})
      bound->queue.visit([&](const auto& queue) { nudge(queue, word, by); });
  };
  // The order of the words is that of the classes; each is looked at, whatever it is.
  const Victim victims[] = {
      {"TX producer", [](QueuePair& pair) { nudge(pair.port->tx, 0, 64); }},
      {"TX entries", [](QueuePair& pair) { nudge(pair.port->tx, 2, 16); }},
      {"TX mask", [](QueuePair& pair) { nudge(pair.port->tx, 3, 1); }},
      {"RX consumer", [](QueuePair& pair) { nudge(pair.port->rx, 1, 64); }},
      {"RX entries", [](QueuePair& pair) { nudge(pair.port->rx, 2, 16); }},
      {"fill entries", [](QueuePair& pair) { nudge(pair.port->fill, 2, 8); }},
      {"virtqueue, last pointer", [&](QueuePair& pair) { both(pair, 3, 16); }},
  };
  for (const Victim& victim : victims) {
    DYNAMIC_SECTION(victim.what << ", layout " << layout) {
      Bench bench(shape(layout));
      Flows flows{PacketFlow{}};
      bench.nic().post();
      flows.send(bench.world, 3, 3);
      const pid_t child = ::fork();
      REQUIRE(child >= 0);
      if (child == 0) {
        for (const int death : {SIGABRT, SIGSEGV, SIGBUS}) std::signal(death, SIG_DFL);
        victim.move(bench.pair());
        bench.owner.poll_once();
        ::_exit(0);
      }
      int status = 0;
      REQUIRE(::waitpid(child, &status, 0) == child);
      CHECK((WIFSIGNALED(status) && (WTERMSIG(status) == SIGABRT || WTERMSIG(status) == SIGSEGV)));
      bench.fence.kill(1);
      ShardStepper heir(bench.world.segment(), bench.fence.view(), 2);
      heir.hold(bench.world.make_ports(), {bench.world.make_device(bench.world.describe(1))});
      const Verdict verdict = take_over_and_judge(bench.world, heir, flows);
      INFO("lost " << verdict.tally.lost << ", duplicated " << verdict.tally.duplicated << ", corrupt "
                   << verdict.tally.corrupt << ", frames " << verdict.leaked_frames << ", stopped " << verdict.stopped);
      CHECK(verdict.clean());
    }
  }
}
