// SPDX-License-Identifier: Apache-2.0
// The driver's side of a virtqueue.
#include "tests/support/guest_rings.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace tandem::test {

namespace {
constexpr std::uint16_t kWrapBit = 1u << 15;
constexpr std::uint16_t kSlotMask = kWrapBit - 1;
constexpr std::uint16_t kAvailFlag = 1u << VRING_PACKED_DESC_F_AVAIL;
constexpr std::uint16_t kUsedFlag = 1u << VRING_PACKED_DESC_F_USED;
constexpr std::uint16_t kUsedFlags = kAvailFlag | kUsedFlag;  // both, as in a used descriptor of an odd round
}  // namespace

void GuestSpace::add(std::uint64_t guest_address, std::uint64_t size, std::byte* memory) {
  parts_.push_back({guest_address, size, memory});
}

std::byte* GuestSpace::at(std::uint64_t address) const {
  for (const Part& part : parts_)
    if (address - part.guest_address < part.size) return part.memory + (address - part.guest_address);
  std::abort();
}

RingPlace RingPlace::at(std::uint64_t address, std::uint32_t size, bool packed) {
  RingPlace place;
  place.size = size;
  place.packed = packed;
  place.descriptors = address;
  if (packed) {
    place.avail = address + std::uint64_t{size} * sizeof(vring_packed_desc);
    place.used = place.avail + sizeof(vring_packed_desc_event);
    return place;
  }
  place.avail = address + std::uint64_t{size} * sizeof(vring_desc);
  place.used = (place.avail + 4 + 2 * (std::uint64_t{size} + 1) + 3) / 4 * 4;
  return place;
}

std::uint64_t RingPlace::bytes(std::uint32_t size) {
  const RingPlace place = at(0, size);
  return (place.used + 4 + sizeof(vring_used_elem) * std::uint64_t{size} + 2 + 63) / 64 * 64;
}

GuestQueue::GuestQueue(const GuestSpace& space, const RingPlace& place, bool event_index, bool in_order)
    : place_(place), event_index_(event_index), in_order_(in_order && place.packed) {
  attach(space);
  std::memset(space.at(place_.descriptors), 0, RingPlace::bytes(place_.size));
  chain_length_.assign(place_.size, 0);
  // Packed: ids in the other order, so that no id is the number of its slot.
  for (std::uint32_t i = place_.size; i > 0; --i)
    free_.push_back(static_cast<std::uint16_t>(place_.packed ? place_.size - i : i - 1));
  free_slots_ = place_.size;
  if (place_.packed) begin_at(0);
}

void GuestQueue::attach(const GuestSpace& space) {
  space_ = &space;
  descriptors_ = reinterpret_cast<vring_desc*>(space.at(place_.descriptors));
  avail_ = reinterpret_cast<vring_avail*>(space.at(place_.avail));
  used_ = reinterpret_cast<vring_used*>(space.at(place_.used));
  slots_ = reinterpret_cast<vring_packed_desc*>(descriptors_);
  driver_event_ = reinterpret_cast<vring_packed_desc_event*>(avail_);
  device_event_ = reinterpret_cast<const vring_packed_desc_event*>(used_);
}

void GuestQueue::rebase(const GuestSpace& space) { attach(space); }

void GuestQueue::begin_at(std::uint16_t index) {
  entries_taken_ = 0;
  if (place_.packed) {
    avail_index_ = used_taken_ = kicked_ = position_of(index);
    // As if every descriptor had been given back up to here: slots behind in this round, the others in the one before.
    for (std::uint32_t slot = 0; slot < place_.size; ++slot) {
      const bool behind = slot < (avail_index_ & kSlotMask);
      slots_[slot].flags = behind == ((avail_index_ & kWrapBit) != 0) ? kUsedFlags : std::uint16_t{0};
    }
    call_at(index);
    return;
  }
  avail_index_ = used_taken_ = kicked_ = index;
  avail_->idx = used_->idx = index;
  call_at(index);
}

std::uint32_t GuestQueue::base_for(std::uint16_t index) const {
  if (!place_.packed) return index;
  const std::uint32_t position = position_of(index);
  return position << 16 | position;
}

