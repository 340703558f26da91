// SPDX-License-Identifier: Apache-2.0
// Writing captures.
#include "recovery/supervisor/pcap.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/unique_fd.hpp"

namespace tandem {

namespace {

struct FileHeader {
  std::uint32_t magic = 0xa1b2c3d4;  // microseconds, this host's byte order
  std::uint16_t major = 2, minor = 4;
  std::uint32_t reserved1 = 0, reserved2 = 0;
  std::uint32_t longest = 262'144;
  std::uint32_t link_type = 1;  // LINKTYPE_ETHERNET
};
struct FrameHeader {
  std::uint32_t seconds, microseconds, captured, length;
};
static_assert(sizeof(FileHeader) == 24 && sizeof(FrameHeader) == 16);

template <class T>
void append(std::vector<std::byte>& to, const T& value) {
  const auto bytes = std::as_bytes(std::span(&value, 1));
  to.insert(to.end(), bytes.begin(), bytes.end());
}

}  // namespace

Status append_to_pcap(const std::string& path, std::span<const std::byte> bytes, std::uint32_t length,
                      std::chrono::system_clock::time_point when) {
  const UniqueFd file{::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_CLOEXEC, 0600)};
  struct stat status {};
  if (!file || ::fstat(file.get(), &status) != 0) return fail_errno("write the capture " + path);
  std::vector<std::byte> record;
  if (status.st_size == 0) append(record, FileHeader{});
  const auto micros = std::chrono::duration_cast<std::chrono::microseconds>(when.time_since_epoch()).count();
  append(record, FrameHeader{static_cast<std::uint32_t>(micros / 1'000'000),
                             static_cast<std::uint32_t>(micros % 1'000'000), static_cast<std::uint32_t>(bytes.size()),
                             std::max(length, static_cast<std::uint32_t>(bytes.size()))});
  record.insert(record.end(), bytes.begin(), bytes.end());
  if (::write(file.get(), record.data(), record.size()) != static_cast<ssize_t>(record.size()))
    return fail_errno("write the capture " + path, "make room on its file system");
  return {};
}

}  // namespace tandem
