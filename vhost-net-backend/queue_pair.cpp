// SPDX-License-Identifier: Apache-2.0
// Stage, arm, apply, disarm: the transaction that moves a burst, and its replay by an heir.
//
// Each Apply function is written once and called twice: by the owner right after arming, and by an heir that finds the
// record armed. Everything it does sets values that are in the record, so a second run after a crash at any point is
// the same run.
#include "vhost-net-backend/queue_pair.hpp"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <optional>

#include "common/layout/redo_checksum.hpp"
#include "vhost-net-backend/gather.hpp"
#include "vhost-net-backend/place.hpp"
#include "vhost-net-backend/plain_run.hpp"
#include "vhost-net-backend/poison.hpp"
#include "vhost-net-backend/probe.hpp"
#include "vhost-net-backend/protection.hpp"
#include "vhost-net-backend/second_opinion.hpp"

namespace tandem {

namespace {

// A burst with large packets in it ends here, for a heartbeat: 32 of 64 KiB would take as long as the strictest hang
// limits allow.
constexpr std::uint64_t kBurstBytes = 256 * 1024;

// The part of the record that is the same for all directions.
void begin_record(QueuePair& pair, RedoKind kind, const VringCursors& vring) {
  RedoRecord& record = pair.shard->record;
  record.version = kRedoVersion;
  record.kind = kind;
  record.used_count = 0;
  record.frame_count = 0;
  record.avail_before = vring.next_avail;
  record.used_before = vring.next_used;
  record.queue_pair = pair.index;
  record.epoch = pair.epoch;
  record.poisoned = 0;
  record.generation = pair.generation;
  record.consumer_before = record.consumer_after = 0;
  record.packets_after = vring.packets;
  record.bytes_after = vring.bytes;
  record.dropped_after = vring.dropped;
}

void arm(QueuePair& pair) {
  RedoRecord& record = pair.shard->record;
  TANDEM_PROBE(kStaged);
  // The commit point. Release: payload, record and everything before it are visible to whoever sees the arm word.
  if constexpr (kProtected)
    record.arm.store(std::uint64_t{record.epoch} << 32 | redo_checksum(record), std::memory_order_release);
  TANDEM_PROBE(kArmed);
}

void disarm(QueuePair& pair) {
  // Release: an heir that sees 0 sees everything that Apply did.
  if constexpr (kProtected) pair.shard->record.arm.store(0, std::memory_order_release);
  TANDEM_PROBE(kDisarmed);
}

// `record`: a RedoRecord, or the RedoDestination in it.
template <class Record>
void apply_cursors(const Record& record, VringCursors& vring) {
  vring.next_avail = record.avail_after;
  vring.next_used = record.used_after;
  vring.packets = record.packets_after;
  vring.bytes = record.bytes_after;
  vring.dropped = record.dropped_after;
  const std::uint64_t word = std::uint64_t{record.avail_after} | std::uint64_t{record.used_after} << 16 |
                             std::uint64_t{vring.start_count} << 32;
  copy_positions(vring, word);
  TANDEM_PROBE(kCursorsAdvanced);
}

// The drop of a poison packet: its suspicion ends with it, also when an heir does it over.
void apply_drop(const RedoRecord& record, Suspicion& suspicion) {
  if (record.poisoned == 0) return;
  suspicion.poisoned = suspicion.poisoned_after;
  suspicion.suspect.store(0, std::memory_order_relaxed);
}

template <class Record>
std::span<const RedoUsed> used_of(const Record& record) {
  return {record.used, record.used_count};
}

std::span<const RedoFrame> frames_of(const RedoRecord& record) { return {record.frames, record.frame_count}; }

// Rings and records are passed by value here and below: through a reference, each store into a ring might have changed
// what leads to the next one, as far as the compiler knows.

void mark_busy(const QueuePair& pair, std::span<const RedoFrame> frames) {
  const XskFrames numbers = pair.port->transmit_frames();
  std::uint64_t* const busy = pair.state->transmit_busy;
  for (const RedoFrame& entry : frames) {
    const std::uint64_t frame = numbers.number(entry.address);
    busy[frame / 64] |= std::uint64_t{1} << (frame % 64);
  }
}

void write_entries(XskRingView<xdp_desc> ring, std::uint32_t producer, std::span<const RedoFrame> frames) {
  for (const RedoFrame& frame : frames) ring.at(producer++) = {frame.address, frame.length, 0};
}
void write_entries(XskRingView<std::uint64_t> ring, std::uint32_t producer, std::span<const RedoFrame> frames) {
  for (const RedoFrame& frame : frames) ring.at(producer++) = frame.address;
}

bool entries_stand(XskRingView<xdp_desc> ring, std::uint32_t producer, std::span<const RedoFrame> frames) {
  std::uint64_t differs = 0;
  for (const RedoFrame& frame : frames) {
    const xdp_desc& entry = ring.at(producer++);
    differs |= (entry.addr ^ frame.address) | (entry.len ^ frame.length);
  }
  return differs == 0;
}
bool entries_stand(XskRingView<std::uint64_t> ring, std::uint32_t producer, std::span<const RedoFrame> frames) {
  std::uint64_t differs = 0;
  for (const RedoFrame& frame : frames) differs |= ring.at(producer++) ^ frame.address;
  return differs == 0;
}

bool leaves_a_guest(const RedoRecord& record) { return record.kind != RedoKind::kReceive; }
bool leaves_a_guest(const RedoDestination&) { return false; }

// Gives the record's chains back. The elements are looked at before they are published: in the guest's memory, so that
// one that differs is the guest's doing, or ours. Ours differs every time.
template <class Record, class Queue>
void give_back(const Record& record, const Queue& queue) {
  const WindowOpen window;
  queue.write_used(used_of(record), record.used_before);
  if (leaves_a_guest(record))
    TANDEM_PROBE(kSourceWritten);
  else
    TANDEM_PROBE(kDestinationWritten);
  look_again();
  if (kProtected && !queue.used_stands(used_of(record), record.used_before)) [[unlikely]]
    confirm_refusal(
        [&] {
          queue.write_used(used_of(record), record.used_before);
          look_again();
          return !queue.used_stands(used_of(record), record.used_before);
        },
        [] { return true; });
  queue.publish_used(used_of(record), record.used_before, record.used_after);
}

// The half that transmits and forwards share: the chains go back to the guest that sent.
template <class Queue>
void apply_departure(QueuePair& pair, const Queue& queue) {
  const RedoRecord& record = pair.shard->record;
  // A replay may find them given back: then the guest may have taken them and reused the same slots.
  if (!queue.is_published(record.used_before)) give_back(record, queue);
  TANDEM_PROBE(kSourcePublished);
  apply_cursors(record, pair.state->transmit);
}

template <class Queue>
void apply_transmit(QueuePair& pair, const Queue& queue) {
  const RedoRecord& record = pair.shard->record;
  const XskPort& port = *pair.port;
  mark_busy(pair, frames_of(record));
  TANDEM_PROBE(kFramesMarked);
  write_entries(port.tx, record.producer_before, frames_of(record));
  TANDEM_PROBE(kDestinationWritten);
  look_again();
  must_hold(entries_stand(port.tx, record.producer_before, frames_of(record)));
  port.tx.publish(record.producer_after);
  TANDEM_PROBE(kDestinationPublished);
  apply_departure(pair, queue);
  apply_drop(record, pair.state->transmit_suspicion);
}

template <class Queue>
void apply_receive(QueuePair& pair, const Queue& queue) {
  const RedoRecord& record = pair.shard->record;
  XskPort& port = *pair.port;
  if (!queue.is_published(record.used_before)) give_back(record, queue);  // as in apply_departure()
  TANDEM_PROBE(kDestinationPublished);
  write_entries(port.fill, record.producer_before, frames_of(record));
  TANDEM_PROBE(kSourceWritten);
  look_again();
  must_hold(entries_stand(port.fill, record.producer_before, frames_of(record)));
  port.fill.publish(record.producer_after);
  port.rx.consume(record.consumer_after);
  TANDEM_PROBE(kSourcePublished);
  apply_cursors(record, pair.state->receive);
  apply_drop(record, pair.state->receive_suspicion);
}

// The other half of a forward; apply_departure() follows it.
template <class Queue>
void apply_delivery(const RedoDestination& record, QueuePair& to, const Queue& queue) {
  if (record.used_count != 0 && !queue.is_published(record.used_before)) give_back(record, queue);
  TANDEM_PROBE(kDestinationPublished);
  to.state->receive.overflow = record.overflow_after;
  apply_cursors(record, to.state->receive);
}

void call(const BoundQueue& bound) {
  if (bound.call_fd < 0) return;
  const std::uint64_t one = 1;
  // Non-blocking; EAGAIN means that the counter is full, so the guest has an interrupt pending anyway.
  [[maybe_unused]] const ssize_t written = ::write(bound.call_fd, &one, sizeof one);
}

template <class Queue>
void call_if_wanted(const BoundQueue& bound, const Queue& queue, std::uint16_t before, std::uint16_t after) {
  if (before != after && queue.wants_call(before, after)) call(bound);
}

void count_transaction(ShardState& shard) {
  // One writer; a plain increment without a locked instruction.
  shard.transactions.store(shard.transactions.load(std::memory_order_relaxed) + 1, std::memory_order_release);
}

// Before arming a burst that drops a poison packet.
void stage_drop(RedoRecord& record, Suspicion& suspicion) {
  record.poisoned = 1;
  suspicion.poisoned_after = suspicion.poisoned + 1;
}

// Before arming, once all is staged: the burst's chains as one that ends with the last of them, where the driver takes
// that. It then finds one cache line of the ring written by us, instead of one for every four chains.
template <class Queue>
void give_back_as_one(RedoRecord& record, const Queue& queue, std::uint32_t slots) {
  if (!queue.gives_back_as_one() || record.used_count < 2) return;
  const Walked all{record.used[record.used_count - 1].id, static_cast<std::uint16_t>(slots), true};
  record.used[0] = used_element(all, 0);
  record.used_count = 1;
}

// Before arming, once all is staged: counts and cursors of either direction, where `moved` entries leave the source.
void check_staged(const RedoRecord& record, const VringCursors& vring, std::uint64_t moved) {
  must_hold(record.avail_before == vring.next_avail && record.used_before == vring.next_used);
  must_hold((record.packets_after - vring.packets) + (record.dropped_after - vring.dropped) == moved);
  must_hold(record.frame_count == record.producer_after - record.producer_before);
}

// Before arming: whether the frames that are to go back are those that the packets taken were in. Each index is worked
// out once more; one that went wrong takes one packet for another.
void check_taken(const RedoRecord& record, const XskPort& port, std::uint32_t taken) {
  if (record.frame_count != taken) [[unlikely]]
    return;  // an entry that names no frame of ours was among them
  const XskRingView<xdp_desc> rx = port.rx;
  std::uint64_t differs = 0;
  for (std::uint32_t i = 0; i < taken; ++i)
    differs |= record.frames[i].address ^ port.frame_start(rx.at(record.consumer_before + i).addr);
  must_hold(differs == 0);
}

// Before arming, and again before disarming: whether what was staged, and applied, went where it belongs.
template <class Queue>
void check_wiring(const QueuePair& pair, const Queue& queue) {
  must_hold(pair.is_wired() && queue.is_whole());
}

// After applying, while the record is still armed: whether the cursors are where the burst, as its stager remembers it,
// was to bring them. Here and not where they are written: what goes wrong there goes wrong here in another way.
void check_applied(const VringCursors& vring, std::uint16_t avail, std::uint16_t used) {
  look_again();
  must_hold(vring.next_avail == avail && vring.next_used == used && vring.copies[0] == position_word(vring));
}

// False, and the queue stopped, if what the guest has made available cannot be true, or its memory has gone.
template <class Queue>
bool usable(const GuestMemory& memory, const Queue& queue, const typename Queue::Supply& supply, VringCursors& vring) {
  must_hold(vring.copies[0] == position_word(vring));  // or a wild store of ours has moved the cursors
  if (memory.faulted()) {  // looked at after the load: the index may be one of the zeroes that stand in for lost pages
    vring.fault.store(QueueFault::kMemoryFault, std::memory_order_release);
    return false;
  }
  if (supply.plausible()) return true;
  confirm_refusal([&] { return !queue.supply(vring.next_avail, vring.next_used).plausible(); },
                  [&] { return supply_is_plausible(queue, vring.next_avail, vring.next_used); });
  vring.fault.store(Queue::kImplausible, std::memory_order_release);
  return false;
}

// After staging, before arming. False, and the queue stopped, if what was staged came from nowhere, or if there is
// nothing because the first chain has no end (`endless`; what precedes such a chain is moved first).
bool may_go_on(const QueuePair& pair, VringCursors& vring, bool endless, bool staged) {
  if (pair.memory->faulted())
    vring.fault.store(QueueFault::kMemoryFault, std::memory_order_release);
  else if (endless && !staged)
    vring.fault.store(QueueFault::kEndlessChain, std::memory_order_release);
  else
    return staged;
  return false;
}

// The bursts, for either layout.

// `kNeighbours`: the pair has some; the burst ends before the first packet that is for one of them.
template <bool kNeighbours, class Queue>
std::uint32_t transmit_from(QueuePair& pair, const Queue& queue) {
  VringCursors& vring = pair.state->transmit;
  XskPort& port = *pair.port;
  const auto supply = queue.supply(vring.next_avail, vring.next_used);
  Progress at{vring.next_avail};
  if (!usable(*pair.memory, queue, supply, vring) || !supply.has(at.position, 0)) return 0;
  drain_completions(pair);
  const std::uint32_t producer = port.tx.producer();
  const std::uint32_t room =
      std::min(port.tx.size() - std::min(producer - port.tx.consumer(), port.tx.size()), kBurstFrames);
  RedoRecord& record = pair.shard->record;
  begin_record(pair, RedoKind::kTransmit, vring);
  record.producer_before = producer;
  FramePicker frames(pair);
  if (!pair.has_suspects) [[likely]]
    stage_plain_transmit<kNeighbours>(pair, queue, supply, frames, room, at);
  Lookahead ahead(*pair.memory, queue, supply, /*writable=*/false, at.position);
  const Suspected& suspect = pair.transmit_suspect;
  bool no_room = false, endless = false, drop = false;
  while (record.used_count < kBurstPackets && !drop && supply.has(at.position, at.slots)) {
    const std::uint32_t frame = frames.peek();
    no_room = frame == kTransmitFrames || record.frame_count >= room;
    if (no_room) break;
    ahead.at(at);
    const std::uint32_t position = transmit_position(pair, at.position);
    take_in_hand(pair, PacketPhase::kTransmit, position);
    if (suspect.is_condemned(position)) [[unlikely]] {
      drop = record.used_count == 0 && suspect.packet;
      if (!drop) break;
    }
    const std::uint64_t address = port.transmit_address(frame);
    ChainFault fault = ChainFault::kPoison;
    Outgoing packet{port.frame(address, port.description().frame_size)};
    const Walked chain = drop ? pass_over(pair, queue, at) : gather_next(pair, queue, at, packet, fault);
    TANDEM_PROBE_PACKET(packet.bytes, packet.length);
    endless = !chain.ended;
    if ((fault != ChainFault::kNone && !drop) || endless) [[unlikely]]
      confirm_bad_transmit(pair, queue, at, frame, packet.large);
    if (endless) break;
    if constexpr (kNeighbours) {
      // The first one goes: a moment ago Forward found it to be for nobody here.
      if (record.used_count != 0 && fault == ChainFault::kNone && find_neighbour(pair, packet.bytes) != nullptr) break;
    }
    bool segmented = false;
    if (fault == ChainFault::kNone && wants_offload(pair, packet)) [[unlikely]] {
      const std::optional<Offload> offload = find_offload(pair, packet);
      if (!offload) {
        fault = ChainFault::kOffload;
      } else if (offload->is_segmented()) {
        segmented = true;
        no_room = !stage_segments(pair, frames, room, packet, *offload);
        if (no_room) break;
      } else {
        complete_checksum(*offload, {packet.bytes, packet.length});
      }
    }
    add_used(record, chain, 0);
    at = {queue.next(at.position, chain.slots), at.slots + chain.slots};
    if (fault != ChainFault::kNone) {
      ++record.dropped_after;
      continue;
    }
    if (!segmented) [[likely]] {
      frames.take(frame);
      record.frames[record.frame_count++] = {static_cast<std::uint32_t>(address), packet.length};
    }
    ++record.packets_after;
    record.bytes_after += packet.length;
    if (segmented && record.bytes_after - vring.bytes >= kBurstBytes) [[unlikely]]
      break;
  }
  if (no_room) pair.transmit_pending = true;  // the kernel has to finish some first
  if (!may_go_on(pair, vring, endless, record.used_count != 0)) {
    let_go(pair);
    return 0;
  }
  const std::uint32_t chains = record.used_count;
  const std::uint32_t producer_after = producer + record.frame_count;
  const std::uint16_t used_after = queue.next(record.used_before, at.slots);
  record.producer_after = producer_after;
  record.avail_after = at.position;
  record.used_after = used_after;
  check_staged(record, vring, chains);
  must_hold(record.producer_before == port.tx.producer() && chains <= at.slots);
  must_hold(queue.next(record.avail_before, at.slots) == at.position);
  give_back_as_one(record, queue, at.slots);
  check_wiring(pair, queue);
  if (drop) stage_drop(record, pair.state->transmit_suspicion);
  take_in_hand(pair, PacketPhase::kApply, record.epoch);
  arm(pair);
  apply_transmit(pair, queue);
  check_applied(vring, at.position, used_after);
  must_hold(port.tx.producer() == producer_after);
  check_wiring(pair, queue);
  disarm(pair);
  let_go(pair);
  count_transaction(*pair.shard);
  // Packets first: to be told that its buffers are back is worth less to a guest than that they are on their way.
  pair.transmit_pending = !port.wake_transmit() || no_room;
  call_if_wanted(pair.transmit, queue, record.used_before, record.used_after);
  TANDEM_PROBE(kNotified);
  return chains;
}

template <class Queue>
std::uint32_t receive_into(QueuePair& pair, const Queue& queue) {
  VringCursors& vring = pair.state->receive;
  XskPort& port = *pair.port;
  const std::uint32_t consumer = port.rx.consumer();
  const std::uint32_t waiting = std::min({port.rx.producer() - consumer, port.rx.size(), kBurstPackets});
  if (waiting == 0) return 0;
  const auto supply = queue.supply(vring.next_avail, vring.next_used);
  if (!usable(*pair.memory, queue, supply, vring)) return 0;
  std::uint32_t starved = 0;
  RedoRecord& record = pair.shard->record;
  begin_record(pair, RedoKind::kReceive, vring);
  const Suspected& suspect = pair.receive_suspect;
  Progress at{vring.next_avail};
  std::uint32_t taken = 0;
  bool endless = false, drop = false;
  {
    const WindowOpen window;
    if (!pair.has_suspects) [[likely]]
      taken = stage_plain_receive(pair, queue, supply, consumer, waiting, at);
    Lookahead ahead(*pair.memory, queue, supply, /*writable=*/true, at.position);
    for (; taken < waiting && !drop; ++taken) {
      ahead.at(at);
      if (taken + kAhead < waiting) __builtin_prefetch(port.frame(port.rx.at(consumer + taken + kAhead).addr, 1));
      take_in_hand(pair, PacketPhase::kReceive, consumer + taken);
      if (suspect.is_condemned(consumer + taken)) [[unlikely]] {
        drop = taken == 0 && suspect.packet;
        if (!drop) break;
      }
      const xdp_desc& descriptor = port.rx.at(consumer + taken);
      const std::byte* packet = port.frame(descriptor.addr, descriptor.len);
      if (drop || packet == nullptr || descriptor.len == 0 || !port.is_receive_frame(descriptor.addr)) {
        ++record.dropped_after;  // poison; or the kernel does not do this, a damaged ring does
        if (port.is_receive_frame(descriptor.addr))
          record.frames[record.frame_count++] = {static_cast<std::uint32_t>(port.frame_start(descriptor.addr)), 0};
        continue;
      }
      TANDEM_PROBE_PACKET(packet, descriptor.len);
      Progress after = at;
      const Placed placed = place(pair, record, queue, supply, kNoOffload, packet, descriptor.len, after);
      endless = placed == Placed::kEndless;
      if (endless || placed == Placed::kNoRecordRoom) break;
      if (placed == Placed::kNoBuffers) {
        pair.starved_avail = after.position;
        starved = kStarvedMark | pair.starved_avail;
        break;
      }
      at = after;
      if (placed == Placed::kDone) {
        ++record.packets_after;
        record.bytes_after += descriptor.len;
      } else {
        ++record.dropped_after;
      }
      record.frames[record.frame_count++] = {static_cast<std::uint32_t>(port.frame_start(descriptor.addr)), 0};
    }
  }
  // In one store: an heir that looks while a round goes on must not take a starved queue for one that is passed by.
  pair.receive_starved = starved != 0;
  vring.starved = starved;
  if (!may_go_on(pair, vring, endless, taken != 0)) {
    let_go(pair);
    return 0;
  }
  record.consumer_before = consumer;
  record.consumer_after = consumer + taken;
  record.producer_before = port.fill.producer();
  const std::uint32_t producer_after = record.producer_before + record.frame_count;
  const std::uint16_t used_after = queue.next(record.used_before, at.slots);
  record.producer_after = producer_after;
  record.avail_after = at.position;
  record.used_after = used_after;
  check_staged(record, vring, taken);
  check_taken(record, port, taken);
  must_hold(record.consumer_before == port.rx.consumer() && record.used_count <= at.slots);
  check_wiring(pair, queue);
  if (drop) stage_drop(record, pair.state->receive_suspicion);
  take_in_hand(pair, PacketPhase::kApply, record.epoch);
  arm(pair);
  apply_receive(pair, queue);
  check_applied(vring, at.position, used_after);
  must_hold(port.rx.consumer() == consumer + taken && port.fill.producer() == producer_after);
  check_wiring(pair, queue);
  disarm(pair);
  let_go(pair);
  count_transaction(*pair.shard);
  call_if_wanted(pair.receive, queue, record.used_before, record.used_after);
  TANDEM_PROBE(kNotified);
  return taken;
}

// One forward, from the transmit virtqueue of `pair` to the receive virtqueue of whoever its first packet is for.
template <class Queue>
class Forward {
 public:
  Forward(QueuePair& pair, const Queue& queue) : pair_(pair), queue_(queue), at_{pair.state->transmit.next_avail} {}

