// SPDX-License-Identifier: Apache-2.0
// kProtected: false in one build alone, which benchmarks measure against to see what protection costs
// (docs/benchmarks.md).
//
// An engine without it does not arm its records or note the packet in hand, leaves the guest-memory window open and has
// no heartbeat: whoever dies with it takes a burst along, and a hang is not found. It is never installed.
#pragma once

#include <cstdlib>

namespace tandem {

#ifdef TANDEM_UNPROTECTED
inline constexpr bool kProtected = false;
#else
inline constexpr bool kProtected = true;
#endif

/// What follows from everything before it, looked at in memory of our own (never in the guest's, who could break it at
/// will). It fails if our code, registers or pointers were damaged: then this process dies, before the damage is
/// committed, or with the record armed from which an heir makes it good.
inline void must_hold(bool condition) {
  if constexpr (kProtected)
    if (!condition) [[unlikely]]
      std::abort();
}
/// After it compilers cannot know what they have just stored.
inline void look_again() { asm volatile("" ::: "memory"); }

}  // namespace tandem
