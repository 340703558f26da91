// SPDX-License-Identifier: Apache-2.0
// Rings and buffers of a guest at full speed.
#include "tests/support/load_guest.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cstring>

#include "common/crc32c.hpp"

namespace tandem::test {

namespace {

constexpr std::uint32_t kHeader = ScriptedFrontEnd::kHeader;
static_assert(LoadGuest::kRingSize * DriverQueue::kBufferSize == LoadGuest::kSlots * LoadGuest::kSlotBytes,
              "the front end's buffers of one ring are our slots");

FrontEndOptions front_end_options(std::uint32_t queue_pairs, bool packed) {
  FrontEndOptions options;
  options.queue_pairs = queue_pairs;
  options.ring_size = LoadGuest::kRingSize;
  options.post_buffers = false;
  // With IN_ORDER what was sent comes back in bursts, and out of turn is an error.
  if (packed) options.features |= virtio_feature::kRingPacked | virtio_feature::kInOrder;
  return options;
}

RingPlace place_of(std::uint32_t vring, bool packed) {
  const std::uint64_t area = vring * DriverQueue::kAreaSize;
  return {LoadGuest::kRingSize, area, area + DriverQueue::kAvailAt, area + DriverQueue::kUsedAt, packed};
}

}  // namespace

std::uint64_t LoadGuest::slot_address(std::uint32_t vring, std::uint32_t slot) {
  return ScriptedFrontEnd::kBuffersGuest + (std::uint64_t{vring} * kSlots + slot) * kSlotBytes;
}

LoadGuest::Pair::Pair(const GuestSpace& space, std::uint32_t number, bool packed)
    : receive(space, place_of(2 * number, packed), /*event_index=*/true, /*in_order=*/packed),
      transmit(space, place_of(2 * number + 1, packed), /*event_index=*/true, /*in_order=*/packed),
      index(number),
      // Odd queue pairs have small buffers, so that long frames take two of them (MRG_RXBUF).
      receive_bytes(number % 2 == 0 ? 2048 : 1024),
      receive_slot_of(kRingSize),
      send_slot_of(kRingSize),
      sent_crc(kSlots),
      sent_length(kSlots) {
  for (std::uint32_t slot = kSlots; slot > 0; --slot) free_send_slots.push_back(static_cast<std::uint16_t>(slot - 1));
}

LoadGuest::LoadGuest(const std::string& socket, std::uint32_t queue_pairs, bool packed)
    : front_end_(socket, front_end_options(queue_pairs, packed)) {
  const std::span<std::byte> memory = front_end_.memory();
  space_.add(0, front_end_.rings_size(), memory.data());
  space_.add(ScriptedFrontEnd::kBuffersGuest, memory.size() - front_end_.rings_size(),
             memory.data() + front_end_.rings_size());
  for (std::uint32_t pair = 0; pair < queue_pairs; ++pair) pairs_.emplace_back(space_, pair, packed);
  for (std::uint32_t vring = 0; vring < 2 * queue_pairs; ++vring)
    shadows_.push_back({std::vector<vring_desc>(kRingSize), std::vector<std::uint16_t>(kRingSize)});
  fill_canaries();
  front_end_.negotiate();
  front_end_.start();
  for (Pair& pair : pairs_) {
    for (std::uint32_t slot = 0; slot < kSlots; ++slot) post(pair, static_cast<std::uint16_t>(slot));
    pair.receive.publish();
    kick(2 * pair.index);
  }
}

std::string LoadGuest::describe() {
  std::string text;
  for (const Pair& pair : pairs_)
    for (const GuestQueue* queue : {&pair.receive, &pair.transmit}) {
      const DriverQueue& ring = front_end_.queue(2 * pair.index + (queue == &pair.transmit ? 1 : 0));
      // Where the device wants to be kicked: behind a split ring's used elements, or first in a packed one's event
      // area.
      std::uint16_t kick_at = 0;
      std::memcpy(&kick_at, packed() ? static_cast<const void*>(ring.used) : &ring.used->ring[kRingSize],
                  sizeof kick_at);
      text += (queue == &pair.receive ? "rx " : "tx ") + std::to_string(pair.index) + ": avail " +
              std::to_string(queue->avail_index()) + ", not yet taken " + std::to_string(queue->published()) +
              ", taken " + std::to_string(queue->used_taken()) + ", kick wanted at " + std::to_string(kick_at) + "; ";
    }
  return text;
}

void LoadGuest::kick(std::uint32_t vring) {
  const std::uint64_t one = 1;
  if (::write(front_end_.queue(vring).kick_fd, &one, sizeof one) != sizeof one) count_error();
}

void LoadGuest::post(Pair& pair, std::uint16_t slot) {
  const Piece piece{slot_address(2 * pair.index, slot), pair.receive_bytes, true};
  const auto head = pair.receive.add({&piece, 1});
  if (!head) return count_error();
  pair.receive_slot_of[*head] = slot;
  remember(pair.receive, 2 * pair.index, *head);
}

void LoadGuest::reclaim(Pair& pair) {
  while (const auto used = pair.transmit.take_used()) {
    if (!used->expected) {
      count_error();
      continue;
    }
    const std::uint16_t slot = pair.send_slot_of[used->id];
    const std::byte* at = space_.at(slot_address(2 * pair.index + 1, slot));
    if (crc32c_extend(~0u, at, pair.sent_length[slot]) != pair.sent_crc[slot]) ++damaged_packets_;
    pair.free_send_slots.push_back(slot);
  }
}

bool LoadGuest::send(std::uint32_t index, const std::function<std::size_t(std::span<std::byte>)>& write) {
  Pair& pair = pairs_[index];
  if (pair.free_send_slots.empty()) reclaim(pair);
  if (pair.free_send_slots.empty() || pair.transmit.free_descriptors() < 2) return false;
  const std::uint16_t slot = pair.free_send_slots.back();
  pair.free_send_slots.pop_back();
  const std::uint64_t address = slot_address(2 * index + 1, slot);
  std::byte* at = space_.at(address);
  std::memset(at, 0, kHeader);
  const auto length = static_cast<std::uint32_t>(write({at + kHeader, kSlotBytes - kHeader}));
  // Even queue pairs lay header and frame out in a descriptor each, odd ones in one.
  const std::array<Piece, 2> pieces{Piece{address, kHeader, false}, Piece{address + kHeader, length, false}};
  const Piece whole{address, kHeader + length, false};
  const auto head = index % 2 == 0 ? pair.transmit.add(pieces) : pair.transmit.add({&whole, 1});
  if (!head) return count_error(), false;
  pair.send_slot_of[*head] = slot;
  pair.sent_length[slot] = kHeader + length;
  pair.sent_crc[slot] = crc32c_extend(~0u, at, kHeader + length);
  remember(pair.transmit, 2 * index + 1, *head);
  return true;
}

void LoadGuest::publish(std::uint32_t index) {
  Pair& pair = pairs_[index];
  pair.transmit.publish();
  if (pair.transmit.kick_wanted()) kick(2 * index + 1);
}

std::size_t LoadGuest::receive(std::uint32_t index, const std::function<void(std::span<const std::byte>)>& take) {
  Pair& pair = pairs_[index];
  const std::uint32_t vring = 2 * index;
  const bool return_pages = return_pages_.load(std::memory_order_relaxed);
  std::size_t frames = 0;
  const auto done_with = [&](std::uint16_t slot) {
    if (return_pages) {
      const auto offset = front_end_.rings_size() + (std::uint64_t{vring} * kSlots + slot) * kSlotBytes;
      ::fallocate(front_end_.memory_fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                  kSlotBytes);
    }
    post(pair, slot);
  };
  while (const auto used = pair.receive.take_used()) {
    if (!used->expected) {
      count_error();
      continue;
    }
    const std::uint16_t slot = pair.receive_slot_of[used->id];
    const std::byte* bytes = space_.at(slot_address(vring, slot));
    std::uint16_t buffers = 0;
    std::memcpy(&buffers, bytes + 10, sizeof buffers);  // num_buffers (Virtio 1.2, 5.1.6)
    if (used->length < kHeader || used->length > pair.receive_bytes || buffers == 0) {
      count_error();
      done_with(slot);
      continue;
    }
    if (buffers == 1) {
      take({bytes + kHeader, used->length - kHeader});
    } else {
      joined_.assign(bytes + kHeader, bytes + used->length);
      for (std::uint16_t i = 1; i < buffers; ++i) {
        // All buffers of a packet are published by one store of used.idx.
        const auto more = pair.receive.take_used();
        if (!more || !more->expected || more->length == 0 || more->length > pair.receive_bytes) {
          count_error();
          break;
        }
        const std::uint16_t next = pair.receive_slot_of[more->id];
        const std::byte* rest = space_.at(slot_address(vring, next));
        joined_.insert(joined_.end(), rest, rest + more->length);
        done_with(next);
      }
      take(joined_);
    }
    ++frames;
    done_with(slot);
  }
  if (frames != 0) {
    pair.receive.publish();
    if (pair.receive.kick_wanted()) kick(vring);
  }
  return frames;
}

void LoadGuest::remember(const GuestQueue& queue, std::uint32_t vring, std::uint16_t head) {
  if (packed()) return;
  Shadow& shadow = shadows_[vring];
  shadow.avail[static_cast<std::uint16_t>(queue.avail_index() - 1) % kRingSize] = head;
  // Read back from memory that a faulty backend may write: neither an index nor the end of the chain is to be relied
  // on.
  std::uint16_t index = head;
  for (std::uint32_t count = 0; count < kRingSize; ++count) {
    shadow.descriptors[index] = queue.descriptor(index);
    if ((shadow.descriptors[index].flags & VRING_DESC_F_NEXT) == 0) return;
    index = shadow.descriptors[index].next % kRingSize;
  }
}

// Everything that neither side ever has a reason to write: (bytes, length).
template <class Visitor>
void LoadGuest::for_each_canary(Visitor visit) {
  std::byte* memory = front_end_.memory().data();
  constexpr std::uint64_t kDescriptorBytes = kRingSize * sizeof(vring_desc);
  const std::uint64_t avail_bytes = packed() ? sizeof(vring_packed_desc_event) : 4 + 2 * std::uint64_t{kRingSize} + 2;
  const std::uint64_t used_bytes =
      packed() ? sizeof(vring_packed_desc_event) : 4 + sizeof(vring_used_elem) * std::uint64_t{kRingSize} + 2;
  for (std::uint32_t vring = 0; vring < shadows_.size(); ++vring) {
    std::byte* area = memory + vring * DriverQueue::kAreaSize;
    visit(area + kDescriptorBytes, DriverQueue::kAvailAt - kDescriptorBytes);
    visit(area + DriverQueue::kAvailAt + avail_bytes, DriverQueue::kUsedAt - DriverQueue::kAvailAt - avail_bytes);
    visit(area + DriverQueue::kUsedAt + used_bytes, DriverQueue::kAreaSize - DriverQueue::kUsedAt - used_bytes);
    for (std::uint32_t slot = 0; slot < kSlots; ++slot)
      visit(space_.at(slot_address(vring, slot)) + kSlotBytes / 2, kSlotBytes / 2);
  }
}

void LoadGuest::fill_canaries() {
  for_each_canary([](std::byte* at, std::size_t size) { std::memset(at, 0xa5, size); });
}

std::uint64_t LoadGuest::damaged_bytes() {
  std::uint64_t damaged = 0;
  for_each_canary([&](const std::byte* at, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) damaged += at[i] != std::byte{0xa5};
  });
  for (std::uint32_t vring = 0; !packed() && vring < shadows_.size(); ++vring) {
    const DriverQueue& ring = front_end_.queue(vring);
    const auto compare = [&](const void* found, const void* left, std::size_t size) {
      for (std::size_t i = 0; i < size; ++i)
        damaged += static_cast<const std::byte*>(found)[i] != static_cast<const std::byte*>(left)[i];
    };
    compare(ring.descriptors, shadows_[vring].descriptors.data(), kRingSize * sizeof(vring_desc));
    compare(ring.avail->ring, shadows_[vring].avail.data(), kRingSize * sizeof(std::uint16_t));
  }
  for (Pair& pair : pairs_) reclaim(pair);
  return damaged + damaged_packets_;
}

}  // namespace tandem::test
