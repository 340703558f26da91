// SPDX-License-Identifier: Apache-2.0
// Draining a world after a takeover, and judging it.
#include "tests/support/takeover_check.hpp"

#include <algorithm>

#include "common/layout/redo_checksum.hpp"

namespace tandem::test {

Verdict& Verdict::operator+=(const Verdict& other) {
  tally += other.tally;
  leaked_frames += other.leaked_frames;
  descriptor_errors += other.descriptor_errors;
  record_left += other.record_left;
  not_notified += other.not_notified;
  miscounted += other.miscounted;
  trespasses += other.trespasses;
  stopped += other.stopped;
  return *this;
}

bool Verdict::clean() const {
  return tally.clean() && leaked_frames == 0 && descriptor_errors == 0 && record_left == 0 && not_notified == 0 &&
         miscounted == 0 && trespasses == 0 && stopped == 0;
}

void sign(RedoRecord& record) {
  record.arm.store(std::uint64_t{record.epoch} << 32 | redo_checksum(record));
}

bool let_go(const EngineWorld& world) {
  const std::uint64_t word = world.segment().shards[0].owner.load();
  return owner_epoch(word) != 0 && owner_tag(word) == 0;
}

void Flows::send(EngineWorld& world, std::uint32_t guest_packets, std::uint32_t uplink_packets) {
  from_guest += send_from_guest(world, flow, from_guest, guest_packets);
  from_uplink += send_from_uplink(world, flow, from_uplink, uplink_packets);
}

void world_moves_on(EngineWorld& world, Flows& flows, std::uint32_t more) {
  std::vector<std::byte> packet;
  while (const auto bytes = world.kernels[0].send())
    if (world.shape().devices == 1) flows.uplink.note(*bytes);
  world.kernels[0].complete();
  world.nics[0].reap();
  while (world.nics[0].take(packet)) flows.guest.note(packet);
  world.nics[0].post();
  if (world.shape().devices > 1) peer_goes_on(world, flows.uplink);
  flows.send(world, more, more);
}

namespace {

// The receiving end of a forward: each packet is delivered once, or counted once as one that found no buffers.
void judge_peer(const EngineWorld& world, const Flows& flows, Verdict& verdict) {
  const GuestNic& nic = world.nics[1];
  const VringCursors& receive = world.state(1).receive;
  verdict.miscounted +=
      receive.packets + receive.overflow != flows.from_guest * flows.flow.arrivals() || receive.dropped != 0;
  verdict.miscounted += verdict.tally.lost != receive.overflow;
  verdict.tally.lost = 0;
  verdict.descriptor_errors += nic.receive.wrong_returns() + nic.empty_returns() + nic.protocol_errors();
  verdict.descriptor_errors += receive.next_used != nic.receive.used_taken();
  verdict.leaked_frames += world.audit(1).leaked + world.audit(1).doubled;
  verdict.stopped += receive.fault.load() != QueueFault::kNone;
}

}  // namespace

Verdict take_over_and_judge(EngineWorld& world, ShardStepper& heir, Flows& flows) {
  Verdict verdict;
  const std::uint32_t vrings = 2 * world.shape().devices;
  for (std::uint32_t i = 0; i < vrings; ++i) world.calls(i);
  const bool everybody_told = let_go(world);
  if (!heir.take_over_and_poll()) {
    verdict.stopped = 1;
    return verdict;
  }
  for (std::uint32_t i = 0; i < vrings; ++i)
    if (!everybody_told && world.calls(i) == 0) ++verdict.not_notified;
  bool quiet = drain(world, heir, flows.uplink, flows.guest).quiet;
  flows.send(world, 3, 3);
  quiet = drain(world, heir, flows.uplink, flows.guest).quiet && quiet;

  const GuestNic& nic = world.nics[0];
  const QueuePairState& state = world.state();
  verdict.tally = flows.uplink.finish(flows.from_guest);
  if (world.shape().devices > 1) judge_peer(world, flows, verdict);
  verdict.tally += flows.guest.finish(flows.from_uplink);
  const FrameAudit audit = world.audit();
  verdict.leaked_frames = audit.leaked + audit.doubled + world.kernels[0].bad_descriptors();
  verdict.descriptor_errors = nic.transmit.wrong_returns() + nic.receive.wrong_returns() + nic.transmit.outstanding() +
                              nic.empty_returns() + nic.protocol_errors();
  verdict.descriptor_errors += state.transmit.next_used != nic.transmit.used_taken();
  verdict.descriptor_errors += state.receive.next_used != nic.receive.used_taken();
  verdict.record_left = world.record().arm.load() != 0;
  verdict.miscounted += state.transmit.packets != flows.from_guest;
  verdict.miscounted += state.receive.packets != flows.from_uplink;
  verdict.miscounted += state.transmit.dropped != flows.bad_from_guest;
  verdict.miscounted += state.receive.dropped != flows.bad_from_uplink;
  verdict.miscounted += state.transmit_suspicion.poisoned + state.receive_suspicion.poisoned != flows.poisoned;
  verdict.stopped +=
      state.transmit.fault.load() != QueueFault::kNone || state.receive.fault.load() != QueueFault::kNone;
  return verdict;
}

}  // namespace tandem::test
