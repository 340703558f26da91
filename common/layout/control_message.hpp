// SPDX-License-Identifier: Apache-2.0
// Control messages between the supervisor and a backend, over an FdChannel. One message is one datagram: header, body.
//
// Raise kControlVersion when a body changes; a backend that is greeted with another version answers kProblem and
// leaves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/layout/segment.hpp"

namespace tandem {

inline constexpr std::uint32_t kControlMagic = 0x54444d43;  // "CMDT"
inline constexpr std::uint16_t kControlVersion = 5;

enum class ControlType : std::uint16_t {
  // supervisor -> backend
  kWelcome =
      1,  ///< WelcomeBody; fds: segment, fence slots, then per shard one wake ring; one dead man's timer; one bell
  kAttach = 2,    ///< AttachBody + XskDescription[queue_pairs]; fds: (xsk, umem) per queue pair
  kDetach = 3,    ///< DeviceBody: forget device and uplink (its last description has nothing running)
  kDescribe = 4,  ///< DeviceDescription; fds in its order
  kPrune = 5,     ///< DeviceBody: drop descriptions older than the generation
  kArm = 6,       ///< ArmBody: the thread's watch is confirmed; from now on it may own the shard. fd: pidfd of its
                  ///< peer, if there is one. Said again when the peer changes
  kDrill = 7,     ///< DrillBody: fail on purpose
  kHandOver = 8,  ///< ShardBody: ask the shard's owner to let go, and take over from it
  // backend -> supervisor
  kReady = 100,             ///< ReadyBody: EAL up, poll threads running
  kHeld = 101,              ///< DeviceBody: standby holds this generation
  kInForce = 102,           ///< DeviceBody: owner of all shards it owns put this generation in force
  kTookOver = 103,          ///< TakeoverBody, after replay
  kFirstTransaction = 104,  ///< TakeoverBody, again with first_transaction_ns
  kDetached = 106,  ///< DeviceBody: device and uplink are forgotten, nothing of theirs is mapped or written any more
  kProblem = 105,   ///< ProblemBody: text for the log; does not by itself end anything
  kNotHandedOver = 107,  ///< RefusalBody: kHandOver came to nothing
  kPoison = 108,         ///< PoisonBody, then `captured` bytes: a packet was dropped because owners died on it
  kCannotAttach = 109,   ///< ProblemBody: an armed backend cannot map a new device's uplink; one not yet armed leaves
};

struct ControlHeader {
  std::uint32_t magic = kControlMagic;
  std::uint16_t version = kControlVersion;
  ControlType type{};
  std::uint32_t body_size = 0;
  std::uint32_t reserved = 0;
};

enum class Polling : std::uint32_t { kAdaptive = 0, kAlways = 1 };
/// How an heir waits: asleep until the fence wakes it, or looking at its owner's slot all the time.
enum class HeirWait : std::uint32_t { kSleeping = 0, kPolling = 1 };

struct WelcomeBody {
  std::uint32_t shard_count = 1;
  Polling polling = Polling::kAdaptive;
  HeirWait heirs = HeirWait::kSleeping;
  std::uint32_t reserved = 0;
};

struct AttachBody {
  std::uint32_t device = 0;
  std::uint32_t first_queue_pair = 0;  ///< index in Segment::queue_pairs
  std::uint32_t queue_pairs = 0;
  std::uint32_t group = 0;  ///< devices of one group, not 0, reach one another directly
  std::uint64_t mac = 0;    ///< the device's; its six bytes in memory order
};

struct DeviceBody {
  std::uint32_t device = 0;
  std::uint32_t shard = 0;
  std::uint64_t generation = 0;
};

struct ShardBody {
  std::uint32_t shard = 0;
  std::uint32_t reserved = 0;
};

struct ArmBody {
  std::uint32_t shard = 0;
  std::uint32_t tag = 0;
  std::uint32_t peer_tag = 0;  ///< the other member's thread of this shard, owner or heir; 0 if there is none
  std::uint32_t peer_pid = 0;
  std::uint32_t peer_tid = 0;
  std::uint32_t reserved = 0;
};

enum class DrillFault : std::uint32_t {
  kBadStore = 1,  ///< a store into the read-only view of guest memory: SIGSEGV
  kAbort = 2,     ///< abort(): SIGABRT
  kBusError = 3,  ///< a load beyond the end of a mapped file: SIGBUS
  kSpin = 4,      ///< an endless loop in the poll thread
  kBlock = 5,     ///< the poll thread sleeps without having said so
  kExit = 6,      ///< the poll thread ends the process as exit() would
  kLivelock = 7,  ///< the poll thread goes on beating and does no work
};

struct DrillBody {
  std::uint32_t shard = 0;
  DrillFault fault{};
  std::uint32_t after_ms = 0;  ///< so long after the owner has read this, when nobody is at work because of it any more
  std::uint32_t reserved = 0;
};

struct ReadyBody {
  std::uint32_t shard_count = 0;
  std::uint32_t thread_ids[kMaxShards] = {};
  std::uint32_t segment_version = kSegmentVersion;
};

struct TakeoverBody {
  std::uint32_t shard = 0;
  std::uint32_t reserved = 0;
  TakeoverTimeline timeline;
};

struct RefusalBody {
  std::uint32_t shard = 0;
  std::uint32_t reserved = 0;
  char text[120] = {};
};

struct ProblemBody {
  std::uint32_t device = 0;
  std::uint32_t reserved = 0;
  char text[248] = {};
};

/// Bytes of a poison packet that are passed on at the most.
inline constexpr std::uint32_t kMaxPoisonBytes = 60 * 1024;

struct PoisonBody {
  std::uint32_t shard = 0;
  std::uint32_t epoch = 0;  ///< of the owner that dropped it
  std::uint32_t device = 0;
  std::uint32_t queue_pair = 0;  ///< index in the segment
  PacketPhase direction{};       ///< kTransmit or kReceive
  std::uint32_t deaths = 0;
  std::uint32_t length = 0;    ///< bytes of the packet, as far as its descriptors tell
  std::uint32_t captured = 0;  ///< of them that could be read
};

static_assert(sizeof(PoisonBody) == 32);
static_assert(sizeof(ControlHeader) == 16 && sizeof(WelcomeBody) == 16 && sizeof(AttachBody) == 24);
static_assert(sizeof(DeviceBody) == 16 && sizeof(ShardBody) == 8 && sizeof(ArmBody) == 24 && sizeof(DrillBody) == 16 &&
              sizeof(RefusalBody) == 128 && sizeof(ProblemBody) == 256);
static_assert(std::is_trivially_copyable_v<TakeoverBody>);

}  // namespace tandem
