// SPDX-License-Identifier: Apache-2.0
// Parsing of a kernel release string.
#include "recovery/fence/kernel_version.hpp"

#include <sys/utsname.h>

#include <charconv>
#include <optional>
#include <utility>

namespace tandem {
namespace {

using Version = std::pair<unsigned, unsigned>;  // major, minor

constexpr Version kNeeded{6, 4};
constexpr Version kFirstToTellNapi{5, 11}, kFirstNotToTellNapi{6, 13};

std::optional<Version> version_of(std::string_view release) {
  Version version;
  const char* end = release.data() + release.size();
  const auto first = std::from_chars(release.data(), end, version.first);
  if (first.ec != std::errc{} || first.ptr == end || *first.ptr != '.' ||
      std::from_chars(first.ptr + 1, end, version.second).ec != std::errc{})
    return std::nullopt;
  return version;
}

}  // namespace

Status kernel_is_supported(std::string_view release) {
  const auto version = version_of(release);
  if (!version)
    return fail(ErrorKind::kInvalid,
                "check the kernel: release \"" + std::string{release} + "\" is not a version number");
  if (*version >= kNeeded) return {};
  return fail(ErrorKind::kUnsupported,
              "check the kernel: Linux " + std::string{release} +
                  " is too old, a standby cannot map AF_XDP rings in use before Linux 6.4; run Debian 13, or Debian 12 "
                  "with the kernel from backports (apt install -t bookworm-backports linux-image-amd64)");
}

bool frames_tell_napi(std::string_view release) {
  const auto version = version_of(release);
  return version && *version >= kFirstToTellNapi && *version < kFirstNotToTellNapi;
}

std::string running_kernel_release() {
  utsname name{};
  return ::uname(&name) == 0 ? std::string{name.release} : std::string{};
}

}  // namespace tandem