  /// Number of ring entries that left; nothing if the next one is not for a neighbour, or is to be refused: it is left
  /// to transmit_from().
  std::optional<std::uint32_t> run() {
    VringCursors& vring = pair_.state->transmit;
    const auto supply = queue_.supply(vring.next_avail, vring.next_used);
    if (!usable(*pair_.memory, queue_, supply, vring) || !supply.has(at_.position, 0)) return 0;
    ahead_.emplace(*pair_.memory, queue_, supply, /*writable=*/false, at_.position);
    QueuePair* to = read_next();
    if (to == nullptr) {
      let_go(pair_);
      return std::nullopt;
    }
    return to->receive.queue.visit([&](const auto& queue) { return move(*to, queue, supply); });
  }

 private:
  // Copies the next chain's packet to the staging buffer. Returns whom it is for; nobody if it is to be refused.
  QueuePair* read_next() {
    const std::uint32_t position = transmit_position(pair_, at_.position);
    ahead_->at(at_);
    take_in_hand(pair_, PacketPhase::kTransmit, position);
    if (pair_.transmit_suspect.is_condemned(position)) [[unlikely]]
      return nullptr;
    ChainFault fault = ChainFault::kNone;
    packet_ = {pair_.staging};
    chain_ = gather_next(pair_, queue_, at_, packet_, fault);
    TANDEM_PROBE_PACKET(packet_.bytes, packet_.length);
    if (!chain_.ended || fault != ChainFault::kNone) return nullptr;
    QueuePair* const to = find_neighbour(pair_, packet_.bytes);
    offload_.reset();
    if (to == nullptr || !wants_offload(pair_, packet_)) [[likely]]
      return to;
    offload_ = find_offload(pair_, packet_);
    return offload_ ? to : nullptr;
  }

