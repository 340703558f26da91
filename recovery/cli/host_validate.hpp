// SPDX-License-Identifier: Apache-2.0
// What a host must have to run Tandem, each with what to do if it has not.
#pragma once

#include <string>
#include <vector>

namespace tandem {

struct HostCheck {
  enum class Verdict { kPass, kWarn, kFail } verdict;
  std::string what;    ///< "kernel is 6.4 or newer"
  std::string remedy;  ///< empty if it passed
};

/// Looks at this host; changes nothing.
std::vector<HostCheck> validate_host(const std::string& control_socket);

}  // namespace tandem
