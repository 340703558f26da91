// SPDX-License-Identifier: Apache-2.0
// The ways in which an owner is made to die, and what each must look like in its incident.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace tandem::test {

/// How a cause is brought about.
enum class Means {
  kSignal,  ///< a signal from outside, at any instruction
  kDrill,   ///< a drill: the poll thread does it to itself
  kMemory,  ///< a memory cgroup that is too small for the pages of the guest
};

struct Cause {
  const char* name;
  Means means;
  int signal;           ///< kSignal
  const char* fault;    ///< kDrill
  const char* died_of;  ///< the incident's cause
  const char* hang;     ///< the verdict; nullptr: none; "some": whatever it is; "any": that, or none
};

/// All causes.
const std::vector<Cause>& causes();

/// What in the incidents of one death, one of each shard, differs from what the cause must look like; empty if nothing.
/// A drill hangs the poll thread of one shard: then one incident has the verdict, the others' owners died of it.
std::string differs(const Cause& cause, const std::vector<nlohmann::json>& incidents);

}  // namespace tandem::test
