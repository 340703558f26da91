// SPDX-License-Identifier: Apache-2.0
// Victim: the inside of a running process, to be read and damaged: mappings, memory, functions, one stopped thread.
//
// Root only. Thread: one. The process may die at any moment; then reads and writes fail and say so.
#pragma once

#include <sys/types.h>
#include <sys/user.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "common/unique_fd.hpp"

namespace tandem::test {

struct Region {
  std::uint64_t begin = 0, end = 0;
  std::string permissions;  ///< "rw-p" (proc(5), /proc/PID/maps)
  std::uint64_t offset = 0;
  std::string path;
  [[nodiscard]] std::uint64_t size() const { return end - begin; }
  [[nodiscard]] bool writable() const { return permissions[1] == 'w'; }
  [[nodiscard]] bool shared() const { return permissions[3] == 's'; }
};

struct Function {
  std::string name;  ///< mangled
  std::uint64_t address = 0, size = 0;
};

class Victim {
 public:
  explicit Victim(pid_t pid);

  [[nodiscard]] pid_t pid() const { return pid_; }
  [[nodiscard]] const std::vector<Region>& regions() const { return regions_; }
  [[nodiscard]] const Region* region_of(std::uint64_t address) const;
  /// Functions of the program itself that are Tandem's, with their addresses in this process.
  [[nodiscard]] const std::vector<Function>& functions() const { return functions_; }

  bool read(std::uint64_t address, std::span<std::byte> bytes) const;
  /// Also into read-only private pages, which the process then has for itself.
  bool write(std::uint64_t address, std::span<const std::byte> bytes) const;
  bool flip(std::uint64_t address, unsigned bit) const;

 private:
  void find_functions();
  pid_t pid_;
  UniqueFd memory_;
  std::vector<Region> regions_;
  std::vector<Function> functions_;
};

/// A thread, stopped for as long as this lives: shorter than any watchdog's limit, please.
class StoppedThread {
 public:
  explicit StoppedThread(pid_t tid);
  ~StoppedThread();
  StoppedThread(const StoppedThread&) = delete;
  StoppedThread& operator=(const StoppedThread&) = delete;

  [[nodiscard]] bool stopped() const { return stopped_; }
  [[nodiscard]] std::optional<user_regs_struct> registers() const;
  /// Lets the thread execute the one store instruction at `instruction`, "mov %rax,(%rdi)", with `value` to `target`,
  /// and then go on as if nothing had been. 0: the store was done; else the signal that it raised, which the thread
  /// gets.
  int store(std::uint64_t instruction, std::uint64_t target, std::uint64_t value);

 private:
  pid_t tid_;
  bool stopped_ = false;
  int deliver_ = 0;
};

}  // namespace tandem::test
