// SPDX-License-Identifier: Apache-2.0
// Binding a split virtqueue to guest memory, and notification suppression (Virtio 1.2, 2.7.6 to 2.7.10).
#include "vhost-net-backend/split_queue.hpp"

#include <linux/virtio_config.h>

namespace tandem {

namespace {
constexpr std::uint64_t bit(unsigned number) { return std::uint64_t{1} << number; }
}  // namespace

Result<SplitQueue> SplitQueue::bind(const GuestMemory& memory, const VringDescription& vring, std::uint64_t features) {
  const std::uint32_t size = vring.size;
  if (size == 0 || size > kMaxVringSize || (size & (size - 1)) != 0)
    return fail(ErrorKind::kInvalid,
                "bind virtqueue: size " + std::to_string(size) + " is not a power of two up to 32768");
  // Avail and used rings end with an event field when EVENT_IDX is on; it costs two bytes to ask for it always.
  const std::byte* desc = memory.view_user(vring.descriptor_user_address, std::uint64_t{size} * sizeof(vring_desc));
  const std::byte* avail = memory.view_user(vring.avail_user_address, 4 + 2 * std::uint64_t{size} + 2);
  const std::uint64_t used_bytes = 4 + sizeof(vring_used_elem) * std::uint64_t{size} + 2;
  const std::byte* used_view = memory.view_user(vring.used_user_address, used_bytes);
  const WritableSpan used = memory.authorize_user(vring.used_user_address, used_bytes);
  if (desc == nullptr || avail == nullptr || used_view == nullptr || used.data() == nullptr)
    return fail(ErrorKind::kInvalid, "bind virtqueue: a ring lies outside the guest's memory");
  if (vring.descriptor_user_address % 16 != 0 || vring.avail_user_address % 2 != 0 || vring.used_user_address % 4 != 0)
    return fail(ErrorKind::kInvalid, "bind virtqueue: a ring is not aligned as Virtio requires (16, 2, 4)");
  SplitQueue queue;
  queue.desc_ = reinterpret_cast<const vring_desc*>(desc);
  queue.avail_ = reinterpret_cast<const vring_avail*>(avail);
  queue.used_view_ = reinterpret_cast<const vring_used*>(used_view);
  queue.used_ = reinterpret_cast<vring_used*>(used.data());
  queue.mask_ = size - 1;
  queue.event_index_ = (features & bit(VIRTIO_RING_F_EVENT_IDX)) != 0;
  queue.indirect_ = (features & bit(VIRTIO_RING_F_INDIRECT_DESC)) != 0;
  queue.seal_ = fold(queue);
  return queue;
}

void SplitQueue::enable_kicks(std::uint16_t next_avail) const {
  if (event_index_ != 0) {
    std::atomic_ref<std::uint16_t>(*kick_event<std::uint16_t>(used_)).store(next_avail, std::memory_order_relaxed);
  } else {
    std::atomic_ref<std::uint16_t>(used_->flags).store(0, std::memory_order_relaxed);
  }
  // The driver publishes avail.idx, then reads this; we write this, then read avail.idx: only full fences on both sides
  // exclude that each misses the other.
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void SplitQueue::disable_kicks() const {
  if (event_index_ == 0)
    std::atomic_ref<std::uint16_t>(used_->flags).store(VRING_USED_F_NO_NOTIFY, std::memory_order_relaxed);
}

bool SplitQueue::wants_call(std::uint16_t before, std::uint16_t after) const {
  // used.idx was stored before the driver's wish is read; same argument as in enable_kicks.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (event_index_ != 0) {
    const std::uint16_t event = load(&avail_->ring[mask_ + 1], std::memory_order_relaxed);
    return vring_need_event(event, after, before) != 0;
  }
  return (load(&avail_->flags, std::memory_order_relaxed) & VRING_AVAIL_F_NO_INTERRUPT) == 0;
}

}  // namespace tandem