  template <class ToQueue>
  std::uint32_t move(QueuePair& to, const ToQueue& to_queue, const typename Queue::Supply& supply) {
    VringCursors& vring = pair_.state->transmit;
    VringCursors& to_vring = to.state->receive;
    RedoRecord& record = pair_.shard->record;
    begin_record(pair_, RedoKind::kForward, vring);
    record.producer_before = record.producer_after = 0;
    begin_destination(record.destination, to);
    const bool delivered = stage(to, to_queue, supply);
    // A neighbour whose memory has gone, or whose ring is none, is stopped; the next burst meets it so.
    if (!may_go_on(pair_, vring, false, record.used_count != 0) ||
        (delivered && !may_go_on(to, to_vring, false, true))) {
      let_go(pair_);
      return 0;
    }
    record.avail_after = at_.position;
    record.used_after = queue_.next(record.used_before, at_.slots);
    RedoDestination& destination = record.destination;
    destination.avail_after = to_at_.position;
    destination.used_after = to_queue.next(destination.used_before, to_at_.slots);
    check_staged(record, vring, record.used_count);
    check_delivered(record, to_vring);
    check_wiring(pair_, queue_);
    check_wiring(to, to_queue);
    take_in_hand(pair_, PacketPhase::kApply, record.epoch);
    apply(to, to_queue);
    call_if_wanted(to.receive, to_queue, destination.used_before, destination.used_after);
    call_if_wanted(pair_.transmit, queue_, record.used_before, record.used_after);
    TANDEM_PROBE(kNotified);
    return record.used_count;
  }

