// SPDX-License-Identifier: Apache-2.0
// The life cycle of a pair: every cell of the table, and whole lives.
#include "recovery/supervisor/pair_state.hpp"

#include <catch2/catch.hpp>
#include <set>
#include <string>
#include <vector>

using namespace tandem;
using S = PairState;
using E = PairEvent;
using A = PairAction;

namespace {

struct Cell {
  S state;
  E event;
  S next;
  A action;
};

const std::vector<Cell> kCells{
    {S::kStopped, E::kStart, S::kStarting, A::kSpawn},
    {S::kStopped, E::kMemberReady, S::kStopped, A::kNone},
    {S::kStopped, E::kTookOver, S::kStopped, A::kNone},
    {S::kStopped, E::kOwnerDied, S::kStopped, A::kNone},
    {S::kStopped, E::kOtherDied, S::kStopped, A::kNone},
    {S::kStopped, E::kStop, S::kStopped, A::kNone},
    {S::kStopped, E::kSwitchover, S::kStopped, A::kInvalid},
    {S::kStopped, E::kHandedOver, S::kStopped, A::kNone},
    {S::kStopped, E::kNotHandedOver, S::kStopped, A::kNone},
    {S::kStarting, E::kStart, S::kStarting, A::kNone},
    {S::kStarting, E::kMemberReady, S::kStarting, A::kArm},
    {S::kStarting, E::kTookOver, S::kSolo, A::kSpawn},
    {S::kStarting, E::kOwnerDied, S::kStarting, A::kNone},
    {S::kStarting, E::kOtherDied, S::kStarting, A::kSpawn},
    {S::kStarting, E::kStop, S::kStopped, A::kKillAll},
    {S::kStarting, E::kSwitchover, S::kStarting, A::kInvalid},
    {S::kStarting, E::kHandedOver, S::kStarting, A::kInvalid},
    {S::kStarting, E::kNotHandedOver, S::kStarting, A::kNone},
    {S::kSolo, E::kStart, S::kSolo, A::kNone},
    {S::kSolo, E::kMemberReady, S::kPaired, A::kArm},
    {S::kSolo, E::kTookOver, S::kSolo, A::kInvalid},
    {S::kSolo, E::kOwnerDied, S::kStarting, A::kNone},
    {S::kSolo, E::kOtherDied, S::kSolo, A::kSpawn},
    {S::kSolo, E::kStop, S::kStopped, A::kKillAll},
    {S::kSolo, E::kSwitchover, S::kSolo, A::kInvalid},
    {S::kSolo, E::kHandedOver, S::kSolo, A::kInvalid},
    {S::kSolo, E::kNotHandedOver, S::kSolo, A::kNone},
    {S::kPaired, E::kStart, S::kPaired, A::kNone},
    {S::kPaired, E::kMemberReady, S::kPaired, A::kInvalid},
    {S::kPaired, E::kTookOver, S::kSolo, A::kSpawn},
    {S::kPaired, E::kOwnerDied, S::kTakingOver, A::kNone},
    {S::kPaired, E::kOtherDied, S::kSolo, A::kSpawn},
    {S::kPaired, E::kStop, S::kStopped, A::kKillAll},
    {S::kPaired, E::kSwitchover, S::kHandingOver, A::kHandOver},
    {S::kPaired, E::kHandedOver, S::kPaired, A::kNone},
    {S::kPaired, E::kNotHandedOver, S::kPaired, A::kNone},
    {S::kTakingOver, E::kStart, S::kTakingOver, A::kNone},
    {S::kTakingOver, E::kMemberReady, S::kTakingOver, A::kInvalid},
    {S::kTakingOver, E::kTookOver, S::kSolo, A::kSpawn},
    {S::kTakingOver, E::kOwnerDied, S::kTakingOver, A::kInvalid},
    {S::kTakingOver, E::kOtherDied, S::kStarting, A::kSpawn},
    {S::kTakingOver, E::kStop, S::kStopped, A::kKillAll},
    {S::kTakingOver, E::kSwitchover, S::kTakingOver, A::kInvalid},
    {S::kTakingOver, E::kHandedOver, S::kPaired, A::kNone},
    {S::kTakingOver, E::kNotHandedOver, S::kTakingOver, A::kNone},
    {S::kHandingOver, E::kStart, S::kHandingOver, A::kNone},
    {S::kHandingOver, E::kMemberReady, S::kHandingOver, A::kInvalid},
    {S::kHandingOver, E::kTookOver, S::kSolo, A::kSpawn},
    {S::kHandingOver, E::kOwnerDied, S::kTakingOver, A::kNone},
    {S::kHandingOver, E::kOtherDied, S::kSolo, A::kSpawn},
    {S::kHandingOver, E::kStop, S::kStopped, A::kKillAll},
    {S::kHandingOver, E::kSwitchover, S::kHandingOver, A::kInvalid},
    {S::kHandingOver, E::kHandedOver, S::kPaired, A::kNone},
    {S::kHandingOver, E::kNotHandedOver, S::kPaired, A::kNone},
};

S live(const std::vector<E>& events, S state = S::kStopped) {
  for (const E event : events) {
    const PairStep step = pair_step(state, event);
    INFO(pair_state_name(state) << ", " << pair_event_name(event));
    CHECK(step.action != A::kInvalid);
    state = step.next;
  }
  return state;
}

}  // namespace

