// SPDX-License-Identifier: Apache-2.0
// MemoryCgroup: a memory cgroup with a small limit, for one process that is to meet the OOM killer.
//
// Uses the v1 memory controller where there is one, else v2. The hierarchy is mounted below a directory of the test,
// because the test's own /sys shows none. Removed by the destructor, as soon as it is empty.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>

namespace tandem::test {

/// The controller's hierarchy, mounted for as long as this lives.
class MemoryController {
 public:
  /// Nothing where the host has no memory controller to offer; `reason` says why.
  static std::optional<MemoryController> mount(const std::string& directory, std::string& reason);
  MemoryController(MemoryController&& other) noexcept;
  MemoryController& operator=(MemoryController&&) = delete;
  ~MemoryController();

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] bool v2() const { return v2_; }

 private:
  MemoryController(std::string path, bool v2) : path_(std::move(path)), v2_(v2) {}
  std::string path_;
  bool v2_;
};

class MemoryCgroup {
 public:
  /// A new group that may use `limit` bytes; see made().
  MemoryCgroup(const MemoryController& controller, const std::string& name, std::uint64_t limit);
  ~MemoryCgroup();
  MemoryCgroup(const MemoryCgroup&) = delete;
  MemoryCgroup& operator=(const MemoryCgroup&) = delete;

  [[nodiscard]] bool made() const { return made_; }
  bool add(pid_t pid) const;
  /// Processes that the OOM killer ended here.
  [[nodiscard]] std::uint64_t killed() const;

 private:
  std::string path_;
  bool v2_, made_ = false;
};

}  // namespace tandem::test
