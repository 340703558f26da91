// SPDX-License-Identifier: Apache-2.0
// Fence: loads, pins and steers the BPF programs that tell when a poll thread can never run user code again.
//
// Held by the supervisor only (root, one thread). Everything it makes is pinned below one directory, so watches stay in
// force when the supervisor dies; its successor calls adopt() on the same directory. Backends get two kinds of fd from
// it: slots_fd() for FenceView (common/fence_view.hpp) and ring_fd() for WakeRing (common/wake_ring.hpp). The watch map
// never leaves.
//
// Tags name poll-thread incarnations (common/layout/fence_slot.h). The caller never uses a tag twice, and never lets
// two watched tags share tag % TANDEM_FENCE_SLOTS (watch() refuses it). Tids are those of the init pid namespace. What
// a mark says of a cause is what the *thread* died of: the thread that faulted has the fault's signal, its siblings,
// and all threads for signals that dump no core (SIGTERM) or a sibling's exit_group, have SIGKILL. wait status tells
// the rest. Not seen: an exec that fails after the point of no return (the thread then dies under its leader's tid);
// backends may not exec.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "common/fence_view.hpp"
#include "common/layout/fence_slot.h"
#include "common/result.hpp"
#include "common/unique_fd.hpp"

namespace tandem {

class Fence {
 public:
  /// Loads and attaches the programs, freezes the slots, pins all in `pin_dir` (made, with bpffs mounted if need be).
  /// Pins of a dead predecessor found there are replaced: its watches end. kUnsupported names what the kernel lacks and
  /// the remedy.
  static Result<Fence> load(const std::string& pin_dir);

  /// Opens what a predecessor left in `pin_dir`, with its watches, marks and rings as they are. kGone: nothing is there
  /// (load instead). kUnsupported: another version's layout (end its pairs, then load).
  static Result<Fence> adopt(const std::string& pin_dir);

  /// Returns only when the death of `tid` is certain to be marked: the entry is in the map and the thread, the same one
  /// as at the call, had not begun to exit afterwards. With `process` not 0, `tid` must be a thread of that process;
  /// keep it from being reaped (or hold a pidfd and check it after) so that its number means what it meant. On kGone
  /// the thread is dead or dying and nothing is watched; its slot may or may not be marked, so treat `tag` as used up.
  /// kInvalid: the incarnation is marked dead already, so it was used before. `ring` is an index from make_ring(), or
  /// TANDEM_FENCE_NO_RING.
  Status watch(pid_t tid, std::uint64_t tag, std::uint32_t ring, pid_t process = 0);

  /// The heir of a watched thread changes. kGone: it is not watched any more (it died, perhaps waking the old heir). A
  /// new heir reads the slot after this returns and before it first sleeps: a death during the call may have woken the
  /// old one.
  Status set_ring(pid_t tid, std::uint64_t tag, std::uint32_t ring);

  /// Ends a watch; its thread's death will not be marked. A tid that is not watched is fine.
  Status unwatch(pid_t tid);

  /// A new descriptor of the frozen slots map: its holder can map it read-only and do nothing else with it.
  [[nodiscard]] Result<UniqueFd> slots_fd() const;

  /// A new wake-up ring for one heir; at most TANDEM_FENCE_RINGS exist. The index stays valid across adopt().
  Result<std::uint32_t> make_ring();
  /// A new descriptor of ring `index`, for exactly one heir. kGone: there is no such ring.
  [[nodiscard]] Result<UniqueFd> ring_fd(std::uint32_t index) const;
  /// Forgets the ring; descriptors that exist stay valid but are never woken again. An index not in use is fine.
  Status free_ring(std::uint32_t index);

  /// What was recorded of incarnation `tag`; all zero while it lives.
  [[nodiscard]] tandem_fence_slot read_slot(std::uint64_t tag) const noexcept { return view_.slot(tag); }
  [[nodiscard]] bool dead(std::uint64_t tag) const noexcept { return view_.dead(tag); }

  /// The highest incarnation that is watched or marked: whoever goes on from pins gives out higher ones only.
  [[nodiscard]] std::uint64_t highest_tag() const noexcept;

  /// Removes the pins (and empty directories): the fence ends with this object and with descriptors held elsewhere.
  Status unpin_all();

 private:
  Fence() = default;
  Status refuse_shared_slot(pid_t tid, std::uint64_t tag) const;

  std::string pin_dir_;
  UniqueFd watch_;
  UniqueFd slots_;
  UniqueFd rings_;
  UniqueFd links_[3];
  FenceView view_;
};

}  // namespace tandem
