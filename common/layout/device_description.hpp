// SPDX-License-Identifier: Apache-2.0
// DeviceDescription: everything a backend must know to serve one vhost-user device, as plain data with a generation
// number.
//
// The supervisor builds it from vhost-user messages (vmm/) and sends it, with its descriptors, to both backends. A new
// generation replaces the old one as a whole. Descriptors travel beside it in one fixed order: one per memory region,
// then per vring its kick fd if kHasKick, its call fd if kHasCall.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace tandem {

inline constexpr std::uint32_t kDeviceDescriptionVersion = 1;
inline constexpr std::uint32_t kMaxMemoryRegions = 32;
inline constexpr std::uint32_t kMaxQueuePairsPerDevice = 32;
inline constexpr std::uint32_t kMaxVringsPerDevice = 2 * kMaxQueuePairsPerDevice;
/// Virtio 1.2, sections 2.7 and 2.8: a virtqueue has at most 32768 entries.
inline constexpr std::uint32_t kMaxVringSize = 32768;
/// VIRTIO_F_RING_PACKED: all vrings of the device are packed.
inline constexpr std::uint64_t kFeatureRingPacked = std::uint64_t{1} << 34;
/// The base of a packed ring that was never used: both positions at slot 0, both wrap counters 1 (Virtio 1.2, 2.8.1).
inline constexpr std::uint32_t kPackedStartBase = 0x80008000;

/// One range of guest memory. All units are bytes; validated by vmm/ (no overflow, no overlap, inside its file).
struct MemoryRegion {
  std::uint64_t guest_address = 0;
  std::uint64_t size = 0;
  std::uint64_t user_address = 0;  ///< the same range in the front end's address space: vring addresses use it
  std::uint64_t mmap_offset = 0;   ///< where the range begins in the file
};

/// vring 2*n is queue pair n's receive queue (uplink to guest), 2*n+1 its transmit queue, as in Virtio 1.2, 5.1.2.
struct VringDescription {
  static constexpr std::uint32_t kHasKick = 1u << 0;
  static constexpr std::uint32_t kHasCall = 1u << 1;
  /// Started, enabled, with addresses inside memory: the backend serves it.
  static constexpr std::uint32_t kRunning = 1u << 2;

  std::uint32_t flags = 0;
  std::uint32_t size = 0;  ///< entries; of a split ring a power of two
  /// Where to begin when start_count changed. Split: avail index. Packed: avail position in the low half, used position
  /// in the high one, each with its wrap counter in its highest bit.
  std::uint32_t base = 0;
  std::uint32_t start_count = 0;  ///< counts starts, so that an owner initializes its cursors once per start
  std::uint64_t descriptor_user_address = 0;
  std::uint64_t avail_user_address = 0;  ///< packed: the driver's event suppression area
  std::uint64_t used_user_address = 0;   ///< packed: the device's
};

struct DeviceDescription {
  std::uint32_t version = kDeviceDescriptionVersion;
  std::uint32_t device = 0;  ///< index in the pair, < kMaxDevices
  std::uint64_t generation = 0;
  std::uint64_t features = 0;  ///< acknowledged virtio features
  std::uint32_t mtu = 0;       ///< bytes of L3 payload, 0 when unknown
  std::uint32_t queue_pairs = 0;
  std::uint32_t region_count = 0;
  std::uint32_t reserved = 0;
  MemoryRegion regions[kMaxMemoryRegions];
  VringDescription vrings[kMaxVringsPerDevice];
};

static_assert(std::is_trivially_copyable_v<DeviceDescription>);
static_assert(sizeof(MemoryRegion) == 32 && sizeof(VringDescription) == 40);
static_assert(offsetof(DeviceDescription, regions) == 40);
static_assert(sizeof(DeviceDescription) == 40 + 32 * 32 + 64 * 40);

}  // namespace tandem
