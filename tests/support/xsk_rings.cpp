// SPDX-License-Identifier: Apache-2.0
// The kernel's side of an AF_XDP socket.
#include "tests/support/xsk_rings.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace tandem::test {

namespace {

// Producer, consumer and flags a cache line apart, then the entries, as the kernel lays them out.
XskRing place_ring(std::uint64_t& offset, std::uint32_t entries, std::uint32_t entry_size) {
  XskRing ring;
  ring.mmap_offset = offset;
  ring.producer = 0;
  ring.consumer = 64;
  ring.flags = 128;
  ring.descriptors = 192;
  ring.entries = entries;
  ring.entry_size = entry_size;
  ring.mmap_size = 192 + (std::uint64_t{entries} * entry_size + 63) / 64 * 64;
  offset += ring.mmap_size;
  return ring;
}

}  // namespace

XskDescription describe_xsk(const XskShape& shape) {
  XskDescription description;
  description.frame_size = shape.frame_size;
  description.headroom = 0;
  description.rx_frames = shape.rx_frames;
  description.tx_frames = shape.tx_frames;
  description.max_packet = shape.frame_size - shape.headroom;
  description.umem_size = std::uint64_t{shape.rx_frames + shape.tx_frames} * shape.frame_size;
  std::uint64_t offset = 0;
  description.rx = place_ring(offset, shape.rx_frames, sizeof(xdp_desc));
  description.tx = place_ring(offset, shape.tx_entries, sizeof(xdp_desc));
  description.fill = place_ring(offset, shape.rx_frames, sizeof(std::uint64_t));
  description.completion = place_ring(offset, shape.tx_frames, sizeof(std::uint64_t));
  return description;
}

std::uint64_t xsk_ring_bytes(const XskDescription& description) {
  return description.completion.mmap_offset + description.completion.mmap_size;
}

KernelXsk::KernelXsk(const XskDescription& description, std::byte* rings, std::byte* frames)
    : description_(description), rings_(rings), frames_(frames) {}

void KernelXsk::rebase(std::byte* rings, std::byte* frames) {
  rings_ = rings;
  frames_ = frames;
}

template <class Entry>
Entry& KernelXsk::entry(const XskRing& ring, std::uint32_t index) const {
  return reinterpret_cast<Entry*>(rings_ + ring.mmap_offset + ring.descriptors)[index & (ring.entries - 1)];
}

std::uint32_t KernelXsk::load(const XskRing& ring, std::uint64_t field) const {
  return std::atomic_ref<std::uint32_t>(word(ring.mmap_offset + field)).load(std::memory_order_acquire);
}

void KernelXsk::store(const XskRing& ring, std::uint64_t field, std::uint32_t value) const {
  std::atomic_ref<std::uint32_t>(word(ring.mmap_offset + field)).store(value, std::memory_order_release);
}

std::uint32_t KernelXsk::filled(const XskRing& ring) const {
  return load(ring, ring.producer) - load(ring, ring.consumer);
}

xdp_desc& KernelXsk::rx_entry(std::uint32_t index) const { return entry<xdp_desc>(description_.rx, index); }

void KernelXsk::reset(std::uint32_t index) {
  for (const XskRing* ring : {&description_.rx, &description_.tx, &description_.fill, &description_.completion}) {
    store(*ring, ring->producer, index);
    store(*ring, ring->consumer, index);
  }
  for (std::uint32_t i = 0; i < description_.rx_frames; ++i)
    entry<std::uint64_t>(description_.fill, index + i) = std::uint64_t{i} * description_.frame_size;
  store(description_.fill, description_.fill.producer, index + description_.rx_frames);
  in_flight_.clear();
  bad_descriptors_ = 0;
}

std::uint32_t KernelXsk::transmit_waiting() const { return filled(description_.tx); }
std::uint32_t KernelXsk::receive_waiting() const { return filled(description_.rx); }

