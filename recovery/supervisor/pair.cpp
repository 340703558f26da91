// SPDX-License-Identifier: Apache-2.0
// A pair's life: spawn, take over, hand over, spawn again. What its members say: pair_members.cpp; what they serve:
// pair_devices.cpp; a pair that another supervisor made: pair_adoption.cpp.
#include "recovery/supervisor/pair.hpp"

#include <spdlog/spdlog.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>

#include "common/monotonic_clock.hpp"

namespace tandem {

namespace {

using namespace std::chrono_literals;

// A member that lived shorter than this before it owned anything counts as an early death.
constexpr std::uint64_t kEarlyNs = 2'000'000'000;
constexpr unsigned kAlarmingDeaths = 3;
constexpr auto kStartLimit = 30s;
// An heir reports sooner, whatever comes of it (handover.cpp): one that does not is hung.
constexpr auto kHandoverLimit = 1s;
constexpr auto kLongestBackOff = 5s;

std::uint64_t free_huge_pages() {
  std::ifstream file("/proc/meminfo");
  for (std::string word; file >> word;)
    if (std::uint64_t count = 0; word == "HugePages_Free:" && file >> count) return count;
  return 0;
}

}  // namespace

std::uint32_t TagSource::next() {
  if (living_.size() >= TANDEM_FENCE_SLOTS) return 0;
  do {
    ++last_;
  } while (last_ == 0 || living_.contains(last_ % TANDEM_FENCE_SLOTS));
  living_[last_ % TANDEM_FENCE_SLOTS] = last_;
  return last_;
}

void TagSource::adopt(std::uint32_t tag) {
  if (tag == 0) return;
  living_[tag % TANDEM_FENCE_SLOTS] = tag;
  last_ = std::max(last_, tag);
}

void TagSource::retire(std::uint32_t tag) {
  const auto found = living_.find(tag % TANDEM_FENCE_SLOTS);
  if (found != living_.end() && found->second == tag) living_.erase(found);
}

Pair::Pair(std::string name, const Config& config, std::string backend_path, EventLoop& loop, Fence& fence,
           TagSource& tags, Listener& listener)
    : name_(std::move(name)),
      config_(config),
      backend_path_(std::move(backend_path)),
      loop_(loop),
      fence_(fence),
      tags_(tags),
      listener_(listener) {}

Result<std::unique_ptr<Pair>> Pair::make(std::string name, const Config& config, std::string backend_path,
                                         EventLoop& loop, Fence& fence, TagSource& tags, Listener& listener) {
  std::unique_ptr<Pair> pair{new Pair(std::move(name), config, std::move(backend_path), loop, fence, tags, listener)};
  if (auto made = pair->make_segment(); !made) return within("make pair " + pair->name_, std::move(made.error()));
  // Three members exist at once around a failover; each takes a handful of 2 MiB pages.
  constexpr std::uint64_t kWantedPages = 8;
  pair->hugepages_ = config.hugepages == Hugepages::kAlways ||
                     (config.hugepages == Hugepages::kAuto && free_huge_pages() >= kWantedPages);
  return pair;
}

Pair::~Pair() {
  for (const auto& [tag, pid] : tag_pids_) tags_.retire(tag);
  for (const Member& member : members_) member.kill();
}

// Again for every new member, which would refuse one that a wild store has damaged.
void Pair::write_header() {
  segment_->magic = kSegmentMagic;
  segment_->version = kSegmentVersion;
  segment_->shard_count = config_.shards;
  segment_->size = sizeof(Segment);
}

Status Pair::make_segment() {
  segment_fd_ = UniqueFd{::memfd_create("tandem-pair", MFD_CLOEXEC | MFD_ALLOW_SEALING)};
  if (!segment_fd_ || ::ftruncate(segment_fd_.get(), sizeof(Segment)) != 0 ||
      ::fcntl(segment_fd_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    return fail_errno("make the pair segment");
  auto mapping = Mapping::map(segment_fd_.get(), sizeof(Segment), PROT_READ | PROT_WRITE, 0, "pair segment");
  if (!mapping) return tl::make_unexpected(std::move(mapping.error()));
  segment_mapping_ = std::move(*mapping);
  segment_ = reinterpret_cast<Segment*>(segment_mapping_.data());
  write_header();
  for (std::uint32_t i = 0; i < config_.shards; ++i) {
    timers_.emplace_back(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
    bells_.emplace_back(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!timers_.back() || !bells_.back()) return fail_errno("make the watchdog's timer and the handover's bell");
  }
  return {};
}

const Member* Pair::owner() const {
  const auto found = std::find_if(members_.begin(), members_.end(),
                                  [](const Member& member) { return member.stage == Member::Stage::kOwner; });
  return found == members_.end() ? nullptr : &*found;
}

const Member* Pair::heir() const {
  const auto found = std::find_if(members_.begin(), members_.end(), [](const Member& member) {
    return member.stage != Member::Stage::kOwner && member.stage != Member::Stage::kDead;
  });
  return found == members_.end() ? nullptr : &*found;
}

Member* Pair::owner_member() { return const_cast<Member*>(owner()); }

Member* Pair::armed_member() {
  const auto found = std::find_if(members_.begin(), members_.end(),
                                  [](const Member& member) { return member.stage == Member::Stage::kArmed; });
  return found == members_.end() ? nullptr : &*found;
}

Member* Pair::peer_of(const Member& member) {
  const auto found = std::find_if(members_.begin(), members_.end(), [&member](const Member& other) {
    return &other != &member && (other.stage == Member::Stage::kOwner || other.stage == Member::Stage::kArmed);
  });
  return found == members_.end() ? nullptr : &*found;
}

std::uint32_t Pair::shards_owned(const Member& member) const {
  std::uint32_t owned = 0;
  for (std::uint32_t i = 0; i < config_.shards && i < member.tags.size(); ++i)
    owned += owner_tag(segment_->shards[i].owner.load(std::memory_order_acquire)) == member.tags[i];
  return owned;
}

Member* Pair::find(pid_t pid) {
  for (Member& member : members_)
    if (member.pid() == pid) return &member;
  return nullptr;
}

void Pair::step(PairEvent event) {
  const bool was_handing_over = state_ == PairState::kHandingOver;
  const PairStep taken = pair_step(state_, event);
  spdlog::debug("pair {}: {} in state {} -> {}", name_, pair_event_name(event), pair_state_name(state_),
                pair_state_name(taken.next));
  state_ = taken.next;
  switch (taken.action) {
    case PairAction::kNone:
    case PairAction::kArm:  // the caller knows which member
      break;
    case PairAction::kSpawn:
      spawn_soon();
      break;
    case PairAction::kHandOver:
      hand_over();
      break;
    case PairAction::kKillAll:
      respawn_.reset();
      heir_look_.reset();
      // Their deaths are no events for a pair that may be started again before they are reaped.
      for (Member& member : members_) {
        member.kill();
        member.stage = Member::Stage::kDead;
      }
      owner_pid_ = 0;
      break;
    case PairAction::kInvalid:
      spdlog::error("pair {}: event \"{}\" cannot happen in state \"{}\"; ignored. Please report this as a bug", name_,
                    pair_event_name(event), pair_state_name(state_));
      break;
  }
  if (was_handing_over && state_ != PairState::kHandingOver) {
    handover_limit_.reset();
    if (event == PairEvent::kNotHandedOver)
      listener_.on_not_handed_over(*this, refusal_);
    else if (event != PairEvent::kHandedOver)
      listener_.on_not_handed_over(
          *this, event == PairEvent::kStop
                     ? "the pair is stopped"
                     : "a backend died meanwhile, see virt-tandem incidents; try again when the pair is paired");
  }
  listener_.on_state(*this);
}

void Pair::stop() { step(PairEvent::kStop); }

void Pair::spawn_soon() {
  // One heir per shard: never two members on their way.
  for (const Member& member : members_)
    if (member.stage == Member::Stage::kStarting || member.stage == Member::Stage::kReady) return;
  std::chrono::nanoseconds delay = 0ns;
  if (early_deaths_ > 0) {
    delay = std::min<std::chrono::nanoseconds>(100ms * (1u << std::min(early_deaths_ - 1, 10u)), kLongestBackOff);
    spdlog::warn("pair {}: {} backends in a row died right after their start; next try in {} ms", name_, early_deaths_,
                 std::chrono::duration_cast<std::chrono::milliseconds>(delay).count());
  }
  respawn_ = loop_.after(delay, [this] { spawn(); });
}

void Pair::spawn() {
  write_header();
  respawn_.reset();
  auto spawned = Member::spawn(config_, backend_path_, hugepages_);
  if (!spawned) {
    spdlog::error("pair {}: {}", name_, spawned.error().text);
    ++early_deaths_;
    spawn_soon();
    return;
  }
  members_.push_back(std::move(*spawned));
  Member& member = members_.back();
  member.spawned_ns = monotonic_ns();
  const pid_t pid = member.pid();
  if (!watch(member)) return end(member, "cannot watch it");
  member.start_limit = loop_.after(kStartLimit, [this, pid] {
    if (Member* late = find(pid); late != nullptr && late->stage == Member::Stage::kStarting)
      end(*late, "it did not become ready within 30 s");
  });
  spdlog::info("pair {}: started backend {}", name_, pid);
  if (auto welcomed = welcome(member); !welcomed) return end(member, welcomed.error().text);
  listener_.on_member_change(*this, member);
}

bool Pair::watch(Member& member) {
  const pid_t pid = member.pid();
  auto on_message = loop_.watch(member.channel().fd(), [this, pid] { on_channel(pid); });
  auto on_exit_source = loop_.watch(member.pidfd(), [this, pid] { on_exit(pid); });
  if (!on_message || !on_exit_source) return false;
  member.on_message = std::move(*on_message);
  member.on_exit = std::move(*on_exit_source);
  return true;
}

void Pair::end(Member& member, const std::string& why) {
  spdlog::error("pair {}: ending backend {}: {}", name_, member.pid(), why);
  member.kill();
}

Status Pair::switchover() {
  if (state_ != PairState::kPaired)
    return fail(ErrorKind::kInvalid, "switch over pair " + name_ + ": it is " + std::string(pair_state_name(state_)) +
                                         "; a switchover needs an armed standby, try again when it is paired");
  step(PairEvent::kSwitchover);
  return {};
}

void Pair::hand_over() {
  Member* heir = armed_member();
  if (heir == nullptr) return on_not_handed_over("there is no armed standby");
  handover_limit_ =
      loop_.after(kHandoverLimit, [this] { on_not_handed_over("the standby did not report within 1 s"); });
  for (std::uint32_t i = 0; i < config_.shards; ++i) {
    // One that an earlier attempt has moved already stays where it is.
    if (owner_tag(segment_->shards[i].owner.load(std::memory_order_acquire)) == heir->tags[i]) continue;
    if (auto sent = heir->send(ControlType::kHandOver, ShardBody{i, 0}); !sent) return end(*heir, sent.error().text);
  }
}

void Pair::on_not_handed_over(const std::string& why) {
  spdlog::warn("pair {}: switchover: {}", name_, why);
  refusal_ = why;
  step(PairEvent::kNotHandedOver);
}

void Pair::on_exit(pid_t pid) {
  on_channel(pid);  // what it said before it died: a takeover, say
  const auto found = std::find_if(members_.begin(), members_.end(), [pid](const Member& m) { return m.pid() == pid; });
  if (found == members_.end()) return;
  const bool was_former = found->stage == Member::Stage::kDead;
  const bool was_owner = pid == owner_pid_;
  const bool early = found->stage != Member::Stage::kOwner && monotonic_ns() - found->spawned_ns < kEarlyNs;
  const ExitStatus status = found->reap();
  if (!status.known)
    spdlog::warn("pair {}: backend {}, started by an earlier tandemd, is gone", name_, pid);
  else if (status.signal != 0)
    spdlog::warn("pair {}: backend {} died of signal {} ({})", name_, pid, status.signal, ::strsignal(status.signal));
  else
    spdlog::warn("pair {}: backend {} left with exit status {}", name_, pid, status.status);
  if (!early)
    early_deaths_ = 0;
  else if (state_ != PairState::kStopped && ++early_deaths_ == kAlarmingDeaths)
    spdlog::critical(
        "pair {}: {} backends in a row died right after their start: it has no standby until one lives; what they "
        "said is above",
        name_, early_deaths_);
  forget_watches(*found, was_owner);
  members_.erase(found);
  std::vector<std::uint32_t> waiting;
  for (const auto& [device, attached] : devices_)
    if (attached.detaching) waiting.push_back(device);
  for (const std::uint32_t device : waiting) note_detached(device, pid);
  listener_.on_member_exit(*this, pid, status);
  if (was_owner) owner_pid_ = 0;
  if (was_owner)
    step(PairEvent::kOwnerDied);
  else if (!was_former)
    step(PairEvent::kOtherDied);
  else
    listener_.on_state(*this);
}

void Pair::forget_watches(Member& member, bool owned) {
  const Member* heir = owner();
  for (std::size_t i = 0; i < member.tags.size(); ++i) {
    // A death takes its own watch away; only one that is still this thread's may be removed, for the tid may name
    // another by now.
    if (fence_.set_ring(member.threads[i], member.tags[i], TANDEM_FENCE_NO_RING))
      static_cast<void>(fence_.unwatch(member.threads[i]));
    // An heir's report names the dead owner's tag, and may come after the owner was reaped: on_took_over() retires it.
    // A member that the segment names owned too, though its own report never came. Of several shards each is reported
    // by itself: the heir may count as owner, by the segment, with reports still on their way.
    if (owned || member.dead_at_adoption ||
        owner_tag(segment_->shards[i].owner.load(std::memory_order_acquire)) == member.tags[i] ||
        (heir != nullptr && (heir->reported_shards >> i & 1u) == 0))
      continue;
    tags_.retire(member.tags[i]);
    tag_pids_.erase(member.tags[i]);
  }
  for (const std::uint32_t ring : member.rings) static_cast<void>(fence_.free_ring(ring));
}

// Tags of owners whose heirs died before they could report.
void Pair::forget_dead_tags() {
  for (auto entry = tag_pids_.begin(); entry != tag_pids_.end();) {
    if (find(entry->second) != nullptr) {
      ++entry;
      continue;
    }
    tags_.retire(entry->first);
    entry = tag_pids_.erase(entry);
  }
}

bool Pair::kill_if_hung(const std::string& why) {
  for (std::uint32_t i = 0; i < config_.shards; ++i) {
    // Who owns is what the segment says: after a handover its report may still be on its way.
    const std::uint32_t tag = owner_tag(segment_->shards[i].owner.load(std::memory_order_acquire));
    const auto pid = tag_pids_.find(tag);
    const Member* member = pid == tag_pids_.end() ? nullptr : find(pid->second);
    // A dead owner's heir is to take over and let go. One that let go alive is waited for: it takes back what nobody
    // takes.
    if (tag == 0 && owner() != nullptr) continue;
    if (member == nullptr || member->stage == Member::Stage::kDead || fence_.dead(tag)) member = armed_member();
    if (member == nullptr || !member->stands_still()) continue;
    spdlog::error("pair {}: backend {} is hung ({}): killing it, its heir takes over", name_, member->pid(), why);
    member->kill();
    return true;
  }
  return false;
}

void Pair::set_hang_limits(std::chrono::nanoseconds spin, std::chrono::nanoseconds blocked) {
  for (std::uint32_t i = 0; i < config_.shards; ++i) {
    segment_->shards[i].spin_limit_ns.store(static_cast<std::uint64_t>(spin.count()), std::memory_order_relaxed);
    segment_->shards[i].blocked_limit_ns.store(static_cast<std::uint64_t>(blocked.count()), std::memory_order_relaxed);
  }
}

Status Pair::drill(DrillFault fault, std::uint32_t after_ms) {
  Member* member = owner_member();
  if (member == nullptr || state_ != PairState::kPaired)
    return fail(ErrorKind::kInvalid, "drill pair " + name_ + ": it is " + std::string(pair_state_name(state_)) +
                                         "; a drill needs an armed standby, try again when it is paired");
  return member->send(ControlType::kDrill, DrillBody{0, fault, after_ms, 0});
}

}  // namespace tandem
