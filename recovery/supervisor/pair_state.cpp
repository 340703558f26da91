// SPDX-License-Identifier: Apache-2.0
// The table.
#include "recovery/supervisor/pair_state.hpp"

namespace tandem {

namespace {

using S = PairState;
using A = PairAction;

constexpr auto kStates = static_cast<std::size_t>(PairState::kCount);
constexpr auto kEvents = static_cast<std::size_t>(PairEvent::kCount);

// Rows: states; columns: start, member ready, took over, owner died, other died, stop, switchover, handed over, not
// handed over.
constexpr std::array<std::array<PairStep, kEvents>, kStates> kTable{{
    // stopped
    {{{S::kStarting, A::kSpawn},
      {S::kStopped, A::kNone},
      {S::kStopped, A::kNone},
      {S::kStopped, A::kNone},
      {S::kStopped, A::kNone},
      {S::kStopped, A::kNone},
      {S::kStopped, A::kInvalid},
      {S::kStopped, A::kNone},
      {S::kStopped, A::kNone}}},
    // starting: whoever is armed finds a dead owner and takes over at once
    {{{S::kStarting, A::kNone},
      {S::kStarting, A::kArm},
      {S::kSolo, A::kSpawn},
      {S::kStarting, A::kNone},
      {S::kStarting, A::kSpawn},
      {S::kStopped, A::kKillAll},
      {S::kStarting, A::kInvalid},
      {S::kStarting, A::kInvalid},
      {S::kStarting, A::kNone}}},
    // solo: if the owner dies, the member that is starting will become the owner
    {{{S::kSolo, A::kNone},
      {S::kPaired, A::kArm},
      {S::kSolo, A::kInvalid},
      {S::kStarting, A::kNone},
      {S::kSolo, A::kSpawn},
      {S::kStopped, A::kKillAll},
      {S::kSolo, A::kInvalid},
      {S::kSolo, A::kInvalid},
      {S::kSolo, A::kNone}}},
    // paired: the heir's report may come before the owner is reaped. A handover that was given up may come true
    {{{S::kPaired, A::kNone},
      {S::kPaired, A::kInvalid},
      {S::kSolo, A::kSpawn},
      {S::kTakingOver, A::kNone},
      {S::kSolo, A::kSpawn},
      {S::kStopped, A::kKillAll},
      {S::kHandingOver, A::kHandOver},
      {S::kPaired, A::kNone},
      {S::kPaired, A::kNone}}},
    // taking over
    {{{S::kTakingOver, A::kNone},
      {S::kTakingOver, A::kInvalid},
      {S::kSolo, A::kSpawn},
      {S::kTakingOver, A::kInvalid},
      {S::kStarting, A::kSpawn},
      {S::kStopped, A::kKillAll},
      {S::kTakingOver, A::kInvalid},
      {S::kPaired, A::kNone},
      {S::kTakingOver, A::kNone}}},
    // handing over: as paired
    {{{S::kHandingOver, A::kNone},
      {S::kHandingOver, A::kInvalid},
      {S::kSolo, A::kSpawn},
      {S::kTakingOver, A::kNone},
      {S::kSolo, A::kSpawn},
      {S::kStopped, A::kKillAll},
      {S::kHandingOver, A::kInvalid},
      {S::kPaired, A::kNone},
      {S::kPaired, A::kNone}}},
}};

}  // namespace

PairStep pair_step(PairState state, PairEvent event) {
  return kTable[static_cast<std::size_t>(state)][static_cast<std::size_t>(event)];
}

std::string_view pair_state_name(PairState state) {
  constexpr std::array<std::string_view, kStates> kNames{"stopped", "starting",    "solo",
                                                         "paired",  "taking over", "handing over"};
  return kNames[static_cast<std::size_t>(state)];
}

std::string_view pair_event_name(PairEvent event) {
  constexpr std::array<std::string_view, kEvents> kNames{"start",      "member ready", "took over",
                                                         "owner died", "other died",   "stop",
                                                         "switchover", "handed over",  "not handed over"};
  return kNames[static_cast<std::size_t>(event)];
}

}  // namespace tandem
