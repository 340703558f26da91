// SPDX-License-Identifier: Apache-2.0
// A shard's owner: polls its queue pairs, shows that it lives, sleeps when there is no work.
#include <rte_cycles.h>
#include <rte_pause.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "common/thread_priority.hpp"
#include "vhost-net-backend/protection.hpp"
#include "vhost-net-backend/second_opinion.hpp"
#include "vhost-net-backend/shard.hpp"

namespace tandem {

namespace {

// How long an owner polls without finding work before it goes to sleep. If work came soon after that, it sleeps later
// the next time; if it took long, sooner (as KVM polls before it halts, virt/kvm/kvm_main.c, grow_halt_poll_ns).
constexpr std::uint64_t kLeastIdleMicroseconds = 20;
constexpr std::uint64_t kMostIdleMicroseconds = 160;
// What woke us, in epoll_event::data: the control thread, an heir that asks for a handover, or a file of queue pair n.
constexpr std::uint64_t kMailbox = ~std::uint64_t{0};
constexpr std::uint64_t kBell = kMailbox - 1;
// While the uplink takes frames late, or a queue has no kick fd, sleep no longer than this.
constexpr int kShortSleepMs = 1;
// The owner pushes the dead man's switch at most this often.
constexpr std::uint64_t kBeatMicroseconds = 1000;

}  // namespace

// Before the first sleep with these pairs, so that no takeover waits for it.
void Shard::build_epoll() {
  epoll_stale_ = false;
  epoll_ = UniqueFd{::epoll_create1(EPOLL_CLOEXEC)};
  kick_fd_missing_ = false;
  receive_event_armed_.assign(pairs_.size(), false);
  const auto add = [this](int fd, std::uint32_t events, std::uint64_t data) {
    epoll_event event{};
    event.events = events;
    event.data.u64 = data;
    return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0 || errno == EEXIST;
  };
  bool complete = epoll_.get() >= 0 && add(wake_fd_.get(), EPOLLIN, kMailbox);
  if (bell_) complete = add(bell_.get(), EPOLLIN | EPOLLET, kBell) && complete;
  for (std::size_t i = 0; i < pairs_.size(); ++i) {
    for (const BoundQueue* bound : {&pairs_[i].receive, &pairs_[i].transmit}) {
      if (!bound->queue.bound()) continue;
      // Edge-triggered: every kick is an edge, so nobody has to read the counter back.
      if (bound->kick_fd < 0 || !add(bound->kick_fd, EPOLLIN | EPOLLET, i)) kick_fd_missing_ = true;
    }
    if (pairs_[i].port->fd() >= 0) complete = add(pairs_[i].port->fd(), 0, i) && complete;
    arm_receive_event(i, pairs_[i].can_receive());
  }
  // Without a complete set we would sleep through events: poll with short sleeps instead, and say so.
  if (!complete) {
    kick_fd_missing_ = true;
    say(ProblemEvent{0, "watch the queues' files with epoll: " + std::string(std::strerror(errno)) +
                            "; polling every millisecond instead; raise the limit of open files"});
  }
}

void Shard::arm_receive_event(std::size_t pair, bool wanted) {
  if (receive_event_armed_[pair] == wanted || pairs_[pair].port->fd() < 0) return;
  epoll_event event{};
  event.events = wanted ? EPOLLIN : 0u;
  event.data.u64 = pair;
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, pairs_[pair].port->fd(), &event);
  receive_event_armed_[pair] = wanted;
}

// Pushes the dead man's switch, if the loop does what it is there for: a loop that turns while work lies about is no
// sign of life.
void Shard::beat(std::uint64_t now) {
  last_beat_ = now;
  must_hold(std::all_of(pairs_.begin(), pairs_.end(), [](const QueuePair& pair) { return pair.is_whole(); }));
  // The supervisor may have made us an heir's equal while we were taking over.
  if (!real_time_) become_ordinary();
  const std::uint64_t transactions = state().transactions.load(std::memory_order_relaxed);
  const bool moved = transactions != std::exchange(transactions_at_beat_, transactions);
  if (!moved && std::any_of(pairs_.begin(), pairs_.end(), [](const QueuePair& pair) { return has_work(pair); })) return;
  push_switch();
}

