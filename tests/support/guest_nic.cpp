// SPDX-License-Identifier: Apache-2.0
// A guest's virtio-net driver.
#include "tests/support/guest_nic.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace tandem::test {

namespace {
// Virtio 1.2: 5.1.3 and 6.
constexpr unsigned kGuestCsum = 1;
constexpr unsigned kMergeable = 15;
constexpr unsigned kEventIndex = 29;
constexpr unsigned kVersion1 = 32;
constexpr unsigned kPacked = 34;
constexpr unsigned kInOrder = 35;
constexpr std::uint32_t kTableBytes = 8 * sizeof(vring_desc);
}  // namespace

std::uint32_t NicShape::header_size() const { return has(kVersion1) || has(kMergeable) ? 12 : 10; }
bool NicShape::mergeable() const { return has(kMergeable); }

std::uint64_t GuestNic::bytes(const NicShape& shape) {
  const bool tables = shape.transmit == ChainStyle::kIndirect || shape.receive == ChainStyle::kIndirect;
  return 2 * RingPlace::bytes(shape.queue_size) +
         std::uint64_t{shape.queue_size} *
             (shape.slot_size + shape.receive_slot_bytes() + (tables ? 2 * kTableBytes : 0)) +
         16;
}

GuestNic::GuestNic(const GuestSpace& space, std::uint64_t address, const NicShape& shape)
    : receive(space, RingPlace::at(address, shape.queue_size, shape.has(kPacked)), shape.has(kEventIndex),
              shape.has(kInOrder)),
      transmit(space, RingPlace::at(address + RingPlace::bytes(shape.queue_size), shape.queue_size, shape.has(kPacked)),
               shape.has(kEventIndex), shape.has(kInOrder)),
      shape_(shape),
      space_(&space) {
  if (shape.cuts.size() > 7) std::abort();
  receive_slots_ = address + 2 * RingPlace::bytes(shape.queue_size);
  transmit_slots_ = receive_slots_ + std::uint64_t{shape.queue_size} * shape.receive_slot_bytes();
  receive_tables_ = (transmit_slots_ + std::uint64_t{shape.queue_size} * shape.slot_size + 15) / 16 * 16;
  transmit_tables_ = receive_tables_ + std::uint64_t{shape.queue_size} * kTableBytes;
  slot_of_.assign(shape.queue_size, 0);
  receive.begin_at(shape.first_index);
  transmit.begin_at(shape.first_index);
}

void GuestNic::rebase(const GuestSpace& space) {
  space_ = &space;
  receive.rebase(space);
  transmit.rebase(space);
}

std::vector<Piece>& GuestNic::cut(std::uint64_t address, std::uint32_t length, bool writable, ChainStyle style) {
  pieces_.clear();
  std::uint32_t at = 0;
  if (style != ChainStyle::kDirect)
    for (const std::uint32_t end : shape_.cuts) {
      if (end >= length) break;
      pieces_.push_back({address + at, end - at, writable});
      at = end;
    }
  pieces_.push_back({address + at, length - at, writable});
  return pieces_;
}

std::optional<std::uint16_t> GuestNic::add(GuestQueue& queue, std::uint64_t slot, std::uint32_t length, bool writable,
                                           ChainStyle style, std::uint64_t table) {
  const std::vector<Piece>& pieces = cut(slot, length, writable, style);
  return style == ChainStyle::kIndirect ? queue.add_indirect(pieces, table) : queue.add(pieces);
}

bool GuestNic::send(std::span<const std::byte> packet, const NetHeaderBytes& net) {
  const std::uint32_t index = sent_ % shape_.queue_size;
  const std::uint32_t header = shape_.header_size();
  const auto length = static_cast<std::uint32_t>(header + packet.size());
  if (length > shape_.slot_size) std::abort();
  if (transmit.outstanding() == shape_.queue_size) return false;
  const std::uint64_t slot = transmit_slot(index);
  if (!add(transmit, slot, length, false, shape_.transmit, transmit_tables_ + index * kTableBytes)) return false;
  std::memset(space_->at(slot), 0, header);
  std::memcpy(space_->at(slot), net.data(), net.size());
  std::memcpy(space_->at(slot) + header, packet.data(), packet.size());
  ++sent_;
  return true;
}

std::uint32_t GuestNic::reap() {
  std::uint32_t count = 0;
  while (transmit.take_used()) ++count;
  return count;
}

std::uint32_t GuestNic::post(std::uint32_t most) {
  std::uint32_t count = 0;
  for (; count < most && receive.outstanding() < shape_.queue_size; ++count) {
    const std::uint32_t index = posted_ % shape_.queue_size;
    const auto head = add(receive, receive_slot(index), shape_.receive_slot_bytes(), true, shape_.receive,
                          receive_tables_ + index * kTableBytes);
    if (!head) break;
    slot_of_[*head] = index;
    ++posted_;
  }
  receive.publish();
  return count;
}

void GuestNic::append(std::vector<std::byte>& packet, std::uint64_t slot, std::uint32_t skip, std::uint32_t length) {
  const std::byte* from = space_->at(slot);
  packet.insert(packet.end(), from + skip, from + length);
}

bool GuestNic::take(std::vector<std::byte>& packet) {
  packet.clear();
  const std::uint32_t header = shape_.header_size();
  while (const auto used = receive.take_used()) {
    if (!used->expected) continue;
    if (used->length == 0) {
      ++empty_returns_;
      continue;
    }
    const std::uint64_t slot = receive_slot(slot_of_[used->id]);
    const std::byte* bytes = space_->at(slot);
    if (used->length < header || used->length > shape_.receive_slot_bytes() ||
        (!shape_.has(kGuestCsum) &&
         std::any_of(bytes, bytes + 10, [](std::byte byte) { return byte != std::byte{0}; }))) {
      ++protocol_errors_;
      continue;
    }
    std::memcpy(taken_header_.data(), bytes, taken_header_.size());
    std::uint16_t buffers = 1;
    if (header == 12) std::memcpy(&buffers, bytes + 10, sizeof buffers);
    if (buffers == 0 || (buffers > 1 && !shape_.mergeable())) ++protocol_errors_;
    append(packet, slot, header, used->length);
    for (std::uint16_t i = 1; i < buffers; ++i) {
      // All buffers of a packet are published by one store.
      const auto more = receive.take_used();
      if (!more || !more->expected || more->length == 0 || more->length > shape_.receive_slot_bytes()) {
        ++protocol_errors_;
        return true;
      }
      append(packet, receive_slot(slot_of_[more->id]), 0, more->length);
    }
    return true;
  }
  return false;
}

}  // namespace tandem::test
