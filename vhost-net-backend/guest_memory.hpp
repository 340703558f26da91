// SPDX-License-Identifier: Apache-2.0
// GuestMemory: one device's memory regions, seen read-only, and the one door through which they may be written.
//
// Each region is mapped twice. The view is read-only: every read goes there, and a stray store through a pointer into
// it is a SIGSEGV, which is a failover, not corruption. The window is writable, behind a protection key where the CPU
// has them, and its addresses never leave this class except as a WritableSpan, whose bounds are those of one descriptor
// (or of one used ring) that was validated for the transaction in hand: the write authorization (docs/transactions.md).
//
// Thread: made and destroyed by the control thread, used by poll threads through shared ownership. Excluded from core
// dumps, not inherited by children, never populated wholesale.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <type_traits>

#include "common/layout/device_description.hpp"
#include "common/mapping.hpp"
#include "common/result.hpp"
#include "common/unique_fd.hpp"
#include "vhost-net-backend/seal.hpp"

namespace tandem {

/// Writable bytes of guest memory that the current transaction is authorized to write. Valid while its GuestMemory is.
class WritableSpan {
 public:
  WritableSpan() = default;
  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] std::byte* data() const { return data_; }

 private:
  friend class GuestMemory;
  WritableSpan(std::byte* data, std::size_t size) : data_(data), size_(size) {}
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

class GuestMemory {
  struct Region {
    std::uint64_t guest_address, user_address, size;
    const std::byte* view;
    std::byte* window;
  };

 public:
  /// Maps all regions of `description`, whose first `region_count` descriptors are `fds`. The regions were validated by
  /// vmm/; what a mapping needs is checked again here, because a backend trusts nobody with its own address space.
  static Result<std::shared_ptr<GuestMemory>> map(const DeviceDescription& description, std::span<const UniqueFd> fds);
  ~GuestMemory();
  GuestMemory(const GuestMemory&) = delete;
  GuestMemory& operator=(const GuestMemory&) = delete;

  /// Guest-physical range for reading; nullptr unless [address, address + length) lies in one region and length > 0.
  [[nodiscard]] const std::byte* view(std::uint64_t address, std::uint64_t length) const {
    const Region* region = find(address, length);
    return region == nullptr ? nullptr : region->view + (address - region->guest_address);
  }
  /// Whether view_some(), or authorize_some(), rightly gave `at` for `address`: the answer checked backwards.
  [[nodiscard]] bool is_view_of(const std::byte* at, std::uint64_t address) const {
    return is_mapped_by(&Region::view, at, address);
  }
  [[nodiscard]] bool is_window_of(const std::byte* at, std::uint64_t address) const {
    return is_mapped_by(&Region::window, at, address);
  }
  /// Whether all of [address, address + length) is memory of the guest, in one region or across several that adjoin.
  [[nodiscard]] bool covers(std::uint64_t address, std::uint64_t length) const;
  /// As view(), by the way of covers(); for the second opinion (second_opinion.hpp), which must not rest on find().
  [[nodiscard]] const std::byte* view_again(std::uint64_t address, std::uint64_t length) const;
  /// Longest readable piece at `address`, at most `length` bytes, in one region; empty if none. For data that may cross
  /// regions.
  [[nodiscard]] std::span<const std::byte> view_some(std::uint64_t address, std::uint64_t length) const {
    const Region* region = find(address, 1);
    if (region == nullptr) return {};
    const std::uint64_t offset = address - region->guest_address;
    return {region->view + offset, std::min(length, region->size - offset)};
  }
  /// The same for writing: call only with a range that a device-writable descriptor of this transaction names.
  [[nodiscard]] WritableSpan authorize_some(std::uint64_t address, std::uint64_t length) const {
    const Region* region = find(address, 1);
    if (region == nullptr) return {};
    const std::uint64_t offset = address - region->guest_address;
    return {region->window + offset, static_cast<std::size_t>(std::min(length, region->size - offset))};
  }

  /// Brings what view_some() and authorize_some() would give into this CPU's cache: a hint, for any address.
  void prefetch_view(std::uint64_t address) const {
    if (const Region* region = find(address, 2 * std::uint64_t{kCacheLine}); region != nullptr) {
      const std::byte* at = region->view + (address - region->guest_address);
      __builtin_prefetch(at);
      __builtin_prefetch(at + kCacheLine);
    }
  }
  void prefetch_window(std::uint64_t address) const {
    if (const Region* region = find(address, 2 * std::uint64_t{kCacheLine}); region != nullptr) {
      const std::byte* at = region->window + (address - region->guest_address);
      prefetch_to_write(at);
      prefetch_to_write(at + kCacheLine);
    }
  }

  template <auto Base>
  class Finder;
  /// view() for many addresses in a row, and the same for writing: that only with ranges that device-writable
  /// descriptors of this transaction name. Private to one burst.
  using Reader = Finder<&Region::view>;
  using Writer = Finder<&Region::window>;
  /// A hint: this CPU is about to write at `at`.
  static void prefetch_to_write(const std::byte* at) {
#if defined(__x86_64__)
    // The compiler's own, with the instruction set that DPDK asks for, would fetch the line to read.
    asm volatile("prefetchw %0" : : "m"(*at));
#else
    __builtin_prefetch(at, 1);
#endif
  }

