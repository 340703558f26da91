// SPDX-License-Identifier: Apache-2.0
// Mapping: sole owner of an mmap()ed range.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "common/result.hpp"

namespace tandem {

/// A large page: what one entry of a page table's second level covers with small pages of 4 KiB. With others it is
/// another size, and nothing is gained.
inline constexpr std::size_t kLargePage = std::size_t{2} << 20;

/// Unmaps its range when it goes; move-only. Units are bytes; `offset` must be a multiple of the page size.
class Mapping {
 public:
  Mapping() noexcept = default;
  Mapping(void* base, std::size_t size) noexcept : base_(base), size_(size) {}
  Mapping(Mapping&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    if (this != &other) {
      reset();
      base_ = std::exchange(other.base_, nullptr);
      size_ = std::exchange(other.size_, 0);
    }
    return *this;
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { reset(); }

  /// Maps `size` bytes of `fd` from `offset`, shared. `what` names the object in the error text.
  static Result<Mapping> map(int fd, std::size_t size, int protection, off_t offset, const std::string& what,
                             int flags = MAP_SHARED) {
    void* base = ::mmap(nullptr, size, protection, flags, fd, offset);
    if (base == MAP_FAILED) return fail_errno("map " + what + " (" + std::to_string(size) + " bytes)");
    return Mapping{base, size};
  }

  /// The same, `fd` from its beginning, at a multiple of kLargePage: there, one entry of a page table stands for
  /// each large page that the file has.
  static Result<Mapping> map_large(int fd, std::size_t size, int protection, const std::string& what,
                                   int flags = MAP_SHARED) {
    auto room =
        map(-1, size + kLargePage, PROT_NONE, 0, "room for " + what, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE);
    if (!room) return room;
    const std::size_t before = -reinterpret_cast<std::uintptr_t>(room->base_) % kLargePage;
    std::byte* const begin = room->data() + before;
    if (::mmap(begin, size, protection, flags | MAP_FIXED, fd, 0) == MAP_FAILED)
      return fail_errno("map " + what + " (" + std::to_string(size) + " bytes)");
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    std::byte* const end = begin + (size + page - 1) / page * page;
    if (before != 0) ::munmap(room->base_, before);
    ::munmap(end, static_cast<std::size_t>(room->data() + room->size_ - end));
    room->base_ = begin;
    room->size_ = size;
    return room;
  }

  [[nodiscard]] std::byte* data() const noexcept { return static_cast<std::byte*>(base_); }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  explicit operator bool() const noexcept { return base_ != nullptr; }
  void reset() noexcept {
    if (base_ != nullptr) ::munmap(base_, size_);
    base_ = nullptr;
    size_ = 0;
  }

 private:
  void* base_ = nullptr;
  std::size_t size_ = 0;
};

/// Enters the pages of [at, at + size) into this process's page tables, for reading or for writing too, so that the
/// first access does not fault. Pages that no file has yet are allocated. A hint: what cannot be (a hole, a key, Linux
/// before 5.14) faults later, as it would have.
inline void populate(const void* at, std::size_t size, bool write) {
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(at) / page * page;
  const auto end = (reinterpret_cast<std::uintptr_t>(at) + size + page - 1) / page * page;
  ::madvise(reinterpret_cast<void*>(begin), end - begin, write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
}

}  // namespace tandem
