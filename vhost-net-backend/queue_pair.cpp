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
#include <cstring>

#include "common/crc32c.hpp"
#include "vhost-net-backend/descriptor_chain.hpp"
#include "vhost-net-backend/poison.hpp"
#include "vhost-net-backend/probe.hpp"

namespace tandem {

namespace {

// struct virtio_net_hdr_mrg_rxbuf (Virtio 1.2, 5.1.6; linux/virtio_net.h is C only): num_buffers is its last field.
constexpr std::uint32_t kLongHeader = 12;
constexpr std::uint32_t kBuffersAt = 10;
constexpr std::uint32_t kShortestFrame = 14;  // an Ethernet header; less is no packet

std::uint32_t record_crc(const RedoRecord& record) {
  const auto* from = reinterpret_cast<const std::byte*>(&record.version);
  std::uint32_t crc = crc32c_extend(~0u, from, offsetof(RedoRecord, frames) - offsetof(RedoRecord, version));
  crc = crc32c_extend(crc, record.frames, record.frame_count * sizeof(RedoFrame));
  return crc32c_extend(crc, record.used, record.used_count * sizeof(RedoUsed));
}

// The part of the record that is the same for both directions.
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
  record.arm.store(std::uint64_t{record.epoch} << 32 | record_crc(record), std::memory_order_release);
  TANDEM_PROBE(kArmed);
}

void disarm(QueuePair& pair) {
  // Release: an heir that sees 0 sees everything that Apply did.
  pair.shard->record.arm.store(0, std::memory_order_release);
  TANDEM_PROBE(kDisarmed);
}

void apply_cursors(const RedoRecord& record, VringCursors& vring) {
  vring.next_avail = record.avail_after;
  vring.next_used = record.used_after;
  vring.packets = record.packets_after;
  vring.bytes = record.bytes_after;
  vring.dropped = record.dropped_after;
  TANDEM_PROBE(kCursorsAdvanced);
}

// The drop of a poison packet: its suspicion ends with it, also when an heir does it over.
void apply_drop(const RedoRecord& record, Suspicion& suspicion) {
  if (record.poisoned == 0) return;
  suspicion.poisoned = suspicion.poisoned_after;
  suspicion.suspect.store(0, std::memory_order_relaxed);
}

void write_used_elements(const RedoRecord& record, const SplitQueue& queue) {
  for (std::uint32_t i = 0; i < record.used_count; ++i)
    queue.write_used(static_cast<std::uint16_t>(record.used_before + i), record.used[i].id, record.used[i].length);
}

void apply_transmit(QueuePair& pair) {
  const RedoRecord& record = pair.shard->record;
  XskPort& port = *pair.port;
  for (std::uint32_t i = 0; i < record.frame_count; ++i) {
    const std::uint64_t frame = port.transmit_frame(record.frames[i].address);
    pair.state->transmit_busy[frame / 64] |= std::uint64_t{1} << (frame % 64);
  }
  TANDEM_PROBE(kFramesMarked);
  for (std::uint32_t i = 0; i < record.frame_count; ++i)
    port.tx.at(record.producer_before + i) = {record.frames[i].address, record.frames[i].length, 0};
  TANDEM_PROBE(kDestinationWritten);
  port.tx.publish(record.producer_after);
  TANDEM_PROBE(kDestinationPublished);
  {
    const WindowOpen window;
    write_used_elements(record, pair.transmit.queue);
    TANDEM_PROBE(kSourceWritten);
    pair.transmit.queue.publish_used(record.used_after);
  }
  TANDEM_PROBE(kSourcePublished);
  apply_cursors(record, pair.state->transmit);
  apply_drop(record, pair.state->transmit_suspicion);
}

void apply_receive(QueuePair& pair) {
  const RedoRecord& record = pair.shard->record;
  XskPort& port = *pair.port;
  {
    const WindowOpen window;
    write_used_elements(record, pair.receive.queue);
    TANDEM_PROBE(kDestinationWritten);
    pair.receive.queue.publish_used(record.used_after);
  }
  TANDEM_PROBE(kDestinationPublished);
  for (std::uint32_t i = 0; i < record.frame_count; ++i)
    port.fill.at(record.producer_before + i) = record.frames[i].address;
  TANDEM_PROBE(kSourceWritten);
  port.fill.publish(record.producer_after);
  port.rx.consume(record.consumer_after);
  TANDEM_PROBE(kSourcePublished);
  apply_cursors(record, pair.state->receive);
  apply_drop(record, pair.state->receive_suspicion);
}

void call(const BoundQueue& bound) {
  if (bound.call_fd < 0) return;
  const std::uint64_t one = 1;
  // Non-blocking; EAGAIN means that the counter is full, so the guest has an interrupt pending anyway.
  [[maybe_unused]] const ssize_t written = ::write(bound.call_fd, &one, sizeof one);
}

void call_if_wanted(const BoundQueue& bound, std::uint16_t before, std::uint16_t after) {
  if (before != after && bound.queue.wants_call(before, after)) call(bound);
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

// Entries that the guest has made available; stops the queue if it claims more than the ring holds, or its memory has
// gone.
std::uint32_t available(const GuestMemory& memory, const SplitQueue& queue, VringCursors& vring) {
  const std::uint16_t ahead = static_cast<std::uint16_t>(queue.avail_index() - vring.next_avail);
  if (memory.faulted()) {  // looked at after the load: the index may be one of the zeroes that stand in for lost pages
    vring.fault.store(QueueFault::kMemoryFault, std::memory_order_release);
    return 0;
  }
  if (ahead <= queue.size()) return ahead;
  vring.fault.store(QueueFault::kAvailJump, std::memory_order_release);
  return 0;
}

// Hands out transmit frames that are neither busy nor given out in this burst. It passes over each word of the bitmap
// once, so that a frame staged but not yet marked is never met again.
class FramePicker {
 public:
  explicit FramePicker(const QueuePair& pair)
      : busy_(pair.state->transmit_busy), words_(pair.port->description().tx_frames / 64) {
    word_ = pair.frame_hint % words_;
    left_ = words_;
  }
  /// A free frame, or kTransmitFrames if there is none. The frame counts as given out only after take().
  std::uint32_t peek() {
    while (left_ > 0) {
      const std::uint64_t free = ~(busy_[word_] | taken_);
      if (free != 0) return word_ * 64 + static_cast<std::uint32_t>(std::countr_zero(free));
      word_ = word_ + 1 == words_ ? 0 : word_ + 1;
      taken_ = 0;
      --left_;
    }
    return kTransmitFrames;
  }
  void take(std::uint32_t frame) { taken_ |= std::uint64_t{1} << (frame % 64); }
  [[nodiscard]] std::uint32_t hint() const { return word_; }

 private:
  const std::uint64_t* busy_;
  std::uint32_t words_;
  std::uint32_t word_ = 0;
  std::uint32_t left_ = 0;
  std::uint64_t taken_ = 0;
};

// Copies a transmit chain's payload (all but the virtio header) to `frame`. Returns its length, 0 with `fault` set if
// refused.
std::uint32_t gather(QueuePair& pair, std::uint16_t head, std::byte* frame, ChainFault& fault) {
  ChainWalker chain(*pair.memory, pair.transmit.queue, head, /*writable=*/false);
  const std::uint32_t room = pair.port->description().max_packet;
  std::uint32_t skip = pair.header_size;  // the header may span several descriptors
  std::uint32_t filled = 0;
  std::uint64_t address = 0;
  std::uint32_t length = 0;
  fault = ChainFault::kNone;
  while (chain.next(address, length)) {
    const std::uint32_t skipped = std::min(skip, length);
    // Even skipped bytes must lie in memory: a chain is good or bad as a whole.
    std::uint64_t at = address;
    std::uint64_t left = length;
    skip -= skipped;
    std::uint32_t ignore = skipped;
    while (left > 0) {
      const std::span<const std::byte> piece = pair.memory->view_some(at, left);
      if (piece.empty()) {
        fault = ChainFault::kAddress;
        return 0;
      }
      const std::size_t jump = std::min<std::size_t>(ignore, piece.size());
      ignore -= static_cast<std::uint32_t>(jump);
      const std::size_t copy = piece.size() - jump;
      if (copy > room - filled) {
        fault = ChainFault::kTooLong;
        return 0;
      }
      std::memcpy(frame + filled, piece.data() + jump, copy);
      filled += static_cast<std::uint32_t>(copy);
      at += piece.size();
      left -= piece.size();
    }
  }
  fault = chain.fault();
  if (fault == ChainFault::kNone && (skip != 0 || filled < kShortestFrame)) fault = ChainFault::kTooShort;
  return fault == ChainFault::kNone ? filled : 0;
}

// Writes header and packet into one receive chain's buffers, as far as they go. Returns bytes written (header
// included).
class Scatter {
 public:
  Scatter(QueuePair& pair, std::uint16_t head) : pair_(pair), chain_(*pair.memory, pair.receive.queue, head, true) {}

  // Appends `size` bytes; returns how many found room.
  std::size_t write(const std::byte* data, std::size_t size) {
    std::size_t done = 0;
    while (done < size) {
      if (span_.size() == used_ && !advance()) break;
      const std::size_t copy = std::min(size - done, span_.size() - used_);
      if (data != nullptr) std::memcpy(span_.data() + used_, data + done, copy);
      used_ += copy;
      done += copy;
    }
    return done;
  }
  [[nodiscard]] ChainFault fault() const { return fault_ != ChainFault::kNone ? fault_ : chain_.fault(); }
  // Where the next byte would go; for the header of which one field is patched later.
  [[nodiscard]] std::byte* position() {
    if (span_.size() == used_ && !advance()) return nullptr;
    return span_.data() + used_;
  }

 private:
  bool advance() {
    if (left_ == 0) {
      std::uint32_t length = 0;
      if (!chain_.next(address_, length)) return false;
      left_ = length;
    }
    span_ = pair_.memory->authorize_some(address_, left_);
    used_ = 0;
    if (span_.size() == 0) {
      fault_ = ChainFault::kAddress;
      return false;
    }
    address_ += span_.size();
    left_ -= span_.size();
    return true;
  }

  QueuePair& pair_;
  ChainWalker chain_;
  WritableSpan span_;
  std::size_t used_ = 0;
  std::uint64_t address_ = 0;
  std::uint64_t left_ = 0;
  ChainFault fault_ = ChainFault::kNone;
};

struct Placed {
  enum { kDone, kNoBuffers, kNoRecordRoom, kBadChain, kTooLarge } result;
  std::uint32_t heads;  ///< avail entries used up, whatever the result
};

// Places one packet into receive buffers from avail entry record.avail_before + `offset`; adds used elements to the
// record.
Placed place(QueuePair& pair, const std::byte* packet, std::uint32_t length, std::uint32_t offset,
             std::uint32_t ready) {
  RedoRecord& record = pair.shard->record;
  const SplitQueue& queue = pair.receive.queue;
  const std::uint16_t first_used = record.used_count;
  std::byte* buffers_field[sizeof(std::uint16_t)] = {};
  std::uint32_t heads = 0;
  std::uint32_t done = 0;
  do {
    if (heads > 0 && !pair.mergeable) {
      record.used_count = first_used;
      record.used[record.used_count++].length = 0;  // the chain goes back empty, the packet is dropped
      return {Placed::kTooLarge, 1};
    }
    if (offset + heads >= ready) {
      record.used_count = first_used;
      return {Placed::kNoBuffers, 0};
    }
    if (record.used_count == kBurstUsed) {
      record.used_count = first_used;
      return {first_used == 0 ? Placed::kTooLarge : Placed::kNoRecordRoom, 0};
    }
    const std::uint16_t head = queue.avail_head(static_cast<std::uint16_t>(record.avail_before + offset + heads));
    Scatter scatter(pair, head);
    std::uint32_t written = 0;
    if (heads == 0) {
      // All fields zero: no offloads. num_buffers, the last two bytes of 12, is known only at the end.
      static constexpr std::byte kHeader[kLongHeader] = {};
      written = static_cast<std::uint32_t>(scatter.write(kHeader, std::min(pair.header_size, kBuffersAt)));
      for (std::uint32_t i = kBuffersAt; i < pair.header_size && written == i; ++i) {
        buffers_field[i - kBuffersAt] = scatter.position();
        written += static_cast<std::uint32_t>(scatter.write(kHeader, 1));
      }
      if (written < pair.header_size) {
        record.used[record.used_count++] = {head, 0};
        return {Placed::kBadChain, 1};
      }
    }
    const auto copied = static_cast<std::uint32_t>(scatter.write(packet + done, length - done));
    done += copied;
    written += copied;
    if (scatter.fault() != ChainFault::kNone || (written == 0 && done < length)) {
      // The whole packet is given up; the heads before this one are given back to be used again, this one goes back
      // empty.
      record.used_count = first_used;
      if (heads > 0) {
        // Return all of them empty: their content was partly written and their order in the ring must be kept.
        for (std::uint32_t i = 0; i < heads; ++i) record.used[record.used_count++].length = 0;
      }
      record.used[record.used_count++] = {head, 0};
      return {Placed::kBadChain, heads + 1};
    }
    record.used[record.used_count++] = {head, written};
    ++heads;
  } while (done < length);
  if (pair.header_size == kLongHeader) {
    // num_buffers, little endian with VERSION_1; guest-endian before, which is little endian on every host Tandem runs
    // on.
    *buffers_field[0] = static_cast<std::byte>(heads & 0xffu);
    *buffers_field[1] = static_cast<std::byte>(heads >> 8);
  }
  return {Placed::kDone, heads};
}

}  // namespace

void drain_completions(QueuePair& pair) {
  XskPort& port = *pair.port;
  const std::uint32_t consumer = port.completion.consumer();
  const std::uint32_t producer = port.completion.producer();
  // A full ring is the most there can be; more means that the index was damaged.
  const std::uint32_t count = std::min(producer - consumer, port.completion.size());
  if (count == 0) return;
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::uint64_t frame = port.transmit_frame(port.completion.at(consumer + i));
    if (frame < kTransmitFrames) pair.state->transmit_busy[frame / 64] &= ~(std::uint64_t{1} << (frame % 64));
  }
  TANDEM_PROBE(kCompletionCleared);
  // Busy bits first: if we die here, the same completions are read again, and clearing twice is clearing once.
  port.completion.consume(consumer + count);
}