void Shard::push_switch() {
  const ShardState& shard = state();
  const std::uint64_t limit = std::min(shard.spin_limit_ns.load(std::memory_order_relaxed),
                                       shard.blocked_limit_ns.load(std::memory_order_relaxed));
  if (limit != 0) switch_.push(limit);
}

void Shard::look_at_suspects(QueuePair& pair) {
  std::vector<PoisonPacket> dropped;
  meet_suspects(pair, dropped);
  for (PoisonPacket& packet : dropped) say(PoisonEvent{device_of(pair.index), std::move(packet), epoch_});
}

// With many queue pairs one round may take longer than the limits: each one that moves something is a sign of life.
void Shard::keep_alive() {
  const std::uint64_t now = rte_rdtsc();
  state().heartbeat_tsc.store(now, std::memory_order_relaxed);
  if (now - last_beat_ > config_.tsc_hz / 1'000'000 * kBeatMicroseconds) beat(now);
}

void Shard::drill_if_due() {
  if (monotonic_ns() < drill_at_ns_) return;
  drill_at_ns_ = 0;
  drill(drill_fault_);
}

// A drill: the loop as it should be, but for the work.
void Shard::livelock() {
  for (;;) {
    keep_alive();
    rte_pause();
  }
}

bool Shard::poll_once() {
  bool worked = false;
  for (QueuePair& pair : pairs_) {
    if (pair.port->in_memory()) pair.port->play_kernel();
    if (pair.settling_until_ns != 0) [[unlikely]]
      settle(pair, monotonic_ns());
    const bool suspects = pair.has_suspects;
    if (suspects) [[unlikely]]
      look_at_suspects(pair);
    if (pair.transmit_pending) pair.transmit_pending = !pair.port->wake_transmit();
    bool moved = false;
    if (pair.can_transmit()) moved |= transmit_burst(pair) != 0;
    if (pair.can_receive()) moved |= receive_burst(pair) != 0;
    if (pair.port->polls_netdev() && (pair.can_receive() || pair.can_transmit())) pair.port->poll_netdev();
    if (moved && pairs_.size() > 1) keep_alive();
    worked |= moved;
    if (suspects) [[unlikely]]
      look_at_suspects(pair);
  }
  return worked;
}

void Shard::poll_as_owner() {
  ShardState& shard = state();
  const std::uint64_t least_idle = config_.tsc_hz / 1'000'000 * kLeastIdleMicroseconds;
  const std::uint64_t most_idle = config_.tsc_hz / 1'000'000 * kMostIdleMicroseconds;
  std::uint64_t idle = least_idle;
  const std::uint64_t beat_cycles = config_.tsc_hz / 1'000'000 * kBeatMicroseconds;
  const std::uint64_t taken_over = rte_rdtsc();
  std::uint64_t last_work = taken_over;
  drill_at_ns_ = 0;  // of an ownership that ended by a handover
  if (first_transaction_pending_) note_first_transaction();
  while (!stop_) {
    const std::uint64_t now = rte_rdtsc();
    if constexpr (kProtected) {
      shard.heartbeat_tsc.store(now, std::memory_order_relaxed);
      if (now - last_beat_ > beat_cycles) beat(now);
    }
    if (shard.handover.request.load(std::memory_order_relaxed) != 0 && let_go()) return;
    if (has_commands_.load(std::memory_order_relaxed)) {
      run_commands();
      last_work = now;
    }
    if (drill_at_ns_ != 0) [[unlikely]]
      drill_if_due();
    const bool worked = poll_once();
    if (kicks_asked_) [[unlikely]]
      refuse_kicks();
    // What had piled up while nobody polled is moved, or that takes long: others want this CPU too.
    if (real_time_ && (!worked || now - taken_over > beat_cycles)) [[unlikely]] {
      real_time_ = false;
      become_ordinary();
    }
    if (worked) {
      last_work = now;
      if (first_transaction_pending_) note_first_transaction();
    } else if (config_.polling == Polling::kAdaptive && now - last_work > idle) {
      sleep();
      last_work = rte_rdtsc();
      idle = last_work - now < most_idle ? std::min(2 * idle, most_idle) : std::max(idle / 2, least_idle);
      // To have woken is a sign of life. Without a push here a hang in the first round after a sleep, which found work
      // and so does not push by itself, would wait for the heir's own slow look.
      if (last_work - last_beat_ > beat_cycles) {
        last_beat_ = last_work;
        push_switch();
      }
    } else {
      rte_pause();
    }
  }
}

