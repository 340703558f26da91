// SPDX-License-Identifier: Apache-2.0
// XskUser: a minimal owner of one socket's rings, which knows nothing but an XskDescription and two descriptors.
//
// It keeps no index of its own: every position is read from the rings, and every store sets a value that follows from
// them, so that a second XskUser goes on wherever the first was killed. (Ring sizes equal frame counts, so entry i +
// size of the fill ring is the refill for entry i of the RX ring, and TX frame i % tx_frames is free once i - tx_frames
// is completed.)
#pragma once

#include <linux/if_xdp.h>
#include <sys/socket.h>

#include <cstring>
#include <functional>

#include "common/layout/xsk_description.hpp"
#include "common/mapping.hpp"

namespace tandem::test {

class XskUser {
 public:
  static Result<XskUser> map(const XskDescription& description, int socket, int umem) {
    XskUser user;
    user.description_ = description;
    user.socket_ = socket;
    auto frames = Mapping::map(umem, description.umem_size, PROT_READ | PROT_WRITE, 0, "UMEM");
    if (!frames) return tl::make_unexpected(frames.error());
    user.umem_ = std::move(*frames);
    for (auto [ring, layout] :
         {std::pair{&user.rx_, &description.rx}, std::pair{&user.tx_, &description.tx},
          std::pair{&user.fill_, &description.fill}, std::pair{&user.completion_, &description.completion}}) {
      auto mapping = Mapping::map(socket, layout->mmap_size, PROT_READ | PROT_WRITE,
                                  static_cast<off_t>(layout->mmap_offset), "ring");
      if (!mapping) return tl::make_unexpected(mapping.error());
      *ring = std::move(*mapping);
    }
    return user;
  }

  /// Index of the next frame to receive, and how many the kernel has delivered, since the socket was made.
  [[nodiscard]] std::uint32_t consumed() const { return load(rx_, description_.rx.consumer); }
  [[nodiscard]] std::uint32_t delivered() const { return load(rx_, description_.rx.producer); }

  /// Hands each waiting frame to `take` (with its RX index) and refills; returns how many.
  std::uint32_t receive(
      const std::function<void(std::uint32_t index, const std::uint8_t* data, std::size_t size)>& take) {
    const std::uint32_t first = consumed();
    const std::uint32_t end = delivered();
    for (std::uint32_t index = first; index != end; ++index) {
      const xdp_desc& entry = entries<xdp_desc>(rx_, description_.rx)[index & (description_.rx.entries - 1)];
      take(index, bytes(entry.addr), entry.len);
      entries<std::uint64_t>(fill_, description_.fill)[index & (description_.fill.entries - 1)] =
          entry.addr & ~std::uint64_t{description_.frame_size - 1};
      store(fill_, description_.fill.producer, index + 1 + description_.rx_frames);
      store(rx_, description_.rx.consumer, index + 1);
    }
    return end - first;
  }

  /// Posts one frame; false if all TX frames are in flight.
  bool post(const std::uint8_t* data, std::size_t size) {
    const std::uint32_t index = load(tx_, description_.tx.producer);
    store(completion_, description_.completion.consumer, load(completion_, description_.completion.producer));
    if (index - load(completion_, description_.completion.consumer) >= description_.tx_frames) return false;
    const std::uint64_t address =
        (std::uint64_t{description_.rx_frames} + index % description_.tx_frames) * description_.frame_size;
    std::memcpy(bytes(address), data, size);
    entries<xdp_desc>(tx_, description_.tx)[index & (description_.tx.entries - 1)] = {
        address, static_cast<std::uint32_t>(size), 0};
    store(tx_, description_.tx.producer, index + 1);
    return true;
  }

  struct Flush {
    std::uint32_t calls = 0;
    std::uint32_t again = 0;  ///< calls that ended with EAGAIN: more to do
    std::uint32_t sent_by_first = 0;
  };
  /// Wakes the socket until the kernel has taken every posted frame.
  Flush flush() {
    Flush result;
    const std::uint32_t before = load(tx_, description_.tx.consumer);
    while (load(tx_, description_.tx.consumer) != load(tx_, description_.tx.producer)) {
      if (::sendto(socket_, nullptr, 0, MSG_DONTWAIT, nullptr, 0) < 0 && errno == EAGAIN) ++result.again;
      if (result.calls++ == 0) result.sent_by_first = load(tx_, description_.tx.consumer) - before;
    }
    return result;
  }

 private:
  static std::uint32_t load(const Mapping& ring, std::uint64_t at) {
    return __atomic_load_n(reinterpret_cast<std::uint32_t*>(ring.data() + at), __ATOMIC_ACQUIRE);
  }
  static void store(const Mapping& ring, std::uint64_t at, std::uint32_t value) {
    __atomic_store_n(reinterpret_cast<std::uint32_t*>(ring.data() + at), value, __ATOMIC_RELEASE);
  }
  template <class Entry>
  static Entry* entries(const Mapping& ring, const XskRing& layout) {
    return reinterpret_cast<Entry*>(ring.data() + layout.descriptors);
  }
  std::uint8_t* bytes(std::uint64_t address) { return reinterpret_cast<std::uint8_t*>(umem_.data() + address); }

  XskDescription description_;
  int socket_ = -1;
  Mapping umem_;
  Mapping rx_;
  Mapping tx_;
  Mapping fill_;
  Mapping completion_;
};

}  // namespace tandem::test
