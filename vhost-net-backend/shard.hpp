// SPDX-License-Identifier: Apache-2.0
// Shard: one poll thread, first as heir, then as owner of a set of queue pairs.
//
// Heir: holds device descriptions, waits for the fence to say that the shard's owner is dead, then takes over
// (takeover.cpp). Owner: polls its queue pairs, busy while there is work, asleep in epoll when there is none. A planned
// handover (handover.cpp) makes the owner an heir again, with everything it holds.
//
// Threads: run() is the poll thread; everything public besides it may be called by the control thread. The two share a
// mailbox; what the poll thread has to say comes back through take_events() after event_fd() became readable.
#pragma once

#include <sys/epoll.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "common/fence_view.hpp"
#include "common/layout/control_message.hpp"
#include "common/layout/segment.hpp"
#include "common/monotonic_clock.hpp"
#include "common/thread_priority.hpp"
#include "common/wake_ring.hpp"
#include "vhost-net-backend/device.hpp"
#include "vhost-net-backend/poison.hpp"
#include "vhost-net-backend/watchdog.hpp"

namespace tandem {

struct AttachCommand {
  std::shared_ptr<const UplinkPorts> uplink;
};
struct DetachCommand {
  std::uint32_t device;
};
struct DescribeCommand {
  std::shared_ptr<const Device> device;
};
struct PruneCommand {
  std::uint32_t device;
  std::uint64_t generation;
};
struct ArmCommand {
  std::uint32_t tag;
  std::shared_ptr<Watchdog> peer;  ///< the other member's thread, watched whenever it owns; nullptr: there is none
};
/// Ask the owner to let go, and take over from it. Ends in TookOverEvent or NotHandedOverEvent.
struct HandOverCommand {};
struct DrillCommand {
  DrillFault fault;
  std::uint32_t after_ms = 0;
};
struct StopCommand {};
using ShardCommand = std::variant<AttachCommand, DetachCommand, DescribeCommand, PruneCommand, ArmCommand,
                                  HandOverCommand, DrillCommand, StopCommand>;

struct HeldEvent {
  std::uint32_t device;
  std::uint64_t generation;
};
struct InForceEvent {
  std::uint32_t device;
  std::uint64_t generation;
};
struct DetachedEvent {
  std::uint32_t device;
};
struct TookOverEvent {
  TakeoverTimeline timeline;
};
struct FirstTransactionEvent {
  TakeoverTimeline timeline;
};
struct NotHandedOverEvent {
  std::string text;
};
struct ProblemEvent {
  std::uint32_t device;
  std::string text;
};
/// A packet was dropped because owners died on it.
struct PoisonEvent {
  std::uint32_t device;
  PoisonPacket packet;
  std::uint32_t epoch;
};
/// Something the poll thread no longer needs; destroying it is the control thread's work.
struct GarbageEvent {
  std::shared_ptr<const void> object;
};
using ShardEvent = std::variant<HeldEvent, InForceEvent, DetachedEvent, TookOverEvent, FirstTransactionEvent,
                                NotHandedOverEvent, ProblemEvent, PoisonEvent, GarbageEvent>;

struct ShardConfig {
  std::uint32_t index = 0;
  std::uint32_t shards = 1;    ///< of the pair; a private copy, for the segment's own may be damaged
  Segment* segment = nullptr;  ///< mapped by the caller for the shard's whole life
  const FenceView* fence = nullptr;
  Polling polling = Polling::kAdaptive;
  HeirWait heirs = HeirWait::kSleeping;
  std::uint64_t tsc_hz = 0;  ///< cycles of heartbeat_tsc in a second
};

class Shard {
 public:
  /// `bell`: an eventfd that the shard's threads in both processes know; a ring says that a handover has moved on.
  static Result<std::unique_ptr<Shard>> make(const ShardConfig& config, WakeRing ring, DeadManSwitch timer,
                                             UniqueFd bell = {});

  void run();
  void post(ShardCommand command);
  [[nodiscard]] int event_fd() const { return event_fd_.get(); }
  std::vector<ShardEvent> take_events();
  /// The poll thread's id in this pid namespace; 0 until run() has begun.
  [[nodiscard]] std::uint32_t thread_id() const { return thread_id_.load(std::memory_order_acquire); }

 private:
  friend struct ShardSteps;  // tests/support: drives run()'s steps one at a time, in the caller's thread

  // One device as this shard knows it. `held` is ordered by generation; the one in force is among them. To an heir that
  // is the one which it has last seen in force.
  struct Served {
    std::shared_ptr<const UplinkPorts> uplink;
    std::vector<std::shared_ptr<const Device>> held;
    std::shared_ptr<const Device> in_force;
  };

  Shard(const ShardConfig& config, WakeRing ring, DeadManSwitch timer, UniqueFd bell)
      : config_(config), ring_(std::move(ring)), switch_(std::move(timer)), bell_(std::move(bell)) {}
  ShardState& state() { return config_.segment->shards[config_.index]; }
  void say(ShardEvent event);
  void discard(std::shared_ptr<const void> object);

