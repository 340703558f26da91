// SPDX-License-Identifier: Apache-2.0
// Faults on purpose, so that operators can see a failover before they need one.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>

#include "vhost-net-backend/shard.hpp"

namespace tandem {

namespace {

void load_beyond_file_end() {
  const int fd = ::memfd_create("tandem-drill", MFD_CLOEXEC);
  void* page = ::mmap(nullptr, 4096, PROT_READ, MAP_SHARED, fd, 0);
  if (page != MAP_FAILED) [[maybe_unused]]
    const volatile char byte = *static_cast<volatile char*>(page);
}

}  // namespace

void fail_on_purpose(DrillFault fault, const std::byte* read_only) {
  switch (fault) {
    case DrillFault::kBadStore: {
      // A wild pointer into guest memory: the view is read-only, so this faults instead of corrupting the guest.
      static const std::byte never_written{};
      const std::byte* target = read_only != nullptr ? read_only : &never_written;
      *const_cast<volatile std::byte*>(target) = std::byte{0xff};
      break;
    }
    case DrillFault::kAbort:
      std::abort();
    case DrillFault::kBusError:
      load_beyond_file_end();
      break;
    case DrillFault::kSpin:
      for (volatile bool forever = true; forever;) {
      }
      break;
    case DrillFault::kBlock:
      ::pause();
      break;
    case DrillFault::kExit:
      // Not exit(): its handlers would run beside threads that are still at work.
      ::_exit(EXIT_FAILURE);
    case DrillFault::kLivelock:  // Shard::livelock(): only the shard can beat
      break;
  }
}

}  // namespace tandem
