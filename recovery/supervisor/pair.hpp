// SPDX-License-Identifier: Apache-2.0
// Pair: two backend processes, the segment between them and the devices they serve.
//
// Drives the table of pair_state.hpp, tells members about devices, arms them at the fence, and reports takeovers. All
// on the event loop's thread; nothing here blocks.
#pragma once

#include <systemd/sd-event.h>

#include <algorithm>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "common/layout/device_description.hpp"
#include "common/layout/segment.hpp"
#include "common/layout/xsk_description.hpp"
#include "common/mapping.hpp"
#include "recovery/fence/fence.hpp"
#include "recovery/supervisor/config.hpp"
#include "recovery/supervisor/event_loop.hpp"
#include "recovery/supervisor/member.hpp"
#include "recovery/supervisor/pair_state.hpp"

namespace tandem {

/// Hands out fence tags: never the same twice, never two living ones in one slot (layout/fence_slot.h).
class TagSource {
 public:
  std::uint32_t next();
  /// A tag that a dead supervisor gave out and that may still be named.
  void adopt(std::uint32_t tag);
  /// From here on only higher tags: a dead supervisor gave out these, and some are marked dead.
  void begin_after(std::uint32_t tag) { last_ = std::max(last_, tag); }
  void retire(std::uint32_t tag);

 private:
  std::uint32_t last_ = 0;
  std::map<std::uint32_t, std::uint32_t> living_;  // slot -> tag
};

/// One generation of a device as it is sent to members. Owns duplicates of the descriptors, so that the front end's may
/// go.
struct DescribedGeneration {
  DeviceDescription description;
  std::vector<UniqueFd> fds;
};

/// By whom a NIC is reached without the bridge: AttachBody.
struct Reach {
  std::uint32_t group = 0;
  std::uint64_t mac = 0;
};

class Pair {
 public:
  /// What the pair has to tell the supervisor. Called from the event loop, never from inside a call into the pair.
  struct Listener {
    virtual ~Listener() = default;
    virtual void on_in_force(Pair& pair, std::uint32_t device) = 0;
    /// A member holds a newer generation of the device's description.
    virtual void on_held(Pair& pair, std::uint32_t device) = 0;
    virtual void on_detached(Pair& pair, std::uint32_t device) = 0;
    /// A member that serves already cannot map what a new device needs, and goes on without it.
    virtual void on_cannot_attach(Pair& pair, std::uint32_t device, const std::string& why) = 0;
    /// A shard changed hands, by a death or (timeline.kind) by a handover, in which the victim lives on.
    virtual void on_takeover(Pair& pair, std::uint32_t shard, const TakeoverTimeline& timeline, pid_t victim,
                             pid_t heir) = 0;
    /// A switchover came to nothing; the owner goes on, unless something worse was reported before.
    virtual void on_not_handed_over(Pair& pair, const std::string& why) = 0;
    virtual void on_first_transaction(Pair& pair, std::uint32_t shard, const TakeoverTimeline& timeline) = 0;
    /// An owner dropped a packet because owners had died on it. The queue pair is one of the segment; `bytes` is what
    /// is known of the packet.
    virtual void on_poison(Pair& pair, const PoisonBody& poison, std::span<const std::byte> bytes) = 0;
    /// A member appeared, or learned its threads and tags: what the vault keeps of it has changed.
    virtual void on_member_change(Pair& pair, Member& member) = 0;
    virtual void on_member_exit(Pair& pair, pid_t pid, ExitStatus status) = 0;
    virtual void on_state(Pair& pair) = 0;
  };

  static Result<std::unique_ptr<Pair>> make(std::string name, const Config& config, std::string backend_path,
                                            EventLoop& loop, Fence& fence, TagSource& tags, Listener& listener);
  /// A pair that a dead supervisor made, still without members and devices. `fds`: the segment, then the shards'
  /// timers and bells, as keep_fds() gave them to the vault.
  static Result<std::unique_ptr<Pair>> adopt(std::string name, std::vector<UniqueFd> fds, const Config& config,
                                             std::string backend_path, EventLoop& loop, Fence& fence, TagSource& tags,
                                             Listener& listener);
  ~Pair();
  Pair(const Pair&) = delete;
  Pair& operator=(const Pair&) = delete;

  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] PairState state() const { return state_; }
  [[nodiscard]] Segment& segment() const { return *segment_; }
  [[nodiscard]] const std::list<Member>& members() const { return members_; }
  template <class Visitor>
  void each_member(Visitor visit) {
    for (Member& member : members_) visit(member);
  }
  [[nodiscard]] const Member* owner() const;
  [[nodiscard]] const Member* heir() const;

  /// What must outlive the supervisor, for the vault.
  [[nodiscard]] std::vector<int> keep_fds() const;
  /// A member of a dead supervisor. What it is follows from the segment: the owner, or else (with `tags`) an armed
  /// heir; one that was still starting is ended. Then adopt devices, then resume().
  void adopt_member(pid_t pid, UniqueFd pidfd, UniqueFd channel, std::vector<pid_t> threads,
                    std::vector<std::uint32_t> tags, std::vector<std::uint32_t> rings);
  void adopt_device(std::uint32_t device, std::uint32_t first_queue_pair, std::vector<XskDescription> ports,
                    std::vector<UniqueFd> fds, const Reach& reach);
  /// Goes on from what was adopted: enters the state that the members make, and starts what is missing.
  void resume();

