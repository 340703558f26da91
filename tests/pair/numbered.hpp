// SPDX-License-Identifier: Apache-2.0
// Numbered frames between a scripted guest and the outside, both ways at once, and the account of what became of them.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "common/unique_fd.hpp"
#include "tests/support/pair_host.hpp"
#include "tests/support/scripted_front_end.hpp"

namespace tandem::test {

/// Flows from here on are noise that Traffic does not count.
inline constexpr std::uint16_t kUncountedFlow = 500;

/// A UDP frame with flow (as ports), number and a pattern made from both.
Frame numbered_frame(const std::string& to, const std::string& from, std::uint16_t flow, std::uint32_t number,
                     std::size_t size);

struct Numbered {
  std::uint16_t flow = 0;
  std::uint32_t number = 0;
  bool intact = false;  ///< length and pattern are what they were
};
/// Of a frame that numbered_frame() made, whatever became of it since; nothing for others'.
std::optional<Numbered> parse_numbered(const Frame& frame);

/// What arrived of one flow, compared with what was sent.
class FlowAccount {
 public:
  void note(std::uint32_t number, bool intact);
  [[nodiscard]] std::uint64_t arrived() const { return arrived_; }
  /// Numbers below `sent` that never came.
  [[nodiscard]] std::uint64_t lost(std::uint32_t sent) const;
  std::uint64_t duplicated = 0, reordered = 0, corrupt = 0;

 private:
  std::uint64_t arrived_ = 0;
  std::uint32_t highest_ = 0;
  std::vector<bool> seen_;
};

/// A packet socket on the outside's end of the cable.
class Outside {
 public:
  explicit Outside(const char* netdev = "host0");
  void send(std::span<const std::uint8_t> frame);
  /// Frames of ours that are waiting, whatever their flow and destination.
  std::vector<Frame> receive();
  [[nodiscard]] int fd() const { return socket_.get(); }

 private:
  UniqueFd socket_;
};

struct TrafficResult {
  std::uint64_t sent_in = 0, sent_out = 0, lost = 0, duplicated = 0, reordered = 0, corrupt = 0;
  [[nodiscard]] bool clean() const { return lost + duplicated + reordered + corrupt == 0; }
};
std::ostream& operator<<(std::ostream& out, const TrafficResult& result);

/// Traffic both ways between the outside and one scripted guest: per queue pair a flow out, and `flows_in` flows in.
/// Driven by calls of pump(); windows keep every ring from overflowing, so that what is missing is a loss.
class Traffic {
 public:
  struct Options {
    unsigned flows_in = 1;
    unsigned window_in = 96;  ///< frames on their way to the guest, all flows together (a veth's queue holds 256)
    bool in = true, out = true;
  };
  Traffic(ScriptedFrontEnd& guest, std::string mac, Options options);
  Traffic(ScriptedFrontEnd& guest, std::string mac) : Traffic(guest, std::move(mac), Options{}) {}

  /// One round: sends what the windows allow, takes what has arrived. Returns the number of frames moved.
  std::size_t pump(bool send = true);
  /// Rounds until `done` is true (asked between rounds) or the failsafe; true in the first case. Naps when nothing
  /// moves.
  bool pump_until(const std::function<bool()>& done);
  /// At least `frames` more in each direction that is on.
  bool pump_frames(std::uint64_t frames);
  /// Sends no more and waits for what is on its way; the account. Waits in vain for what is lost: `patience` then.
  TrafficResult finish(std::chrono::milliseconds patience = std::chrono::seconds{5});

  [[nodiscard]] std::uint64_t arrived_in() const;
  [[nodiscard]] std::uint64_t arrived_out() const;
  /// Frames that arrived outside from the queue pair that sent fewest.
  [[nodiscard]] std::uint64_t least_out() const;
  /// Frames that arrived at the guest by queue pair.
  [[nodiscard]] const std::vector<std::uint64_t>& by_pair() const { return by_pair_; }
  Outside& outside() { return outside_; }

 private:
  std::size_t send_in();
  std::size_t send_out();
  std::size_t take();
  void account(const Frame& frame, std::map<std::uint16_t, FlowAccount>& flows, const std::string& to);

  ScriptedFrontEnd& guest_;
  std::string mac_;
  Options options_;
  Outside outside_;
  std::vector<std::uint32_t> next_in_, next_out_;
  std::map<std::uint16_t, FlowAccount> in_, out_;
  std::vector<std::uint64_t> by_pair_;
  std::uint32_t turn_ = 0;
};

}  // namespace tandem::test
