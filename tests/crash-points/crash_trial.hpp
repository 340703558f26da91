// SPDX-License-Identifier: Apache-2.0
// CrashTrial: one row of the matrix, stepped through; every distinct state is handed to an heir, and judged.
#pragma once

#include <cstdint>
#include <unordered_set>
#include <vector>

#include "tests/crash-points/matrix.hpp"
#include "tests/support/takeover_check.hpp"

namespace tandem::test {

/// Plain data: workers hand it to their parent through shared memory.
struct RowResult {
  std::uint64_t points = 0;           ///< instruction boundaries at which the owner might have died
  std::uint64_t distinct = 0;         ///< of these, with different shared bytes
  std::uint64_t changes = 0;          ///< of these, at which the shared bytes were not what they had been one earlier
  std::uint64_t nested_points = 0;    ///< places in takeovers at which the heir might have died: after each instruction
                                      ///< that can store, or after each
  std::uint64_t nested_changes = 0;   ///< of these, at which the shared bytes were not what they had been one earlier
  std::uint64_t nested_distinct = 0;  ///< of these, with shared bytes not met before in this row
  std::uint64_t takeovers = 0;        ///< that were run and judged
  std::uint64_t unforeseen = 0;       ///< changes by instructions that store_traps.hpp takes for harmless
  Verdict verdict;
  double seconds = 0;
  bool done = false;
};

struct TrialOptions {
  bool until_harm = false;         ///< second crashes only if the first ones did no harm
  bool every_instruction = false;  ///< heirs are stopped after every instruction, not only after those that can store
};

/// The shared bytes of a world.
using Snapshot = std::vector<std::byte>;

class CrashTrial {
 public:
  explicit CrashTrial(const MatrixRow& row);
  RowResult run(const TrialOptions& options);

 private:
  void prepare(EngineWorld& world, FakeFence& fence, Flows& flows) const;
  void restart_driver(EngineWorld& world, ShardStepper& owner) const;
  void begin_burst();
  void condemn_next();
  /// After each instruction of the owner.
  void look(Snapshot& snapshot, RowResult& result);
  [[nodiscard]] std::vector<std::shared_ptr<const Device>> devices(const EngineWorld& world) const;
  void step_owner(RowResult& result);
  /// `moved`: guest and kernel had gone on before the heir came.
  void step_heirs(bool moved, bool every_instruction, RowResult& result);
  /// An heir takes over a copy of `snapshot`, once at once and once after guest and kernel have gone on.
  void judge(const Snapshot& snapshot, RowResult& result);

  MatrixRow row_;
  std::unique_ptr<EngineWorld> world_, trial_;
  std::unique_ptr<FakeFence> fence_;
  std::unique_ptr<Flows> flows_;  // as they stand when the burst begins
  std::vector<std::shared_ptr<const Device>> devices_;
  std::vector<std::shared_ptr<const UplinkPorts>> ports_;  // of each device
  std::unordered_set<std::uint64_t> seen_;
  // A distinct state of the owner's burst, with what guest and kernel remember then.
  struct Start {
    Snapshot snapshot;
    std::vector<GuestNic> nics;
    std::vector<KernelXsk> kernels;
    Flows flows;
  };
  std::vector<Start> starts_;
  bool let_go_ = false;  // the owner that is stepped has let go
};

}  // namespace tandem::test
