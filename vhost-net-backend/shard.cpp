// SPDX-License-Identifier: Apache-2.0
// The poll thread: commands from the control thread, the heir's wait, the owner's loop, sleeping and waking.
#include "vhost-net-backend/shard.hpp"

#include <rte_cycles.h>
#include <rte_pause.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <ctime>

#include "common/thread_priority.hpp"
#include "vhost-net-backend/protection.hpp"
#include "vhost-net-backend/second_opinion.hpp"

namespace tandem {

namespace {

// How long an owner polls without finding work before it goes to sleep: about the price of going to sleep and waking.
constexpr std::uint64_t kIdleMicroseconds = 20;
// What woke us, in epoll_event::data: the control thread, an heir that asks for a handover, or a file of queue pair n.
constexpr std::uint64_t kMailbox = ~std::uint64_t{0};
constexpr std::uint64_t kBell = kMailbox - 1;
// While the uplink takes frames late, or a queue has no kick fd, sleep no longer than this.
constexpr int kShortSleepMs = 1;
// How often an heir looks whether a sleeping owner sleeps through work; everything else wakes it.
constexpr int kHeirPeriodMs = 100;
// An heir that suspects its owner of passing work by looks again so soon.
constexpr std::uint64_t kSuspicionNs = 250'000;
// The owner pushes the dead man's switch at most this often.
constexpr std::uint64_t kBeatMicroseconds = 1000;
// An heir waits so long for a description that its dead owner had in force; the supervisor sends it to heirs first.
constexpr std::uint64_t kDescriptionLimitNs = 500'000'000;
// A killed process that is still there after this long cannot die.
constexpr std::uint64_t kCannotDieNs = 1'000'000'000;

}  // namespace

std::uint64_t monotonic_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<std::uint64_t>(now.tv_nsec);
}