std::uint32_t transmit_burst(QueuePair& pair) {
  VringCursors& vring = pair.state->transmit;
  const SplitQueue& queue = pair.transmit.queue;
  XskPort& port = *pair.port;
  const std::uint32_t ready = std::min(available(*pair.memory, queue, vring), kBurstPackets);
  if (ready == 0) return 0;
  drain_completions(pair);
  const std::uint32_t producer = port.tx.producer();
  const std::uint32_t room = port.tx.size() - std::min(producer - port.tx.consumer(), port.tx.size());
  RedoRecord& record = pair.shard->record;
  begin_record(pair, RedoKind::kTransmit, vring);
  record.producer_before = producer;
  FramePicker frames(pair);
  const Suspected& suspect = pair.transmit_suspect;
  bool drop = false;
  std::uint32_t entries = 0;
  for (; entries < ready && !drop && record.frame_count < room; ++entries) {
    const std::uint32_t frame = frames.peek();
    if (frame == kTransmitFrames) break;
    const auto avail = static_cast<std::uint16_t>(vring.next_avail + entries);
    const std::uint32_t position = transmit_position(pair, avail);
    take_in_hand(pair, PacketPhase::kTransmit, position);
    if (suspect.is_condemned(position)) [[unlikely]] {
      drop = entries == 0 && suspect.packet;
      if (!drop) break;
    }
    const std::uint16_t head = queue.avail_head(avail);
    const std::uint64_t address = port.transmit_address(frame);
    ChainFault fault = ChainFault::kPoison;
    const std::uint32_t length =
        drop ? 0 : gather(pair, head, port.frame(address, port.description().frame_size), fault);
    TANDEM_PROBE_PACKET(port.frame(address, length), length);
    record.used[record.used_count++] = {head, 0};
    if (fault != ChainFault::kNone) {
      ++record.dropped_after;
      continue;
    }
    frames.take(frame);
    record.frames[record.frame_count++] = {address, length, 0};
    ++record.packets_after;
    record.bytes_after += length;
  }
  if (entries < ready) pair.transmit_pending = true;  // no frame or no room: the kernel has to finish some first
  if (entries == 0) {
    let_go(pair);
    return 0;
  }
  if (pair.memory->faulted()) {
    let_go(pair);
    vring.fault.store(QueueFault::kMemoryFault, std::memory_order_release);
    return 0;
  }
  record.producer_after = producer + record.frame_count;
  record.avail_after = static_cast<std::uint16_t>(record.avail_before + entries);
  record.used_after = static_cast<std::uint16_t>(record.used_before + record.used_count);
  pair.frame_hint = frames.hint();
  if (drop) stage_drop(record, pair.state->transmit_suspicion);
  take_in_hand(pair, PacketPhase::kApply, record.epoch);
  arm(pair);
  apply_transmit(pair);
  disarm(pair);
  let_go(pair);
  count_transaction(*pair.shard);
  call_if_wanted(pair.transmit, record.used_before, record.used_after);
  pair.transmit_pending = !port.wake_transmit() || entries < ready;
  TANDEM_PROBE(kNotified);
  return entries;
}

