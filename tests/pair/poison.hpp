// SPDX-License-Identifier: Apache-2.0
// Frames that kill probed backends (vhost-net-backend/poison_probe.hpp), and traffic of two guests at once.
#pragma once

#include <cstring>

#include "tests/pair/fixture.hpp"
#include "vhost-net-backend/poison_probe.hpp"

namespace tandem::test {

/// From the outside to the guest with `mac`, or the other way round.
inline Frame poison_frame(bool to_guest, const std::string& mac, DrillFault fault) {
  const std::string outside = "02:00:00:00:00:01";
  Frame frame = numbered_frame(to_guest ? mac : outside, to_guest ? outside : mac, kUncountedFlow, 0, 200);
  std::memcpy(frame.data() + kPoisonAt, kPoisonMagic, kPoisonMagicSize);
  frame[kPoisonAt + kPoisonMagicSize] = static_cast<std::uint8_t>(fault);
  return frame;
}

/// Both at work until `done`, which is asked every 20 ms.
inline bool pump_until(Traffic& one, Traffic& other, const std::function<bool()>& done) {
  auto asked = std::chrono::steady_clock::now();
  return one.pump_until([&] {
    other.pump();
    if (std::chrono::steady_clock::now() - asked < std::chrono::milliseconds{20}) return false;
    asked = std::chrono::steady_clock::now();
    return done();
  });
}

}  // namespace tandem::test