Result<std::unique_ptr<Shard>> Shard::make(const ShardConfig& config, WakeRing ring, DeadManSwitch timer,
                                           UniqueFd bell) {
  std::unique_ptr<Shard> shard{new Shard(config, std::move(ring), std::move(timer), std::move(bell))};
  shard->wake_fd_ = UniqueFd{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  shard->event_fd_ = UniqueFd{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  if (!shard->wake_fd_ || !shard->event_fd_) return fail_errno("make the shard's mailbox");
  return shard;
}

void Shard::post(ShardCommand command) {
  {
    const std::lock_guard lock(mutex_);
    commands_.push_back(std::move(command));
    has_commands_.store(true, std::memory_order_release);
  }
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(wake_fd_.get(), &one, sizeof one);
}

std::vector<ShardEvent> Shard::take_events() {
  std::uint64_t count = 0;
  [[maybe_unused]] const ssize_t got = ::read(event_fd_.get(), &count, sizeof count);
  const std::lock_guard lock(mutex_);
  return std::exchange(events_, {});
}

void Shard::say(ShardEvent event) {
  {
    const std::lock_guard lock(mutex_);
    events_.push_back(std::move(event));
  }
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(event_fd_.get(), &one, sizeof one);
}

void Shard::discard(std::shared_ptr<const void> object) {
  if (object) say(GarbageEvent{std::move(object)});
}

void Shard::run_commands() {
  std::deque<ShardCommand> commands;
  {
    const std::lock_guard lock(mutex_);
    commands.swap(commands_);
    has_commands_.store(false, std::memory_order_relaxed);
  }
  for (ShardCommand& command : commands) std::visit([this](auto& alternative) { execute(alternative); }, command);
}

void Shard::execute(AttachCommand& command) {
  Served& served = devices_[command.uplink->device];
  discard(std::exchange(served.uplink, std::move(command.uplink)));
  if (owner_) rebuild_pairs();
}

void Shard::execute(DetachCommand& command) {
  Served& served = devices_[command.device];
  Served gone = std::exchange(served, {});
  if (owner_) rebuild_pairs();
  discard(std::move(gone.uplink));
  discard(std::move(gone.in_force));
  for (auto& device : gone.held) discard(std::move(device));
  say(DetachedEvent{command.device});
}

void Shard::execute(DescribeCommand& command) {
  const std::uint32_t index = command.device->description().device;
  const std::uint64_t generation = command.device->description().generation;
  Served& served = devices_[index];
  if (!served.held.empty() && served.held.back()->description().generation >= generation) {
    discard(std::move(command.device));  // said twice, by a supervisor that died in between
  } else {
    served.held.push_back(std::move(command.device));
  }
  if (owner_)
    put_in_force(index);
  else
    say(HeldEvent{index, generation});
}

void Shard::execute(PruneCommand& command) { prune(devices_[command.device], command.generation); }

void Shard::execute(ArmCommand& command) {
  tag_ = command.tag;
  watchdog_ = std::move(command.peer);
}

void Shard::execute(DrillCommand& command) {
  if (command.fault == DrillFault::kLivelock && owner_) livelock();
  const std::byte* read_only = nullptr;
  for (const Served& served : devices_)
    if (served.in_force && served.in_force->description().region_count > 0)
      read_only =
          served.in_force->memory()->view_some(served.in_force->description().regions[0].guest_address, 1).data();
  fail_on_purpose(command.fault, read_only);
}

void Shard::execute(StopCommand&) { stop_ = true; }

void Shard::prune(Served& served, std::uint64_t below) {
  std::erase_if(served.held, [&](std::shared_ptr<const Device>& device) {
    if (device->description().generation >= below || device == served.in_force) return false;
    discard(std::move(device));
    return true;
  });
}

// Makes the newest description the one in force. The record is empty here: commands run between transactions.
void Shard::put_in_force(std::uint32_t device) {
  Served& served = devices_[device];
  if (served.held.empty() || !served.uplink) return;
  const std::shared_ptr<const Device> newest = served.held.back();
  const std::uint64_t generation = newest->description().generation;
  if (served.in_force != newest) {
    // Rings that go on although the takeover did not find their description: it has not looked at them.
    std::vector<std::pair<const BoundQueue*, VringCursors*>> unseen;
    const auto count = std::min<std::size_t>(newest->description().queue_pairs, served.uplink->ports.size());
    for (std::uint32_t n = 0; n < count; ++n) {
      const std::uint32_t index = served.uplink->first_queue_pair + n;
      if (!serves(index)) continue;
      QueuePairState& pair = config_.segment->queue_pairs[index];
      for (const std::uint32_t vring : {2 * n, 2 * n + 1}) {
        const BoundQueue& bound = newest->vring(vring);
        VringCursors& cursors = vring % 2 == 0 ? pair.receive : pair.transmit;
        if (!bound.queue.bound()) continue;
        if (cursors.start_count == bound.start_count) {
          if (!served.in_force) unseen.emplace_back(&bound, &cursors);
          continue;
        }
        // A new start: nobody uses these cursors, for the ring was not running in the generation before. start_count
        // goes last, so that an heir who finds us dead in between does it over.
        cursors.next_avail = static_cast<std::uint16_t>(newest->description().vrings[vring].base);
        cursors.next_used = bound.queue.first_used(newest->description().vrings[vring].base);
        cursors.fault.store(QueueFault::kNone, std::memory_order_relaxed);
        copy_positions(cursors, (position_word(cursors) & 0xffff'ffffu) | std::uint64_t{bound.start_count} << 32);
        std::atomic_ref<std::uint32_t>(cursors.start_count).store(bound.start_count, std::memory_order_release);
      }
    }
    served.in_force = newest;
    rebuild_pairs();
    mend(/*record_pending=*/false);  // of a ring that goes on, and that no takeover bound
    // Its last burst may be that of a record which could not be replayed without it.
    for (const auto& [bound, cursors] : unseen)
      if (bound->queue.is_half_published(cursors->next_used))
        cursors->fault.store(QueueFault::kRecordInvalid, std::memory_order_release);
    note_in_force(served, generation);
    // A call fd may be new, and the front end may have looked at the old one for the last time: an interrupt too many
    // is harmless.
    for (QueuePair& pair : pairs_)
      if (pair.memory == newest->memory()) notify_all(pair);
    prune(served, generation);
  }
  say(InForceEvent{device, generation});
}

void Shard::rebuild_pairs() {
  pairs_.clear();
  for (const Served& served : devices_) {
    if (!served.uplink || !served.in_force) continue;
    const DeviceDescription& description = served.in_force->description();
    const auto count = std::min<std::size_t>(description.queue_pairs, served.uplink->ports.size());
    for (std::uint32_t n = 0; n < count; ++n) {
      const std::uint32_t index = served.uplink->first_queue_pair + n;
      const BoundQueue& receive = served.in_force->vring(2 * n);
      const BoundQueue& transmit = served.in_force->vring(2 * n + 1);
      if (!serves(index) || (!receive.queue.bound() && !transmit.queue.bound())) continue;
      QueuePair pair;
      pair.index = index;
      pair.state = &config_.segment->queue_pairs[index];
      pair.shard = &state();
      pair.epoch = epoch_;
      pair.cursor = PacketCursor{tag_, PacketPhase::kNone, index, 0}.word();
      pair.generation = description.generation;
      pair.memory = served.in_force->memory();
      pair.port = served.uplink->ports[n].get();
      constexpr std::uint64_t kLongHeader = std::uint64_t{1} << 32 | std::uint64_t{1} << 15;  // VERSION_1, MRG_RXBUF
      pair.header_size = (description.features & kLongHeader) != 0 ? 12 : 10;
      pair.mergeable = (description.features & (std::uint64_t{1} << 15)) != 0;
      pair.asked = OffloadSet::asked_by_guest(description.features);
      pair.taken = OffloadSet::taken_by_guest(description.features);
      pair.staging = staging_.data();
      pair.receive = receive;
      pair.transmit = transmit;
      // Whatever was known before: look once whether the kernel still has frames to take.
      pair.transmit_pending = true;
      load_suspects(pair);
      pair.seal = pair.checksum();
      pairs_.push_back(pair);
    }
  }
  find_neighbours();
  epoll_stale_ = true;
}

// Who reaches whom without the bridge. A queue of one device sends to one queue of another, so that each flow keeps its
// order; that changes only when a device comes or goes, or changes its queues.
void Shard::find_neighbours() {
  const bool any = std::any_of(devices_.begin(), devices_.end(),
                               [](const Served& served) { return served.uplink && served.uplink->group != 0; });
  if (!any) return;
  std::vector<QueuePair*> receivers[kMaxDevices];
  for (QueuePair& pair : pairs_)
    if (pair.receive.queue.bound()) receivers[device_of(pair.index)].push_back(&pair);
  for (QueuePair& pair : pairs_) {
    const std::uint32_t device = device_of(pair.index);
    const UplinkPorts& uplink = *devices_[device].uplink;
    for (std::uint32_t other = 0; uplink.group != 0 && other < kMaxDevices; ++other) {
      if (other == device || receivers[other].empty() || devices_[other].uplink->group != uplink.group) continue;
      const std::size_t n = (pair.index - uplink.first_queue_pair) % receivers[other].size();
      pair.neighbours.push_back({devices_[other].uplink->mac, receivers[other][n]});
    }
  }
}

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

void Shard::run() {
  { const WindowOpen settle; }  // gives this thread the key's default: windows readable, not writable
  thread_id_.store(static_cast<std::uint32_t>(::gettid()), std::memory_order_release);
  say(GarbageEvent{});
  while (!stop_) {
    wait_as_heir();
    if (!stop_ && take_over()) poll_as_owner();
  }
}

void Shard::wait_as_heir() {
  const UniqueFd epoll{::epoll_create1(EPOLL_CLOEXEC)};
  epoll_event event{};
  event.events = EPOLLIN;
  for (const int fd : {wake_fd_.get(), ring_.fd(), switch_.fd()})
    if (fd >= 0) ::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, fd, &event);
  // Edge-triggered: every ring is an edge, so neither process has to read the counter back.
  event.events = EPOLLIN | EPOLLET;
  if (bell_) ::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, bell_.get(), &event);
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
      follow_request();
      if (watchdog_ && watchdog_->tag() == owner_tag(word)) watch_owner();
    }
    epoll_event woken[4];
    const int count = config_.heirs == HeirWait::kPolling ? poll_as_heir(epoll.get(), woken, period, word)
                                                          : ::epoll_wait(epoll.get(), woken, 4, period);
    if (count < 0) continue;
    ring_.drain();
    switch_expired_ = switch_.drain();
    std::uint64_t posted = 0;
    [[maybe_unused]] const ssize_t got = ::read(wake_fd_.get(), &posted, sizeof posted);
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
      // It beats, and has not pushed: because it passes work by, or because it will in a moment.
      if (expired) switch_.push(idle_rounds_.suspicious() ? kSuspicionNs : limit);
      return;
    }
    if (!view.passes_work_by) watchdog_->look(view);
  }
  const HangVerdict verdict = judge(view);
  if (verdict == HangVerdict::kNone) {
    // Starved or nearly over a limit: ask again soon. A sleeper without work is asked at the heir's own period.
    if (!view.marked_asleep || view.work_pending) switch_.push(std::min(view.spin_limit_ns, view.blocked_limit_ns));
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

std::uint32_t Shard::device_of(std::uint32_t queue_pair) const {
  const auto found = std::find_if(devices_.begin(), devices_.end(), [queue_pair](const Served& served) {
    return served.uplink && queue_pair - served.uplink->first_queue_pair < served.uplink->ports.size();
  });
  return static_cast<std::uint32_t>(found - devices_.begin());
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
    const bool suspects = pair.has_suspects;
    if (suspects) [[unlikely]]
      look_at_suspects(pair);
    if (pair.settling_until_ns != 0) [[unlikely]]
      settle(pair, monotonic_ns());
    if (pair.transmit_pending) pair.transmit_pending = !pair.port->wake_transmit();
    bool moved = false;
    if (pair.can_transmit()) moved |= transmit_burst(pair) != 0;
    if (pair.can_receive()) moved |= receive_burst(pair) != 0;
    if (moved && pairs_.size() > 1) keep_alive();
    worked |= moved;
    if (suspects) [[unlikely]]
      look_at_suspects(pair);
  }
  return worked;
}

void Shard::poll_as_owner() {
  ShardState& shard = state();
  const std::uint64_t idle_cycles = config_.tsc_hz / 1'000'000 * kIdleMicroseconds;
  const std::uint64_t beat_cycles = config_.tsc_hz / 1'000'000 * kBeatMicroseconds;
  const std::uint64_t taken_over = rte_rdtsc();
  std::uint64_t last_work = taken_over;
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
    const bool worked = poll_once();
    // What had piled up while nobody polled is moved, or that takes long: others want this CPU too.
    if (real_time_ && (!worked || now - taken_over > beat_cycles)) [[unlikely]] {
      real_time_ = false;
      become_ordinary();
    }
    if (worked) {
      last_work = now;
      if (first_transaction_pending_) note_first_transaction();
    } else if (config_.polling == Polling::kAdaptive && now - last_work > idle_cycles) {
      sleep();
      last_work = rte_rdtsc();
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
  int timeout = kick_fd_missing_ ? kShortSleepMs : -1;
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
  shard.takeover.first_transaction_ns = monotonic_ns();
  say(FirstTransactionEvent{shard.takeover});
}

}  // namespace tandem
