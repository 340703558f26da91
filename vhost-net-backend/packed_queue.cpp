// SPDX-License-Identifier: Apache-2.0
// Binding a packed virtqueue to guest memory, giving back, and notification suppression (Virtio 1.2, 2.8).
#include "vhost-net-backend/packed_queue.hpp"

#include <linux/virtio_config.h>

#include <string>

namespace tandem {

namespace {

constexpr std::uint64_t bit(unsigned number) { return std::uint64_t{1} << number; }

// struct vring_packed_desc_event: off_wrap in the low half, flags in the high one.
constexpr std::uint32_t event_word(std::uint16_t off_wrap, std::uint32_t flags) { return flags << 16 | off_wrap; }

static_assert(sizeof(vring_packed_desc) == 16 && offsetof(vring_packed_desc, len) == 8 &&
              offsetof(vring_packed_desc, id) == 12 && offsetof(vring_packed_desc, flags) == 14);
static_assert(sizeof(vring_packed_desc_event) == 4 && offsetof(vring_packed_desc_event, off_wrap) == 0);
static_assert(std::atomic_ref<std::uint64_t>::is_always_lock_free && std::endian::native == std::endian::little);

}  // namespace

Result<PackedQueue> PackedQueue::bind(const GuestMemory& memory, const VringDescription& vring,
                                      std::uint64_t features) {
  PackedQueue queue;
  queue.size_ = vring.size;
  if (vring.size == 0 || vring.size > kMaxVringSize)
    return fail(ErrorKind::kInvalid,
                "bind packed virtqueue: size " + std::to_string(vring.size) + " is not from 1 to 32768");
  if (vring.descriptor_user_address % 16 != 0 || vring.avail_user_address % 4 != 0 || vring.used_user_address % 4 != 0)
    return fail(ErrorKind::kInvalid, "bind packed virtqueue: an area is not aligned as Virtio requires (16, 4, 4)");
  const std::uint64_t ring_bytes = std::uint64_t{vring.size} * sizeof(vring_packed_desc);
  const std::byte* view = memory.view_user(vring.descriptor_user_address, ring_bytes);
  const WritableSpan window = memory.authorize_user(vring.descriptor_user_address, ring_bytes);
  const std::byte* driver_event = memory.view_user(vring.avail_user_address, sizeof(vring_packed_desc_event));
  const WritableSpan device_event = memory.authorize_user(vring.used_user_address, sizeof(vring_packed_desc_event));
  if (view == nullptr || window.data() == nullptr || driver_event == nullptr || device_event.data() == nullptr)
    return fail(ErrorKind::kInvalid, "bind packed virtqueue: an area lies outside the guest's memory");
  const auto avail = static_cast<std::uint16_t>(vring.base), used = static_cast<std::uint16_t>(vring.base >> 16);
  // Behind what was made available, and not by more than the ring holds: the front end may have taken the base from
  // another backend, which left chains without giving them back.
  if (!queue.is_position(avail) || !queue.is_position(used) || queue.distance(used, avail) > vring.size)
    return fail(ErrorKind::kInvalid, "bind packed virtqueue: base " + std::to_string(vring.base) +
                                         " is no pair of positions in a ring of " + std::to_string(vring.size));
  queue.view_ = reinterpret_cast<const vring_packed_desc*>(view);
  queue.window_ = reinterpret_cast<std::uint64_t*>(window.data());
  queue.driver_event_ = reinterpret_cast<const std::uint32_t*>(driver_event);
  queue.device_event_ = reinterpret_cast<std::uint32_t*>(device_event.data());
  queue.event_index_ = (features & bit(VIRTIO_RING_F_EVENT_IDX)) != 0;
  queue.indirect_ = (features & bit(VIRTIO_RING_F_INDIRECT_DESC)) != 0;
  queue.in_order_ = (features & bit(VIRTIO_F_IN_ORDER)) != 0;
  queue.seal_ = fold(queue);
  return queue;
}

void PackedQueue::write_used(std::span<const RedoUsed> used, std::uint16_t before) const {
  std::uint16_t position = before;
  for (std::size_t i = 0; i + 1 < used.size(); ++i) {
    position = next(position, used[i].slots);
    // Relaxed: nobody looks here before the first slot is published.
    word(position).store(used_word(used[i + 1], position), std::memory_order_relaxed);
  }
}

bool PackedQueue::used_stands(std::span<const RedoUsed> used, std::uint16_t before) const {
  for (std::size_t i = 0; i + 1 < used.size(); ++i) {
    before = next(before, used[i].slots);
    if (word(before).load(std::memory_order_relaxed) != used_word(used[i + 1], before)) return false;
  }
  return true;
}

void PackedQueue::publish_used(std::span<const RedoUsed> used, std::uint16_t before, std::uint16_t) const {
  if (used.empty()) return;
  // Release: payload and the other slots first.
  word(before).store(used_word(used[0], before), std::memory_order_release);
}

bool PackedQueue::is_half_published(std::uint16_t next_used) const {
  if (!is_position(next_used)) return true;
  bool some_available = false, some_old = false;
  for (std::uint32_t i = 0; i < size_; ++i) {
    const std::uint16_t position = next(next_used, i);
    const std::uint16_t bits = flags(index(position)) & (kAvail | kUsed);
    const std::uint16_t given_back = (position & kWrap) != 0 ? kAvail | kUsed : 0;
    if (bits == given_back) return true;  // in the round that has not been given back yet
    some_available = some_available || available(position);
    some_old = some_old || bits == (given_back ^ (kAvail | kUsed));
  }
  // The slot was given back and made available anew, if its USED bit says so; or it is left over from the middle of a
  // chain of the round before, or of a burst that was given back as one. In the first case the driver is one round
  // ahead: every slot after this one is available, or was given back and is available anew too. In the second case
  // nothing is available, and the first slot of that chain or burst, like those of all before it, shows that it was
  // given back in the round before.
  return is_published(next_used) && (some_available || !some_old);
}

std::uint32_t PackedQueue::kick_wish(std::uint16_t next_avail) const {
  return event_index_ != 0 ? event_word(next_avail, VRING_PACKED_EVENT_FLAG_DESC)
                           : event_word(0, VRING_PACKED_EVENT_FLAG_ENABLE);
}

bool PackedQueue::kicks_stand(std::uint16_t next_avail) const {
  return std::atomic_ref<std::uint32_t>(*device_event_).load(std::memory_order_relaxed) == kick_wish(next_avail);
}

void PackedQueue::enable_kicks(std::uint16_t next_avail) const {
  std::atomic_ref<std::uint32_t>(*device_event_).store(kick_wish(next_avail), std::memory_order_relaxed);
  // The driver makes a descriptor available, then reads this; we write this, then look at the descriptor: only full
  // fences on both sides exclude that each misses the other.
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void PackedQueue::disable_kicks() const {
  std::atomic_ref<std::uint32_t>(*device_event_)
      .store(event_word(0, VRING_PACKED_EVENT_FLAG_DISABLE), std::memory_order_relaxed);
}

bool PackedQueue::wants_call(std::uint16_t before, std::uint16_t after) const {
  // The used descriptors were stored before the driver's wish is read; same argument as in enable_kicks.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const std::uint32_t wish =
      std::atomic_ref<std::uint32_t>(const_cast<std::uint32_t&>(*driver_event_)).load(std::memory_order_relaxed);
  const std::uint32_t flags = wish >> 16 & 3u;  // the other bits are reserved
  if (flags != VRING_PACKED_EVENT_FLAG_DESC || event_index_ == 0) return flags != VRING_PACKED_EVENT_FLAG_DISABLE;
  const auto event = static_cast<std::uint16_t>(wish);
  if (!is_position(event)) return true;  // the guest's mistake costs it an interrupt
  return distance(before, event) < distance(before, after);
}

}  // namespace tandem
