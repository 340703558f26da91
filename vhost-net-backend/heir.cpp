// SPDX-License-Identifier: Apache-2.0
// A shard's heir: waits for its owner's death, and watches whether it works (watchdog.hpp).
#include <rte_cycles.h>
#include <rte_pause.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <bit>

#include "vhost-net-backend/shard.hpp"

namespace tandem {

namespace {

// How often an heir looks whether a sleeping owner sleeps through work; everything else wakes it.
constexpr int kHeirPeriodMs = 100;
// While something besides its owner's death keeps it from taking over, it looks again so soon.
constexpr int kShortSleepMs = 1;
// An heir that suspects its owner of passing work by looks again so soon.
constexpr std::uint64_t kSuspicionNs = 250'000;
// An owner that stands still and may only be waiting for a CPU is looked at again so soon, or after its limit.
constexpr std::uint64_t kAskAgainNs = 5'000'000;
// A look at a limit comes so much after it, so that it is over then.
constexpr std::uint64_t kBeyondLimitNs = 50'000;
// An heir waits so long for a description that its dead owner had in force; the supervisor sends it to heirs first.
constexpr std::uint64_t kDescriptionLimitNs = 500'000'000;
// A killed process that is still there after this long cannot die.
constexpr std::uint64_t kCannotDieNs = 1'000'000'000;

}  // namespace

void Shard::wait_as_heir() {
  // Closed when the next one is made: closing takes longer than a takeover has.
  heir_epoll_ = UniqueFd{::epoll_create1(EPOLL_CLOEXEC)};
  const int epoll = heir_epoll_.get();
  epoll_event event{};
  event.events = EPOLLIN;
  for (const int fd : {wake_fd_.get(), ring_.fd(), switch_.fd()}) {
    event.data.fd = fd;
    if (fd >= 0) ::epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
  }
  // Edge-triggered: every ring is an edge, so neither process has to read the counter back.
  event.events = EPOLLIN | EPOLLET;
  event.data.fd = bell_.get();
  if (bell_) ::epoll_ctl(epoll, EPOLL_CTL_ADD, bell_.get(), &event);
  bool quiet = false;
  while (!stop_) {
    run_commands();
    // The supervisor ends an heir that stands still.
    if (tag_ != 0) state().heir_beat_ns.store(monotonic_ns(), std::memory_order_relaxed);
    if (hand_over_wanted_) {
      ask_owner();
      await_grant();
    }
    // Looked at before every sleep: a wake-up is a hint, the slot decides. Before it is armed nobody may own.
    const std::uint64_t word = state().owner.load(std::memory_order_acquire);
    int period = kHeirPeriodMs;
    if (tag_ != 0 && config_.fence->dead(owner_of(word))) {
      if (!left_to_another(word) && holds_what_is_in_force()) return;
      // What the dead owner put in force last is on its way to us; without it its record could not be replayed. Or we
      // let go ourselves, and the heir that asked is on its way.
      period = kShortSleepMs;
    } else if (tag_ != 0) {
      // Not while changes are coming: each would have it bind all of them once more, on the owner's CPU.
      if (quiet) prepare();
      follow_request();
      if (watchdog_ && watchdog_->tag() == owner_tag(word)) watch_owner();
    }
    epoll_event woken[4];
    const int count = config_.heirs == HeirWait::kPolling ? poll_as_heir(epoll, woken, period, word)
                                                          : ::epoll_wait(epoll, woken, 4, period);
    quiet = count == 0;
    // Only what has something is read: an owner's death takes no system call but the one that slept.
    for (int i = 0; i < count; ++i) {
      std::uint64_t posted = 0;
      if (woken[i].data.fd == ring_.fd())
        ring_.drain();
      else if (woken[i].data.fd == switch_.fd())
        switch_expired_ = switch_.drain();
      else if (woken[i].data.fd == wake_fd_.get()) [[maybe_unused]]
        const ssize_t got = ::read(wake_fd_.get(), &posted, sizeof posted);
    }
  }
}

// Does what epoll_wait(2) does, without a sleep, and returns as soon as `word`'s owner has died, or the word is another
// one. The slot is a page of the kernel's that changes only then, so looking at it slows nobody down; what comes as a
// file is looked at less often.
int Shard::poll_as_heir(int epoll, std::span<epoll_event> woken, int period_ms, std::uint64_t word) const {
  constexpr int kLooks = 64;  // some microseconds
  const auto period = static_cast<std::uint64_t>(period_ms) * (config_.tsc_hz / 1000);
  const std::uint64_t begun = rte_rdtsc();
  // Else we may not own yet, or have seen that it is dead and wait for something besides.
  const bool watches = tag_ != 0 && period_ms == kHeirPeriodMs;
  for (;;) {
    for (int i = 0; i < kLooks; ++i) {
      if (watches && config_.fence->dead(owner_tag(word))) return 0;
      rte_pause();
    }
    const int count = ::epoll_wait(epoll, woken.data(), static_cast<int>(woken.size()), 0);
    if (count != 0 || rte_rdtsc() - begun >= period) return count;
    if (config_.segment->shards[config_.index].owner.load(std::memory_order_relaxed) != word) return 0;
  }
}

bool Shard::holds_all_in_force() {
  return std::all_of(devices_.begin(), devices_.end(), [this](const Served& served) {
    std::uint64_t generation = 0;
    return !served.uplink || find_in_force(served, generation) != nullptr || generation == 0;
  });
}

// Whether every description in force is held here, or has been waited for long enough.
bool Shard::holds_what_is_in_force() {
  const bool all = holds_all_in_force();
  const std::uint64_t now = monotonic_ns();
  if (missing_since_ns_ == 0) missing_since_ns_ = now;
  const bool late = now - missing_since_ns_ > kDescriptionLimitNs;
  if (all || late) missing_since_ns_ = 0;
  return all || late;
}

// After every wake-up of the heir: is there reason to look closer, and what is to be seen?
void Shard::watch_owner() {
  ShardState& shard = state();
  const std::uint64_t beat = shard.heartbeat_tsc.load(std::memory_order_relaxed);
  OwnerView view;
  view.spin_limit_ns = shard.spin_limit_ns.load(std::memory_order_relaxed);
  view.blocked_limit_ns = shard.blocked_limit_ns.load(std::memory_order_relaxed);
  if (view.spin_limit_ns == 0 || view.blocked_limit_ns == 0 || beat == 0) return;
  const std::uint64_t now = monotonic_ns();
  view.still_ns =
      static_cast<std::uint64_t>(static_cast<double>(rte_rdtsc() - beat) * 1e9 / static_cast<double>(config_.tsc_hz));
  view.marked_asleep = shard.asleep.load(std::memory_order_acquire) != 0;
  view.work_pending = work_waits();
  view.passes_work_by = idle_rounds_.look(view.work_pending, beat, shard.transactions.load(std::memory_order_acquire));
  const bool expired = std::exchange(switch_expired_, false);
  if (view.marked_asleep) {
    if (!view.work_pending) {
      asleep_work_since_ns_ = 0;
    } else if (asleep_work_since_ns_ == 0 || asleep_work_beat_ != beat) {
      // Work that came just before we looked, or after another nap: the time counts from here.
      asleep_work_since_ns_ = now;
      asleep_work_beat_ = beat;
    }
    view.asleep_work_ns = asleep_work_since_ns_ == 0 ? 0 : now - asleep_work_since_ns_;
    if (view.asleep_work_ns > view.blocked_limit_ns) watchdog_->look(view);
  } else {
    asleep_work_since_ns_ = 0;
    const std::uint64_t limit = std::min(view.spin_limit_ns, view.blocked_limit_ns);
    if (!view.passes_work_by && view.still_ns <= limit) {
      // It has beaten since it pushed last: because it passes work by, because it will push in a moment, or because it
      // hung in between. The limit counts from the beat.
      if (expired) switch_.push(idle_rounds_.suspicious() ? kSuspicionNs : limit - view.still_ns + kBeyondLimitNs);
      return;
    }
    if (!view.passes_work_by) watchdog_->look(view);
  }
  const HangVerdict verdict = judge(view);
  if (verdict == HangVerdict::kNone) {
    // Starved or nearly over a limit: ask again soon. A sleeper without work is asked at the heir's own period.
    if (!view.marked_asleep || view.work_pending)
      switch_.push(std::min({view.spin_limit_ns, view.blocked_limit_ns, kAskAgainNs}));
    return;
  }
  // It may have gone on while we looked.
  if (!view.passes_work_by && shard.heartbeat_tsc.load(std::memory_order_acquire) != beat) return;
  if (verdict_ != HangVerdict::kNone) {
    if (now - verdict_ns_ < kCannotDieNs) return;
    say(ProblemEvent{0, "the owner of this shard is hung and does not die of SIGKILL (state " +
                            std::string(1, view.state) +
                            "): no takeover while it can still run; thaw its cgroup, or find "
                            "what it waits for in /proc/PID/stack"});
  }
  verdict_ = verdict;
  verdict_ns_ = now;
  watchdog_->kill();
}

namespace {

// Whether the uplink takes the next packet, whatever it is: a full TX ring, or frames that it keeps, are its fault and
// not the owner's. A packet that may have to be segmented takes as many as there can be of it. While the owner moves
// nothing this can only become true, never false.
bool takes_packets(const XskPort& port, const QueuePairState& pair, OffloadSet asked) {
  const bool cuts = (asked.bits & (OffloadSet::kTcp4 | OffloadSet::kTcp6)) != 0;
  const std::uint32_t needed = cuts ? most_segments(port) : 1;
  const std::uint32_t posted = std::min(port.tx.producer() - port.tx.consumer(), port.tx.size());
  if (port.tx.size() - posted < needed) return false;
  // Completed ones are the owner's to take.
  std::uint32_t frames = port.completion.producer() - port.completion.consumer();
  const std::uint32_t words = port.description().tx_frames / 64;
  for (std::uint32_t i = 0; i < words && frames < needed; ++i)
    frames += static_cast<std::uint32_t>(std::popcount(~pair.transmit_busy[i]));
  return frames >= needed;
}

}  // namespace

// Whether there is work that an owner would do if it looked. Looks at the rings through the descriptions held here;
// writes nothing.
bool Shard::work_waits() {
  for (const Served& served : devices_) {
    if (!served.uplink) continue;
    std::uint64_t generation = 0;
    const auto device = find_in_force(served, generation);
    if (!device) continue;
    for (std::uint32_t n = 0; n < served.uplink->ports.size() && n < device->description().queue_pairs; ++n) {
      const std::uint32_t index = served.uplink->first_queue_pair + n;
      const QueuePairState& pair = config_.segment->queue_pairs[index];
      const BoundQueue& receive = device->vring(2 * n);
      const BoundQueue& transmit = device->vring(2 * n + 1);
      const XskPort& port = *served.uplink->ports[n];
      const auto works = [](const BoundQueue& bound, const VringCursors& cursors) {
        return bound.queue.bound() && cursors.fault.load(std::memory_order_relaxed) == QueueFault::kNone &&
               cursors.start_count == bound.start_count && bound.queue.offers(cursors.next_avail);
      };
      if (!serves(index)) continue;
      // Packets without buffers are the guest's fault.
      if (works(transmit, pair.transmit) &&
          takes_packets(port, pair, OffloadSet::asked_by_guest(device->description().features)))
        return true;
      if (works(receive, pair.receive) && port.rx.consumer() != port.rx.producer() &&
          (pair.receive.starved == 0 || receive.queue.offers(static_cast<std::uint16_t>(pair.receive.starved))))
        return true;
    }
  }
  return false;
}

}  // namespace tandem
