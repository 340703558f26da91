// SPDX-License-Identifier: Apache-2.0
// The memory that an uplink shares: sealed, allocated, and mapped where large pages can be.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <fstream>
#include <sstream>
#include <string>

#include "common/mapping.hpp"
#include "common/unique_fd.hpp"
#include "recovery/uplink/sealed_memory.hpp"

using namespace tandem;

namespace {

std::uint64_t allocated(int fd) {
  struct stat found {};
  REQUIRE(::fstat(fd, &found) == 0);
  return static_cast<std::uint64_t>(found.st_blocks) * 512;
}

// Whether a plain memfd can be collapsed.
bool has_large_pages() {
  const UniqueFd file{::memfd_create("plain", MFD_CLOEXEC)};
  REQUIRE(::ftruncate(file.get(), kLargePage) == 0);
  const auto mapping = Mapping::map_large(file.get(), kLargePage, PROT_READ | PROT_WRITE, "plain");
  REQUIRE(mapping);
  std::fill_n(mapping->data(), kLargePage, std::byte{1});
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which glibc 2.36 does not name
  return ::madvise(mapping->data(), kLargePage, kCollapse) == 0;
}

// ShmemPmdMapped of the mapping at `address` (proc(5), smaps), in bytes.
std::uint64_t in_large_pages(const void* address) {
  std::ifstream file{"/proc/self/smaps"};
  std::ostringstream begin;
  begin << std::hex << reinterpret_cast<std::uintptr_t>(address) << '-';
  bool here = false;
  for (std::string line; std::getline(file, line);) {
    here = here ? line.find("VmFlags") == std::string::npos : line.starts_with(begin.str());
    if (here && line.starts_with("ShmemPmdMapped:")) return std::stoull(line.substr(15)) * 1024;
  }
  return 0;
}

}  // namespace

TEST_CASE("frames: zeroes, all there, and nobody can change their size") {
  const std::uint64_t size = GENERATE(8u << 20, (2u << 20) + 4096u, 4096u);
  const auto frames = make_frames("frames-test", size);
  REQUIRE(frames);
  CHECK(allocated(frames->get()) >= size);
  CHECK(::fcntl(frames->get(), F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL));
  CHECK(::ftruncate(frames->get(), 0) != 0);
  const auto mapping = Mapping::map_large(frames->get(), size, PROT_READ | PROT_WRITE, "frames");
  REQUIRE(mapping);
  CHECK(mapping->size() == size);
  CHECK(reinterpret_cast<std::uintptr_t>(mapping->data()) % kLargePage == 0);
  CHECK(std::all_of(mapping->data(), mapping->data() + size, [](std::byte byte) { return byte == std::byte{}; }));
  std::fill_n(mapping->data(), size, std::byte{0x5a});
  const auto again = Mapping::map(frames->get(), size, PROT_READ, 0, "frames");
  REQUIRE(again);
  CHECK(std::equal(mapping->data(), mapping->data() + size, again->data()));
}

TEST_CASE("frames: large pages, where the kernel gives any") {
  constexpr std::uint64_t kSize = 8 << 20;
  const auto frames = make_frames("frames-test", kSize);
  REQUIRE(frames);
  const auto mapping =
      Mapping::map_large(frames->get(), kSize, PROT_READ | PROT_WRITE, "frames", MAP_SHARED | MAP_POPULATE);
  REQUIRE(mapping);
  if (!has_large_pages()) {
    WARN("SKIPPED: this kernel has no large pages to spare (MADV_COLLAPSE)");
    return;
  }
  CHECK(in_large_pages(mapping->data()) == kSize);
}

TEST_CASE("a large mapping that cannot be made says what of") {
  const auto refused = Mapping::map_large(-1, 4096, PROT_READ, "a file that is none");
  REQUIRE_FALSE(refused);
  CHECK(refused.error().text.find("a file that is none") != std::string::npos);
}