namespace {

// A wish that does not stand is one that the guest has overwritten, or that we fail to write: then nothing would ever
// wake us. Or there is no memory any more: then each of the two mappings shows zeroes of its own.
void ask_for_kicks(const GuestMemory& memory, const Virtqueue& queue, std::uint16_t next_avail) {
  queue.enable_kicks(next_avail);
  if (kProtected && !queue.kicks_stand(next_avail)) [[unlikely]]
    confirm_refusal(
        [&] {
          queue.enable_kicks(next_avail);
          return !queue.kicks_stand(next_avail);
        },
        [&] { return !memory.faulted(); });
}

}  // namespace

void Shard::sleep() {
  if (epoll_stale_) build_epoll();
  {
    const WindowOpen window;
    for (QueuePair& pair : pairs_) {
      must_hold(pair.is_whole());
      if (pair.can_transmit()) ask_for_kicks(*pair.memory, pair.transmit.queue, pair.state->transmit.next_avail);
      if (pair.can_receive() && pair.receive_starved)
        ask_for_kicks(*pair.memory, pair.receive.queue, pair.starved_avail);
    }
  }
  int timeout = kick_fd_missing_ || drill_at_ns_ != 0 ? kShortSleepMs : -1;
  bool work = false;
  for (std::size_t i = 0; i < pairs_.size(); ++i) {
    if (pairs_[i].transmit_pending || pairs_[i].settling_until_ns != 0) timeout = kShortSleepMs;
    // A starved receive queue waits for the guest: its socket stays readable and would keep us awake.
    arm_receive_event(i, pairs_[i].can_receive() && !pairs_[i].receive_starved);
    work = work || has_work(pairs_[i]);
  }
  ShardState& shard = state();
  shard.asleep.store(1, std::memory_order_release);
  epoll_event woken[16];
  const int count = ::epoll_wait(epoll_.get(), woken, 16, work ? 0 : timeout);
  if constexpr (kProtected) shard.heartbeat_tsc.store(rte_rdtsc(), std::memory_order_relaxed);
  shard.asleep.store(0, std::memory_order_release);
  for (int i = 0; i < count; ++i) {
    std::uint64_t value = 0;
    if (woken[i].data.u64 == kMailbox) {
      [[maybe_unused]] const ssize_t got = ::read(wake_fd_.get(), &value, sizeof value);
    }
  }
  refuse_kicks();
}

// While we poll, a kick tells us nothing and costs the guest a system call or an exit.
void Shard::refuse_kicks() {
  kicks_asked_ = false;
  const WindowOpen window;
  for (QueuePair& pair : pairs_) {
    if (pair.can_transmit()) pair.transmit.queue.disable_kicks();
    if (pair.can_receive()) pair.receive.queue.disable_kicks();
  }
}

void Shard::note_first_transaction() {
  ShardState& shard = state();
  if (shard.transactions.load(std::memory_order_relaxed) == transactions_at_takeover_) return;
  first_transaction_pending_ = false;
  if (shard.takeover.first_transaction_ns == 0) shard.takeover.first_transaction_ns = monotonic_ns();
  say(FirstTransactionEvent{shard.takeover});
}

}  // namespace tandem
