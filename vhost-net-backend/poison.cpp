// SPDX-License-Identifier: Apache-2.0
// Weighing a death, giving up a record, and dropping exactly the packet that kills.
#include "vhost-net-backend/poison.hpp"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>

#include "common/layout/control_message.hpp"

namespace tandem {

namespace {

// Descriptors of a poison chain that are followed; a longer one is cut off.
constexpr std::uint32_t kCaptureDescriptors = 256;

// Copies bytes of our own address space through the kernel, which returns an error where a load would fault.
std::size_t copy_safely(std::byte* to, const std::byte* from, std::size_t size) {
  iovec local{to, size};
  iovec remote{const_cast<std::byte*>(from), size};
  const ssize_t copied = ::process_vm_readv(::getpid(), &local, 1, &remote, 1, 0);
  return copied < 0 ? 0 : static_cast<std::size_t>(copied);
}

// What a transmit chain holds, read without the code that may have died on it: no checks but bounds, and no load from
// memory that might not be there.
class ChainCapture {
 public:
  ChainCapture(const QueuePair& pair, PoisonPacket& packet) : pair_(pair), packet_(packet), skip_(pair.header_size) {}

  void run(const SplitQueue& queue, std::uint16_t position) {
    std::uint32_t index = queue.avail_head(position);
    for (std::uint32_t n = 0; n < kCaptureDescriptors && index < queue.size(); ++n) {
      const vring_desc descriptor = queue.descriptor(static_cast<std::uint16_t>(index));
      if ((descriptor.flags & VRING_DESC_F_INDIRECT) != 0)
        table(descriptor);
      else
        piece(descriptor.addr, descriptor.len);
      if ((descriptor.flags & VRING_DESC_F_NEXT) == 0) return;
      index = descriptor.next;
    }
  }
  void run(const PackedQueue& queue, std::uint16_t position) {
    for (std::uint32_t n = 0; n < kCaptureDescriptors && queue.offers(position); ++n) {
      const vring_packed_desc descriptor = queue.descriptor(PackedQueue::index(position));
      if ((descriptor.flags & VRING_DESC_F_INDIRECT) != 0)
        table(descriptor);
      else
        piece(descriptor.addr, descriptor.len);
      if ((descriptor.flags & VRING_DESC_F_NEXT) == 0) return;
      position = queue.next(position, 1);
    }
  }

 private:
  // Entry `index` of an indirect table; false if it is not there.
  template <class Descriptor>
  bool read(const Descriptor& whole, std::uint32_t index, Descriptor& descriptor) const {
    if (index >= whole.len / sizeof descriptor) return false;
    const auto from = pair_.memory->view_some(whole.addr + index * sizeof descriptor, sizeof descriptor);
    return from.size() == sizeof descriptor &&
           copy_safely(reinterpret_cast<std::byte*>(&descriptor), from.data(), from.size()) == from.size();
  }

  void table(const vring_desc& whole) {
    vring_desc descriptor{};
    for (std::uint32_t n = 0, index = 0; n < kCaptureDescriptors && read(whole, index, descriptor); ++n) {
      if ((descriptor.flags & VRING_DESC_F_INDIRECT) == 0) piece(descriptor.addr, descriptor.len);
      if ((descriptor.flags & VRING_DESC_F_NEXT) == 0) return;
      index = descriptor.next;
    }
  }
  // Packed: entries follow each other.
  void table(const vring_packed_desc& whole) {
    vring_packed_desc descriptor{};
    for (std::uint32_t index = 0; index < kCaptureDescriptors && read(whole, index, descriptor); ++index)
      if ((descriptor.flags & VRING_DESC_F_INDIRECT) == 0) piece(descriptor.addr, descriptor.len);
  }

  void piece(std::uint64_t address, std::uint64_t left) {
    const std::uint64_t skipped = std::min<std::uint64_t>(skip_, left);
    skip_ -= static_cast<std::uint32_t>(skipped);
    address += skipped;
    left -= skipped;
    packet_.length = static_cast<std::uint32_t>(std::min<std::uint64_t>(packet_.length + left, ~std::uint32_t{0}));
    while (left > 0 && packet_.bytes.size() < kMaxPoisonBytes) {
      const auto from =
          pair_.memory->view_some(address, std::min<std::uint64_t>(left, kMaxPoisonBytes - packet_.bytes.size()));
      if (from.empty()) return;
      const std::size_t before = packet_.bytes.size();
      packet_.bytes.resize(before + from.size());
      const std::size_t copied = copy_safely(packet_.bytes.data() + before, from.data(), from.size());
      packet_.bytes.resize(before + copied);
      if (copied < from.size()) return;
      address += copied;
      left -= copied;
    }
  }