std::optional<std::span<const std::byte>> KernelXsk::send() {
  const XskRing& tx = description_.tx;
  while (filled(tx) != 0) {
    const std::uint32_t consumer = load(tx, tx.consumer);
    const xdp_desc descriptor = entry<xdp_desc>(tx, consumer);
    store(tx, tx.consumer, consumer + 1);
    const std::uint64_t first = std::uint64_t{description_.rx_frames} * description_.frame_size;
    const std::uint64_t inside = descriptor.addr % description_.frame_size;
    if (descriptor.addr < first || descriptor.addr >= description_.umem_size || descriptor.len == 0 ||
        descriptor.len > description_.frame_size - inside || descriptor.options != 0) {
      ++bad_descriptors_;
      continue;
    }
    in_flight_.push_back(descriptor.addr);
    return std::span<const std::byte>{frames_ + descriptor.addr, descriptor.len};
  }
  return std::nullopt;
}

std::uint32_t KernelXsk::complete(std::uint32_t most) {
  const XskRing& ring = description_.completion;
  std::uint32_t done = 0;
  for (; done < most && !in_flight_.empty() && filled(ring) < ring.entries; ++done) {
    const std::uint32_t producer = load(ring, ring.producer);
    entry<std::uint64_t>(ring, producer) = in_flight_.front();
    in_flight_.pop_front();
    store(ring, ring.producer, producer + 1);
  }
  return done;
}

bool KernelXsk::receive(std::span<const std::byte> packet) {
  const XskRing& fill = description_.fill;
  const XskRing& rx = description_.rx;
  if (filled(fill) == 0 || filled(rx) == rx.entries || packet.size() > description_.max_packet) return false;
  const std::uint32_t consumer = load(fill, fill.consumer);
  const std::uint64_t frame = entry<std::uint64_t>(fill, consumer);
  store(fill, fill.consumer, consumer + 1);
  if (frame >= std::uint64_t{description_.rx_frames} * description_.frame_size) {
    ++bad_descriptors_;
    return false;
  }
  const std::uint64_t start = frame / description_.frame_size * description_.frame_size;
  const std::uint64_t address = start + (description_.frame_size - description_.max_packet);
  std::memcpy(frames_ + address, packet.data(), packet.size());
  const std::uint32_t producer = load(rx, rx.producer);
  entry<xdp_desc>(rx, producer) = {address, static_cast<std::uint32_t>(packet.size()), 0};
  store(rx, rx.producer, producer + 1);
  return true;
}

FrameAudit KernelXsk::audit(std::span<const std::uint64_t> transmit_busy) const {
  std::vector<std::uint32_t> places(description_.rx_frames + description_.tx_frames, 0);
  const auto note = [&](std::uint64_t address) {
    const std::uint64_t frame = address / description_.frame_size;
    if (frame < places.size()) ++places[frame];
  };
  const auto walk = [&](const XskRing& ring, auto address) {
    const std::uint32_t consumer = load(ring, ring.consumer);
    const std::uint32_t count = std::min(filled(ring), ring.entries);
    for (std::uint32_t i = 0; i < count; ++i) note(address(ring, consumer + i));
  };
  const auto descriptor = [this](const XskRing& ring, std::uint32_t i) { return entry<xdp_desc>(ring, i).addr; };
  const auto address = [this](const XskRing& ring, std::uint32_t i) { return entry<std::uint64_t>(ring, i); };
  walk(description_.rx, descriptor);
  walk(description_.fill, address);
  walk(description_.tx, descriptor);
  walk(description_.completion, address);
  for (const std::uint64_t frame : in_flight_) note(frame);
  FrameAudit audit;
  for (std::uint32_t i = 0; i < places.size(); ++i) {
    const bool transmit = i >= description_.rx_frames;
    const std::uint32_t bit = i - description_.rx_frames;
    const bool wanted = !transmit || (transmit_busy[bit / 64] >> (bit % 64) & 1u) != 0;
    if (places[i] > 1 || (places[i] == 1 && !wanted)) ++audit.doubled;
    if (places[i] == 0 && wanted) ++audit.leaked;
  }
  return audit;
}

}  // namespace tandem::test