  template <class ToQueue>
  void apply(QueuePair& to, const ToQueue& to_queue) {
    const RedoRecord& record = pair_.shard->record;
    arm(pair_);
    apply_delivery(record.destination, to, to_queue);
    apply_departure(pair_, queue_);
    check_wiring(pair_, queue_);
    check_wiring(to, to_queue);
    disarm(pair_);
    let_go(pair_);
    count_transaction(*pair_.shard);
    // Packets from the uplink may wait for buffers that this burst took: receive_into() has to look where they are now.
    to.receive_starved = false;
    to.state->receive.starved = 0;
  }

  static void begin_destination(RedoDestination& record, const QueuePair& to) {
    const VringCursors& vring = to.state->receive;
    record.generation = to.generation;
    record.queue_pair = to.index;
    record.used_count = record.reserved = 0;
    record.avail_before = vring.next_avail;
    record.used_before = vring.next_used;
    record.packets_after = vring.packets;
    record.bytes_after = vring.bytes;
    record.dropped_after = vring.dropped;
    record.overflow_after = vring.overflow;
  }

  void check_delivered(const RedoRecord& record, const VringCursors& vring) const {
    const RedoDestination& to = record.destination;
    must_hold(to.avail_before == vring.next_avail && to.used_before == vring.next_used);
    must_hold((to.packets_after - vring.packets) + (to.dropped_after - vring.dropped) +
                  (to.overflow_after - vring.overflow) ==
              arrivals_);
  }

