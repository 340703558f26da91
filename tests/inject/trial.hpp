// SPDX-License-Identifier: Apache-2.0
// One run: a fault into the owner, what it does in a while, the owner's end, and what is left of the world then.
#pragma once

#include "tests/inject/faults.hpp"
#include "tests/inject/outcome.hpp"
#include "tests/inject/world.hpp"

namespace tandem::test {

/// Injects the fault number `number` of `seed` and looks what becomes of it. The world is good for another run if the
/// outcome is recovered or without effect.
Run run_trial(World& world, FaultKind kind, std::uint64_t seed, std::uint64_t number);

}  // namespace tandem::test