  /// Front-end (user) address range: vring addresses use these.
  [[nodiscard]] const std::byte* view_user(std::uint64_t address, std::uint64_t length) const;
  [[nodiscard]] WritableSpan authorize_user(std::uint64_t address, std::uint64_t length) const;

  /// populate() for what a takeover is about to touch: a ring, by user addresses, in view and window (needs
  /// WindowOpen); or pages with buffers, by guest addresses, as far as the guest has memory there. Addresses that lie
  /// nowhere are left alone. False: some of the guest's pages are not in memory yet, or any more.
  void warm_ring(std::uint64_t user_address, std::uint64_t length) const;
  bool warm_buffers(std::uint64_t address, std::uint64_t length, bool writable) const;

  /// True once a page of this memory was found missing (SIGBUS): its content is private zeroes from then on, the device
  /// stops.
  [[nodiscard]] bool faulted() const { return faulted_.load(std::memory_order_relaxed); }

  /// False: what map() has set was changed since (seal.hpp).
  [[nodiscard]] bool is_whole() const { return seal_ == checksum(); }

 private:
  static constexpr std::uint32_t kCacheLine = 64;
  struct Mappings {
    Mapping view, window;
  };
  GuestMemory() = default;
  template <class Base>
  [[nodiscard]] bool is_mapped_by(Base Region::*base, const std::byte* at, std::uint64_t address) const {
    // Worked out once more, and not taken from what find() has just worked out.
    asm volatile("" : "+r"(at), "+r"(address));
    for (std::uint32_t i = 0; i < count_; ++i) {
      const std::uint64_t offset = address - regions_[i].guest_address;
      if (offset < regions_[i].size && regions_[i].*base + offset == at) [[likely]]
        return true;
    }
    return false;
  }
  // The region that `address` lies in.
  [[nodiscard]] const Region* find_again(std::uint64_t address) const;
  [[nodiscard]] const Region* find(std::uint64_t address, std::uint64_t length) const {
    for (std::uint32_t i = 0; i < count_; ++i) {
      const Region& region = regions_[i];
      // Unsigned wrap makes an address below the region a huge offset: one comparison serves both ends.
      const std::uint64_t offset = address - region.guest_address;
      if (offset < region.size && length <= region.size - offset) [[likely]]
        return length == 0 ? nullptr : &region;
    }
    return nullptr;
  }
  // Whether [address, address + length), of one byte or more, lies in `last`, or in another region, which `last`
  // becomes.
  [[nodiscard]] bool find_from(Region& last, std::uint64_t address, std::uint64_t length) const {
    const std::uint64_t offset = address - last.guest_address;
    if (offset < last.size && length <= last.size - offset) [[likely]]
      return true;
    const Region* const other = find(address, length);
    if (other == nullptr) return false;
    last = *other;
    return true;
  }
  [[nodiscard]] const Region* find_user(std::uint64_t address, std::uint64_t length) const;

  [[nodiscard]] std::uint64_t checksum() const {
    std::uint64_t sum = count_;
    for (std::uint32_t i = 0; i < count_ && i < kMaxMemoryRegions; ++i) sum ^= fold(regions_[i]);
    return sum;
  }

  std::uint32_t count_ = 0;
  std::atomic<bool> faulted_{false};
  std::uint64_t seal_ = 0;
  Region regions_[kMaxMemoryRegions];
  Mappings mappings_[kMaxMemoryRegions];
};

/// Most addresses lie in the region that the one before lay in. `Base`: where a region is mapped.
template <auto Base>
class GuestMemory::Finder {
 public:
  explicit Finder(const GuestMemory& memory) : memory_(memory) {
    if (memory.count_ != 0) last_ = memory.regions_[0];
  }
  /// Where [address, address + length) is mapped; nullptr if it is not in one region. `length` is 1 or more.
  [[nodiscard]] auto find(std::uint64_t address, std::uint64_t length) {
    using Bytes = std::remove_reference_t<decltype(last_.*Base)>;
    return memory_.find_from(last_, address, length) ? last_.*Base + (address - last_.guest_address) : Bytes{nullptr};
  }
  /// Whether find() rightly gave `at` for `address`.
  [[nodiscard]] bool confirms(const std::byte* at, std::uint64_t address) const {
    return memory_.is_mapped_by(Base, at, address);
  }

 private:
  const GuestMemory& memory_;
  Region last_{};
};

/// While one lives, this thread may write through windows (no-op without protection keys). Not nested.
class WindowOpen {
 public:
  WindowOpen();
  ~WindowOpen();
  WindowOpen(const WindowOpen&) = delete;
  WindowOpen& operator=(const WindowOpen&) = delete;
};

/// Installs the SIGBUS handler: a fault inside some GuestMemory turns that mapping into private zeroes and sets
/// faulted(); any other SIGBUS keeps its default action, so that the fence sees a death. Once per process, before poll
/// threads start.
Status install_guest_fault_handler();

/// True if windows are behind a protection key.
bool guest_windows_have_key();

}  // namespace tandem
