// SPDX-License-Identifier: Apache-2.0
// The memory that an uplink shares: sealed, allocated, and mapped where large pages can be.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>

#include "common/mapping.hpp"
#include "recovery/uplink/sealed_memory.hpp"

using namespace tandem;

namespace {

std::uint64_t allocated(int fd) {
  struct stat found {};
  REQUIRE(::fstat(fd, &found) == 0);
  return static_cast<std::uint64_t>(found.st_blocks) * 512;
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

TEST_CASE("a large mapping that cannot be made says what of, and leaves nothing behind") {
  const auto refused = Mapping::map_large(-1, 4096, PROT_READ, "a file that is none");
  REQUIRE_FALSE(refused);
  CHECK(refused.error().text.find("a file that is none") != std::string::npos);
}
