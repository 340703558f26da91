// SPDX-License-Identifier: Apache-2.0
// Planned handover: an heir asks, the owner lets go between two bursts, the heir takes the epoch (docs/handover.md).
//
// Letting go stores tag 0, nobody, into the owner word. From then on the shard is as it is before its first owner: any
// armed heir may take it, by compare-and-swap, and takeover.cpp does the rest. The former owner is one of them; it
// leaves the shard to the heir that asked for as long as that lives and is in time.
#include <rte_cycles.h>
#include <rte_pause.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "vhost-net-backend/probe.hpp"
#include "vhost-net-backend/shard.hpp"

namespace tandem {

namespace {

// An heir that asked looks this long without sleeping: an owner that polls answers within a burst. Longer would only
// keep an owner from a CPU that it shares with us.
constexpr std::uint64_t kAskSpinMicroseconds = 50;
// Then it sleeps; an owner that has not let go by now will not be waited for.
constexpr std::uint64_t kAskLimitNs = 200'000'000;
// A former owner leaves the shard to its heir at least this long, however small the hang limits are.
constexpr std::uint64_t kLeastGraceNs = 2'000'000;

std::uint32_t random_nonce() {
  std::uint32_t nonce = 0;
  // Four bytes never block or fail once the kernel is up; a nonce of 0 would do as well, for the epoch is in the word.
  [[maybe_unused]] const ssize_t got = ::getrandom(&nonce, sizeof nonce, GRND_NONBLOCK);
  return nonce;
}

}  // namespace

void Shard::ring_bell() const {
  const std::uint64_t one = 1;
  if (bell_) [[maybe_unused]]
    const ssize_t written = ::write(bell_.get(), &one, sizeof one);
}

void Shard::execute(HandOverCommand&) {
  if (owner_) return say(NotHandedOverEvent{"it owns the shard already"});
  if (tag_ == 0) return say(NotHandedOverEvent{"it may not own yet"});
  hand_over_wanted_ = true;
}

// As heir. The request names the epoch, so that it means nothing to a later owner.
void Shard::ask_owner() {
  if (!std::exchange(hand_over_wanted_, false)) return;
  ShardState& shard = state();
  const std::uint64_t word = shard.owner.load(std::memory_order_acquire);
  if (config_.fence->dead(owner_tag(word))) return;  // no owner to ask: a takeover is next
  if (!holds_all_in_force())
    return say(NotHandedOverEvent{"it does not hold every device description in force; try again"});
  Handover& handover = shard.handover;
  asked_ns_ = monotonic_ns();
  asked_ = std::uint64_t{owner_epoch(word)} << 32 | random_nonce();
  handover.requested_ns.store(asked_ns_, std::memory_order_relaxed);
  handover.heir_tag.store(tag_, std::memory_order_relaxed);
  // Release: who sees the request sees who asks.
  handover.request.store(asked_, std::memory_order_release);
  TANDEM_PROBE(kHandoverAsked);
  ring_bell();
}

void Shard::await_grant() {
  const std::uint64_t word = state().owner.load(std::memory_order_acquire);
  const std::uint64_t until = rte_rdtsc() + config_.tsc_hz / 1'000'000 * kAskSpinMicroseconds;
  while (asked_ != 0 && state().owner.load(std::memory_order_relaxed) == word && rte_rdtsc() < until) rte_pause();
}

// As heir, while the owner lives: has the request come to nothing?
void Shard::follow_request() {
  if (asked_ == 0) return;
  Handover& handover = state().handover;
  const char* why = nullptr;
  if (owner_epoch(state().owner.load(std::memory_order_acquire)) != owner_epoch(asked_)) {
    why = "the owner had let go, and took it back because this standby did not come in time; try again";
  } else if (handover.request.load(std::memory_order_relaxed) != asked_) {
    why = "the owner refused";
  } else if (monotonic_ns() - asked_ns_ > kAskLimitNs) {
    // The owner may let go all the same, this very moment: then the word names nobody, and we take it as any heir does.
    std::uint64_t expected = asked_;
    handover.request.compare_exchange_strong(expected, 0, std::memory_order_relaxed);
    why = "the owner did not let go within 200 ms";
  }
  if (why == nullptr) return;
  asked_ = 0;
  say(NotHandedOverEvent{why});
}

// As owner, between two rounds of the poll loop: nothing is staged, the record is empty, everybody has been told. True
// if this thread owns no more: it then touches no ring, cursor, guest memory or callfd until it takes over again.
bool Shard::let_go() {
  ShardState& shard = state();
  Handover& handover = shard.handover;
  std::uint64_t request = handover.request.load(std::memory_order_acquire);
  const std::uint32_t heir = handover.heir_tag.load(std::memory_order_relaxed);
  if (owner_epoch(request) != epoch_ || heir == tag_ || config_.fence->dead(heir)) {
    // Of another epoch, or its heir is gone: nobody would come.
    handover.request.compare_exchange_strong(request, 0, std::memory_order_relaxed);
    return false;
  }
  const std::uint64_t now = monotonic_ns();
  handover.owner_tag.store(tag_, std::memory_order_relaxed);
  handover.granted_ns.store(now, std::memory_order_relaxed);
  handover.grant.store(request, std::memory_order_release);
  TANDEM_PROBE(kHandoverGranted);
  std::uint64_t word = owner_word(epoch_, tag_);
  shard.owner_inverted.store(~owner_word(epoch_, 0), std::memory_order_release);
  // Release: whoever finds nobody here sees everything we did. If the word is not ours, another owner may be at work.
  if (!shard.owner.compare_exchange_strong(word, owner_word(epoch_, 0), std::memory_order_acq_rel)) std::abort();
  TANDEM_PROBE(kHandoverLetGo);
  ring_bell();
  owner_ = false;
  left_word_ = owner_word(epoch_, 0);
  left_to_ = heir;
  left_until_ns_ = now + std::max({kLeastGraceNs, shard.spin_limit_ns.load(std::memory_order_relaxed),
                                   shard.blocked_limit_ns.load(std::memory_order_relaxed)});
  wiring_changed();  // pairs_ begin anew when it takes over again
  epoll_.reset();
  for (Served& served : devices_) discard(std::move(served.in_force));
  asleep_work_since_ns_ = 0;
  idle_rounds_ = {};
  return true;
}

// As former owner: whether the shard, which names nobody, is still to be left to the heir that asked for it.
bool Shard::left_to_another(std::uint64_t word) const {
  return word == left_word_ && !config_.fence->dead(left_to_) && monotonic_ns() < left_until_ns_;
}

}  // namespace tandem
