// SPDX-License-Identifier: Apache-2.0
// The life cycle of a pair as a table: state x event -> next state and action. Pure; every cell is tested.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

namespace tandem {

enum class PairState : std::size_t {
  kStopped,      ///< no process
  kStarting,     ///< nobody owns yet; a member is starting
  kSolo,         ///< an owner without an heir; a member is starting
  kPaired,       ///< an owner and an armed heir
  kTakingOver,   ///< nobody owns, an heir is on the way: the owner is dead, or had let go when a new supervisor came
  kHandingOver,  ///< an owner and an armed heir that was told to ask for the shards
  kCount,
};

enum class PairEvent : std::size_t {
  kStart,          ///< the first NIC arrives
  kMemberReady,    ///< a starting member has its threads up and can be armed
  kTookOver,       ///< a member reports that it owns now
  kOwnerDied,      ///< the process that was last known to own has been reaped
  kOtherDied,      ///< heir or starting member reaped; a former owner's death is no event
  kStop,           ///< the last NIC left
  kSwitchover,     ///< an operator wants owner and heir to change places
  kHandedOver,     ///< a member reports that it owns now, and who owned before lives on as heir
  kNotHandedOver,  ///< the heir reports that nothing came of it, or does not report
  kCount,
};

enum class PairAction {
  kNone,
  kSpawn,     ///< start a new member unless one is starting (with back-off if members die young)
  kArm,       ///< watch the ready member's threads and allow it to own
  kHandOver,  ///< tell the heir to ask for the shards
  kKillAll,   ///< end every member
  kInvalid,   ///< cannot happen; logged as a bug and ignored
};

struct PairStep {
  PairState next;
  PairAction action;
};

/// The table's cell.
PairStep pair_step(PairState state, PairEvent event);

std::string_view pair_state_name(PairState state);
std::string_view pair_event_name(PairEvent event);

}  // namespace tandem
