// SPDX-License-Identifier: Apache-2.0
// The vault's log: one line on stderr, or nothing when stderr would block.
#pragma once

#include <poll.h>
#include <unistd.h>

#include <string>
#include <string_view>

namespace tandem {

/// Writes one line. A reader that stopped reading loses lines; it must not stop the vault. (A pipe that polls writable
/// takes PIPE_BUF = 4096 bytes without blocking, pipe(7).)
inline void vault_log(std::string_view text) {
  pollfd ready{STDERR_FILENO, POLLOUT, 0};
  if (::poll(&ready, 1, 0) != 1 || (ready.revents & POLLOUT) == 0) return;
  std::string line{"tandem-vault: "};
  line.append(text.substr(0, 2048)).push_back('\n');
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, line.data(), line.size());
}

}  // namespace tandem
