// SPDX-License-Identifier: Apache-2.0
// Parsing of a kernel release string.
#include "recovery/fence/kernel_version.hpp"

#include <sys/utsname.h>

#include <charconv>

namespace tandem {
namespace {

constexpr unsigned kNeededMajor = 6;
constexpr unsigned kNeededMinor = 4;

}  // namespace

Status kernel_is_supported(std::string_view release) {
  unsigned major = 0;
  unsigned minor = 0;
  const char* end = release.data() + release.size();
  const auto first = std::from_chars(release.data(), end, major);
  if (first.ec != std::errc{} || first.ptr == end || *first.ptr != '.' ||
      std::from_chars(first.ptr + 1, end, minor).ec != std::errc{})
    return fail(ErrorKind::kInvalid,
                "check the kernel: release \"" + std::string{release} + "\" is not a version number");
  if (major > kNeededMajor || (major == kNeededMajor && minor >= kNeededMinor)) return {};
  return fail(ErrorKind::kUnsupported,
              "check the kernel: Linux " + std::string{release} +
                  " is too old, a standby cannot map AF_XDP rings in use before Linux 6.4; run Debian 13, or Debian 12 "
                  "with the kernel from backports (apt install -t bookworm-backports linux-image-amd64)");
}

std::string running_kernel_release() {
  utsname name{};
  return ::uname(&name) == 0 ? std::string{name.release} : std::string{};
}

}  // namespace tandem