TEST_CASE("every cell of the pair's table") {
  REQUIRE(kCells.size() == static_cast<std::size_t>(S::kCount) * static_cast<std::size_t>(E::kCount));
  std::set<std::pair<S, E>> seen;
  for (const Cell& cell : kCells) {
    INFO(pair_state_name(cell.state) << ", " << pair_event_name(cell.event));
    const PairStep step = pair_step(cell.state, cell.event);
    CHECK(step.next == cell.next);
    CHECK(step.action == cell.action);
    seen.emplace(cell.state, cell.event);
  }
  CHECK(seen.size() == kCells.size());
}

TEST_CASE("names of states and events are all different") {
  std::set<std::string> states, events;
  for (std::size_t i = 0; i < static_cast<std::size_t>(S::kCount); ++i)
    states.emplace(pair_state_name(static_cast<S>(i)));
  for (std::size_t i = 0; i < static_cast<std::size_t>(E::kCount); ++i)
    events.emplace(pair_event_name(static_cast<E>(i)));
  CHECK(states.size() == static_cast<std::size_t>(S::kCount));
  CHECK(events.size() == static_cast<std::size_t>(E::kCount));
}

TEST_CASE("lives of a pair") {
  const std::vector<E> birth{E::kStart, E::kMemberReady, E::kTookOver, E::kMemberReady};
  CHECK(live(birth) == S::kPaired);
  // A failover whose report comes before the dead owner is reaped, and the other way round.
  CHECK(live({E::kTookOver, E::kMemberReady}, S::kPaired) == S::kPaired);
  CHECK(live({E::kOwnerDied, E::kTookOver, E::kMemberReady}, S::kPaired) == S::kPaired);
  // Both die, in either order of being reaped; a new one is started once.
  CHECK(live({E::kOwnerDied, E::kOtherDied, E::kMemberReady, E::kTookOver, E::kMemberReady}, S::kPaired) == S::kPaired);
  CHECK(live({E::kOtherDied, E::kOwnerDied, E::kMemberReady, E::kTookOver, E::kMemberReady}, S::kPaired) == S::kPaired);
  // The owner dies while its standby is still starting.
  CHECK(live({E::kTookOver, E::kOwnerDied, E::kMemberReady, E::kTookOver, E::kMemberReady}, S::kPaired) == S::kPaired);
  CHECK(live({E::kStop, E::kOtherDied, E::kOwnerDied}, S::kPaired) == S::kStopped);
  // A switchover; one that comes to nothing; one whose report comes after it was given up.
  CHECK(live({E::kSwitchover, E::kHandedOver}, S::kPaired) == S::kPaired);
  CHECK(live({E::kSwitchover, E::kNotHandedOver, E::kHandedOver}, S::kPaired) == S::kPaired);
  // A death of either side in the middle of one: as ever.
  CHECK(live({E::kSwitchover, E::kOwnerDied, E::kTookOver, E::kMemberReady}, S::kPaired) == S::kPaired);
  CHECK(live({E::kSwitchover, E::kTookOver, E::kOwnerDied}, S::kPaired) != S::kPaired);
  CHECK(live({E::kSwitchover, E::kOtherDied, E::kMemberReady}, S::kPaired) == S::kPaired);
  // Adopted while nobody owned, for the owner had let go.
  CHECK(live({E::kHandedOver}, S::kTakingOver) == S::kPaired);
}
