// SPDX-License-Identifier: Apache-2.0
// Messages that take something away: after the answer nobody writes to the guest's memory, whatever happens to the
// owner meanwhile.
#include <signal.h>

#include <fstream>

#include "tests/pair/fixture.hpp"

using namespace tandem;
using namespace tandem::test;
using R = VhostUserRequest;

namespace {

enum class Message { kGetVringBase, kEnable0, kMemTable, kStatus0, kDisconnect };
const std::vector<Message> kMessages{Message::kGetVringBase, Message::kEnable0, Message::kMemTable, Message::kStatus0,
                                     Message::kDisconnect};
constexpr const char* kNames[] = {"GET_VRING_BASE", "SET_VRING_ENABLE 0", "SET_MEM_TABLE", "SET_STATUS 0",
                                  "disconnect"};

/// Two guests on one shard: one that takes something away while it is flooded, and one whose traffic proves that the
/// poll thread goes on working.
struct Scene {
  PairHost host;
  std::optional<ScriptedFrontEnd> victim, witness;
  std::optional<Traffic> traffic;

  Scene() {
    host.start();
    require_domain(host, "victim", {{.mac = kMac}});
    require_domain(host, "witness", {{.mac = kOtherMac}});
    victim.emplace(start_guest(host, kMac));
    witness.emplace(start_guest(host, kOtherMac));
    traffic.emplace(*witness, kOtherMac);
    REQUIRE(traffic->pump_frames(20));  // the bridge has learned the way
  }

  void flood(std::uint32_t frames = 64) {
    for (std::uint32_t number = 0; number < frames; ++number)
      traffic->outside().send(numbered_frame(kMac, "02:00:00:00:00:01", kUncountedFlow, number, 900));
  }

  /// Floods until the victim's receive queue moves.
  void flood_until_received() {
    const std::uint64_t before = victim->queue(0).used_index();
    REQUIRE(eventually([&] {
      flood();
      victim->receive(0);
      return victim->queue(0).used_index() != before;
    }));
    flood();
  }

  /// Sends the message; takes the answer, which ends the owner's right to write.
  void take_away(Message message) {
    switch (message) {
      case Message::kGetVringBase:
        victim->send_state(R::kGetVringBase, 0, 0);
        break;
      case Message::kEnable0:
        victim->send_state(R::kSetVringEnable, 0, 0, true);
        break;
      case Message::kMemTable:
        // Another table: the buffers are gone, the rings stay.
        victim->send_rings_only_table();
        break;
      case Message::kStatus0:
        victim->send_body(R::kSetStatus, std::uint64_t{0}, {}, true);
        break;
      case Message::kDisconnect:
        victim->disconnect();
        break;
    }
  }
  void take_answer(Message message) {
    switch (message) {
      case Message::kGetVringBase:
        base = load_wire<VhostUserVringState>(victim->reply(R::kGetVringBase)).num;
        break;
      case Message::kEnable0:
        REQUIRE(victim->reply_u64(R::kSetVringEnable) == 0);
        break;
      case Message::kMemTable:
        REQUIRE(victim->reply_u64(R::kSetMemTable) == 0);
        break;
      case Message::kStatus0:
        REQUIRE(victim->reply_u64(R::kSetStatus) == 0);
        break;
      case Message::kDisconnect: {
        // There is no answer; the next connection is served only when this one is done with.
        ScriptedFrontEnd next(host.nic_socket(kMac));
        next.settle();
        break;
      }
    }
  }

  /// Fills what the receive queue may have written with a pattern, lets the poll thread work under a flood, and looks
  /// again.
  void require_untouched(bool rings_too = true) {
    DriverQueue& queue = victim->queue(0);
    const std::span<std::byte> buffers{queue.buffers, std::size_t{queue.size} * DriverQueue::kBufferSize};
    const std::span<std::byte> used{reinterpret_cast<std::byte*>(queue.used), sizeof(vring_used) + 8 * queue.size + 2};
    std::fill(buffers.begin(), buffers.end(), std::byte{0xa5});
    if (rings_too) std::fill(used.begin(), used.end(), std::byte{0xa5});
    flood();
    REQUIRE(traffic->pump_frames(300));
    flood();
    REQUIRE(traffic->pump_frames(50));
    const auto untouched = [](std::byte byte) { return byte == std::byte{0xa5}; };
    CHECK(std::all_of(buffers.begin(), buffers.end(), untouched));
    if (rings_too) CHECK(std::all_of(used.begin(), used.end(), untouched));
  }

