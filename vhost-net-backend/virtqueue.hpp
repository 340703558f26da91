// SPDX-License-Identifier: Apache-2.0
// Virtqueue: a split or a packed virtqueue, or none. The engine asks which once a burst (visit()) and runs code made
// for that layout; what happens more rarely goes through the functions here. Thread and lifetime as its alternatives.
#pragma once

#include <linux/virtio_config.h>

#include <cstdint>
#include <utility>
#include <variant>

#include "vhost-net-backend/packed_queue.hpp"
#include "vhost-net-backend/split_queue.hpp"

namespace tandem {

class Virtqueue {
 public:
  Virtqueue() = default;
  /// `vring` must be running; `features` say which layout it has.
  static Result<Virtqueue> bind(const GuestMemory& memory, const VringDescription& vring, std::uint64_t features) {
    return (features >> VIRTIO_F_RING_PACKED & 1u) != 0 ? wrap(PackedQueue::bind(memory, vring, features))
                                                        : wrap(SplitQueue::bind(memory, vring, features));
  }

  [[nodiscard]] bool bound() const { return layout_.index() != 0; }

  /// Calls `function` with the SplitQueue or PackedQueue; must be bound.
  template <class Function>
  decltype(auto) visit(Function&& function) const {
    if (const auto* split = std::get_if<SplitQueue>(&layout_)) return function(*split);
    return function(*std::get_if<PackedQueue>(&layout_));
  }

  [[nodiscard]] bool offers(std::uint16_t position) const {
    return visit([&](const auto& queue) { return queue.offers(position); });
  }
  [[nodiscard]] bool is_half_published(std::uint16_t next_used) const {
    return visit([&](const auto& queue) { return queue.is_half_published(next_used); });
  }
  [[nodiscard]] std::uint16_t first_used(std::uint32_t base) const {
    return visit([&](const auto& queue) { return queue.first_used(base); });
  }
  void enable_kicks(std::uint16_t next_avail) const {
    visit([&](const auto& queue) { queue.enable_kicks(next_avail); });
  }
  /// False: what bind() has set was changed since (seal.hpp).
  [[nodiscard]] bool is_whole() const {
    return !bound() || visit([](const auto& queue) { return queue.is_whole(); });
  }
  [[nodiscard]] bool kicks_stand(std::uint16_t next_avail) const {
    return visit([&](const auto& queue) { return queue.kicks_stand(next_avail); });
  }
  void disable_kicks() const {
    visit([](const auto& queue) { queue.disable_kicks(); });
  }

 private:
  template <class Queue>
  static Result<Virtqueue> wrap(Result<Queue> queue) {
    if (!queue) return tl::make_unexpected(std::move(queue.error()));
    Virtqueue made;
    made.layout_ = *queue;
    return made;
  }

  std::variant<std::monostate, SplitQueue, PackedQueue> layout_;
};

}  // namespace tandem