  // From the packet that was read on, as many as are for `to`. Returns whether any of its buffers were written.
  template <class ToQueue>
  bool stage(QueuePair& to, const ToQueue& to_queue, const typename Queue::Supply& supply) {
    RedoRecord& record = pair_.shard->record;
    VringCursors& vring = to.state->receive;
    to_at_ = {vring.next_avail};
    const auto buffers = to_queue.supply(vring.next_avail, vring.next_used);
    // A neighbour that is stopped, now or since long, takes nothing: to the sender it is like a full ring.
    const bool takes = to.can_receive() && usable(*to.memory, to_queue, buffers, vring);
    Lookahead to_ahead(*to.memory, to_queue, buffers, /*writable=*/true, to_at_.position);
    const auto another = [&] {
      return record.used_count < kBurstPackets && supply.has(at_.position, at_.slots) && read_next() == &to;
    };
    // The packet that was read is the first of the run; if nothing could be staged of that, it is here.
    if (takes && !pair_.has_suspects && !offload_) [[likely]] {
      const WindowOpen window;
      arrivals_ = stage_plain_forward(pair_, queue_, supply, at_, to, to_queue, buffers, to_at_);
    }
    for (bool more = arrivals_ == 0 || another(); more; more = another()) {
      if (takes) to_ahead.at(to_at_);
      Arrival arrival;
      const Placed placed = takes ? deliver(to, to_queue, buffers, arrival) : Placed::kNoBuffers;
      if (placed == Placed::kNoRecordRoom) break;
      if (placed == Placed::kEndless) {
        // What precedes such a chain is moved first.
        if (record.used_count == 0) vring.fault.store(QueueFault::kEndlessChain, std::memory_order_release);
        break;
      }
      if (!takes) arrival.overflow = 1;
      count(record, arrival);
      add_used(record, chain_, 0);
      at_ = {queue_.next(at_.position, chain_.slots), at_.slots + chain_.slots};
      if (packet_.large && record.bytes_after - pair_.state->transmit.bytes >= kBurstBytes) break;
    }
    return takes;
  }

