// SPDX-License-Identifier: Apache-2.0
// kProtected: false in one build alone, which benchmarks measure against to see what protection costs
// (docs/benchmarks.md).
//
// An engine without it does not arm its records or note the packet in hand, leaves the guest-memory window open and has
// no heartbeat: whoever dies with it takes a burst along, and a hang is not found. It is never installed.
#pragma once

namespace tandem {

#ifdef TANDEM_UNPROTECTED
inline constexpr bool kProtected = false;
#else
inline constexpr bool kProtected = true;
#endif

}  // namespace tandem
