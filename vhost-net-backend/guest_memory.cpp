// SPDX-License-Identifier: Apache-2.0
// Mapping of guest memory, protection keys, and what happens when a front end takes pages away.
#include "vhost-net-backend/guest_memory.hpp"

#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <string>
#include <vector>

#include "vhost-net-backend/protection.hpp"

namespace tandem {

namespace {

// The key of all windows, or -1. Allocated once, before any thread starts; the right to write is per thread (pkeys(7)).
int window_key() {
  if constexpr (!kProtected) return -1;
  static const int key = ::pkey_alloc(0, PKEY_DISABLE_WRITE);
  return key;
}

// What the SIGBUS handler may touch: fixed slots, each published by its `size`, so that no lock is needed.
struct FaultRange {
  std::atomic<std::uintptr_t> base{0};
  std::atomic<std::size_t> size{0};
  std::atomic<std::atomic<bool>*> flag{nullptr};
  std::atomic<int> protection{0};
};
constexpr std::size_t kFaultRanges = 64 * kMaxMemoryRegions * 2 * 2;
FaultRange fault_ranges[kFaultRanges];
std::atomic<std::size_t> fault_ranges_used{0};

bool watch_range(const Mapping& mapping, int protection, std::atomic<bool>* flag) {
  for (std::size_t i = 0; i < kFaultRanges; ++i) {
    FaultRange& range = fault_ranges[i];
    if (range.size.load(std::memory_order_relaxed) != 0) continue;
    range.base.store(reinterpret_cast<std::uintptr_t>(mapping.data()), std::memory_order_relaxed);
    range.flag.store(flag, std::memory_order_relaxed);
    range.protection.store(protection, std::memory_order_relaxed);
    range.size.store(mapping.size(), std::memory_order_release);
    std::size_t used = fault_ranges_used.load(std::memory_order_relaxed);
    if (i >= used) fault_ranges_used.store(i + 1, std::memory_order_release);
    return true;
  }
  return false;
}

void unwatch_range(const Mapping& mapping) {
  const auto base = reinterpret_cast<std::uintptr_t>(mapping.data());
  for (std::size_t i = 0; i < fault_ranges_used.load(std::memory_order_relaxed); ++i) {
    FaultRange& range = fault_ranges[i];
    if (range.base.load(std::memory_order_relaxed) == base && range.size.load(std::memory_order_relaxed) != 0)
      range.size.store(0, std::memory_order_release);
  }
}

// Replaces the whole mapping, not the one page: huge pages cannot be replaced in part, and the device stops anyway.
bool replace_faulted(std::uintptr_t address) {
  const std::size_t used = fault_ranges_used.load(std::memory_order_acquire);
  for (std::size_t i = 0; i < used; ++i) {
    FaultRange& range = fault_ranges[i];
    const std::size_t size = range.size.load(std::memory_order_acquire);
    const std::uintptr_t base = range.base.load(std::memory_order_relaxed);
    if (size == 0 || address < base || address - base >= size) continue;
    const int protection = range.protection.load(std::memory_order_relaxed);
    // NOLINTNEXTLINE(performance-no-int-to-ptr): the address comes from the kernel as a number
    void* at = reinterpret_cast<void*>(base);
    if (::mmap(at, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
      return false;
    ::madvise(at, size, MADV_DONTDUMP);
    range.flag.load(std::memory_order_relaxed)->store(true, std::memory_order_relaxed);
    return true;
  }
  return false;
}

void on_bus_error(int signal, siginfo_t* info, void*) {
  // A fault has a positive code (BUS_ADRERR and its kin); kill() and sigqueue() have codes <= 0.
  if (info->si_code > 0 && replace_faulted(reinterpret_cast<std::uintptr_t>(info->si_addr))) return;
  struct sigaction default_action {};
  default_action.sa_handler = SIG_DFL;
  ::sigaction(signal, &default_action, nullptr);
  // A real fault happens again when the handler returns; one sent by kill() is sent once more.
  if (info->si_code <= 0) ::raise(signal);
}

}  // namespace

bool guest_windows_have_key() { return window_key() >= 0; }

WindowOpen::WindowOpen() {
  if (window_key() >= 0) ::pkey_set(window_key(), 0);
}
WindowOpen::~WindowOpen() {
  if (window_key() >= 0) ::pkey_set(window_key(), PKEY_DISABLE_WRITE);
}

Status install_guest_fault_handler() {
  window_key();
  struct sigaction action {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  if (::sigaction(SIGBUS, &action, nullptr) != 0) return fail_errno("install the handler for guest memory faults");
  return {};
}

Result<std::shared_ptr<GuestMemory>> GuestMemory::map(const DeviceDescription& description,
                                                      std::span<const UniqueFd> fds) {
  const std::string device = "memory of device " + std::to_string(description.device);
  if (description.region_count > kMaxMemoryRegions || fds.size() < description.region_count)
    return fail(ErrorKind::kInvalid, device + ": more regions than descriptors or than allowed");
  std::shared_ptr<GuestMemory> memory{new GuestMemory};
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  for (std::uint32_t i = 0; i < description.region_count; ++i) {
    const MemoryRegion& in = description.regions[i];
    const std::string what = device + ", region " + std::to_string(i);
    struct stat status {};
    struct statfs filesystem {};
    if (::fstat(fds[i].get(), &status) != 0 || ::fstatfs(fds[i].get(), &filesystem) != 0)
      return fail_errno("examine file of " + what);
    const auto file_size = static_cast<std::uint64_t>(status.st_size);
    if (in.size == 0 || in.mmap_offset > file_size || in.size > file_size - in.mmap_offset)
      return fail(ErrorKind::kInvalid, what + " is larger than its file (" + std::to_string(file_size) + " bytes)");
    // Offsets into huge pages must be mapped from a huge page's beginning; st_blksize is that size on hugetlbfs.
    const std::uint64_t unit =
        filesystem.f_type == HUGETLBFS_MAGIC ? std::max(page, static_cast<std::uint64_t>(status.st_blksize)) : page;
    const std::uint64_t start = in.mmap_offset / unit * unit;
    const std::uint64_t length = (in.mmap_offset + in.size - start + unit - 1) / unit * unit;
    auto view = Mapping::map(fds[i].get(), length, PROT_READ, static_cast<off_t>(start), what);
    if (!view) return within("map guest memory for reading", std::move(view.error()));
    auto window = Mapping::map(fds[i].get(), length, PROT_READ | PROT_WRITE, static_cast<off_t>(start), what,
                               MAP_SHARED | MAP_NORESERVE);
    if (!window) return within("map guest memory for writing", std::move(window.error()));
    for (const Mapping* mapping : {&*view, &*window}) {
      ::madvise(mapping->data(), mapping->size(), MADV_DONTDUMP);
      ::madvise(mapping->data(), mapping->size(), MADV_DONTFORK);
    }
    if (window_key() >= 0 && ::pkey_mprotect(window->data(), window->size(), PROT_READ | PROT_WRITE, window_key()) != 0)
      return fail_errno("protect the writable window of " + what + " with a key");
    Region& region = memory->regions_[memory->count_];
    region.guest_address = in.guest_address;
    region.user_address = in.user_address;
    region.size = in.size;
    region.view = view->data() + (in.mmap_offset - start);
    region.window = window->data() + (in.mmap_offset - start);
    Mappings& mappings = memory->mappings_[memory->count_];
    mappings.view = std::move(*view);
    mappings.window = std::move(*window);
    ++memory->count_;
    if (!watch_range(mappings.view, PROT_READ, &memory->faulted_) ||
        !watch_range(mappings.window, PROT_READ | PROT_WRITE, &memory->faulted_))
      return fail(ErrorKind::kSystem, what + ": too many regions mapped in this process; use fewer NICs per pair");
  }
  memory->seal_ = memory->checksum();
  return memory;
}

GuestMemory::~GuestMemory() {
  for (std::uint32_t i = 0; i < count_; ++i) {
    unwatch_range(mappings_[i].view);
    unwatch_range(mappings_[i].window);
  }
}

const GuestMemory::Region* GuestMemory::find_user(std::uint64_t address, std::uint64_t length) const {
  for (std::uint32_t i = 0; i < count_ && length != 0; ++i) {
    const std::uint64_t offset = address - regions_[i].user_address;
    if (offset < regions_[i].size && length <= regions_[i].size - offset) return &regions_[i];
  }
  return nullptr;
}

// Apart from find(), on purpose: see second_opinion.hpp.
const GuestMemory::Region* GuestMemory::find_again(std::uint64_t address) const {
  for (std::uint32_t i = 0; i < count_; ++i)
    if (address >= regions_[i].guest_address && address <= regions_[i].guest_address + (regions_[i].size - 1))
      return &regions_[i];
  return nullptr;
}

bool GuestMemory::covers(std::uint64_t address, std::uint64_t length) const {
  while (length != 0) {
    const Region* region = find_again(address);
    if (region == nullptr) return false;
    const std::uint64_t covered = region->guest_address + (region->size - 1) - address + 1;
    if (covered >= length) return true;
    address += covered;
    length -= covered;
  }
  return true;
}

const std::byte* GuestMemory::view_again(std::uint64_t address, std::uint64_t length) const {
  const Region* region = find_again(address);
  if (region == nullptr || length > region->guest_address + region->size - address) return nullptr;
  return region->view + (address - region->guest_address);
}

const std::byte* GuestMemory::view_user(std::uint64_t address, std::uint64_t length) const {
  const Region* region = find_user(address, length);
  return region == nullptr ? nullptr : region->view + (address - region->user_address);
}

void GuestMemory::warm_ring(std::uint64_t user_address, std::uint64_t length) const {
  const Region* region = find_user(user_address, length);
  if (region == nullptr) return;
  const std::uint64_t offset = user_address - region->user_address;
  populate(region->view + offset, length, false);
  populate(region->window + offset, length, true);
}

bool GuestMemory::warm_buffers(std::uint64_t address, std::uint64_t length, bool writable) const {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> resident;
  bool all = true;
  while (length != 0) {
    const Region* region = find(address, 1);
    const std::uint64_t offset = region == nullptr ? 0 : address - region->guest_address;
    const std::uint64_t piece =
        region == nullptr ? std::min<std::uint64_t>(page, length) : std::min(length, region->size - offset);
    if (region != nullptr && offset % page == 0) {
      // Memory that the guest has given back (a balloon) stays so. Of hugetlbfs this tells only what was touched here,
      // which is no loss: it takes few faults.
      resident.resize((piece + page - 1) / page);
      const std::byte* const base = writable ? region->window + offset : region->view + offset;
      if (::mincore(const_cast<std::byte*>(base), piece, resident.data()) != 0) return false;
      // By reading, also what is to be written: the kernel then enters the pages around each as well
      // (fault_around_bytes), writable where the file's kind allows, as memfds do.
      for (std::size_t first = 0; first < resident.size();) {
        std::size_t end = first;
        while (end < resident.size() && (resident[end] & 1) != 0) ++end;
        if (end != first) populate(base + first * page, (end - first) * page, false);
        all = all && end == resident.size();
        first = end + 1;
      }
    }
    address += piece;
    length -= piece;
  }
  return all;
}

WritableSpan GuestMemory::authorize_user(std::uint64_t address, std::uint64_t length) const {
  const Region* region = find_user(address, length);
  if (region == nullptr) return {};
  return {region->window + (address - region->user_address), static_cast<std::size_t>(length)};
}

}  // namespace tandem
