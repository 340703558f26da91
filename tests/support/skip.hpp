// SPDX-License-Identifier: Apache-2.0
// Visible skipping: CTest reports the test as "Skipped" when it prints this line (SKIP_REGULAR_EXPRESSION).
#pragma once

#include <cstdio>

/// Leaves the test case as skipped. `reason` names the missing capability and what would provide it.
#define TANDEM_SKIP(reason)                                    \
  do {                                                         \
    std::printf("SKIPPED: %s\n", std::string(reason).c_str()); \
    std::fflush(stdout);                                       \
    SUCCEED("skipped");                                        \
    return;                                                    \
  } while (false)
