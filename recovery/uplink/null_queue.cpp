// SPDX-License-Identifier: Apache-2.0
// Rings and frames in two memfds.
#include "recovery/uplink/null_queue.hpp"

#include <linux/if_xdp.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>

#include "common/mapping.hpp"
#include "recovery/uplink/sealed_memory.hpp"

namespace tandem {
namespace {

constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kCacheLine = 64;
constexpr std::uint64_t kSourceMac = 6;  // where an Ethernet header has it
constexpr std::array<std::byte, 8> kSender = {std::byte{2},   {}, {}, {}, {}, std::byte{1}, std::byte{0x88},
                                              std::byte{0xb5}};

/// Indices a cache line apart, as the kernel has them; each ring in pages of its own, so that it can be mapped alone.
XskRing place_ring(std::uint64_t& offset, std::uint32_t entries, std::size_t entry_size) {
  XskRing ring;
  ring.mmap_offset = offset;
  ring.producer = 0;
  ring.consumer = kCacheLine;
  ring.flags = 2 * kCacheLine;
  ring.descriptors = 3 * kCacheLine;
  ring.entries = entries;
  ring.entry_size = static_cast<std::uint32_t>(entry_size);
  ring.mmap_size = ring.descriptors + entries * entry_size;
  offset = (offset + ring.mmap_size + kPage - 1) / kPage * kPage;
  return ring;
}

// A source goes round so few of its frames, four bursts, that they stay in a core's cache, as an allocator's that hands
// out what was freed last: it is to cost nothing.
constexpr std::uint32_t kSourceFrames = 128;

Status post_frames(const XskRing& ring, const XskDescription& description, int rings) {
  auto mapping = Mapping::map(rings, ring.mmap_size, PROT_READ | PROT_WRITE, static_cast<off_t>(ring.mmap_offset),
                              "a null uplink's fill ring");
  if (!mapping) return tl::make_unexpected(std::move(mapping.error()));
  const bool source = (description.flags & XskDescription::kSource) != 0;
  const std::uint32_t frames = source ? std::min(kSourceFrames, description.rx_frames) : description.rx_frames;
  auto* entries = reinterpret_cast<std::uint64_t*>(mapping->data() + ring.descriptors);
  for (std::uint64_t frame = 0; frame < frames; ++frame) entries[frame] = frame * description.frame_size;
  // Nobody else maps it yet: no order is needed.
  *reinterpret_cast<std::uint32_t*>(mapping->data() + ring.producer) = frames;
  return {};
}

Status write_frames(const XskDescription& description, const std::string& to, int umem) {
  auto mapping = Mapping::map(umem, description.umem_size, PROT_READ | PROT_WRITE, 0, "a null uplink's frames");
  if (!mapping) return tl::make_unexpected(std::move(mapping.error()));
  for (std::uint64_t frame = 0; frame < description.rx_frames; ++frame) {
    std::byte* packet = mapping->data() + frame * description.frame_size + kXskKernelHeadroom;
    const auto* destination = reinterpret_cast<const std::byte*>(to.data());
    std::copy(destination, destination + kSourceMac, packet);
    std::copy(kSender.begin(), kSender.end(), packet + kSourceMac);
  }
  return {};
}

}  // namespace

Result<XskQueue> make_null_queue(std::uint32_t queue, const NullQueuePlan& plan) {
  const std::string doing = "make null queue " + std::to_string(queue);
  XskDescription description;
  description.flags = XskDescription::kInMemory | plan.flags;
  description.queue = queue;
  description.frame_size = plan.frame_size;
  description.rx_frames = kXskRxFrames;
  description.tx_frames = kXskTxFrames;
  description.max_packet = plan.frame_size - kXskKernelHeadroom;
  description.source_length = plan.source_length;
  description.umem_size = std::uint64_t{kXskRxFrames + kXskTxFrames} * plan.frame_size;
  std::uint64_t size = 0;
  description.rx = place_ring(size, kXskRxFrames, sizeof(xdp_desc));
  description.tx = place_ring(size, kXskTxFrames, sizeof(xdp_desc));
  description.fill = place_ring(size, kXskRxFrames, sizeof(std::uint64_t));
  description.completion = place_ring(size, kXskTxFrames, sizeof(std::uint64_t));
  auto rings = make_sealed_memory("tandem-null-rings", size);
  if (!rings) return within(doing, std::move(rings.error()));
  auto umem = make_frames("tandem-null-umem", description.umem_size);
  if (!umem) return within(doing, std::move(umem.error()));
  if (auto posted = post_frames(description.fill, description, rings->get()); !posted)
    return within(doing, std::move(posted.error()));
  if ((plan.flags & XskDescription::kSource) != 0)
    if (auto written = write_frames(description, plan.to, umem->get()); !written)
      return within(doing, std::move(written.error()));
  return XskQueue{description, std::move(*rings), std::move(*umem)};
}

}  // namespace tandem
