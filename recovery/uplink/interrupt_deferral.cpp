// SPDX-License-Identifier: Apache-2.0
#include "recovery/uplink/interrupt_deferral.hpp"

#include <fstream>

namespace tandem {

namespace {

constexpr const char* kPolls = "napi_defer_hard_irqs";
constexpr const char* kTimeout = "gro_flush_timeout";

std::string file_of(const std::string& name, const char* setting) { return "/sys/class/net/" + name + "/" + setting; }

tl::unexpected<Error> failed(const std::string& verb, const std::string& path) {
  return fail_errno(verb + " how long interrupts wait (" + path + ")",
                    "/sys must show the network namespace that tandemd runs in, and be writable");
}

Status write(const std::string& path, std::uint64_t value) {
  std::ofstream file(path);
  file << value << std::flush;
  if (!file) return failed("set", path);
  return {};
}

}  // namespace

Result<InterruptDeferral> interrupt_deferral(const std::string& name) {
  InterruptDeferral found;
  for (const char* setting : {kPolls, kTimeout}) {
    const std::string path = file_of(name, setting);
    std::ifstream file(path);
    std::uint64_t value = 0;
    if (!(file >> value)) return failed("read", path);
    if (setting == kPolls)
      found.polls = static_cast<std::uint32_t>(value);
    else
      found.timeout_ns = value;
  }
  return found;
}

Status set_interrupt_deferral(const std::string& name, const InterruptDeferral& wanted) {
  if (auto set = write(file_of(name, kPolls), wanted.polls); !set) return set;
  return write(file_of(name, kTimeout), wanted.timeout_ns);
}

}  // namespace tandem
