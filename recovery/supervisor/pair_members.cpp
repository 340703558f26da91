// SPDX-License-Identifier: Apache-2.0
// What a pair and its members say to each other: greeting, readiness, arming at the fence, takeovers; and whether
// standbys still look for their owners.
#include <spdlog/spdlog.h>

#include <algorithm>
#include <bit>

#include "common/monotonic_clock.hpp"
#include "common/thread_priority.hpp"
#include "recovery/supervisor/member_message.hpp"
#include "recovery/supervisor/pair.hpp"

namespace tandem {

namespace {

using namespace std::chrono_literals;

// How often standbys are looked at, and how long one may not have looked for its owner itself (it does every 100 ms):
// longer if it waits for a CPU.
constexpr auto kHeirLook = 250ms;
constexpr std::uint64_t kHeirLimitNs = 1'000'000'000;
constexpr std::uint64_t kStarvedHeirLimitNs = 5'000'000'000;
// It looks for the first time once its control thread has mapped all that it was sent before: hundreds of uplinks and
// virtqueues take seconds.
constexpr std::uint64_t kFirstLookLimitNs = 10'000'000'000;

}  // namespace

Status Pair::welcome(Member& member) {
  auto slots = fence_.slots_fd();
  if (!slots) return tl::make_unexpected(std::move(slots.error()));
  std::vector<UniqueFd> rings;
  std::vector<int> fds{segment_fd_.get(), slots->get()};
  for (std::uint32_t i = 0; i < config_.shards; ++i) {
    auto ring = fence_.make_ring();
    if (!ring) return tl::make_unexpected(std::move(ring.error()));
    member.rings.push_back(*ring);
    auto fd = fence_.ring_fd(*ring);
    if (!fd) return tl::make_unexpected(std::move(fd.error()));
    rings.push_back(std::move(*fd));
    fds.push_back(rings.back().get());
  }
  for (const UniqueFd& timer : timers_) fds.push_back(timer.get());
  for (const UniqueFd& bell : bells_) fds.push_back(bell.get());
  const WelcomeBody welcome{config_.shards, config_.polling,
                            config_.heirs == Heirs::kPolling ? HeirWait::kPolling : HeirWait::kSleeping};
  return member.send(ControlType::kWelcome, welcome, fds);
}

void Pair::on_channel(pid_t pid) {
  for (int budget = 64; budget > 0; --budget) {
    Member* member = find(pid);
    if (member == nullptr) return;
    bool would_block = false;
    auto message = member->channel().receive(&would_block);
    if (would_block) return;
    if (!message) {
      // Its end closed: it is dead or dying, and the pidfd will say so.
      member->on_message.reset();
      if (message.error().kind != ErrorKind::kGone) end(*member, message.error().text);
      return;
    }
    on_message(*member, *message);
  }
}

void Pair::on_message(Member& member, const ChannelMessage& message) {
  const auto parsed = parse_member_message(message.bytes, config_.shards);
  if (!parsed) return end(member, parsed.error().text);
  const auto* device = std::get_if<DeviceBody>(&parsed->body);
  const auto* takeover = std::get_if<TakeoverBody>(&parsed->body);
  switch (parsed->type) {
    case ControlType::kReady:
      return on_ready(member, std::get<ReadyBody>(parsed->body));
    case ControlType::kHeld:
      member.held[device->device] = device->generation;
      if (member.stage == Member::Stage::kArmed) note_caught_up(member);
      return listener_.on_held(*this, device->device);
    case ControlType::kInForce:
      member.held[device->device] = device->generation;
      note_caught_up(member);
      prune_generations(device->device);
      if (devices_.contains(device->device)) listener_.on_in_force(*this, device->device);
      return;
    case ControlType::kDetached:
      return note_detached(device->device, member.pid());
    case ControlType::kTookOver:
      return on_took_over(member, *takeover);
    case ControlType::kFirstTransaction:
      return listener_.on_first_transaction(*this, takeover->shard, takeover->timeline);
    case ControlType::kPoison: {
      const auto& poison = std::get<PoisonMessage>(parsed->body);
      return listener_.on_poison(*this, poison.fixed, poison.bytes);
    }
    case ControlType::kNotHandedOver:
      return on_not_handed_over(std::get<RefusalBody>(parsed->body).text);
    case ControlType::kCannotAttach: {
      const auto& problem = std::get<ProblemBody>(parsed->body);
      if (devices_.contains(problem.device)) listener_.on_cannot_attach(*this, problem.device, problem.text);
      return;
    }
    default:
      spdlog::warn("pair {}: backend {}, device {}: {}", name_, member.pid(),
                   std::get<ProblemBody>(parsed->body).device, std::get<ProblemBody>(parsed->body).text);
  }
}

void Pair::on_ready(Member& member, const ReadyBody& ready) {
  if (member.stage != Member::Stage::kStarting) return end(member, "it reported ready out of turn");
  for (std::uint32_t i = 0; i < config_.shards; ++i) member.threads.push_back(static_cast<pid_t>(ready.thread_ids[i]));
  member.stage = Member::Stage::kReady;
  member.start_limit.reset();
  if (auto introduced = introduce(member); !introduced) return end(member, introduced.error().text);
  arm(member);
  if (member.stage == Member::Stage::kArmed) step(PairEvent::kMemberReady);
}

// Everything the pair serves, the generation in force before a newer one. The channel keeps the order, so the member is
// told of it before it is armed; mapping it takes longer (note_caught_up()).
Status Pair::introduce(Member& member) {
  for (const auto& [device, attached] : devices_) {
    if (attached.detaching) continue;
    if (auto sent = send_attach(member, device, attached); !sent) return sent;
    for (const DescribedGeneration& generation : attached.generations)
      if (auto sent = send_describe(member, generation); !sent) return sent;
  }
  return {};
}

void Pair::arm(Member& member) {
  for (std::uint32_t i = 0; i < config_.shards; ++i) {
    const std::uint32_t tag = tags_.next();
    if (tag == 0) return end(member, "every fence slot is taken; use fewer pairs and shards");
    member.tags.push_back(tag);
    tag_pids_[tag] = member.pid();
  }
  // The vault knows the tags before anyone can own under them.
  listener_.on_member_change(*this, member);
  for (std::uint32_t i = 0; i < config_.shards; ++i)
    if (auto armed = arm_shard(member, i); !armed) return end(member, armed.error().text);
  member.stage = Member::Stage::kArmed;
  member.heir_since_ns = monotonic_ns();
  note_caught_up(member);
  look_at_heirs();
}

// Watch first, confirmed; then each one's death is to wake the other; then it may own. Its peer is told too: after a
// handover the two have changed places, and nobody has to be told anything. Doing it again changes nothing.
Status Pair::arm_shard(Member& member, std::uint32_t shard) {
  const pid_t thread = member.threads[shard];
  const std::uint32_t tag = member.tags[shard];
  Member* peer = peer_of(member);
  const std::uint32_t ring = peer == nullptr ? TANDEM_FENCE_NO_RING : peer->rings[shard];
  if (!fence_.set_ring(thread, tag, ring)) {
    if (auto watched = fence_.watch(thread, tag, ring, member.pid()); !watched) return watched;
  }
  // Not before: the watch has found out that the thread is the member's own, which the member may have lied about.
  if (auto set = make_ordinary(thread, config_.nice); !set) spdlog::warn("{}", set.error().text);
  if (auto set = place(member, peer, shard); !set) spdlog::warn("{}", set.error().text);
  give_heir_priority(member, shard);
  if (peer != nullptr) {
    auto set = fence_.set_ring(peer->threads[shard], peer->tags[shard], member.rings[shard]);
    // kGone: the peer is dead; the member will see its slot before it first sleeps.
    if (!set && set.error().kind != ErrorKind::kGone) return set;
    if (auto told = tell_peer(*peer, &member, shard); !told) spdlog::warn("{}", told.error().text);
  }
  return tell_peer(member, peer, shard);
}

// Heirs that poll have CPUs of their own: those of the list that the peer is not on. A member that was started under
// another configuration, perhaps, stays where it is.
Status Pair::place(const Member& member, const Member* peer, std::uint32_t shard) const {
  if (config_.cpus.empty() || member.adopted) return {};
  const bool second =
      config_.heirs == Heirs::kPolling && peer != nullptr && runs_on(peer->threads.front(), config_.cpus.front());
  auto pinned = pin_thread(member.threads[shard], config_.cpus[second ? config_.shards + shard : shard]);
  return pinned ? pinned : within("pair " + name_ + ", pair.cpus", std::move(pinned.error()));
}

// Only a thread whose watch is confirmed. An owner has given it up and is left alone; it costs a little time, no more,
// to wake an heir without.
void Pair::give_heir_priority(const Member& member, std::uint32_t shard) {
  if (config_.heirs != Heirs::kRealTime || member.stage == Member::Stage::kOwner) return;
  if (auto set = make_real_time(member.threads[shard]); !set && !std::exchange(real_time_refused_, true))
    spdlog::warn("pair {}: {}; a busy host may delay its failovers", name_, set.error().text);
}

Status Pair::tell_peer(Member& member, const Member* peer, std::uint32_t shard) {
  ArmBody body;
  body.shard = shard;
  body.tag = member.tags[shard];
  std::vector<int> fds;
  if (peer != nullptr) {
    body.peer_tag = peer->tags[shard];
    body.peer_pid = static_cast<std::uint32_t>(peer->pid());
    body.peer_tid = static_cast<std::uint32_t>(peer->threads[shard]);
    fds.push_back(peer->pidfd());
  }
  return member.send(ControlType::kArm, body, fds);
}

// Owners are watched by their heirs; who watches these is here.
void Pair::look_at_heirs() {
  heir_look_ = loop_.after(kHeirLook, [this] { look_at_heirs(); });
  for (Member& member : members_) {
    for (std::uint32_t i = 0; i < config_.shards && member.stage == Member::Stage::kArmed; ++i) look_at_heir(member, i);
  }
}

void Pair::look_at_heir(Member& member, std::uint32_t shard) {
  const ShardState& state = segment_->shards[shard];
  if (owner_tag(state.owner.load(std::memory_order_acquire)) == member.tags[shard]) return;
  const std::uint64_t now = monotonic_ns();
  const std::uint64_t beat = state.heir_beat_ns.load(std::memory_order_relaxed);
  const std::uint64_t last = std::max(beat, member.heir_since_ns);
  if (now < last + (beat > member.heir_since_ns ? kHeirLimitNs : kFirstLookLimitNs)) return;
  if (member.ended_as_hung_ns != 0) {
    if (now > member.ended_as_hung_ns + kHeirLimitNs)
      spdlog::critical("pair {}: standby {} is hung and does not die of SIGKILL: the pair has no standby until it does",
                       name_, member.pid());
    member.ended_as_hung_ns = now;
    return;
  }
  const char thread = member.thread_state(member.threads[shard]);
  if (thread == 'R' && now < last + kStarvedHeirLimitNs) return;
  member.ended_as_hung_ns = now;
  end(member, "it is standby and has not looked for its owner for " + std::to_string((now - last) / 1'000'000'000) +
                  " s (state " + std::string(1, thread) + ")");
}

void Pair::on_took_over(Member& member, const TakeoverBody& body) {
  // A supervisor that adopted this pair may have seen from the segment what the report says only now.
  const bool known = member.stage == Member::Stage::kOwner;
  if (member.stage != Member::Stage::kArmed && !known) return end(member, "it reported a takeover out of turn");
  // The word may have moved on since: the member let go again, or died and its heir was faster than its report.
  const std::uint64_t word = segment_->shards[body.shard].owner.load(std::memory_order_acquire);
  if (body.timeline.tag != member.tags[body.shard] || owner_epoch(word) < body.timeline.epoch ||
      (owner_epoch(word) == body.timeline.epoch && owner_tag(word) != member.tags[body.shard] && owner_tag(word) != 0))
    return end(member, "it claims shard " + std::to_string(body.shard) + ", which the segment says another owns");
  const auto previous = static_cast<std::uint32_t>(body.timeline.previous_tag);
  const auto victim = tag_pids_.find(previous);
  if (previous != 0)
    listener_.on_takeover(*this, body.shard, body.timeline, victim == tag_pids_.end() ? 0 : victim->second,
                          member.pid());
  if (victim != tag_pids_.end() && fence_.dead(previous)) {
    tags_.retire(previous);
    tag_pids_.erase(victim);
  }
  member.reported_shards |= 1u << body.shard;
  // Not before the last report: the shards change hands before they are reported, and each report names a dead owner.
  if (static_cast<std::uint32_t>(std::popcount(member.reported_shards)) == config_.shards) forget_dead_tags();
  if (known || shards_owned(member) < config_.shards) return;
  early_deaths_ = 0;
  for (Member& other : members_) {
    if (other.stage != Member::Stage::kOwner) continue;
    other.stage = fence_.dead(other.tags[0]) ? Member::Stage::kDead : Member::Stage::kArmed;
    other.heir_since_ns = monotonic_ns();
    other.reported_shards = 0;
    for (std::uint32_t i = 0; other.stage == Member::Stage::kArmed && i < config_.shards; ++i)
      give_heir_priority(other, i);
  }
  member.stage = Member::Stage::kOwner;
  owner_pid_ = member.pid();
  spdlog::info("pair {}: backend {} owns since epoch {}", name_, member.pid(), body.timeline.epoch);
  step(armed_member() != nullptr ? PairEvent::kHandedOver : PairEvent::kTookOver);
}

}  // namespace tandem