  std::uint32_t base = 0;
};

// State letter of a process; 'X': gone.
char state_of(pid_t pid) { return proc_status(pid, "State").empty() ? 'X' : proc_status(pid, "State")[0]; }

}  // namespace

TEST_CASE("no write to guest memory after the answer to a message that takes it away") {
  SKIP_UNLESS_PAIR();
  const Message message = GENERATE(from_range(kMessages));
  INFO(kNames[static_cast<int>(message)]);
  Scene scene;
  scene.flood_until_received();
  scene.take_away(message);
  scene.take_answer(message);
  if (message == Message::kGetVringBase)
    CHECK(static_cast<std::uint16_t>(scene.base) == scene.victim->queue(0).used_index());
  scene.require_untouched(message != Message::kMemTable);  // whose new table has the rings
  const TrafficResult result = scene.traffic->finish();
  CAPTURE(result);
  CHECK(result.clean());
  CHECK(scene.host.incidents().empty());
  scene.victim.reset();
  require_clean_end(scene.host, {"victim", "witness"});
}

TEST_CASE(
    "the owner dies or is stopped when something is taken away: the answer comes all the same, and not too early") {
  SKIP_UNLESS_PAIR();
  const Message message = GENERATE(from_range(kMessages));
  const int signal = GENERATE(SIGKILL, SIGSTOP);
  INFO(kNames[static_cast<int>(message)] << ", owner gets " << (signal == SIGKILL ? "SIGKILL" : "SIGSTOP"));
  Scene scene;
  scene.flood_until_received();
  const pid_t owner = scene.host.active();
  const auto before = std::chrono::steady_clock::now();
  ::kill(owner, signal);
  scene.take_away(message);
  scene.take_answer(message);
  const auto waited = std::chrono::steady_clock::now() - before;
  // Whoever wrote before is gone for good: not stopped, ready to go on where it was.
  // On its way out it may still be running, in the kernel: the fence has seen it, and it ends.
  CHECK(eventually([&] {
    const char state = state_of(owner);
    return state == 'Z' || state == 'X';
  }));
  if (message == Message::kGetVringBase)
    CHECK(static_cast<std::uint16_t>(scene.base) == scene.victim->queue(0).used_index());
  ::kill(owner, SIGCONT);
  scene.require_untouched(message != Message::kMemTable);
  // Generous: the limit is 5 ms, the machine may be busy.
  CHECK(waited < std::chrono::seconds{3});
  const TrafficResult result = scene.traffic->finish();
  CAPTURE(result);
  CHECK(result.clean());
  scene.victim.reset();
  require_clean_end(scene.host, {"victim", "witness"});
}

TEST_CASE("owner and heir are stopped when something is taken away: both are ended, a new backend lets the answer go") {
  SKIP_UNLESS_PAIR();
  Scene scene;
  scene.flood_until_received();
  const pid_t owner = scene.host.active(), heir = scene.host.standby();
  for (const pid_t pid : {heir, owner}) ::kill(pid, SIGSTOP);
  scene.take_away(Message::kGetVringBase);
  scene.take_answer(Message::kGetVringBase);
  for (const pid_t pid : {heir, owner}) {
    CHECK(eventually([&, pid = pid] {
      const char state = state_of(pid);
      return state == 'Z' || state == 'X';
    }));
  }
  scene.require_untouched();
  scene.victim.reset();
  require_clean_end(scene.host, {"victim", "witness"});
}

TEST_CASE("a guest stops and starts its device under traffic: what it had not stopped goes on where it was") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    for (int round = 0; round < 4; ++round) {
      Traffic traffic(guest, kMac);
      REQUIRE(traffic.pump_frames(200));
      // A pause of all queues, and the active killed in the middle of every second one.
      for (std::uint32_t vring = 0; vring < 2; ++vring) guest.send_state(R::kSetVringEnable, vring, 0);
      guest.settle();
      const pid_t victim = host.active();
      if (round % 2 == 1) {
        ::kill(victim, SIGKILL);
        REQUIRE(host.wait_paired(victim));
      }
      for (std::uint32_t vring = 0; vring < 2; ++vring) guest.send_state(R::kSetVringEnable, vring, 1);
      guest.settle();
      REQUIRE(traffic.pump_frames(200));
      const TrafficResult result = traffic.finish();
      CAPTURE(result);
      CHECK(result.clean());
      guest.stop();
      guest.reset_rings();
      guest.start();
    }
  }
  require_clean_end(host, {"one"});
}
