// SPDX-License-Identifier: Apache-2.0
// VringState: what a front end has told us about one vring, and the pure rules about when it runs.
//
// Source: vhost-user.rst "Ring states" and "Vring state description"; Virtio 1.2, 2.7 and 2.8 (sizes and alignment).
// `packed`: VIRTIO_F_RING_PACKED was acknowledged. Not thread-safe.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/layout/device_description.hpp"
#include "common/result.hpp"
#include "common/unique_fd.hpp"
#include "vmm/memory_table.hpp"

namespace tandem {

/// The part without descriptors, saved as it is. Zero means "not told".
struct VringRecord {
  enum Enable : std::uint32_t { kUnset = 0, kDisabled = 1, kEnabled = 2 };

  std::uint32_t size = 0;  ///< entries
  std::uint32_t base = 0;  ///< VringDescription::base to start from, if `ran` is 0; see vring_start()
  std::uint32_t start_count = 0;
  std::uint32_t enable = kUnset;  ///< what SET_VRING_ENABLE said last; survives a stop
  std::uint32_t started = 0;      ///< between SET_VRING_KICK and GET_VRING_BASE (or reset)
  std::uint32_t ran = 0;          ///< an owner may have moved the cursors since `base` was set
  std::uint32_t has_addresses = 0;
  std::uint32_t has_base = 0;  ///< `base` was told, or is where an owner stopped
  std::uint64_t descriptor_user_address = 0;
  std::uint64_t avail_user_address = 0;
  std::uint64_t used_user_address = 0;
};
static_assert(std::is_trivially_copyable_v<VringRecord> && sizeof(VringRecord) == 56);

struct VringState {
  VringRecord record;
  UniqueFd kick;  ///< empty on a started vring: the front end wants it polled
  UniqueFd call;

  /// Stops it. The avail index stays with the owner (`ran`) until it is asked for or replaced. The call fd stays, as
  /// QEMU does not always send it again; the kick fd goes, as a new one is what starts the vring.
  void stop() noexcept;

  /// A kick fd (or "poll") came. Starts a stopped vring; if nobody asked for the index where an earlier run ended, nor
  /// gave a new one, the new run begins at 0 like after any reset.
  void start(UniqueFd new_kick) noexcept;

  /// The next run begins at the beginning, unless a base is told.
  void forget_base() noexcept;
};

/// 1 to 32768; split: a power of two.
Status check_vring_size(std::uint32_t size, bool packed);

/// Alignment of the three parts (Virtio 1.2, 2.7 and 2.8). Split: descriptor table 16, avail ring 2, used ring 4.
/// Packed: descriptor ring 16, event suppression areas 4.
Status check_vring_alignment(const VringRecord& vring, bool packed);

/// Each part, with the event index fields, inside one region and aligned in its file too. Needs size and addresses.
Status check_vring_inside(const VringRecord& vring, bool packed, const MemoryTable& memory);

/// Where a run that has not begun begins: the base that was told, else the beginning.
std::uint32_t vring_start(const VringRecord& vring, bool packed);

/// Packed: both positions inside the ring, the used one at most a ring behind the other. Needs size.
Status check_vring_start(const VringRecord& vring, bool packed);

/// The base of a packed ring as told by SET_VRING_BASE, with its used half filled in: DPDK's virtio-user says 0x8000
/// and nothing about it. A used position of slot 0 with wrap counter 0 makes no sense beside an avail wrap counter
/// of 1.
std::uint32_t complete_packed_base(std::uint32_t told);

/// Whether an owner may serve it. `enabled_by_default`: VHOST_USER_F_PROTOCOL_FEATURES was not acknowledged.
bool vring_runs(const VringRecord& vring, bool packed, const MemoryTable& memory, bool enabled_by_default);

}  // namespace tandem
