// SPDX-License-Identifier: Apache-2.0
// Takeover: what an heir does between seeing its predecessor dead and polling (docs/fence.md).
//
// After a planned handover the same, from an owner that lives, finished its burst and told everybody (handover.cpp).
//
// Order: take the epoch; bind the queue pairs under the generations that were in force, unless they were bound while
// there was time (prepare()); replay the armed record; queue pair by queue pair, look what has become of its frames and
// move what waits; notify both sides of everything, for the dead owner may have died between publishing and telling;
// put newer descriptions in force. A second death anywhere in here leaves a state from which the next heir does the
// same again.
#include <rte_cycles.h>

#include <algorithm>
#include <array>
#include <span>
#include <utility>

#include "vhost-net-backend/poison.hpp"
#include "vhost-net-backend/probe.hpp"
#include "vhost-net-backend/shard.hpp"

namespace tandem {

// Whom the owner word names. If its copy names somebody else in the same epoch, a wild store hit one of the two: then
// it is the one that an heir knows, for there are no more than two members. Nobody, or a tag that does not die, if that
// does not tell either: better no owner than two.
std::uint32_t Shard::owner_of(std::uint64_t word) {
  const std::uint32_t tag = owner_tag(word);
  const std::uint64_t copy = ~state().owner_inverted.load(std::memory_order_acquire);
  if (copy == word || owner_epoch(copy) != owner_epoch(word)) return tag;
  const auto known = [this](std::uint32_t one) {
    return one == tag_ || (watchdog_ != nullptr && one == watchdog_->tag());
  };
  if (known(tag) != known(owner_tag(copy))) return known(tag) ? tag : owner_tag(copy);
  return config_.fence->dead(tag) && !config_.fence->dead(owner_tag(copy)) ? owner_tag(copy) : tag;
}

bool Shard::take_over() {
  ShardState& shard = state();
  const std::uint64_t awake = monotonic_ns();
  std::uint64_t word = shard.owner.load(std::memory_order_acquire);
  const std::uint32_t owner = owner_of(word);
  if (!config_.fence->dead(owner)) return false;
  const std::uint64_t found = word;
  epoch_ = owner_epoch(found) + 1;
  if (!shard.owner.compare_exchange_strong(word, owner_word(epoch_, tag_), std::memory_order_acq_rel)) return false;
  shard.owner_inverted.store(~owner_word(epoch_, tag_), std::memory_order_release);
  TANDEM_PROBE(kTakeoverEpoch);
  owner_ = real_time_ = true;
  const bool let_go = owner == 0 && owner_epoch(found) != 0;
  if (!let_go) former_watchdog_ = std::move(watchdog_);

  TakeoverTimeline timeline{};
  timeline.previous_tag = owner;
  timeline.tag = tag_;
  timeline.epoch = epoch_;
  timeline.awake_ns = awake;
  timeline.epoch_ns = monotonic_ns();
  if (let_go) note_handover(timeline);
  // Answered, or of an epoch that is over.
  shard.handover.request.store(0, std::memory_order_relaxed);
  asked_ = 0;
  left_word_ = ~std::uint64_t{0};
  timeline.fence_ns = config_.fence->slot(timeline.previous_tag).time_ns;
  timeline.verdict = std::exchange(verdict_, HangVerdict::kNone);
  timeline.verdict_ns = std::exchange(verdict_ns_, 0);
  timeline.owner_was_asleep = shard.asleep.load(std::memory_order_relaxed);
  const std::uint64_t beat = shard.heartbeat_tsc.load(std::memory_order_relaxed);
  const std::uint64_t tsc = rte_rdtsc();
  if (timeline.previous_tag != 0 && beat != 0) {
    const double age = static_cast<double>(tsc - beat) * 1e9 / static_cast<double>(config_.tsc_hz);
    timeline.last_heartbeat_ns = monotonic_ns() - static_cast<std::uint64_t>(std::max(age, 0.0));
  }
  // From here on the next heir judges us, not our predecessor.
  shard.heartbeat_tsc.store(tsc, std::memory_order_relaxed);
  shard.asleep.store(0, std::memory_order_relaxed);

  timeline.suspect = weigh_death(*config_.segment, config_.index, *config_.fence,
                                 {static_cast<std::uint32_t>(timeline.previous_tag), timeline.verdict});
  adopt_generations();
  mend(/*record_pending=*/true);
  replay_record(timeline);
  mend(/*record_pending=*/false);  // the queues of a record that could not be replayed
  TANDEM_PROBE(kTakeoverReplayed);
  timeline.replayed_ns = monotonic_ns();
  timeline.queue_pairs = static_cast<std::uint32_t>(pairs_.size());
  transactions_at_takeover_ = shard.transactions.load(std::memory_order_relaxed);
  first_transaction_pending_ = true;
  // An owner that let go has told everybody of all that it did.
  notices_owed_ = !let_go || timeline.record_armed != 0;
  report_owed_ = true;
  shard.takeover = timeline;
  return true;
}

void Shard::report() {
  if (!std::exchange(report_owed_, false)) return;
  // A polling heir has a CPU of its own, where the dead owner never was.
  if (former_watchdog_ && former_watchdog_->tag() == state().takeover.previous_tag &&
      config_.heirs != HeirWait::kPolling)
    former_watchdog_->put_aside(control_cpus_);
  former_watchdog_.reset();
  say(TookOverEvent{state().takeover});
}

void Shard::tell() {
  if (std::exchange(notices_owed_, false))
    for (QueuePair& pair : pairs_) notify_all(pair);
  report();
  for (std::uint32_t device = 0; device < kMaxDevices; ++device)
    if (devices_[device].uplink) put_in_force(device);
}

// What the owner that let go has written down, and what that makes of this takeover.
void Shard::note_handover(TakeoverTimeline& timeline) {
  const Handover& handover = state().handover;
  timeline.previous_tag = handover.owner_tag.load(std::memory_order_relaxed);
  timeline.requested_ns = handover.requested_ns.load(std::memory_order_relaxed);
  timeline.granted_ns = handover.granted_ns.load(std::memory_order_relaxed);
  if (handover.heir_tag.load(std::memory_order_relaxed) == tag_) timeline.kind = TakeoverKind::kHandover;
  // Neither: both are dead, and this is a failover, from a dead owner that happened to have let go.
  if (timeline.previous_tag == tag_) timeline.kind = TakeoverKind::kTakenBack;
}

// The description under which a device's queue pairs are served, with its generation; nullptr if it is not held here.
std::shared_ptr<const Device> Shard::find_in_force(const Served& served, std::uint64_t& generation) {
  // An owner who died while it put a generation in force leaves some queue pairs at the old one; by then it had set all
  // cursors for the new one and had moved no packet since, so the newest stands for all.
  std::shared_ptr<const Device> newest;
  generation = 0;
  const auto consider = [&](std::uint64_t candidate) {
    const auto found = std::find_if(served.held.begin(), served.held.end(),
                                    [&](const auto& held) { return held->description().generation == candidate; });
    if (found != served.held.end() && (!newest || candidate > newest->description().generation)) newest = *found;
  };
  for_each_pair(served, [&](QueuePairState& pair) {
    const std::uint64_t found = pair.generation.load(std::memory_order_acquire);
    generation = std::max(generation, found);
    consider(found);
    // An heir holds what is in force (or it is on its way): a word that names something else was hit by a wild store.
    if (const std::uint64_t copy = ~pair.generation_inverted.load(std::memory_order_relaxed); copy != found)
      consider(copy);
  });
  if (newest) generation = newest->description().generation;
  return newest;
}

// Binds every device under the generation that its queue pairs were served with.
void Shard::adopt_generations() {
  for (std::uint32_t device = 0; device < kMaxDevices; ++device) {
    Served& served = devices_[device];
    if (!served.uplink) continue;
    std::uint64_t generation = 0;
    std::shared_ptr<const Device> in_force = find_in_force(served, generation);
    if (in_force != served.in_force) {
      served.in_force = std::move(in_force);
      pairs_stale_ = true;
    }
    if (served.in_force)
      note_in_force(served, generation);
    else if (generation != 0)
      say(ProblemEvent{device, "take over: generation " + std::to_string(generation) +
                                   " of this device's description is not held here; it waits for a newer one"});
  }
  // What was bound long ago may have been hit by a stray store since.
  if (pairs_stale_ || !std::all_of(pairs_.begin(), pairs_.end(), [](const QueuePair& pair) { return pair.is_wired(); }))
    bind_pairs();
  for (QueuePair& pair : pairs_) begin_epoch(pair);
  epoll_stale_ = kicks_asked_ = true;
}

// As heir, while the owner lives: does what it can of the above. What is in force may change until the takeover, which
// looks again.
void Shard::prepare() {
  for (Served& served : devices_) {
    std::uint64_t generation = 0;
    std::shared_ptr<const Device> in_force = served.uplink ? find_in_force(served, generation) : nullptr;
    if (in_force == served.in_force) continue;
    discard(std::exchange(served.in_force, std::move(in_force)));
    pairs_stale_ = true;
  }
  if (pairs_stale_) bind_pairs();
}

// What may have been hit by a wild store and can be known otherwise. A stop of which the cause lasts is found again.
void Shard::mend(bool record_pending) {
  const RedoRecord& record = state().record;
  std::array<const VringCursors*, 2> in_record{};
  if (record_is_valid(record)) {
    const auto* pairs = config_.segment->queue_pairs;
    in_record[0] =
        record.kind == RedoKind::kReceive ? &pairs[record.queue_pair].receive : &pairs[record.queue_pair].transmit;
    if (record.kind == RedoKind::kForward) in_record[1] = &pairs[record.destination.queue_pair].receive;
  }
  for (QueuePair& pair : pairs_) {
    for (const auto& [bound, cursors] :
         {std::pair{&pair.receive, &pair.state->receive}, std::pair{&pair.transmit, &pair.state->transmit}}) {
      if (!bound->queue.bound()) continue;
      if (record_pending && cursors->fault.load(std::memory_order_relaxed) != QueueFault::kRecordInvalid)
        cursors->fault.store(QueueFault::kNone, std::memory_order_relaxed);
      // An owner that died while it applied its record left them in between; the record says more than they do.
      if (record_pending && std::find(in_record.begin(), in_record.end(), cursors) != in_record.end()) continue;
      // Of a ring that is to be started anew they are about to be set.
      if (repair_positions(*cursors) || cursors->start_count != bound->start_count) continue;
      cursors->fault.store(QueueFault::kRecordInvalid, std::memory_order_release);
      say(ProblemEvent{device_of(pair.index),
                       "take over: nobody knows where a virtqueue of queue pair " + std::to_string(pair.index) +
                           " stands, its dead owner damaged all that says so; that queue is stopped until the guest "
                           "resets its device"});
    }
  }
}

// Release: whoever reads it knows that nothing is written under an older generation any more.
void Shard::note_in_force(const Served& served, std::uint64_t generation) {
  for_each_pair(served, [&](QueuePairState& pair) {
    if (pair.generation_inverted.load(std::memory_order_relaxed) == ~generation &&
        pair.generation.load(std::memory_order_relaxed) == generation)
      return;
    pair.generation_inverted.store(~generation, std::memory_order_relaxed);
    pair.generation.store(generation, std::memory_order_release);
  });
}

// Where the guest was shown more than our cursor says, a burst was published of which no record is left: going on would
// take it back.
void Shard::stop_half_published() {
  for (QueuePair& pair : pairs_) {
    for (const auto& [bound, cursors] :
         {std::pair{&pair.receive, &pair.state->receive}, std::pair{&pair.transmit, &pair.state->transmit}})
      if (bound->queue.bound() && bound->queue.is_half_published(cursors->next_used))
        cursors->fault.store(QueueFault::kRecordInvalid, std::memory_order_release);
  }
}

void Shard::replay_record(TakeoverTimeline& timeline) {
  RedoRecord& record = state().record;
  if (record.arm.load(std::memory_order_acquire) == 0) return;
  timeline.record_armed = 1;
  const auto find = [this](std::uint32_t index, std::uint64_t generation) {
    const auto found = std::find_if(pairs_.begin(), pairs_.end(), [&](const QueuePair& candidate) {
      return candidate.index == index && candidate.generation == generation;
    });
    return found == pairs_.end() ? nullptr : &*found;
  };
  QueuePair* const pair = find(record.queue_pair, record.generation);
  if (!record_is_valid(record) || pair == nullptr) {
    // The dead owner damaged it, or nobody can map its memory any more. The cursors still stand before the burst or
    // after it: that burst may be lost or repeated, everything else stays exact.
    say(ProblemEvent{0,
                     "replay the dead owner's record: it is damaged or its device is gone; the burst in hand may be "
                     "lost or repeated"});
    stop_half_published();
    record.arm.store(0, std::memory_order_release);
    return;
  }
  timeline.replayed_kind = static_cast<std::uint32_t>(record.kind);
  const bool forward = record.kind == RedoKind::kForward;
  // Of a forward whose destination is gone, the sender must not suffer: its half is done without the other.
  QueuePair* const destination = forward ? find(record.destination.queue_pair, record.destination.generation) : nullptr;
  timeline.replayed_packets = forward ? record.used_count : record.frame_count;
  timeline.replayed_queue_pair = record.queue_pair;
  if (record_is_poison(*config_.segment, record)) {
    abandon_record(*pair, destination);
    say(ProblemEvent{0,
                     "replay the dead owner's record: two owners in a row died while they applied it; it is given up, "
                     "that burst may be lost or repeated, and queue pair " +
                         std::to_string(record.queue_pair) + " is stopped in that direction"});
    return;
  }
  timeline.record_valid = replay(*pair, destination) == ReplayResult::kReplayed ? 1 : 0;
  if (forward && destination == nullptr) stop_half_published();
  if (timeline.record_valid == 0)
    say(ProblemEvent{0, "replay the dead owner's record: cursors or frames of queue pair " +
                            std::to_string(record.queue_pair) + " do not match it; that queue is stopped"});
}

}  // namespace tandem
