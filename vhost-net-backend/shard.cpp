// SPDX-License-Identifier: Apache-2.0
// The poll thread: its mailbox, what the control thread asks of it, and which queue pairs it serves. Its two loops:
// heir.cpp and owner.cpp.
#include "vhost-net-backend/shard.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>

namespace tandem {

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
  if (!has_commands_.load(std::memory_order_acquire)) return;
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
  wiring_changed();
}

void Shard::execute(DetachCommand& command) {
  Served& served = devices_[command.device];
  Served gone = std::exchange(served, {});
  wiring_changed();
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

void Shard::execute(PruneCommand& command) {
  Served& served = devices_[command.device];
  // An heir only expects it to be in force; it looks again.
  if (!owner_ && served.in_force && served.in_force->description().generation < command.generation) {
    discard(std::exchange(served.in_force, nullptr));
    wiring_changed();
  }
  prune(served, command.generation);
}

void Shard::execute(ArmCommand& command) {
  tag_ = command.tag;
  watchdog_ = std::move(command.peer);
}

void Shard::execute(DrillCommand& command) {
  if (command.after_ms == 0) return drill(command.fault);
  if (!owner_) return;  // it has just let go: a switchover calls a drill off
  drill_fault_ = command.fault;
  drill_at_ns_ = monotonic_ns() + std::uint64_t{command.after_ms} * 1'000'000;
}

void Shard::drill(DrillFault fault) {
  if (fault == DrillFault::kLivelock && owner_) livelock();
  const std::byte* read_only = nullptr;
  for (const Served& served : devices_)
    if (served.in_force && served.in_force->description().region_count > 0)
      read_only =
          served.in_force->memory()->view_some(served.in_force->description().regions[0].guest_address, 1).data();
  fail_on_purpose(fault, read_only);
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

// Something that queue pairs point to has come or goes. An heir has time to bind them anew later (prepare()).
void Shard::wiring_changed() {
  if (owner_) return rebuild_pairs();
  pairs_.clear();
  pairs_stale_ = true;
}

// As owner: what it has found out about a port's frames stays true.
void Shard::rebuild_pairs() {
  struct Known {
    const XskPort* port;
    std::uint64_t settling_until_ns;
  };
  std::array<Known, kMaxQueuePairs> known{};
  for (const QueuePair& pair : pairs_) known[pair.index] = {pair.port, pair.settling_until_ns};
  bind_pairs();
  for (QueuePair& pair : pairs_) {
    begin_epoch(pair);
    if (known[pair.index].port == pair.port) pair.settling_until_ns = known[pair.index].settling_until_ns;
  }
  epoll_stale_ = kicks_asked_ = true;
}

// What a queue pair knows of its owner, and of what it had been up to.
void Shard::begin_epoch(QueuePair& pair) {
  pair.epoch = epoch_;
  pair.cursor = PacketCursor{tag_, PacketPhase::kNone, pair.index, 0}.word();
  load_suspects(pair);
  pair.seal = pair.checksum();
}

// Builds pairs_ of what is in force, but for begin_epoch().
void Shard::bind_pairs() {
  pairs_.clear();
  pairs_stale_ = false;
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
      pair.settling_until_ns = QueuePair::kNotLookedAt;
      pair.seal = pair.checksum();
      pairs_.push_back(std::move(pair));
    }
  }
  find_neighbours();
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

std::uint32_t Shard::device_of(std::uint32_t queue_pair) const {
  const auto found = std::find_if(devices_.begin(), devices_.end(), [queue_pair](const Served& served) {
    return served.uplink && queue_pair - served.uplink->first_queue_pair < served.uplink->ports.size();
  });
  return static_cast<std::uint32_t>(found - devices_.begin());
}

void Shard::run() {
  { const WindowOpen settle; }  // gives this thread the key's default: windows readable, not writable
  thread_id_.store(static_cast<std::uint32_t>(::gettid()), std::memory_order_release);
  say(GarbageEvent{});
  while (!stop_) {
    wait_as_heir();
    if (stop_ || !take_over()) continue;
    // Packets first: to tell everybody takes system calls, and nobody minds hearing of both at once. But if packets
    // wait that owners died on, we may not live to report it.
    if (std::any_of(pairs_.begin(), pairs_.end(), [](const QueuePair& pair) { return pair.has_suspects; })) report();
    if (poll_once()) state().takeover.first_transaction_ns = monotonic_ns();
    tell();
    poll_as_owner();
  }
}

}  // namespace tandem