  // shard.cpp: commands
  void run_commands();
  void execute(AttachCommand& command);
  void execute(DetachCommand& command);
  void execute(DescribeCommand& command);
  void execute(PruneCommand& command);
  void execute(ArmCommand& command);
  void execute(HandOverCommand& command);
  void execute(DrillCommand& command);
  void drill(DrillFault fault);
  void execute(StopCommand& command);
  bool serves(std::uint32_t queue_pair) const {
    return queue_pair < kMaxQueuePairs && queue_pair % config_.shards == config_.index;
  }
  // The states of this shard's queue pairs of a device that has an uplink.
  template <class Visitor>
  void for_each_pair(const Served& served, Visitor visit) {
    for (std::uint32_t n = 0; n < served.uplink->ports.size(); ++n)
      if (serves(served.uplink->first_queue_pair + n))
        visit(config_.segment->queue_pairs[served.uplink->first_queue_pair + n]);
  }
  void put_in_force(std::uint32_t device);
  void note_in_force(const Served& served, std::uint64_t generation);
  void wiring_changed();
  void rebuild_pairs();
  void bind_pairs();
  void begin_epoch(QueuePair& pair);
  void find_neighbours();
  void prune(Served& served, std::uint64_t below);
  [[nodiscard]] std::uint32_t device_of(std::uint32_t queue_pair) const;

  // heir.cpp
  void wait_as_heir();
  int poll_as_heir(int epoll, std::span<epoll_event> woken, int period_ms, std::uint64_t word) const;
  void watch_owner();
  bool holds_all_in_force();
  bool holds_what_is_in_force();
  bool work_waits();

  // owner.cpp
  void beat(std::uint64_t now);
  void push_switch();
  void drill_if_due();
  void poll_as_owner();
  bool poll_once();
  void look_at_suspects(QueuePair& pair);
  void keep_alive();
  [[noreturn]] void livelock();
  void sleep();
  void refuse_kicks();
  void build_epoll();
  void arm_receive_event(std::size_t pair, bool wanted);
  void note_first_transaction();

  // takeover.cpp: take_over() until rings and cursors are whole, report() it to the supervisor, tell() that and all
  // whom a dead owner may not have told.
  bool take_over();
  void report();
  void tell();
  [[nodiscard]] std::uint32_t owner_of(std::uint64_t word);
  void note_handover(TakeoverTimeline& timeline);
  void adopt_generations();
  void prepare();
  std::shared_ptr<const Device> find_in_force(const Served& served, std::uint64_t& generation);
  void replay_record(TakeoverTimeline& timeline);
  void mend(bool record_pending);
  void stop_half_published();

  // handover.cpp
  void ring_bell() const;
  void ask_owner();
  void await_grant();
  void follow_request();
  bool let_go();
  [[nodiscard]] bool left_to_another(std::uint64_t word) const;

  ShardConfig config_;
  WakeRing ring_;
  DeadManSwitch switch_;
  UniqueFd bell_;
  UniqueFd wake_fd_, event_fd_, epoll_, heir_epoll_;
  cpu_set_t control_cpus_ = allowed_cpus();  // of the thread that makes the shard
  std::atomic<std::uint32_t> thread_id_{0};

  std::mutex mutex_;  // guards commands_ and events_; the poll thread takes it only when has_commands_ is set
  std::atomic<bool> has_commands_{false};
  std::deque<ShardCommand> commands_;
  std::vector<ShardEvent> events_;

  // Poll thread only.
  bool stop_ = false;
  bool owner_ = false;
  bool real_time_ = false;  // took over with an heir's priority and has not given it up yet
  std::uint32_t tag_ = 0;
  std::uint32_t epoch_ = 0;
  std::vector<Served> devices_{kMaxDevices};
  std::vector<QueuePair> pairs_;
  bool pairs_stale_ = true;  // as heir: they are not of what was last seen in force
  // QueuePair::staging, of one packet at a time. Made with the shard, because a takeover has no time for it.
  std::vector<std::byte> staging_ = std::vector<std::byte>(kLargestPacketRoom + kXskLargeFrame);
  std::vector<bool> receive_event_armed_;
  bool kick_fd_missing_ = false;
  bool epoll_stale_ = true;  // pairs_ have changed since it was built
  bool kicks_asked_ = true;  // pairs_ have changed, and a driver whose ring is polled may still have to kick
  std::uint64_t transactions_at_takeover_ = 0;
  bool first_transaction_pending_ = false;
  bool notices_owed_ = false;
  bool report_owed_ = false;
  // As heir: the handover it is to ask for, the request that stands, and what it let go as former owner.
  bool hand_over_wanted_ = false;
  std::uint64_t asked_ = 0;
  std::uint64_t asked_ns_ = 0;
  std::uint64_t left_word_ = ~std::uint64_t{0};
  std::uint64_t left_until_ns_ = 0;
  std::uint32_t left_to_ = 0;
  // As heir: the owner it watches, what it was found guilty of, and since when it has slept through work.
  std::shared_ptr<Watchdog> watchdog_;
  std::shared_ptr<Watchdog> former_watchdog_;  // of the owner it took over from, until there is time to close it
  HangVerdict verdict_ = HangVerdict::kNone;
  std::uint64_t verdict_ns_ = 0;
  IdleRounds idle_rounds_;
  bool switch_expired_ = false;
  std::uint64_t asleep_work_since_ns_ = 0;
  std::uint64_t asleep_work_beat_ = 0;  // the owner's heartbeat then: another one now means that it woke in between
  std::uint64_t missing_since_ns_ = 0;  // since when a dead owner's descriptions are not all held here
  // As owner: when the switch was last looked at, and the transactions counted then.
  std::uint64_t last_beat_ = 0;
  std::uint64_t transactions_at_beat_ = 0;
  // As owner: the drill that waits for its time.
  DrillFault drill_fault_{};
  std::uint64_t drill_at_ns_ = 0;
};

/// Fails on purpose, in the calling thread, as `virt-tandem drill` asks. kBadStore stores into `read_only`.
void fail_on_purpose(DrillFault fault, const std::byte* read_only);

}  // namespace tandem
