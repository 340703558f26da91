// SPDX-License-Identifier: Apache-2.0
// memfds with seals, and large pages for frames.
#include "recovery/uplink/sealed_memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>

#include <string>
#include <utility>

#include "common/mapping.hpp"

namespace tandem {

namespace {
constexpr int kCollapse = 25;  // MADV_COLLAPSE (asm-generic/mman-common.h), which glibc 2.36 does not name
}  // namespace

Result<UniqueFd> make_sealed_memory(const char* name, std::uint64_t size) {
  const std::string doing = std::string{"make the memfd "} + name + " of " + std::to_string(size) + " bytes";
  UniqueFd memory{::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING)};
  if (!memory || ::ftruncate(memory.get(), static_cast<off_t>(size)) != 0) return fail_errno(doing);
  // No holder can shrink the file under the others' mappings, nor take the seals off.
  if (::fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    return fail_errno(doing + ", seal it");
  return memory;
}

Result<UniqueFd> make_frames(const char* name, std::uint64_t size) {
  auto memory = make_sealed_memory(name, size);
  if (!memory) return memory;
  auto mapping = Mapping::map_large(memory->get(), size, PROT_READ | PROT_WRITE, name);
  if (!mapping) return tl::make_unexpected(std::move(mapping.error()));
  // Before anybody pins them. Only what has a page is collapsed, and each page that it has is copied: one of each.
  // Without memory to spare, or before Linux 6.1, they stay small.
  for (std::uint64_t at = 0; at < size; at += kLargePage) populate(mapping->data() + at, 1, true);
  ::madvise(mapping->data(), size, kCollapse);
  populate(mapping->data(), size, true);
  return memory;
}

}  // namespace tandem
