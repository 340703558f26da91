// SPDX-License-Identifier: Apache-2.0
// RunningShard: a shard that runs its own loop in a thread of the test, and the world that goes on around it.
#pragma once

#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <thread>
#include <variant>
#include <vector>

#include "tests/support/takeover_check.hpp"

namespace tandem::test {

/// The events of one type, in order.
template <class Event>
std::vector<Event> only(const std::vector<ShardEvent>& events) {
  std::vector<Event> found;
  for (const ShardEvent& event : events)
    if (const auto* wanted = std::get_if<Event>(&event)) found.push_back(*wanted);
  return found;
}

/// A shard that runs its own loop in a thread, with a wake ring that nobody writes: wake-ups come by command.
class RunningShard {
 public:
  /// `bell`: an eventfd that the two shards of a handover share; the caller's.
  RunningShard(const EngineWorld& world, const FakeFence& fence, std::uint32_t tag, Polling polling, int bell = -1,
               HeirWait heirs = HeirWait::kSleeping)
      : tag_(tag) {
    ShardConfig config;
    config.shards = std::max(world.segment().shard_count, 1u);
    config.segment = &world.segment();
    config.fence = &fence.view();
    config.polling = polling;
    config.heirs = heirs;
    config.tsc_hz = 1'000'000'000;
    UniqueFd ring{::memfd_create("wake", MFD_CLOEXEC)};
    if (::ftruncate(ring.get(), 8192) != 0) std::abort();
    auto wake = WakeRing::open(std::move(ring));
    if (!wake) std::abort();
    auto made = Shard::make(config, std::move(*wake), DeadManSwitch{}, UniqueFd{bell < 0 ? -1 : ::dup(bell)});
    if (!made) std::abort();
    shard_ = std::move(*made);
    thread_ = std::thread([this] { shard_->run(); });
    shard_->post(AttachCommand{world.make_ports()});
    shard_->post(DescribeCommand{world.make_device(world.describe(1))});
    shard_->post(ArmCommand{tag, nullptr});
  }
  ~RunningShard() { stop(); }
  void stop() {
    if (!thread_.joinable()) return;
    shard_->post(StopCommand{});
    thread_.join();
  }
  void post(ShardCommand command) { shard_->post(std::move(command)); }
  void wake() { shard_->post(ArmCommand{tag_, nullptr}); }
  /// Waits until the shard has said `Event`; false after ten seconds.
  template <class Event>
  bool heard() {
    for (;;) {
      if (!only<Event>(take_events()).empty()) return true;
      if (!wait()) return false;
    }
  }
  std::vector<ShardEvent> take_events() { return shard_->take_events(); }
  /// Waits until the shard has said something; false after ten seconds.
  bool wait() {
    pollfd ready{shard_->event_fd(), POLLIN, 0};
    return ::poll(&ready, 1, 10'000) > 0;
  }

 private:
  std::uint32_t tag_;
  std::unique_ptr<Shard> shard_;
  std::thread thread_;
};

/// Plays guest and kernel beside running shards until `enough` packets have come out at either end.
inline bool exchange(EngineWorld& world, Flows& flows, std::uint32_t enough) {
  std::vector<std::byte> packet;
  const std::uint64_t give_up = monotonic_ns() + 20'000'000'000u;
  while (flows.uplink.arrived() < enough || flows.guest.arrived() < enough) {
    if (monotonic_ns() > give_up) return false;
    if (flows.from_guest < enough) flows.send(world, 3, 0);
    if (flows.from_uplink < enough) flows.send(world, 0, 3);
    while (const auto bytes = world.kernels[0].send()) flows.uplink.note(*bytes);
    world.kernels[0].complete();
    world.nics[0].reap();
    while (world.nics[0].take(packet)) flows.guest.note(packet);
    world.nics[0].post();
  }
  return true;
}

}  // namespace tandem::test
