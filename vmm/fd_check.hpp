// SPDX-License-Identifier: Apache-2.0
// What a descriptor from a front end really is: eventfd or shared memory file, and which one.
//
// A name or a message type proves nothing: each descriptor is asked the kernel about. Needs /proc. Any thread.
#pragma once

#include <cstdint>

#include "common/result.hpp"

namespace tandem {

/// Same value: same kernel object, as long as a descriptor of it stays open.
struct FileIdentity {
  std::uint64_t device = 0;
  std::uint64_t inode = 0;
  friend bool operator==(const FileIdentity&, const FileIdentity&) = default;
};

/// Succeeds for eventfds only, and makes the eventfd non-blocking: a full counter must not block a poll thread, nor an
/// empty one. The flag belongs to the open file, so the front end sees it too; QEMU and DPDK set it themselves.
Status check_eventfd(int fd);

/// Whether two eventfds are one object. False when the kernel does not say (no eventfd-id in fdinfo, before Linux 5.2).
bool same_eventfd(int first, int second);

/// Succeeds for a file of tmpfs (memfd) or hugetlbfs, open for reading and writing, not sealed against writing, whose
/// size covers [offset, offset + size). The sum must not overflow (the caller checked). A file can still shrink later:
/// consumers treat SIGBUS in their mapping as "this device stops".
Status check_memory_file(int fd, std::uint64_t offset, std::uint64_t size);

Result<FileIdentity> file_identity(int fd);

}  // namespace tandem