std::optional<std::uint16_t> GuestQueue::add(std::span<const Piece> pieces) {
  if (place_.packed) return add_packed(pieces);
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
  if (place_.packed) {
    if (free_slots_ == 0) return std::nullopt;
    auto* entries = reinterpret_cast<vring_packed_desc*>(space_->at(table));
    for (std::size_t i = 0; i < pieces.size(); ++i)
      entries[i] = {pieces[i].address, pieces[i].length, 0,
                    static_cast<std::uint16_t>(pieces[i].writable ? VRING_DESC_F_WRITE : 0)};
    vring_packed_desc& slot = packed_descriptor(0);
    slot = {table, static_cast<std::uint32_t>(pieces.size() * sizeof(vring_packed_desc)), 0,
            static_cast<std::uint16_t>(VRING_DESC_F_INDIRECT | (slot.flags & kUsedFlags))};
    const std::uint16_t id = free_.back();
    free_.pop_back();
    offer_packed(id, 1);
    return id;
  }
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

void GuestQueue::publish() {
  if (!place_.packed) return publish_index(avail_index_);
  // The first one last, so that all are seen at once. Release: the descriptors first.
  for (; !pending_.empty(); pending_.pop_back())
    std::atomic_ref<std::uint16_t>(slots_[pending_.back().slot].flags)
        .store(pending_.back().flags, std::memory_order_release);
}

void GuestQueue::publish_index(std::uint16_t index) {
  // Release: descriptors and ring entries first.
  std::atomic_ref<std::uint16_t>(avail_->idx).store(index, std::memory_order_release);
}

std::uint16_t GuestQueue::used_index() const {
  return std::atomic_ref<std::uint16_t>(used_->idx).load(std::memory_order_acquire);
}

std::uint32_t GuestQueue::published() const {
  if (!place_.packed) return static_cast<std::uint16_t>(used_index() - used_taken_);
  std::uint32_t slots = 0, chains = 0;
  for (; chains < batch_left_; ++chains) slots += chain_length_[in_flight_[chains]];
  while (slots < place_.size) {
    const auto used = used_at(next_position(used_taken_, slots));
    if (!used) break;
    const std::uint32_t batch = in_order_ ? batch_up_to(used->id, chains) : 0;
    if (batch == 0) slots += used->id < place_.size ? std::max<std::uint32_t>(chain_length_[used->id], 1) : 1;
    for (const std::uint32_t end = chains + batch; chains < end; ++chains) slots += chain_length_[in_flight_[chains]];
  }
  return slots;
}

std::uint32_t GuestQueue::batch_up_to(std::uint16_t id, std::uint32_t first) const {
  for (std::size_t i = first; i < in_flight_.size(); ++i)
    if (in_flight_[i] == id) return static_cast<std::uint32_t>(i) + 1 - first;
  return 0;
}

std::optional<UsedEntry> GuestQueue::take_used() {
  if (place_.packed) return take_packed();
  if (used_index() == used_taken_) return std::nullopt;
  const vring_used_elem element = used_->ring[used_taken_ & (place_.size - 1)];
  ++used_taken_;
  ++entries_taken_;
  UsedEntry entry{element.id, element.len, element.id < place_.size && chain_length_[element.id] != 0};
  if (!entry.expected) {
    ++wrong_returns_;
    return entry;
  }
  auto index = static_cast<std::uint16_t>(element.id);
  const std::uint16_t length = std::exchange(chain_length_[index], std::uint16_t{0});
  for (std::uint16_t i = 0; i < length; ++i) {
    free_.push_back(index);
    // A faulty backend may have written there: no index of ours may come from it unchecked.
    index = static_cast<std::uint16_t>(descriptors_[index].next & (place_.size - 1));
  }
  --outstanding_;
  return entry;
}

bool GuestQueue::kick_wanted() {
  // avail.idx was stored before the device's wish is read.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (place_.packed) return kick_wanted_packed();
  const std::uint16_t before = std::exchange(kicked_, avail_index_);
  if (event_index_) {
    const auto* event = reinterpret_cast<const std::uint16_t*>(&used_->ring[place_.size]);
    return vring_need_event(*event, avail_index_, before) != 0;
  }
  return before != avail_index_ && (used_->flags & VRING_USED_F_NO_NOTIFY) == 0;
}

void GuestQueue::call_at(std::uint16_t index) {
  if (!place_.packed) {
    avail_->ring[place_.size] = index;
    return;
  }
  driver_event_->off_wrap = position_of(index);
  driver_event_->flags = event_index_ ? VRING_PACKED_EVENT_FLAG_DESC : VRING_PACKED_EVENT_FLAG_ENABLE;
}

void GuestQueue::calls_off(bool off) {
  if (place_.packed)
    driver_event_->flags = off ? VRING_PACKED_EVENT_FLAG_DISABLE : VRING_PACKED_EVENT_FLAG_ENABLE;
  else
    avail_->flags = static_cast<std::uint16_t>(off ? VRING_AVAIL_F_NO_INTERRUPT : 0);
}

// Packed rings.

std::uint16_t GuestQueue::position_of(std::uint32_t in_two_rounds) const {
  in_two_rounds %= 2 * place_.size;
  return static_cast<std::uint16_t>(in_two_rounds < place_.size ? in_two_rounds | kWrapBit
                                                                : in_two_rounds - place_.size);
}

std::uint16_t GuestQueue::next_position(std::uint16_t position, std::uint32_t slots) const {
  return position_of((position & kSlotMask) + ((position & kWrapBit) != 0 ? 0 : place_.size) + slots);
}

vring_packed_desc& GuestQueue::packed_descriptor(std::uint32_t ahead) const {
  return slots_[next_position(avail_index_, ahead) & kSlotMask];
}

std::optional<std::uint16_t> GuestQueue::add_packed(std::span<const Piece> pieces) {
  if (pieces.empty() || free_slots_ < pieces.size()) return std::nullopt;
  for (std::uint32_t i = 0; i < pieces.size(); ++i) {
    vring_packed_desc& slot = packed_descriptor(i);
    const auto flags = (slot.flags & kUsedFlags) | (pieces[i].writable ? VRING_DESC_F_WRITE : 0) |
                       (i + 1 == pieces.size() ? 0 : VRING_DESC_F_NEXT);
    slot = {pieces[i].address, pieces[i].length, 0, static_cast<std::uint16_t>(flags)};
  }
  const std::uint16_t id = free_.back();
  free_.pop_back();
  offer_packed(id, static_cast<std::uint32_t>(pieces.size()));
  return id;
}

void GuestQueue::offer_packed(std::uint16_t id, std::uint32_t slots) {
  for (std::uint32_t i = 0; i < slots; ++i) {
    const std::uint16_t position = next_position(avail_index_, i);
    vring_packed_desc& slot = slots_[position & kSlotMask];
    slot.id = i + 1 == slots ? id : static_cast<std::uint16_t>(id ^ 0x5555);  // counts in the last one only
    const auto flags =
        static_cast<std::uint16_t>((slot.flags & ~kUsedFlags) | ((position & kWrapBit) != 0 ? kAvailFlag : kUsedFlag));
    if (i == 0)
      pending_.push_back({static_cast<std::uint16_t>(position & kSlotMask), flags});
    else
      slot.flags = flags;
  }
  if (id < place_.size) chain_length_[id] = static_cast<std::uint16_t>(slots);
  if (in_order_ && id < place_.size) in_flight_.push_back(id);
  free_slots_ -= slots;
  avail_index_ = next_position(avail_index_, slots);
  ++outstanding_;
}

std::optional<vring_packed_desc> GuestQueue::used_at(std::uint16_t position) const {
  vring_packed_desc& slot = slots_[position & kSlotMask];
  const std::uint16_t flags = std::atomic_ref<std::uint16_t>(slot.flags).load(std::memory_order_acquire);
  if ((flags & kUsedFlags) != ((position & kWrapBit) != 0 ? kUsedFlags : 0)) return std::nullopt;
  return slot;
}

std::optional<UsedEntry> GuestQueue::take_packed() {
  UsedEntry entry;
  if (batch_left_ == 0) {
    const auto used = used_at(used_taken_);
    if (!used) return std::nullopt;
    entry = {used->id, used->len, used->id < place_.size && chain_length_[used->id] != 0};
    // Of bytes written, a device says so.
    entry.expected = entry.expected && ((used->flags & VRING_DESC_F_WRITE) != 0) == (entry.length != 0);
    if (in_order_ && entry.expected) {
      batch_left_ = batch_up_to(used->id, 0);
      // How much was written to all but the last one, nobody would know.
      entry.expected = batch_left_ == 1 || (batch_left_ > 1 && entry.length == 0);
    }
    if (!entry.expected) {
      batch_left_ = 0;
      ++wrong_returns_;
      used_taken_ = next_position(used_taken_, 1);
      return entry;
    }
  }
  if (in_order_) {
    entry = {in_flight_.front(), entry.length, true};
    in_flight_.pop_front();
    --batch_left_;
  }
  const auto id = static_cast<std::uint16_t>(entry.id);
  const std::uint16_t length = std::exchange(chain_length_[id], std::uint16_t{0});
  free_.push_back(id);
  free_slots_ += length;
  entries_taken_ += length;
  used_taken_ = next_position(used_taken_, length);
  --outstanding_;
  return entry;
}

bool GuestQueue::kick_wanted_packed() {
  const std::uint16_t before = std::exchange(kicked_, avail_index_);
  if (before == avail_index_) return false;
  if (device_event_->flags != VRING_PACKED_EVENT_FLAG_DESC)
    return device_event_->flags != VRING_PACKED_EVENT_FLAG_DISABLE;
  // As Linux does: all three on the scale of the round that the driver is in.
  auto event = static_cast<std::uint16_t>(device_event_->off_wrap & kSlotMask);
  const auto now = static_cast<std::uint16_t>(avail_index_ & kSlotMask);
  auto old = static_cast<std::uint16_t>(before & kSlotMask);
  if ((device_event_->off_wrap & kWrapBit) != (avail_index_ & kWrapBit))
    event = static_cast<std::uint16_t>(event - place_.size);
  if ((before & kWrapBit) != (avail_index_ & kWrapBit)) old = static_cast<std::uint16_t>(old - place_.size);
  return vring_need_event(event, now, old) != 0;
}

}  // namespace tandem::test