std::uint32_t receive_burst(QueuePair& pair) {
  VringCursors& vring = pair.state->receive;
  XskPort& port = *pair.port;
  const std::uint32_t consumer = port.rx.consumer();
  const std::uint32_t waiting = std::min({port.rx.producer() - consumer, port.rx.size(), kBurstPackets});
  if (waiting == 0) return 0;
  const std::uint32_t ready = available(*pair.memory, pair.receive.queue, vring);
  if (vring.fault.load(std::memory_order_relaxed) != QueueFault::kNone) return 0;
  std::uint32_t starved = 0;
  RedoRecord& record = pair.shard->record;
  begin_record(pair, RedoKind::kReceive, vring);
  const Suspected& suspect = pair.receive_suspect;
  bool drop = false;
  std::uint32_t taken = 0;
  std::uint32_t heads = 0;
  {
    const WindowOpen window;
    for (; taken < waiting && !drop; ++taken) {
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
          record.frames[record.frame_count++] = {port.frame_start(descriptor.addr), 0, 0};
        continue;
      }
      TANDEM_PROBE_PACKET(packet, descriptor.len);
      const Placed placed = place(pair, packet, descriptor.len, heads, ready);
      if (placed.result == Placed::kNoRecordRoom) break;
      if (placed.result == Placed::kNoBuffers) {
        pair.starved_avail = static_cast<std::uint16_t>(vring.next_avail + ready);
        starved = kStarvedMark | pair.starved_avail;
        break;
      }
      heads += placed.heads;
      if (placed.result == Placed::kDone) {
        ++record.packets_after;
        record.bytes_after += descriptor.len;
      } else {
        ++record.dropped_after;
      }
      record.frames[record.frame_count++] = {port.frame_start(descriptor.addr), 0, 0};
    }
  }
  // In one store: an heir that looks while a round goes on must not take a starved queue for one that is passed by.
  pair.receive_starved = starved != 0;
  vring.starved = starved;
  if (taken == 0) {
    let_go(pair);
    return 0;
  }
  if (pair.memory->faulted()) {
    let_go(pair);
    vring.fault.store(QueueFault::kMemoryFault, std::memory_order_release);
    return 0;
  }
  record.consumer_before = consumer;
  record.consumer_after = consumer + taken;
  record.producer_before = port.fill.producer();
  record.producer_after = record.producer_before + record.frame_count;
  record.avail_after = static_cast<std::uint16_t>(record.avail_before + heads);
  record.used_after = static_cast<std::uint16_t>(record.used_before + record.used_count);
  if (drop) stage_drop(record, pair.state->receive_suspicion);
  take_in_hand(pair, PacketPhase::kApply, record.epoch);
  arm(pair);
  apply_receive(pair);
  disarm(pair);
  let_go(pair);
  count_transaction(*pair.shard);
  call_if_wanted(pair.receive, record.used_before, record.used_after);
  TANDEM_PROBE(kNotified);
  return taken;
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
         (record.kind == RedoKind::kTransmit || record.kind == RedoKind::kReceive) &&
         record.frame_count <= kBurstPackets && record.used_count <= kBurstUsed && record.queue_pair < kMaxQueuePairs &&
         record.epoch == static_cast<std::uint32_t>(word >> 32) &&
         record_crc(record) == static_cast<std::uint32_t>(word);
}

