// SPDX-License-Identifier: Apache-2.0
// The faults that are injected, as in the driver-recovery literature: bits in code, stack and heap, corrupt pointers,
// wild stores, damaged shared state, nothing left to allocate (Swift et al. 2003, Herder et al. 2009, Zheng et al.
// 2013).
#pragma once

#include <nlohmann/json.hpp>
#include <random>
#include <string>

#include "tests/inject/victim.hpp"

namespace tandem::test {

enum class FaultKind { kCode, kStack, kHeap, kPointer, kWildStore, kSegment, kDescriptors, kMemory, kCount };

const char* fault_name(FaultKind kind);

struct Injected {
  bool done = false;         ///< false: the victim was gone, or had no such place
  bool window_hit = false;   ///< a wild store that met a writable window onto guest memory: nothing stops that here
  bool end_at_once = false;  ///< the victim is to die right after, as of the wild store that did it
  nlohmann::json what;       ///< where and which bits, for the reader and for doing it again
};

/// Injects one fault of `kind` into a process whose poll thread is `tid`. What is chosen follows from `random`.
Injected inject(FaultKind kind, const Victim& victim, pid_t tid, std::mt19937_64& random);

}  // namespace tandem::test
