// SPDX-License-Identifier: Apache-2.0
// A pair's life: spawn, introduce, arm, take over, spawn again.
#include "recovery/supervisor/pair.hpp"

#include <spdlog/spdlog.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <ctime>
#include <fstream>

#include "common/thread_priority.hpp"
#include "recovery/supervisor/member_message.hpp"

namespace tandem {

namespace {

using namespace std::chrono_literals;

// A member that lived shorter than this before it owned anything counts as an early death.
constexpr std::uint64_t kEarlyNs = 2'000'000'000;
constexpr unsigned kAlarmingDeaths = 3;
constexpr auto kStartLimit = 30s;
constexpr auto kDetachLimit = 1s;
// An heir reports sooner, whatever comes of it (handover.cpp): one that does not is hung.
constexpr auto kHandoverLimit = 1s;
// How often standbys are looked at, and how long one may not have looked for its owner itself (it does every 100 ms):
// longer if it waits for a CPU.
constexpr auto kHeirLook = 250ms;
constexpr std::uint64_t kHeirLimitNs = 1'000'000'000;
constexpr std::uint64_t kStarvedHeirLimitNs = 5'000'000'000;
constexpr auto kLongestBackOff = 5s;

std::uint64_t now_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<std::uint64_t>(now.tv_nsec);
}

std::uint64_t free_huge_pages() {
  std::ifstream file("/proc/meminfo");
  for (std::string word; file >> word;)
    if (std::uint64_t count = 0; word == "HugePages_Free:" && file >> count) return count;
  return 0;
}

// State letter of a thread (proc(5), /proc/PID/stat), or 'X' when it is gone.
char thread_state(pid_t pid, pid_t tid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/task/" + std::to_string(tid) + "/stat");
  std::string line;
  std::getline(file, line);
  const std::size_t name_end = line.rfind(')');
  return name_end == std::string::npos || name_end + 2 >= line.size() ? 'X' : line[name_end + 2];
}

// Runnable threads are starved, not hung; one in D is on its way through the kernel.
bool stands_still(const Member& member) {
  const auto moves = [&member](pid_t tid) {
    const char state = thread_state(member.pid(), tid);
    return state == 'R' || state == 'D';
  };
  return !moves(member.pid()) && std::none_of(member.threads.begin(), member.threads.end(), moves);
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

Result<std::unique_ptr<Pair>> Pair::adopt(std::string name, std::vector<UniqueFd> fds, const Config& config,
                                          std::string backend_path, EventLoop& loop, Fence& fence, TagSource& tags,
                                          Listener& listener) {
  const std::string doing = "adopt pair " + name;
  std::unique_ptr<Pair> pair{new Pair(std::move(name), config, std::move(backend_path), loop, fence, tags, listener)};
  if (fds.size() != 1 + 2 * config.shards)
    return fail(ErrorKind::kInvalid, doing + ": it has another number of shards than the configuration says");
  auto mapping = Mapping::map(fds[0].get(), sizeof(Segment), PROT_READ | PROT_WRITE, 0, "pair segment");
  if (!mapping) return within(doing, std::move(mapping.error()));
  pair->segment_mapping_ = std::move(*mapping);
  pair->segment_ = reinterpret_cast<Segment*>(pair->segment_mapping_.data());
  if (pair->segment_->magic != kSegmentMagic || pair->segment_->version != kSegmentVersion ||
      pair->segment_->shard_count != config.shards)
    return fail(ErrorKind::kUnsupported, doing + ": its segment is of another version or damaged");
  pair->segment_fd_ = std::move(fds[0]);
  for (std::uint32_t i = 0; i < config.shards; ++i) {
    pair->timers_.push_back(std::move(fds[1 + i]));
    pair->bells_.push_back(std::move(fds[1 + config.shards + i]));
    // The owner's tag stays named until an heir takes over, even if the owner is gone.
    tags.adopt(owner_tag(pair->segment_->shards[i].owner.load(std::memory_order_acquire)));
  }
  return pair;
}

std::vector<int> Pair::keep_fds() const {
  std::vector<int> fds{segment_fd_.get()};
  for (const UniqueFd& timer : timers_) fds.push_back(timer.get());
  for (const UniqueFd& bell : bells_) fds.push_back(bell.get());
  return fds;
}

void Pair::adopt_member(pid_t pid, UniqueFd pidfd, UniqueFd channel, std::vector<pid_t> threads,
                        std::vector<std::uint32_t> tags, std::vector<std::uint32_t> rings) {
  Member& member = members_.emplace_back(Member::adopt(pid, std::move(pidfd), std::move(channel)));
  member.threads = std::move(threads);
  member.tags = std::move(tags);
  member.rings = std::move(rings);
  for (const std::uint32_t tag : member.tags) {
    tags_.adopt(tag);
    tag_pids_[tag] = pid;
  }
  // One that is ended here counts as gone already: resume() starts another.
  member.stage = Member::Stage::kDead;
  if (!watch(member)) return end(member, "cannot watch it");
  if (member.tags.size() != config_.shards || member.threads.size() != config_.shards)
    return end(member, "it was still starting when its supervisor died");
  member.dead_at_adoption = fence_.dead(member.tags[0]);
  if (member.dead_at_adoption) return;
  // In the middle of a handover each may own some of the shards: then the heir's report decides.
  const bool owns = shards_owned(member) > 0 && owner() == nullptr;
  member.stage = owns ? Member::Stage::kOwner : Member::Stage::kArmed;
  member.heir_since_ns = now_ns();
  if (!owns) return;
  owner_pid_ = pid;
  member.reported_shards = ~0u;  // to the supervisor before us, or never
}

void Pair::adopt_device(std::uint32_t device, std::uint32_t first_queue_pair, std::vector<XskDescription> ports,
                        std::vector<UniqueFd> fds, const Reach& reach) {
  const auto begin = queue_pair_used_.begin() + first_queue_pair;
  std::fill(begin, begin + static_cast<std::ptrdiff_t>(ports.size()), true);
  Attached& attached = devices_[device];
  attached.first_queue_pair = first_queue_pair;
  attached.ports = std::move(ports);
  attached.fds = std::move(fds);
  attached.reach = reach;
}

void Pair::resume() {
  const bool armed = std::any_of(members_.begin(), members_.end(),
                                 [](const Member& member) { return member.stage == Member::Stage::kArmed; });
  if (owner() != nullptr)
    state_ = armed ? PairState::kPaired : PairState::kSolo;
  else
    state_ = armed ? PairState::kTakingOver : PairState::kStarting;
  spdlog::info("pair {}: adopted, {}", name_, pair_state_name(state_));
  // Our predecessor may have died before it armed them, or after it told them of a device that it kept nowhere.
  for (Member& member : members_) {
    for (std::uint32_t device = 0; device < kMaxDevices; ++device) {
      if (member.stage == Member::Stage::kDead || devices_.contains(device)) continue;
      if (auto sent = member.send(ControlType::kDetach, DeviceBody{device, 0, 0}); !sent)
        end(member, sent.error().text);
    }
  }
  for (Member& member : members_) {
    for (std::uint32_t i = 0; member.stage == Member::Stage::kArmed && i < config_.shards; ++i)
      if (auto again = arm_shard(member, i); !again) end(member, again.error().text);
  }
  if (!armed) spawn_soon();
  look_at_heirs();
  listener_.on_state(*this);
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
          *this, event == PairEvent::kStop ? "the pair is stopped" : "a backend died meanwhile; see the incidents");
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
  member.spawned_ns = now_ns();
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
      return listener_.on_held(*this, device->device);
    case ControlType::kInForce:
      member.held[device->device] = device->generation;
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

// Everything the pair serves, the generation in force before a newer one. The channel keeps the order, so what is sent
// here is held by the time the member is armed.
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
  member.heir_since_ns = now_ns();
  look_at_heirs();
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
  const std::uint64_t now = now_ns();
  const std::uint64_t last = std::max(state.heir_beat_ns.load(std::memory_order_relaxed), member.heir_since_ns);
  if (now < last + kHeirLimitNs) return;
  if (member.ended_as_hung_ns != 0) {
    if (now > member.ended_as_hung_ns + kHeirLimitNs)
      spdlog::critical("pair {}: standby {} is hung and does not die of SIGKILL: the pair has no standby until it does",
                       name_, member.pid());
    member.ended_as_hung_ns = now;
    return;
  }
  const char thread = thread_state(member.pid(), member.threads[shard]);
  if (thread == 'R' && now < last + kStarvedHeirLimitNs) return;
  member.ended_as_hung_ns = now;
  end(member, "it is standby and has not looked for its owner for " + std::to_string((now - last) / 1'000'000'000) +
                  " s (state " + std::string(1, thread) + ")");
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
  give_heir_priority(member, shard);
  if (peer != nullptr) {
    auto set = fence_.set_ring(peer->threads[shard], peer->tags[shard], member.rings[shard]);
    // kGone: the peer is dead; the member will see its slot before it first sleeps.
    if (!set && set.error().kind != ErrorKind::kGone) return set;
    if (auto told = tell_peer(*peer, &member, shard); !told) spdlog::warn("{}", told.error().text);
  }
  return tell_peer(member, peer, shard);
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
    other.heir_since_ns = now_ns();
    other.reported_shards = 0;
    for (std::uint32_t i = 0; other.stage == Member::Stage::kArmed && i < config_.shards; ++i)
      give_heir_priority(other, i);
  }
  member.stage = Member::Stage::kOwner;
  owner_pid_ = member.pid();
  spdlog::info("pair {}: backend {} owns since epoch {}", name_, member.pid(), body.timeline.epoch);
  step(armed_member() != nullptr ? PairEvent::kHandedOver : PairEvent::kTookOver);
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
  const bool early = found->stage != Member::Stage::kOwner && now_ns() - found->spawned_ns < kEarlyNs;
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

Status Pair::reserve(std::uint32_t queue_pairs, std::uint32_t& device, std::uint32_t& first_queue_pair) {
  device = 0;
  while (device < kMaxDevices && devices_.contains(device)) ++device;
  if (device == kMaxDevices)
    return fail(ErrorKind::kInvalid, "add a NIC to pair " + name_ + ": it serves " + std::to_string(kMaxDevices) +
                                         " already; name another pair in the domain's metadata");
  for (std::uint32_t first = 0; first + queue_pairs <= kMaxQueuePairs; ++first) {
    const auto begin = queue_pair_used_.begin() + first;
    if (std::find(begin, begin + queue_pairs, true) != begin + queue_pairs) continue;
    std::fill(begin, begin + queue_pairs, true);
    first_queue_pair = first;
    for (std::uint32_t i = 0; i < queue_pairs; ++i) {
      // Nobody serves these: a fresh state, generation 0, no start seen, no frame busy.
      QueuePairState* state = &segment_->queue_pairs[first + i];
      std::memset(static_cast<void*>(state), 0, sizeof *state);
    }
    return {};
  }
  return fail(ErrorKind::kInvalid, "add a NIC to pair " + name_ + ": no room for " + std::to_string(queue_pairs) +
                                       " more queue pairs; use fewer queues or another pair");
}

void Pair::attach(std::uint32_t device, std::uint32_t first_queue_pair, std::vector<XskDescription> ports,
                  std::vector<UniqueFd> fds, const Reach& reach) {
  Attached& attached = devices_[device];
  attached.first_queue_pair = first_queue_pair;
  attached.ports = std::move(ports);
  attached.fds = std::move(fds);
  attached.reach = reach;
  for (Member& member : members_) {
    if (member.stage == Member::Stage::kStarting || member.stage == Member::Stage::kDead) continue;
    if (auto sent = send_attach(member, device, attached); !sent) end(member, sent.error().text);
  }
}

Status Pair::send_attach(Member& member, std::uint32_t device, const Attached& attached) {
  std::vector<int> fds;
  for (const UniqueFd& fd : attached.fds) fds.push_back(fd.get());
  const AttachBody body{device, attached.first_queue_pair, static_cast<std::uint32_t>(attached.ports.size()),
                        attached.reach.group, attached.reach.mac};
  return member.send(ControlType::kAttach, body, fds, std::as_bytes(std::span(attached.ports)));
}

Status Pair::send_describe(Member& member, const DescribedGeneration& generation) {
  std::vector<int> fds;
  for (const UniqueFd& fd : generation.fds) fds.push_back(fd.get());
  return member.send(ControlType::kDescribe, generation.description, fds);
}

Status Pair::describe(const DeviceDescription& description, std::span<const int> fds) {
  Attached& attached = devices_.at(description.device);
  DescribedGeneration generation{description, {}};
  for (const int fd : fds) {
    generation.fds.emplace_back(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!generation.fds.back()) return fail_errno("keep a descriptor of the guest", "raise the limit of open files");
  }
  attached.generations.push_back(std::move(generation));
  prune_generations(description.device);
  // Heirs first: when the owner has put it in force, an heir can already serve it.
  for (const bool owners : {false, true}) {
    for (Member& member : members_) {
      if (member.stage == Member::Stage::kStarting || member.stage == Member::Stage::kDead) continue;
      if ((member.stage == Member::Stage::kOwner) != owners) continue;
      if (auto sent = send_describe(member, attached.generations.back()); !sent) end(member, sent.error().text);
    }
  }
  return {};
}

void Pair::prune_generations(std::uint32_t device) {
  const auto found = devices_.find(device);
  if (found == devices_.end()) return;
  const std::uint64_t current = in_force(device);
  auto& generations = found->second.generations;
  const std::size_t before = generations.size();
  // Keep the one in force and what is newer; of those older than the newest and not in force nobody needs any.
  while (generations.size() > 1 && generations.front().description.generation < current)
    generations.erase(generations.begin());
  if (generations.size() == before) return;
  for (Member& member : members_) {
    if (member.stage != Member::Stage::kArmed) continue;
    if (auto sent = member.send(ControlType::kPrune, DeviceBody{device, 0, current}); !sent)
      end(member, sent.error().text);
  }
}

void Pair::detach(std::uint32_t device) {
  Attached& attached = devices_.at(device);
  attached.detaching = true;
  for (Member& member : members_) {
    if (member.stage == Member::Stage::kDead) continue;
    if (member.stage == Member::Stage::kStarting) continue;  // was never told of it
    attached.waiting_for.insert(attached.waiting_for.end(), config_.shards, member.pid());
    if (auto sent = member.send(ControlType::kDetach, DeviceBody{device, 0, 0}); !sent) end(member, sent.error().text);
  }
  if (attached.waiting_for.empty()) return note_detached(device, 0);
  attached.limit = loop_.after(kDetachLimit, [this, device] {
    const auto found = devices_.find(device);
    if (found == devices_.end()) return;
    for (Member& member : members_)
      if (std::count(found->second.waiting_for.begin(), found->second.waiting_for.end(), member.pid()) != 0)
        end(member, "it did not let go of a NIC that is released, within 1 s");
  });
}

void Pair::note_detached(std::uint32_t device, pid_t pid) {
  const auto found = devices_.find(device);
  if (found == devices_.end() || !found->second.detaching) return;
  // Every shard of a process reports; a dead process (reported once) lets go of everything.
  auto& waiting = found->second.waiting_for;
  if (const auto one = std::find(waiting.begin(), waiting.end(), pid); one != waiting.end()) waiting.erase(one);
  if (find(pid) == nullptr) std::erase(waiting, pid);
  if (!waiting.empty()) return;
  detached_[device] = loop_.soon([this, device] { listener_.on_detached(*this, device); });
}

void Pair::release(std::uint32_t device) {
  const auto found = devices_.find(device);
  if (found == devices_.end()) return;
  const auto begin = queue_pair_used_.begin() + found->second.first_queue_pair;
  std::fill(begin, begin + static_cast<std::ptrdiff_t>(found->second.ports.size()), false);
  for (Member& member : members_) member.held.erase(device);
  devices_.erase(found);
}

std::uint64_t Pair::in_force(std::uint32_t device) const {
  const auto found = devices_.find(device);
  if (found == devices_.end()) return 0;
  std::uint64_t lowest = ~std::uint64_t{0};
  for (std::size_t i = 0; i < found->second.ports.size(); ++i)
    lowest = std::min(
        lowest, segment_->queue_pairs[found->second.first_queue_pair + i].generation.load(std::memory_order_acquire));
  return lowest;
}

bool Pair::serves(std::uint32_t device) const {
  return state_ == PairState::kPaired && in_force(device) != 0 &&
         std::all_of(members_.begin(), members_.end(), [device](const Member& member) {
           const bool serving = member.stage == Member::Stage::kOwner || member.stage == Member::Stage::kArmed;
           return !serving || member.held.contains(device);
         });
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
    if (member == nullptr || !stands_still(*member)) continue;
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

Status Pair::drill(DrillFault fault) {
  Member* member = owner_member();
  if (member == nullptr || state_ != PairState::kPaired)
    return fail(ErrorKind::kInvalid, "drill pair " + name_ + ": it is " + std::string(pair_state_name(state_)) +
                                         "; a drill needs an armed standby, try again when it is paired");
  return member->send(ControlType::kDrill, DrillBody{0, fault});
}

}  // namespace tandem
