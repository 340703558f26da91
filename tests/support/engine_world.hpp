// SPDX-License-Identifier: Apache-2.0
// EngineWorld: everything a shard shares with others (guest memory, pair segment, AF_XDP rings and frames) in one small
// memfd, with a guest and a kernel at the other ends; ShardStepper: a real Shard whose steps the test calls one by one.
// No root, sockets or BPF.
//
// A world may be copied into another of the same shape (copy_from): a snapshot, on which an heir can be tried.
// Processes forked from the one that made a world share it; each makes its own Device, because a backend's mappings are
// not inherited.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "common/fence_view.hpp"
#include "common/layout/segment.hpp"
#include "tests/support/guest_nic.hpp"
#include "tests/support/packets.hpp"
#include "tests/support/xsk_rings.hpp"
#include "vhost-net-backend/shard.hpp"

namespace tandem::test {

namespace feature {
/// CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN; and the same for the other direction.
inline constexpr std::uint64_t kAsksOffloads = 1u << 0 | 1u << 11 | 1u << 12 | 1u << 13;
inline constexpr std::uint64_t kTakesOffloads = 1u << 1 | 1u << 7 | 1u << 8 | 1u << 9;
inline constexpr std::uint64_t kMergeable = std::uint64_t{1} << 15;
inline constexpr std::uint64_t kIndirect = std::uint64_t{1} << 28;
inline constexpr std::uint64_t kEventIndex = std::uint64_t{1} << 29;
inline constexpr std::uint64_t kVersion1 = std::uint64_t{1} << 32;
inline constexpr std::uint64_t kPacked = std::uint64_t{1} << 34;
inline constexpr std::uint64_t kInOrder = std::uint64_t{1} << 35;
}  // namespace feature

/// Made-up fence slots in a memfd: the test says who is dead.
class FakeFence {
 public:
  FakeFence();
  /// Dead by `signal`; `own_doing`: the thread's own fault, not somebody else's signal.
  void kill(std::uint32_t tag, int signal = 9, bool own_doing = false);
  /// For this process only: a view is not inherited by children.
  [[nodiscard]] const FenceView& view() const { return views_.back(); }
  /// Makes view() anew, in a child.
  void view_again();

 private:
  UniqueFd fd_;
  Mapping slots_;
  // One a process. A parent's stays: unmapping it in a child would hit whatever lies at its address there.
  std::deque<FenceView> views_;
};

struct WorldShape {
  NicShape nic;
  XskShape xsk;
  std::uint32_t queue_pairs = 1;
  std::uint32_t devices = 1;  ///< the queue pairs are theirs, the same number each; all in one group
  std::uint32_t shards = 1;
  std::uint32_t device = 0;
  std::uint32_t first_queue_pair = 0;
  std::uint32_t xsk_index = 0;  ///< where the socket's ring indices begin
  /// Memory besides the NIC's own: one region adjacent in guest addresses (but nowhere else) to the first, one after a
  /// hole.
  std::uint64_t spare_bytes = 0;
};

inline constexpr std::uint64_t kGuestBase = 0x40000000;
inline constexpr std::uint64_t kUserBase = 0x7f0000000000;

class EngineWorld {
 public:
  explicit EngineWorld(const WorldShape& shape);

  /// A description of the device with generation `generation`; change it before make_device() to describe something
  /// else.
  [[nodiscard]] DeviceDescription describe(std::uint64_t generation, std::uint32_t nth = 0) const;
  [[nodiscard]] std::shared_ptr<const Device> make_device(const DeviceDescription& description,
                                                          const Device* previous = nullptr) const;
  [[nodiscard]] std::shared_ptr<const UplinkPorts> make_ports(std::uint32_t nth = 0) const;

  /// Device `nth` of several has this address.
  [[nodiscard]] static std::uint64_t mac(std::uint32_t nth) { return nth == 0 ? kSenderMac : kReceiverMac; }

  [[nodiscard]] Segment& segment() const;
  [[nodiscard]] QueuePairState& state(std::uint32_t pair = 0) const;
  [[nodiscard]] RedoRecord& record(std::uint32_t shard = 0) const { return segment().shards[shard].record; }
  [[nodiscard]] FrameAudit audit(std::uint32_t pair = 0) const;
  [[nodiscard]] std::span<std::byte> guest_bytes() const;
  [[nodiscard]] std::uint64_t spare_address(int region) const;
  /// Interrupts that the guest got since the last call; `vring` as in the description.
  std::uint64_t calls(std::uint32_t vring) const;
  [[nodiscard]] int memory_fd() const { return memory_.get(); }

