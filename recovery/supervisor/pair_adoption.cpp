// SPDX-License-Identifier: Apache-2.0
// A pair whose supervisor died: its segment, members and devices, taken from what the vault kept.
#include <spdlog/spdlog.h>
#include <sys/mman.h>

#include <algorithm>

#include "common/monotonic_clock.hpp"
#include "recovery/supervisor/pair.hpp"

namespace tandem {

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
  member.heir_since_ns = monotonic_ns();
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
  for (Member& member : members_)
    if (member.stage == Member::Stage::kArmed) note_caught_up(member);
  if (!armed) spawn_soon();
  look_at_heirs();
  listener_.on_state(*this);
}

}  // namespace tandem