  // What became of a packet at its receiver: of each of its segments, if it had to be cut.
  struct Arrival {
    std::uint32_t packets = 0, dropped = 0, overflow = 0;
    std::uint64_t bytes = 0;

    void add(Placed placed, std::uint32_t length) {
      if (placed == Placed::kDone) [[likely]] {
        ++packets;
        bytes += length;
      } else {
        ++(placed == Placed::kNoBuffers ? overflow : dropped);
      }
    }
  };

  template <class ToQueue>
  Placed deliver(QueuePair& to, const ToQueue& to_queue, const typename ToQueue::Supply& buffers, Arrival& arrival) {
    const WindowOpen window;
    NetHeader header = kNoOffload;
    if (offload_) [[unlikely]] {
      if (to.taken.has_all(offload_->needed))
        header = header_for_receiver(*offload_, packet_.header);
      else if (offload_->is_segmented())
        return deliver_segments(to, to_queue, buffers, arrival);
      else
        complete_checksum(*offload_, {packet_.bytes, packet_.length});
    }
    const Placed placed = deliver_one(to, to_queue, buffers, header, packet_.bytes, packet_.length);
    arrival.add(placed, packet_.length);
    return placed;
  }

  template <class ToQueue>
  Placed deliver_one(QueuePair& to, const ToQueue& to_queue, const typename ToQueue::Supply& buffers,
                     const NetHeader& header, const std::byte* bytes, std::uint32_t length) {
    Progress after = to_at_;
    const Placed placed = place(to, pair_.shard->record.destination, to_queue, buffers, header, bytes, length, after);
    if (placed != Placed::kNoBuffers) to_at_ = after;
    return placed;
  }

