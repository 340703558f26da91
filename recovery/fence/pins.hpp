// SPDX-License-Identifier: Apache-2.0
// Pins: BPF objects that outlive the process that made them, as files of a bpffs directory.
#pragma once

#include <string>

#include "common/result.hpp"
#include "common/unique_fd.hpp"

namespace tandem {

/// Makes `directory` (mode 0700) on a BPF file system, and mounts one on /sys/fs/bpf if the directory lies below it and
/// nothing is mounted there. An existing directory is fine. Needs root.
Status make_pin_directory(const std::string& directory);

/// Pins an open BPF object; an existing pin of that name is replaced (its object lives on while others hold it).
Status pin_object(int fd, const std::string& path);

/// Opens a pinned object. kGone: there is no such pin.
Result<UniqueFd> open_pin(const std::string& path);

/// Removes every pin in `directory` and the directory, then its parents while they are empty and below /sys/fs/bpf.
/// What is not there is not an error.
Status remove_pin_directory(const std::string& directory);

}  // namespace tandem
