// SPDX-License-Identifier: Apache-2.0
// Load: numbered traffic both ways between the outside and several guests, and from guest to guest, as fast as the
// machine allows, in a thread of its own, with books that are always up to date.
//
// Flows: one out of each queue pair, `flows_in` towards each NIC, which the host spreads over its queues, and, if asked
// for, one out of each queue pair to the next guest. Each flow has a credit: so many frames are on their way, no more,
// and a frame that arrives gives its credit back. The credits of all flows together fit into every queue on the way,
// and those towards a guest into each of its receive rings, so that no ring can overflow and what is missing is a loss.
//
// A *stretch* is a piece of time in which the longest silence of any flow is measured, for gaps.
//
// Threads: the object's own thread moves the traffic; the public functions are for one other thread.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/flow_ledger.hpp"
#include "tests/support/load_guest.hpp"
#include "tests/support/load_outside.hpp"
#include "tests/support/prime_frames.hpp"

namespace tandem::test {

class Load {
 public:
  struct Options {
    unsigned flows_in = 4;             ///< towards each NIC
    bool between_guests = false;       ///< each queue pair sends to the next guest, too; the last one to the first
    unsigned credit = 600;             ///< frames on their way, all flows together (a CPU's backlog takes 1000)
    std::uint64_t rate = 0;            ///< frames sent per second, all flows together; 0: as many as go
    std::chrono::seconds patience{3};  ///< a flow silent for so long, with frames on their way, has lost them
  };
  struct Count {
    Tally tally;
    std::uint64_t sent_in = 0, sent_out = 0, sent_between = 0, arrived = 0;
    std::uint64_t stalls = 0;       ///< flows written off after `patience`
    std::uint64_t ring_errors = 0;  ///< LoadGuest::ring_errors() of all guests
    Count operator-(const Count& earlier) const;
    /// Everything that entered came out once, in order, whole, and no ring was misused.
    [[nodiscard]] bool clean() const { return tally.clean() && ring_errors == 0; }
  };

  /// `guests[i]` has the address `macs[i]`; they outlive this object. start() begins.
  Load(std::vector<LoadGuest*> guests, const std::vector<std::string>& macs, Options options);
  ~Load();
  Load(const Load&) = delete;
  Load& operator=(const Load&) = delete;

  void start();
  /// Sends no more, waits until everything has arrived or `patience` is over, and ends the thread.
  Count stop();
  [[nodiscard]] Count count() const;
  /// Of the flows from and to one guest.
  [[nodiscard]] Tally tally_of(std::size_t guest) const;

  /// Frames arrived, by flow.
  [[nodiscard]] std::vector<std::uint64_t> arrived_by_flow() const;
  /// LoadGuest::damaged_bytes() of one guest.
  [[nodiscard]] std::uint64_t damaged_bytes(std::size_t guest) const;

  /// From now on the longest silence is measured.
  void begin_stretch();
  struct Stretch {
    std::chrono::nanoseconds silence{0};  ///< the longest of any flow since begin_stretch(), one that lasts included
    std::chrono::nanoseconds pause{0};    ///< the longest in which the traffic thread itself got nothing done
  };
  Stretch end_stretch();
  /// The first flows that stalled, in words: which, and how the guest's rings stood then.
  [[nodiscard]] std::vector<std::string> stall_texts() const;

 private:
  struct Flow {
    PrimeFrames frames;
    std::size_t from, to;    // guests, or kOutside
    std::uint32_t pair = 0;  // of the guest that sends
    std::uint64_t sent = 0;
    FlowLedger ledger = {};
    std::int64_t last_ns = 0, longest_ns = 0;
    [[nodiscard]] std::uint64_t on_their_way() const { return sent - ledger.next(); }
  };
  static constexpr std::size_t kOutside = ~std::size_t{0};
  void run();
  std::size_t round(bool send);
  void take(std::span<const std::byte> frame, std::size_t receiver, std::int64_t now);
  std::size_t send_from_outside(Flow& flow, std::uint64_t most);
  std::size_t send_from_guest(Flow& flow, std::uint64_t most);
  void look_for_stalls(std::int64_t now);
  [[nodiscard]] bool all_arrived() const;

  std::vector<LoadGuest*> guests_;
  Options options_;
  std::uint64_t credit_ = 0;  // of each flow
  LoadOutside outside_;
  std::thread thread_;
  std::atomic<bool> sending_{false}, stop_{false};
  std::atomic<std::int64_t> drain_until_ns_{0};

  // Guards what follows; held by the traffic thread for a round at a time. Whoever wants it takes `next_` first and
  // gives that back once it has the other, or the traffic thread, which hardly ever lets go, would have it for ever.
  mutable std::mutex next_, mutex_;
  [[nodiscard]] std::unique_lock<std::mutex> lock() const {
    const std::lock_guard turn(next_);
    return std::unique_lock(mutex_);
  }
  std::vector<Flow> flows_;
  std::vector<std::size_t> flow_of_id_;  // index in flows_
  std::uint64_t stalls_ = 0;
  std::vector<std::string> stall_texts_;
  std::int64_t round_ns_ = 0, longest_pause_ns_ = 0;
  std::size_t first_flow_ = 0;  // of the present round
  double allowance_ = 0;        // frames that the rate allows now
  std::int64_t allowance_ns_ = 0;
};

}  // namespace tandem::test