ReplayResult replay(QueuePair& pair) {
  RedoRecord& record = pair.shard->record;
  const bool transmit = record.kind == RedoKind::kTransmit;
  VringCursors& vring = transmit ? pair.state->transmit : pair.state->receive;
  const BoundQueue& bound = transmit ? pair.transmit : pair.receive;
  const auto either = [](std::uint32_t found, std::uint32_t before, std::uint32_t after) {
    return found == before || found == after;
  };
  bool sane = bound.queue.bound() && either(vring.next_avail, record.avail_before, record.avail_after) &&
              either(vring.next_used, record.used_before, record.used_after) &&
              static_cast<std::uint16_t>(record.used_after - record.used_before) == record.used_count;
  const auto& destination_producer = transmit ? pair.port->tx.producer() : pair.port->fill.producer();
  sane = sane && either(destination_producer, record.producer_before, record.producer_after) &&
         record.producer_after - record.producer_before == record.frame_count;
  if (!transmit) sane = sane && either(pair.port->rx.consumer(), record.consumer_before, record.consumer_after);
  for (std::uint32_t i = 0; sane && i < record.frame_count; ++i) {
    const RedoFrame& frame = record.frames[i];
    sane = transmit ? pair.port->transmit_frame(frame.address) < kTransmitFrames &&
                          pair.port->frame(frame.address, frame.length) != nullptr
                    : pair.port->is_receive_frame(frame.address);
  }
  if (!sane) {
    vring.fault.store(QueueFault::kRecordInvalid, std::memory_order_release);
    disarm(pair);
    return ReplayResult::kInvalid;
  }
  take_in_hand(pair, PacketPhase::kApply, record.epoch);
  if (transmit)
    apply_transmit(pair);
  else
    apply_receive(pair);
  disarm(pair);
  let_go(pair);
  return ReplayResult::kReplayed;
}

bool has_work(const QueuePair& pair) {
  if (pair.can_transmit() && !pair.transmit_pending &&
      pair.transmit.queue.avail_index() != pair.state->transmit.next_avail)
    return true;
  if (!pair.can_receive() || pair.port->rx.producer() == pair.port->rx.consumer()) return false;
  return !pair.receive_starved || pair.receive.queue.avail_index() != pair.starved_avail;
}

}  // namespace tandem
