// SPDX-License-Identifier: Apache-2.0
// Descriptor checks through fstat, fstatfs, fcntl and /proc/self.
#include "vmm/fd_check.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <array>
#include <charconv>
#include <optional>
#include <string>
#include <string_view>

#include "common/unique_fd.hpp"

namespace tandem {
namespace {

constexpr std::string_view kEventfdLink = "anon_inode:[eventfd]";

std::optional<std::uint64_t> eventfd_id(int fd) {
  const UniqueFd info{::open(("/proc/self/fdinfo/" + std::to_string(fd)).c_str(), O_RDONLY | O_CLOEXEC)};
  if (!info) return std::nullopt;
  std::array<char, 1024> text{};
  const ssize_t got = ::read(info.get(), text.data(), text.size());
  if (got <= 0) return std::nullopt;
  const std::string_view all{text.data(), static_cast<std::size_t>(got)};
  constexpr std::string_view kKey = "eventfd-id:";
  const std::size_t key = all.find(kKey);
  if (key == std::string_view::npos) return std::nullopt;
  const std::size_t digits = all.find_first_not_of(" \t", key + kKey.size());
  if (digits == std::string_view::npos) return std::nullopt;
  std::uint64_t id = 0;
  const auto parsed = std::from_chars(all.data() + digits, all.data() + all.size(), id);
  if (parsed.ec != std::errc{}) return std::nullopt;
  return id;
}

}  // namespace

Status check_eventfd(int fd) {
  std::array<char, 64> target{};
  const ssize_t length = ::readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), target.data(), target.size());
  if (length < 0) return fail_errno("find out what kind of descriptor came", "is /proc mounted?");
  const std::string_view kind{target.data(), static_cast<std::size_t>(length)};
  if (kind != kEventfdLink)
    return fail(ErrorKind::kInvalid, "an eventfd is needed, the descriptor is " + std::string{kind});
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0) return fail_errno("make an eventfd non-blocking");
  return {};
}

bool same_eventfd(int first, int second) {
  const auto a = eventfd_id(first);
  return a.has_value() && a == eventfd_id(second);
}

Status check_memory_file(int fd, std::uint64_t offset, std::uint64_t size) {
  struct statfs filesystem {};
  if (::fstatfs(fd, &filesystem) != 0) return fail_errno("ask for the file system of a memory file");
  const auto magic = static_cast<std::uint64_t>(filesystem.f_type);
  if (magic != TMPFS_MAGIC && magic != HUGETLBFS_MAGIC)
    return fail(
        ErrorKind::kInvalid,
        "guest memory must be a file of tmpfs (memfd) or hugetlbfs, this descriptor is of a file system of type " +
            std::to_string(magic) + "; use <source type='memfd'/> in <memoryBacking>");
  struct stat file {};
  if (::fstat(fd, &file) != 0) return fail_errno("ask for the size of a memory file");
  if (!S_ISREG(file.st_mode)) return fail(ErrorKind::kInvalid, "guest memory must be a regular file");
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0) return fail_errno("ask for the access mode of a memory file");
  const int seals = ::fcntl(fd, F_GET_SEALS);  // fails for files that know no seals
  if ((flags & O_ACCMODE) != O_RDWR || (seals >= 0 && (seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) != 0))
    return fail(ErrorKind::kInvalid,
                "the memory file cannot be mapped for writing; guest memory must be shared read-write");
  const auto length = static_cast<std::uint64_t>(file.st_size);
  if (offset > length || size > length - offset)
    return fail(ErrorKind::kInvalid, "the memory file has " + std::to_string(length) + " bytes, the region needs " +
                                         std::to_string(size) + " from offset " + std::to_string(offset));
  return {};
}

Result<FileIdentity> file_identity(int fd) {
  struct stat file {};
  if (::fstat(fd, &file) != 0) return fail_errno("ask for the identity of a memory file");
  return FileIdentity{file.st_dev, file.st_ino};
}

}  // namespace tandem