  /// The parts of the area on which anything depends, in one order for all worlds of a shape: a snapshot is their
  /// concatenation. Without heartbeats and timelines, which only tell what happened when.
  [[nodiscard]] const std::vector<std::span<std::byte>>& parts() const { return parts_; }
  /// Takes over all shared bytes and what guest and kernel remember.
  void copy_from(const EngineWorld& other);
  /// The private half only: the shared half comes from a snapshot.
  void copy_ends_from(const EngineWorld& other);

  [[nodiscard]] const WorldShape& shape() const { return shape_; }

  std::vector<GuestNic> nics;
  std::vector<KernelXsk> kernels;
  GuestSpace space;

 private:
  [[nodiscard]] std::byte* rings(std::uint32_t pair) const;
  [[nodiscard]] std::byte* frames(std::uint32_t pair) const;

  WorldShape shape_;
  XskDescription xsk_;
  std::uint64_t nic_bytes_, guest_bytes_, segment_at_, xsk_at_, xsk_stride_;
  UniqueFd memory_;
  Mapping area_;
  std::vector<UniqueFd> call_fds_;
  std::vector<std::span<std::byte>> parts_;
};

/// Runs the steps of a Shard's poll thread in the calling thread.
class ShardStepper {
 public:
  ShardStepper(Segment& segment, const FenceView& fence, std::uint32_t tag, std::uint32_t index = 0);

  void post(ShardCommand command) { shard_->post(std::move(command)); }
  void run_commands();
  /// Attach, describe and arm, as a supervisor does with a new standby.
  void hold(std::shared_ptr<const UplinkPorts> ports, std::vector<std::shared_ptr<const Device>> devices);
  /// A takeover alone, and, as Shard::run() does it, with the first round before anybody is told.
  bool take_over();
  bool take_over_and_poll();
  /// A handover: as heir, ask the owner, and see what became of it; as owner, answer (true: it owns no more); as former
  /// owner, whether the shard is to be left to the heir that asked.
  void ask_owner();
  void follow_request();
  bool let_go();
  bool left_to_another();
  /// As heir: whether there is work that the owner would do if it looked.
  bool work_waits();
  bool poll_once();
  /// What the owner does before and after it sleeps, without the sleep: there is work or a file that wakes it at once.
  void sleep();
  [[nodiscard]] std::vector<QueuePair>& pairs();
  std::vector<ShardEvent> events() { return shard_->take_events(); }
  [[nodiscard]] std::uint32_t tag() const { return tag_; }
  Shard& shard() { return *shard_; }

 private:
  std::unique_ptr<Shard> shard_;
  std::uint32_t tag_;
};

/// Everything of a world, in `generation`, as a new standby holds it.
void hold_all(ShardStepper& shard, const EngineWorld& world, std::uint64_t generation = 1);

/// The guest of the last device takes what arrived, and posts again. Returns whether anything moved.
std::uint32_t peer_goes_on(EngineWorld& world, Ledger& ledger);

/// Lets engine, kernel and guest run until nothing moves. Packets that left and arrived go to the ledgers. With two
/// devices the first one's packets are to arrive at the other: those that the kernel sends stand in no ledger.
struct Drained {
  std::uint32_t sent = 0, received = 0;
  bool quiet = true;  ///< false: given up, for something moved in every one of very many rounds
};
Drained drain(EngineWorld& world, ShardStepper& shard, Ledger& uplink, Ledger& guest, std::uint32_t pair = 0);

/// Puts packets [first, first + count) of `flow` on the transmit ring, or on the uplink's RX. Returns how many fitted.
std::uint32_t send_from_guest(EngineWorld& world, const PacketFlow& flow, std::uint32_t first, std::uint32_t count,
                              std::uint32_t pair = 0);
std::uint32_t send_from_uplink(EngineWorld& world, const PacketFlow& flow, std::uint32_t first, std::uint32_t count,
                               std::uint32_t pair = 0);

}  // namespace tandem::test