  // For a receiver that does not take the packet as it is: each segment is a packet to it, and finds buffers or not.
  // All in this one transaction, or none: kNoRecordRoom, kEndless.
  template <class ToQueue>
  Placed deliver_segments(QueuePair& to, const ToQueue& to_queue, const typename ToQueue::Supply& buffers,
                          Arrival& arrival) {
    RedoDestination& record = pair_.shard->record.destination;
    const Progress begin = to_at_;
    const std::uint16_t first_used = record.used_count;
    std::byte* const segment = pair_.staging + kLargestPacketRoom;
    for (std::uint32_t n = 0; n < offload_->segments; ++n) {
      const std::uint32_t length = write_segment(*offload_, {packet_.bytes, packet_.length}, n, segment);
      Placed placed = deliver_one(to, to_queue, buffers, kNoOffload, segment, length);
      // With nothing else in the record there never will be room: what is left is too large for it.
      if (placed == Placed::kNoRecordRoom && first_used == 0) placed = Placed::kTooLarge;
      if (placed == Placed::kNoRecordRoom || placed == Placed::kEndless) {
        record.used_count = first_used;
        to_at_ = begin;
        return placed;
      }
      arrival.add(placed, length);
    }
    return Placed::kDone;
  }

  void count(RedoRecord& record, const Arrival& arrival) {
    RedoDestination& to = record.destination;
    ++record.packets_after;
    record.bytes_after += packet_.length;
    to.packets_after += arrival.packets;
    to.bytes_after += arrival.bytes;
    to.dropped_after += arrival.dropped;
    to.overflow_after += arrival.overflow;
    arrivals_ += arrival.packets + arrival.dropped + arrival.overflow;
  }

  QueuePair& pair_;
  const Queue& queue_;
  Progress at_;       ///< in the transmit virtqueue
  Progress to_at_{};  ///< in the receive virtqueue
  std::optional<Lookahead<Queue>> ahead_;
  Walked chain_{};
  Outgoing packet_;                 ///< in the staging buffer
  std::optional<Offload> offload_;  ///< what its driver asks for
  std::uint64_t arrivals_ = 0;      ///< packets and segments of this burst that the receiver's counters are to tell of
};

// Whether one virtqueue's part of a record fits what is found: its cursors as they were before the burst or as they are
// to be after it. `record`: a RedoRecord, or the RedoDestination in it.
template <class Record, class Queue>
bool cursors_fit(const Record& record, const VringCursors& vring, const Queue& queue) {
  const auto at_rest = [&record](std::uint64_t word) {
    const auto avail = static_cast<std::uint16_t>(word), used = static_cast<std::uint16_t>(word >> 16);
    return (avail == record.avail_before || avail == record.avail_after) &&
           (used == record.used_before || used == record.used_after);
  };
  std::uint32_t slots = 0;
  for (const RedoUsed& used : used_of(record)) {
    if (!queue.is_extent(1, used.slots)) return false;
    slots += used.slots;
  }
  if (!queue.is_extent(record.used_count, slots) || !queue.is_position(record.avail_before) ||
      !queue.is_position(record.used_before) || queue.next(record.avail_before, slots) != record.avail_after ||
      queue.next(record.used_before, slots) != record.used_after)
    return false;
  return at_rest(position_word(vring)) || at_rest(vring.copies[0]) || at_rest(~vring.copies[1]);
}

// The same for a record of packets from or to an uplink, and for each ring room for what the record says.
template <class Queue>
bool record_fits(const QueuePair& pair, const RedoRecord& record, const VringCursors& vring, const Queue& queue) {
  if (!cursors_fit(record, vring, queue)) return false;
  const bool transmit = record.kind == RedoKind::kTransmit;
  // The kernel's own indices: what stands in ours is about to be set, and an owner whose code was damaged may have set
  // it to anything. If the kernel has gone by it, it took entries that nobody wrote.
  const auto stands = [](std::uint32_t producer, std::uint32_t consumer, std::uint32_t size) {
    return producer - consumer <= size;
  };
  const XskPort& port = *pair.port;
  if (record.producer_after - record.producer_before != record.frame_count ||
      !(transmit ? stands(record.producer_after, port.tx.consumer(), port.tx.size())
                 : stands(record.producer_after, port.fill.consumer(), port.fill.size())) ||
      (!transmit && !stands(port.rx.producer(), record.consumer_after, port.rx.size())))
    return false;
  return std::all_of(record.frames, record.frames + record.frame_count, [&](const RedoFrame& frame) {
    return transmit ? pair.port->transmit_frame(frame.address) < kTransmitFrames &&
                          pair.port->frame(frame.address, frame.length) != nullptr
                    : pair.port->is_receive_frame(frame.address);
  });
}

}  // namespace

void drain_completions(QueuePair& pair) {
  XskPort& port = *pair.port;
  const std::uint32_t consumer = port.completion.consumer();
  const std::uint32_t producer = port.completion.producer();
  // A full ring is the most there can be; more means that the index was damaged.
  const std::uint32_t count = std::min(producer - consumer, port.completion.size());
  if (count == 0) return;
  const XskRingView<std::uint64_t> completed = port.completion;
  const XskFrames frames = port.transmit_frames();
  std::uint64_t* const busy = pair.state->transmit_busy;
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::uint64_t frame = frames.number(completed.at(consumer + i));
    if (frame < kTransmitFrames) busy[frame / 64] &= ~(std::uint64_t{1} << (frame % 64));
  }
  TANDEM_PROBE(kCompletionCleared);
  // Busy bits first: if we die here, the same completions are read again, and clearing twice is clearing once.
  port.completion.consume(consumer + count);
}

