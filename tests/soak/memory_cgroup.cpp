// SPDX-License-Identifier: Apache-2.0
// Both versions of the memory controller.
#include "tests/soak/memory_cgroup.hpp"

#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>

#include "tests/support/pair_host.hpp"

namespace tandem::test {

namespace {

bool write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  file << text << std::flush;
  return static_cast<bool>(file);
}

// The value after `key` in a file of "key value" lines.
std::uint64_t value_of(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::uint64_t value = 0;
  for (std::string word; file >> word >> value;)
    if (word == key) return value;
  return 0;
}

}  // namespace

std::optional<MemoryController> MemoryController::mount(const std::string& directory, std::string& reason) {
  ::mkdir(directory.c_str(), 0755);
  if (::mount("cgroup", directory.c_str(), "cgroup", 0, "memory") == 0) return MemoryController(directory, false);
  reason = std::string("no memory controller: v1: ") + std::strerror(errno);
  if (::mount("cgroup2", directory.c_str(), "cgroup2", 0, nullptr) == 0) {
    if (write_file(directory + "/cgroup.subtree_control", "+memory")) return MemoryController(directory, true);
    ::umount2(directory.c_str(), MNT_DETACH);
    reason += "; v2: it is not delegated";
  }
  ::rmdir(directory.c_str());
  return std::nullopt;
}

MemoryController::MemoryController(MemoryController&& other) noexcept
    : path_(std::exchange(other.path_, {})), v2_(other.v2_) {}

MemoryController::~MemoryController() {
  if (path_.empty()) return;
  ::umount2(path_.c_str(), MNT_DETACH);
  ::rmdir(path_.c_str());
}

MemoryCgroup::MemoryCgroup(const MemoryController& controller, const std::string& name, std::uint64_t limit)
    : path_(controller.path() + "/" + name), v2_(controller.v2()) {
  if (::mkdir(path_.c_str(), 0755) != 0) return;
  made_ = write_file(path_ + (v2_ ? "/memory.max" : "/memory.limit_in_bytes"), std::to_string(limit));
}

MemoryCgroup::~MemoryCgroup() {
  // Its process has been reaped, or is on its way out: the group is free once the kernel has let go of it.
  eventually([&] { return ::rmdir(path_.c_str()) == 0 || errno != EBUSY; });
}

bool MemoryCgroup::add(pid_t pid) const { return write_file(path_ + "/cgroup.procs", std::to_string(pid)); }

std::uint64_t MemoryCgroup::killed() const {
  return value_of(path_ + (v2_ ? "/memory.events" : "/memory.oom_control"), "oom_kill");
}

}  // namespace tandem::test
