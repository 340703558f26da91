// SPDX-License-Identifier: Apache-2.0
// The driver's side of a split virtqueue.
#include "tests/support/guest_rings.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace tandem::test {

void GuestSpace::add(std::uint64_t guest_address, std::uint64_t size, std::byte* memory) {
  parts_.push_back({guest_address, size, memory});
}

std::byte* GuestSpace::at(std::uint64_t address) const {
  for (const Part& part : parts_)
    if (address - part.guest_address < part.size) return part.memory + (address - part.guest_address);
  std::abort();
}

RingPlace RingPlace::at(std::uint64_t address, std::uint32_t size) {
  RingPlace place;
  place.size = size;
  place.descriptors = address;
  place.avail = address + std::uint64_t{size} * sizeof(vring_desc);
  place.used = (place.avail + 4 + 2 * (std::uint64_t{size} + 1) + 3) / 4 * 4;
  return place;
}

std::uint64_t RingPlace::bytes(std::uint32_t size) {
  const RingPlace place = at(0, size);
  return (place.used + 4 + sizeof(vring_used_elem) * std::uint64_t{size} + 2 + 63) / 64 * 64;
}

GuestQueue::GuestQueue(const GuestSpace& space, const RingPlace& place, bool event_index)
    : place_(place), event_index_(event_index) {
  attach(space);
  std::memset(space.at(place_.descriptors), 0, RingPlace::bytes(place_.size));
  chain_length_.assign(place_.size, 0);
  for (std::uint32_t i = place_.size; i > 0; --i) free_.push_back(static_cast<std::uint16_t>(i - 1));
}

void GuestQueue::attach(const GuestSpace& space) {
  space_ = &space;
  descriptors_ = reinterpret_cast<vring_desc*>(space.at(place_.descriptors));
  avail_ = reinterpret_cast<vring_avail*>(space.at(place_.avail));
  used_ = reinterpret_cast<vring_used*>(space.at(place_.used));
}

void GuestQueue::rebase(const GuestSpace& space) { attach(space); }

void GuestQueue::begin_at(std::uint16_t index) {
  avail_index_ = used_taken_ = kicked_ = index;
  avail_->idx = used_->idx = index;
  call_at(index);
}

std::optional<std::uint16_t> GuestQueue::add(std::span<const Piece> pieces) {
  if (free_.size() < pieces.size() || pieces.empty()) return std::nullopt;
  const std::size_t first = free_.size() - 1;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const bool last = i + 1 == pieces.size();
    const auto flags = (pieces[i].writable ? VRING_DESC_F_WRITE : 0) | (last ? 0 : VRING_DESC_F_NEXT);
    descriptors_[free_[first - i]] = {pieces[i].address, pieces[i].length, static_cast<std::uint16_t>(flags),
                                      last ? std::uint16_t{0} : free_[first - i - 1]};
  }
  const std::uint16_t head = free_[first];
  chain_length_[head] = static_cast<std::uint16_t>(pieces.size());
  free_.resize(free_.size() - pieces.size());
  ++outstanding_;
  offer(head);
  return head;
}

std::optional<std::uint16_t> GuestQueue::add_indirect(std::span<const Piece> pieces, std::uint64_t table) {
  if (free_.empty() || pieces.empty()) return std::nullopt;
  auto* entries = reinterpret_cast<vring_desc*>(space_->at(table));
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const bool last = i + 1 == pieces.size();
    const auto flags = (pieces[i].writable ? VRING_DESC_F_WRITE : 0) | (last ? 0 : VRING_DESC_F_NEXT);
    entries[i] = {pieces[i].address, pieces[i].length, static_cast<std::uint16_t>(flags),
                  static_cast<std::uint16_t>(last ? 0 : i + 1)};
  }
  const std::uint16_t head = free_.back();
  free_.pop_back();
  descriptors_[head] = {table, static_cast<std::uint32_t>(pieces.size() * sizeof(vring_desc)), VRING_DESC_F_INDIRECT,
                        0};
  chain_length_[head] = 1;
  ++outstanding_;
  offer(head);
  return head;
}

void GuestQueue::offer(std::uint16_t head) {
  avail_->ring[avail_index_ & (place_.size - 1)] = head;
  ++avail_index_;
}

void GuestQueue::publish() { publish_index(avail_index_); }

void GuestQueue::publish_index(std::uint16_t index) {
  // Release: descriptors and ring entries first.
  std::atomic_ref<std::uint16_t>(avail_->idx).store(index, std::memory_order_release);
}

std::uint16_t GuestQueue::used_index() const {
  return std::atomic_ref<std::uint16_t>(used_->idx).load(std::memory_order_acquire);
}

std::optional<UsedEntry> GuestQueue::take_used() {
  if (used_index() == used_taken_) return std::nullopt;
  const vring_used_elem element = used_->ring[used_taken_ & (place_.size - 1)];
  ++used_taken_;
  UsedEntry entry{element.id, element.len, element.id < place_.size && chain_length_[element.id] != 0};
  if (!entry.expected) {
    ++wrong_returns_;
    return entry;
  }
  auto index = static_cast<std::uint16_t>(element.id);
  const std::uint16_t length = std::exchange(chain_length_[index], std::uint16_t{0});
  for (std::uint16_t i = 0; i < length; ++i) {
    free_.push_back(index);
    index = descriptors_[index].next;
  }
  --outstanding_;
  return entry;
}

bool GuestQueue::kick_wanted() {
  // avail.idx was stored before the device's wish is read.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const std::uint16_t before = std::exchange(kicked_, avail_index_);
  if (event_index_) {
    const auto* event = reinterpret_cast<const std::uint16_t*>(&used_->ring[place_.size]);
    return vring_need_event(*event, avail_index_, before) != 0;
  }
  return before != avail_index_ && (used_->flags & VRING_USED_F_NO_NOTIFY) == 0;
}

void GuestQueue::call_at(std::uint16_t index) { avail_->ring[place_.size] = index; }

void GuestQueue::calls_off(bool off) {
  avail_->flags = static_cast<std::uint16_t>(off ? VRING_AVAIL_F_NO_INTERRUPT : 0);
}

}  // namespace tandem::test
