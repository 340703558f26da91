// SPDX-License-Identifier: Apache-2.0
// What must hold after a takeover, checked from the outside: by the guest, the kernel, and the books of frames and
// descriptors.
#pragma once

#include <cstdint>

#include "tests/support/engine_world.hpp"

namespace tandem::test {

/// What went wrong; all zero is exactly once, in order, byte exact, with everything given back.
struct Verdict {
  Tally tally;
  std::uint64_t leaked_frames = 0;      ///< nowhere, or in two places, or busy without being in the kernel's hands
  std::uint64_t descriptor_errors = 0;  ///< chains returned twice, never, empty, or with a wrong header
  std::uint64_t record_left = 0;        ///< the redo record was not empty in the end
  std::uint64_t not_notified = 0;       ///< the heir did not interrupt the guest
  std::uint64_t miscounted = 0;         ///< packet counters differ from what crossed
  std::uint64_t trespasses = 0;         ///< stores to shared memory by a thread that had let go of the shard
  std::uint64_t stopped = 0;            ///< a queue stopped, no takeover took place, or it never came to rest

  Verdict& operator+=(const Verdict& other);
  [[nodiscard]] bool clean() const;
};

/// Arms a record with a checksum that is right, whatever its content; counts that are too large are cut for it.
void sign(RedoRecord& record);

/// Whether the shard's owner has let go of it.
bool let_go(const EngineWorld& world);

/// The flows of one trial: what has entered the rings so far, and what has come out.
struct Flows {
  explicit Flows(const PacketFlow& packets) : flow(packets), uplink(packets), guest(packets) {}
  PacketFlow flow;
  Ledger uplink, guest;
  std::uint32_t from_guest = 0, from_uplink = 0;
  std::uint32_t bad_from_guest = 0;   ///< chains that have to be dropped, counted and given back
  std::uint32_t bad_from_uplink = 0;  ///< packets that have to be dropped and counted
  std::uint32_t poisoned = 0;         ///< of both: dropped because owners died on them

  /// More packets; as many as fit.
  void send(EngineWorld& world, std::uint32_t guest_packets, std::uint32_t uplink_packets);
};

/// Guest and kernel go on while nobody serves: the kernel sends and completes, the guest takes what it was given and
/// posts again, and `more` packets arrive at either end.
void world_moves_on(EngineWorld& world, Flows& flows, std::uint32_t more);

/// Lets `heir` take over, drains everything, sends some more each way, and judges. After an owner that let go the guest
/// need not be interrupted: the owner had done that.
Verdict take_over_and_judge(EngineWorld& world, ShardStepper& heir, Flows& flows);

}  // namespace tandem::test