  void start() { step(PairEvent::kStart); }
  /// Kills all members; on_state() reports kStopped once the last one is reaped.
  void stop();
  /// True when no process is left.
  [[nodiscard]] bool empty() const { return members_.empty(); }

  /// Room for a device of `queue_pairs`, or an error that says what is full. Its queue pairs' states are zeroed.
  Status reserve(std::uint32_t queue_pairs, std::uint32_t& device, std::uint32_t& first_queue_pair);
  void attach(std::uint32_t device, std::uint32_t first_queue_pair, std::vector<XskDescription> ports,
              std::vector<UniqueFd> fds, const Reach& reach);
  /// Sends a generation to every member, heir first. `fds` are duplicated.
  Status describe(const DeviceDescription& description, std::span<const int> fds);
  /// Forgets the device in all members; on_detached() when none maps it any more, then release() its room.
  void detach(std::uint32_t device);
  void release(std::uint32_t device);

  /// Generation in force for every queue pair of the device: the smallest of them.
  [[nodiscard]] std::uint64_t in_force(std::uint32_t device) const;
  /// Whether the pair is whole, a generation of the device is in force, and owner and heir hold one: both have mapped
  /// its uplink.
  [[nodiscard]] bool serves(std::uint32_t device) const;
  /// Whether the owner has made no step to a generation although it could have: not runnable and past the limit. Kills
  /// it then. An heir that is to follow a dead owner counts as one. Returns true if it was killed.
  bool kill_if_hung(const std::string& why);
  Status drill(DrillFault fault, std::uint32_t after_ms);
  /// Makes owner and heir change places without a death. Ends in on_takeover() for each shard, or on_not_handed_over().
  Status switchover();
  /// How long an owner may stand still before its heir ends it; 0: not watched.
  void set_hang_limits(std::chrono::nanoseconds spin, std::chrono::nanoseconds blocked);

 private:
  struct Attached {
    std::uint32_t first_queue_pair = 0;
    std::vector<XskDescription> ports;
    std::vector<UniqueFd> fds;
    Reach reach;
    // At most two: the one in force, and a newer one that is not yet.
    std::vector<DescribedGeneration> generations;
    bool detaching = false;
    EventLoop::Timer limit;          // for them
    std::vector<pid_t> waiting_for;  // members that still have to let go
  };

  Pair(std::string name, const Config& config, std::string backend_path, EventLoop& loop, Fence& fence, TagSource& tags,
       Listener& listener);
  Status make_segment();
  void write_header();
  void step(PairEvent event);
  void spawn_soon();
  void spawn();
  bool watch(Member& member);
  void arm(Member& member);
  Status arm_shard(Member& member, std::uint32_t shard);
  Status place(const Member& member, const Member* peer, std::uint32_t shard) const;
  void give_heir_priority(const Member& member, std::uint32_t shard);
  Status tell_peer(Member& member, const Member* peer, std::uint32_t shard);
  void hand_over();
  Status welcome(Member& member);
  Status introduce(Member& member);
  void end(Member& member, const std::string& why);
  Status send_attach(Member& member, std::uint32_t device, const Attached& attached);
  Status send_describe(Member& member, const DescribedGeneration& generation);
  void on_channel(pid_t pid);
  void on_exit(pid_t pid);
  void on_message(Member& member, const ChannelMessage& message);
  void on_ready(Member& member, const ReadyBody& ready);
  void on_took_over(Member& member, const TakeoverBody& body);
  void on_not_handed_over(const std::string& why);
  void look_at_heirs();
  void look_at_heir(Member& member, std::uint32_t shard);
  void forget_watches(Member& member, bool owned);
  void forget_dead_tags();
  // Member::caught_up, if it holds by now what is in force for every device.
  void note_caught_up(Member& member) const;
  void note_detached(std::uint32_t device, pid_t pid);
  void prune_generations(std::uint32_t device);
  Member* find(pid_t pid);
  Member* owner_member();
  Member* armed_member();
  // The other member that may own: heir of an owner, owner of an heir.
  Member* peer_of(const Member& member);
  // How many shards the segment says a member owns.
  [[nodiscard]] std::uint32_t shards_owned(const Member& member) const;

  std::string name_;
  const Config& config_;
  std::string backend_path_;
  EventLoop& loop_;
  Fence& fence_;
  TagSource& tags_;
  Listener& listener_;
  PairState state_ = PairState::kStopped;
  UniqueFd segment_fd_;
  Mapping segment_mapping_;
  std::vector<UniqueFd> timers_;  // the shards' dead man's switches (vhost-net-backend/watchdog.hpp)
  std::vector<UniqueFd> bells_;   // the shards' eventfds for handovers (vhost-net-backend/handover.cpp)
  Segment* segment_ = nullptr;
  bool hugepages_ = false;
  bool real_time_refused_ = false;  // said once
  std::list<Member> members_;
  std::map<std::uint32_t, Attached> devices_;
  std::map<std::uint32_t, pid_t> tag_pids_;  // whose tag it was; kept until no one can name it any more
  std::vector<bool> queue_pair_used_ = std::vector<bool>(kMaxQueuePairs, false);
  pid_t owner_pid_ = 0;        // process last known to own
  unsigned early_deaths_ = 0;  // in a row, for the back-off
  EventLoop::Timer respawn_;
  EventLoop::Timer handover_limit_;
  EventLoop::Timer heir_look_;
  std::string refusal_;                                 // why the last handover came to nothing
  std::map<std::uint32_t, EventLoop::Timer> detached_;  // reports on their way, by device
};

}  // namespace tandem