  const QueuePair& pair_;
  PoisonPacket& packet_;
  std::uint32_t skip_;
};

void capture_received(const QueuePair& pair, std::uint32_t position, PoisonPacket& packet) {
  const XskPort& port = *pair.port;
  const xdp_desc descriptor = port.rx.at(position);
  packet.length = descriptor.len;
  const std::byte* bytes = port.frame(descriptor.addr, descriptor.len);
  if (bytes == nullptr) return;
  packet.bytes.resize(std::min(descriptor.len, kMaxPoisonBytes));
  packet.bytes.resize(copy_safely(packet.bytes.data(), bytes, packet.bytes.size()));
}

// One direction of a queue pair, as its suspect is met.
struct Direction {
  PacketPhase phase;
  Suspicion& suspicion;
  Suspected& suspected;
};

// Entries between the queue's cursor and the suspect; nothing if it has passed, or never was in this queue.
std::optional<std::uint32_t> entries_ahead(const QueuePair& pair, PacketPhase phase, std::uint32_t position) {
  if (phase == PacketPhase::kReceive) {
    const std::uint32_t ahead = position - pair.port->rx.consumer();
    return ahead < pair.port->rx.size() ? std::optional(ahead) : std::nullopt;
  }
  if (!pair.transmit.queue.bound()) return std::nullopt;
  const auto avail = static_cast<std::uint16_t>(position);
  return pair.transmit.queue.visit([&](const auto& queue) -> std::optional<std::uint32_t> {
    const std::uint16_t next = pair.state->transmit.next_avail;
    if (transmit_position(pair, avail) != position || !queue.is_position(avail) || !queue.is_position(next))
      return std::nullopt;
    const std::uint32_t ahead = queue.distance(next, avail);
    return ahead < queue.size() ? std::optional(ahead) : std::nullopt;
  });
}

bool is_waiting(const QueuePair& pair, PacketPhase phase) {
  return phase == PacketPhase::kReceive
             ? pair.can_receive() && pair.port->rx.producer() != pair.port->rx.consumer()
             : pair.can_transmit() && pair.transmit.queue.offers(pair.state->transmit.next_avail);
}

void capture(const QueuePair& pair, const Direction& direction, const Suspect& suspect) {
  auto packet = std::make_shared<PoisonPacket>();
  packet->queue_pair = pair.index;
  packet->direction = direction.phase;
  packet->deaths = suspect.deaths;
  // Whoever died while it only captured does not show in the normal count: then nobody tries again.
  if (suspect.deaths == kPoisonDeaths) {
    take_in_hand(pair, direction.phase, suspect.position);
    if (direction.phase == PacketPhase::kReceive)
      capture_received(pair, suspect.position, *packet);
    else
      pair.transmit.queue.visit([&](const auto& queue) {
        ChainCapture(pair, *packet).run(queue, static_cast<std::uint16_t>(suspect.position));
      });
    let_go(pair);
  }
  direction.suspected.packet = std::move(packet);
}

void meet(QueuePair& pair, const Direction& direction, std::vector<PoisonPacket>& dropped) {
  const std::uint64_t word = direction.suspicion.suspect.load(std::memory_order_relaxed);
  if (word == 0) {
    // Applying the drop cleared it.
    if (direction.suspected.packet) dropped.push_back(std::move(*direction.suspected.packet));
    direction.suspected = {};
    return;
  }
  const Suspect suspect = Suspect::from(word);
  const auto ahead = entries_ahead(pair, direction.phase, suspect.position);
  if (!ahead) {
    direction.suspicion.suspect.store(0, std::memory_order_relaxed);
    direction.suspected = {};
    return;
  }
  if (suspect.deaths < kPoisonDeaths) return;
  direction.suspected.condemned = suspect.position;
  if (*ahead == 0 && !direction.suspected.packet && is_waiting(pair, direction.phase))
    capture(pair, direction, suspect);
}

bool has_suspects(const QueuePair& pair) {
  return pair.state->receive_suspicion.suspect.load(std::memory_order_relaxed) != 0 ||
         pair.state->transmit_suspicion.suspect.load(std::memory_order_relaxed) != 0;
}

// The word that counts deaths on what `cursor` names; nullptr if it names nothing that can be in hand.
std::atomic<std::uint64_t>* find_suspect(Segment& segment, std::uint32_t shard, const PacketCursor& cursor) {
  if (segment.shard_count == 0 || cursor.queue_pair % segment.shard_count != shard) return nullptr;
  QueuePairState& pair = segment.queue_pairs[cursor.queue_pair];
  const RedoRecord& record = segment.shards[shard].record;
  switch (cursor.phase) {
    case PacketPhase::kNone:
      return nullptr;
    // Whether these are still to come is seen once their rings are bound: entries_ahead().
    case PacketPhase::kTransmit:
      return &pair.transmit_suspicion.suspect;
    case PacketPhase::kReceive:
      return &pair.receive_suspicion.suspect;
    case PacketPhase::kApply:
      return record.arm.load(std::memory_order_acquire) != 0 && record.queue_pair == cursor.queue_pair &&
                     record.epoch == cursor.position
                 ? &pair.record_suspect
                 : nullptr;
  }
  return nullptr;
}

}  // namespace

bool own_fault(const tandem_fence_slot& slot, HangVerdict verdict) {
  if (verdict == HangVerdict::kSpinning) return true;
  if (slot.cause != TANDEM_FENCE_SIGNAL || slot.own_doing == 0) return false;
  switch (slot.signal) {
    case SIGSEGV:
    case SIGBUS:
    case SIGILL:
    case SIGFPE:
    case SIGTRAP:
    case SIGABRT:
      return true;
    default:
      return false;
  }
}

std::uint32_t weigh_death(Segment& segment, std::uint32_t shard, const FenceView& fence, const Death& death) {
  const auto cursor = PacketCursor::from(segment.shards[shard].in_hand.load(std::memory_order_relaxed));
  std::atomic<std::uint64_t>* word = find_suspect(segment, shard, cursor);
  if (word == nullptr) return 0;
  // The cursor may be that of an earlier owner, whose heir died before it touched anything: tags only grow.
  std::uint32_t writer = (death.owner & ~kShortTagMask) | cursor.tag;
  if (writer > death.owner) writer -= kShortTagMask + 1;
  if (!own_fault(fence.slot(writer), writer == death.owner ? death.verdict : HangVerdict::kNone)) return 0;
  Suspect suspect = Suspect::from(word->load(std::memory_order_relaxed));
  if (suspect.deaths != 0 && suspect.tag == cursor.tag) return 0;  // counted by an heir that died since
  const bool again = suspect.deaths != 0 && suspect.position == cursor.position;
  suspect = {cursor.tag, again ? std::min(suspect.deaths + 1, 0xffu) : 1, cursor.position};
  word->store(suspect.word(), std::memory_order_relaxed);
  std::atomic<std::uint64_t>& kills = segment.queue_pairs[cursor.queue_pair].kills;
  kills.store(kills.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  return static_cast<std::uint32_t>(cursor.phase) | suspect.deaths << 8 | cursor.queue_pair << 16;
}

bool record_is_poison(const Segment& segment, const RedoRecord& record) {
  const auto suspect =
      Suspect::from(segment.queue_pairs[record.queue_pair].record_suspect.load(std::memory_order_relaxed));
  return suspect.deaths >= kPoisonDeaths && suspect.position == record.epoch;
}

void abandon_record(QueuePair& pair, QueuePair* destination) {
  RedoRecord& record = pair.shard->record;
  XskPort& port = *pair.port;
  const bool transmit = record.kind == RedoKind::kTransmit, receive = record.kind == RedoKind::kReceive;
  (!receive ? pair.state->transmit : pair.state->receive)
      .fault.store(QueueFault::kRecordInvalid, std::memory_order_release);
  if (destination != nullptr)
    destination->state->receive.fault.store(QueueFault::kRecordInvalid, std::memory_order_release);
  if (transmit && port.tx.producer() == record.producer_before) {
    // Nothing was posted: the frames are free.
    for (std::uint32_t i = 0; i < record.frame_count; ++i)
      if (const std::uint64_t frame = port.transmit_frame(record.frames[i].address); frame < kTransmitFrames)
        pair.state->transmit_busy[frame / 64] &= ~(std::uint64_t{1} << (frame % 64));
  }
  // Frames that the kernel has back may not be received once more.
  if (receive && port.fill.producer() == record.producer_after && port.rx.consumer() == record.consumer_before)
    port.rx.consume(record.consumer_after);
  pair.state->record_suspect.store(0, std::memory_order_relaxed);
  record.arm.store(0, std::memory_order_release);
}

void load_suspects(QueuePair& pair) {
  pair.receive_suspect = pair.transmit_suspect = {};
  pair.has_suspects = has_suspects(pair);
}

void meet_suspects(QueuePair& pair, std::vector<PoisonPacket>& dropped) {
  meet(pair, {PacketPhase::kReceive, pair.state->receive_suspicion, pair.receive_suspect}, dropped);
  meet(pair, {PacketPhase::kTransmit, pair.state->transmit_suspicion, pair.transmit_suspect}, dropped);
  pair.has_suspects = has_suspects(pair);
}

}  // namespace tandem
