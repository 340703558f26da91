// SPDX-License-Identifier: Apache-2.0
// The owner word's protocol (docs/handover.md) as a model: every interleaving of three members' steps and deaths.
//
// A member's step is one access to the word, as in handover.cpp and takeover.cpp: loads and compare-and-swaps are
// separate steps, so that every stale judgement occurs. What is shown: never two members at work; and from every state
// in which a member lives, somebody can come to work.
#include <array>
#include <catch2/catch.hpp>
#include <deque>
#include <set>
#include <tuple>

namespace {

constexpr int kMembers = 3;
constexpr int kLastEpoch = 4;  // the model stops here; epochs do not wrap in it
constexpr int kNobody = 0;     // tags are 1 to kMembers

enum class At { kLook, kTake, kWork, kLetGo, kDead };

struct Member {
  At at = At::kLook;
  int epoch = 0, tag = 0;  // kTake: the word that was judged; kWork, kLetGo: its own
  bool leaves = false;     // has let go, and leaves the shard to another for now

  auto operator<=>(const Member&) const = default;
};

struct World {
  int epoch = 0, tag = kNobody;
  std::array<Member, kMembers> members{};

  auto operator<=>(const World&) const = default;
  [[nodiscard]] bool dead(int who) const {
    return who == kNobody || members[static_cast<std::size_t>(who - 1)].at == At::kDead;
  }
  [[nodiscard]] int working() const {
    int count = 0;
    for (const Member& member : members) count += member.at == At::kWork || member.at == At::kLetGo;
    return count;
  }
};

// Deliberate mistakes, which must be found.
enum class Mistake { kNone, kTakesFromTheLiving, kPlainStore, kWorksOnAfterLettingGo };

std::vector<World> steps(const World& world, Mistake mistake) {
  std::vector<World> next;
  for (int tag = 1; tag <= kMembers; ++tag) {
    const auto i = static_cast<std::size_t>(tag - 1);
    const Member& member = world.members[i];
    if (member.at == At::kDead) continue;
    const auto go = [&](auto change) {
      World after = world;
      change(after, after.members[i]);
      next.push_back(after);
    };
    go([](World&, Member& self) { self = {At::kDead, 0, 0, false}; });
    if (member.leaves) go([](World&, Member& self) { self.leaves = false; });  // late, or the other is dead
    switch (member.at) {
      case At::kLook:
        if ((world.dead(world.tag) || mistake == Mistake::kTakesFromTheLiving) && !member.leaves &&
            world.epoch < kLastEpoch)
          go([](World& w, Member& self) { self = {At::kTake, w.epoch, w.tag, false}; });
        break;
      case At::kTake:
        go([&](World& w, Member& self) {
          const bool swapped = mistake == Mistake::kPlainStore || (w.epoch == self.epoch && w.tag == self.tag);
          if (swapped) {
            w.epoch = self.epoch + 1;
            w.tag = tag;
            self = {At::kWork, w.epoch, tag, false};
          } else {
            self = {At::kLook, 0, 0, false};
          }
        });
        break;
      case At::kWork:
        go([](World&, Member& self) { self.at = At::kLetGo; });  // a request came, between two bursts
        break;
      case At::kLetGo:
        go([&](World& w, Member& self) {
          if (w.epoch != self.epoch || w.tag != tag) return;  // would abort; shown not to happen by working() <= 1
          w.tag = kNobody;
          self = mistake == Mistake::kWorksOnAfterLettingGo ? Member{At::kWork, self.epoch, tag, true}
                                                            : Member{At::kLook, 0, 0, true};
        });
        break;
      case At::kDead:
        break;
    }
  }
  return next;
}

struct Outcome {
  std::size_t states = 0, most_at_work = 0, foreign_words = 0, stuck = 0;
};

Outcome explore(Mistake mistake) {
  Outcome outcome;
  std::set<World> seen{World{}};
  std::deque<World> open{World{}};
  while (!open.empty()) {
    const World world = open.front();
    open.pop_front();
    ++outcome.states;
    outcome.most_at_work = std::max(outcome.most_at_work, static_cast<std::size_t>(world.working()));
    bool lives = false, can_move = false;
    for (int tag = 1; tag <= kMembers; ++tag) {
      const Member& member = world.members[static_cast<std::size_t>(tag - 1)];
      lives = lives || member.at != At::kDead;
      // Whoever is at work stands in the word, with its epoch.
      if (member.at == At::kWork || member.at == At::kLetGo)
        outcome.foreign_words += world.tag != tag || world.epoch != member.epoch;
      can_move = can_move || member.at == At::kTake || member.at == At::kWork || member.at == At::kLetGo ||
                 (member.at == At::kLook && world.dead(world.tag));
    }
    outcome.stuck += lives && !can_move;
    for (const World& after : steps(world, mistake))
      if (seen.insert(after).second) open.push_back(after);
  }
  return outcome;
}

}  // namespace

TEST_CASE("handover model: never two owners, never nobody for good") {
  const Outcome outcome = explore(Mistake::kNone);
  CHECK(outcome.states > 1000);
  CHECK(outcome.most_at_work == 1);
  CHECK(outcome.foreign_words == 0);
  CHECK(outcome.stuck == 0);
}

TEST_CASE("handover model: it can see mistakes") {
  for (const Mistake mistake : {Mistake::kTakesFromTheLiving, Mistake::kPlainStore, Mistake::kWorksOnAfterLettingGo}) {
    INFO(static_cast<int>(mistake));
    CHECK(explore(mistake).most_at_work > 1);
  }
}
