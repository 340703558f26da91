// SPDX-License-Identifier: Apache-2.0
// Files in memory that an uplink shares with a pair's members: of a size that no holder can change, so that nobody's
// mapping of them ever faults (memfd_create(2), file sealing).
#pragma once

#include <cstdint>

#include "common/result.hpp"
#include "common/unique_fd.hpp"

namespace tandem {

/// `size` bytes of zeroes, in a memfd called `name`.
Result<UniqueFd> make_sealed_memory(const char* name, std::uint64_t size);

/// The same for a UMEM, in large pages where the kernel has some: three processes map it, and with small ones the page
/// tables of each take 4 KiB for every 2 MiB. All of it is allocated, as registration would do, unless memory is short.
Result<UniqueFd> make_frames(const char* name, std::uint64_t size);

}  // namespace tandem
