// SPDX-License-Identifier: Apache-2.0
// The devices that a pair serves: room in the segment, generations of their descriptions, and letting go of them.
#include <spdlog/spdlog.h>

#include <algorithm>

#include "recovery/supervisor/pair.hpp"

namespace tandem {

namespace {

using namespace std::chrono_literals;

constexpr auto kDetachLimit = 1s;

}  // namespace

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

void Pair::note_caught_up(Member& member) const {
  member.caught_up |= std::all_of(devices_.begin(), devices_.end(), [&](const auto& entry) {
    const auto& [device, attached] = entry;
    if (attached.detaching || attached.generations.empty()) return true;
    const auto held = member.held.find(device);
    return held != member.held.end() && held->second >= in_force(device);
  });
}

bool Pair::serves(std::uint32_t device) const {
  return state_ == PairState::kPaired && in_force(device) != 0 &&
         std::all_of(members_.begin(), members_.end(), [device](const Member& member) {
           const bool serving = member.stage == Member::Stage::kOwner || member.stage == Member::Stage::kArmed;
           return !serving || member.held.contains(device);
         });
}

}  // namespace tandem