namespace {

// Frames that a dead owner's bitmap and the kernel disagree about come back within this time, or never.
constexpr std::uint64_t kSettleLimitNs = 100'000'000;

bool frames_add_up(const QueuePair& pair) {
  const XskPort& port = *pair.port;
  // Both indices count from the socket's beginning, and every frame that is posted comes back once.
  const std::uint32_t posted = port.tx.producer() - port.completion.consumer();
  const std::uint32_t words = port.description().tx_frames / 64;
  std::uint32_t busy = 0;
  for (std::uint32_t i = 0; i < words; ++i)
    busy += static_cast<std::uint32_t>(std::popcount(pair.state->transmit_busy[i]));
  return busy == posted;
}

}  // namespace

void settle(QueuePair& pair, std::uint64_t now_ns) {
  drain_completions(pair);
  if (pair.settling_until_ns == QueuePair::kNotLookedAt) {
    pair.settling_until_ns = frames_add_up(pair) ? 0 : now_ns + kSettleLimitNs;
    return;
  }
  const bool all_back = pair.port->completion.consumer() == pair.port->tx.producer();
  if (all_back) std::fill_n(pair.state->transmit_busy, std::size(pair.state->transmit_busy), 0);
  if (all_back || now_ns >= pair.settling_until_ns) pair.settling_until_ns = 0;
}

std::uint32_t transmit_burst(QueuePair& pair) {
  return pair.transmit.queue.visit([&](const auto& queue) {
    if (pair.neighbours.empty()) [[likely]]
      return transmit_from<false>(pair, queue);
    const std::optional<std::uint32_t> forwarded = Forward(pair, queue).run();
    return forwarded ? *forwarded : transmit_from<true>(pair, queue);
  });
}

std::uint32_t receive_burst(QueuePair& pair) {
  return pair.receive.queue.visit([&](const auto& queue) { return receive_into(pair, queue); });
}

void notify_all(QueuePair& pair) {
  if (pair.receive.queue.bound()) call(pair.receive);
  if (pair.transmit.queue.bound()) call(pair.transmit);
  drain_completions(pair);
  pair.transmit_pending = !pair.port->wake_transmit();
}

bool record_is_valid(const RedoRecord& record) {
  const std::uint64_t word = record.arm.load(std::memory_order_acquire);
  return word != 0 && record.version == kRedoVersion &&
         (record.kind == RedoKind::kTransmit || record.kind == RedoKind::kReceive ||
          (record.kind == RedoKind::kForward && record.frame_count == 0 &&
           record.destination.used_count <= kBurstFrames && record.destination.queue_pair < kMaxQueuePairs &&
           record.destination.queue_pair != record.queue_pair)) &&
         record.frame_count <= kBurstFrames && record.used_count <= kBurstUsed && record.queue_pair < kMaxQueuePairs &&
         record.epoch == static_cast<std::uint32_t>(word >> 32) &&
         redo_checksum(record) == static_cast<std::uint32_t>(word);
}

namespace {

// Both halves of a forward, each if it fits; where one does not, that queue is stopped and the other suffers nothing.
bool replay_forward(QueuePair& from, QueuePair* to) {
  const RedoRecord& record = from.shard->record;
  const auto half = [](const auto& part, const BoundQueue& bound, VringCursors& vring, const auto& apply) {
    const bool fits = bound.queue.bound() && bound.queue.visit([&](const auto& queue) {
      if (!cursors_fit(part, vring, queue)) return false;
      apply(queue);
      return true;
    });
    if (!fits) vring.fault.store(QueueFault::kRecordInvalid, std::memory_order_release);
    return fits;
  };
  take_in_hand(from, PacketPhase::kApply, record.epoch);
  const bool delivered =
      to == nullptr || half(record.destination, to->receive, to->state->receive,
                            [&](const auto& queue) { apply_delivery(record.destination, *to, queue); });
  return half(record, from.transmit, from.state->transmit, [&](const auto& queue) { apply_departure(from, queue); }) &&
         delivered;
}

}  // namespace

ReplayResult replay(QueuePair& pair, QueuePair* destination) {
  const RedoRecord& record = pair.shard->record;
  if (record.kind == RedoKind::kForward) {
    const bool whole = replay_forward(pair, destination);
    disarm(pair);
    let_go(pair);
    return whole ? ReplayResult::kReplayed : ReplayResult::kInvalid;
  }
  const bool transmit = record.kind == RedoKind::kTransmit;
  VringCursors& vring = transmit ? pair.state->transmit : pair.state->receive;
  const BoundQueue& bound = transmit ? pair.transmit : pair.receive;
  const bool fits = bound.queue.bound() && bound.queue.visit([&](const auto& queue) {
    if (!record_fits(pair, record, vring, queue)) return false;
    take_in_hand(pair, PacketPhase::kApply, record.epoch);
    if (transmit)
      apply_transmit(pair, queue);
    else
      apply_receive(pair, queue);
    return true;
  });
  if (!fits) vring.fault.store(QueueFault::kRecordInvalid, std::memory_order_release);
  disarm(pair);
  let_go(pair);
  return fits ? ReplayResult::kReplayed : ReplayResult::kInvalid;
}

bool has_work(const QueuePair& pair) {
  if (pair.can_transmit() && !pair.transmit_pending && pair.transmit.queue.offers(pair.state->transmit.next_avail))
    return true;
  if (!pair.can_receive() || pair.port->rx.producer() == pair.port->rx.consumer()) return false;
  return !pair.receive_starved || pair.receive.queue.offers(pair.starved_avail);
}

}  // namespace tandem
