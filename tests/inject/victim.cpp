// SPDX-License-Identifier: Apache-2.0
// /proc, ELF and ptrace.
#include "tests/inject/victim.hpp"

#include <elf.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <sstream>

namespace tandem::test {

namespace {

std::string proc(pid_t pid, const char* file) { return "/proc/" + std::to_string(pid) + "/" + file; }

template <class T>
T at(const std::string& image, std::uint64_t offset) {
  T value{};
  if (offset + sizeof value <= image.size()) std::memcpy(&value, image.data() + offset, sizeof value);
  return value;
}

}  // namespace

Victim::Victim(pid_t pid) : pid_(pid), memory_(::open(proc(pid, "mem").c_str(), O_RDWR | O_CLOEXEC)) {
  std::ifstream maps(proc(pid, "maps"));
  for (std::string line; std::getline(maps, line);) {
    std::istringstream words(line);
    Region region;
    std::string device, inode;
    char dash = 0;
    words >> std::hex >> region.begin >> dash >> region.end >> region.permissions >> region.offset >> device >> inode;
    std::getline(words >> std::ws, region.path);
    if (region.permissions.size() == 4) regions_.push_back(std::move(region));
  }
  find_functions();
}

const Region* Victim::region_of(std::uint64_t address) const {
  for (const Region& region : regions_)
    if (address >= region.begin && address < region.end) return &region;
  return nullptr;
}

// The symbol table of the program (System V ABI, ELF-64): functions whose names are in namespace tandem.
void Victim::find_functions() {
  std::ifstream file(proc(pid_, "exe"), std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  const std::string image = content.str();
  const auto header = at<Elf64_Ehdr>(image, 0);
  char target[4096];
  const ssize_t length = ::readlink(proc(pid_, "exe").c_str(), target, sizeof target);
  const std::string path(target, length < 0 ? 0 : static_cast<std::size_t>(length));
  std::uint64_t base = 0;
  for (const Region& region : regions_)
    if (region.path == path && region.offset == 0) base = region.begin;
  if (header.e_type == ET_EXEC) base = 0;
  for (unsigned i = 0; i < header.e_shnum; ++i) {
    const auto section = at<Elf64_Shdr>(image, header.e_shoff + i * sizeof(Elf64_Shdr));
    if (section.sh_type != SHT_SYMTAB) continue;
    const auto names = at<Elf64_Shdr>(image, header.e_shoff + section.sh_link * sizeof(Elf64_Shdr));
    for (std::uint64_t offset = 0; offset < section.sh_size; offset += sizeof(Elf64_Sym)) {
      const auto symbol = at<Elf64_Sym>(image, section.sh_offset + offset);
      if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || symbol.st_size == 0) continue;
      std::string name = image.c_str() + names.sh_offset + symbol.st_name;
      if (name.find("6tandem") != std::string::npos)
        functions_.push_back({name, base + symbol.st_value, symbol.st_size});
    }
  }
}

bool Victim::read(std::uint64_t address, std::span<std::byte> bytes) const {
  return ::pread(memory_.get(), bytes.data(), bytes.size(), static_cast<off_t>(address)) ==
         static_cast<ssize_t>(bytes.size());
}

bool Victim::write(std::uint64_t address, std::span<const std::byte> bytes) const {
  return ::pwrite(memory_.get(), bytes.data(), bytes.size(), static_cast<off_t>(address)) ==
         static_cast<ssize_t>(bytes.size());
}

bool Victim::flip(std::uint64_t address, unsigned bit) const {
  std::byte byte{};
  if (!read(address, {&byte, 1})) return false;
  byte ^= static_cast<std::byte>(1u << bit);
  return write(address, {&byte, 1});
}

StoppedThread::StoppedThread(pid_t tid) : tid_(tid) {
  if (::ptrace(PTRACE_SEIZE, tid, nullptr, nullptr) != 0) return;
  int status = 0;
  stopped_ = ::ptrace(PTRACE_INTERRUPT, tid, nullptr, nullptr) == 0 && ::waitpid(tid, &status, __WALL) == tid &&
             WIFSTOPPED(status);
}

StoppedThread::~StoppedThread() {
  ::ptrace(PTRACE_DETACH, tid_, nullptr, reinterpret_cast<void*>(static_cast<std::intptr_t>(deliver_)));
}

std::optional<user_regs_struct> StoppedThread::registers() const {
  user_regs_struct registers{};
  if (!stopped_ || ::ptrace(PTRACE_GETREGS, tid_, nullptr, &registers) != 0) return std::nullopt;
  return registers;
}

int StoppedThread::store(std::uint64_t instruction, std::uint64_t target, std::uint64_t value) {
  const auto before = registers();
  if (!before) return -1;
  user_regs_struct during = *before;
  during.rip = instruction;
  during.rdi = target;
  during.rax = value;
  during.orig_rax = ~0ull;  // not in a system call: nothing to restart
  int status = 0;
  if (::ptrace(PTRACE_SETREGS, tid_, nullptr, &during) != 0 ||
      ::ptrace(PTRACE_SINGLESTEP, tid_, nullptr, nullptr) != 0 || ::waitpid(tid_, &status, __WALL) != tid_ ||
      !WIFSTOPPED(status))
    return -1;
  if (WSTOPSIG(status) != SIGTRAP) return deliver_ = WSTOPSIG(status);
  return ::ptrace(PTRACE_SETREGS, tid_, nullptr, &*before) == 0 ? 0 : -1;
}

}  // namespace tandem::test
