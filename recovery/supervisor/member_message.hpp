// SPDX-License-Identifier: Apache-2.0
// What a backend says to its supervisor (layout/control_message.hpp), validated.
//
// A backend serves hostile guests and may have been taken over by one: parse_member_message() is the one function that
// looks at its bytes. Everything in a MemberMessage is within limits; whether it is true, and whether this is its time,
// is the pair's to judge. Pure, any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <variant>

#include "common/layout/control_message.hpp"
#include "common/result.hpp"

namespace tandem {

/// A PoisonBody and what follows it, which is a part of the message's bytes.
struct PoisonMessage {
  PoisonBody fixed;
  std::span<const std::byte> bytes;
};

struct MemberMessage {
  ControlType type{};
  /// By type. kReady: ReadyBody; kHeld, kInForce, kDetached: DeviceBody; kTookOver, kFirstTransaction: TakeoverBody;
  /// kNotHandedOver: RefusalBody; kCannotAttach, kProblem: ProblemBody; kPoison: PoisonMessage.
  std::variant<ReadyBody, DeviceBody, TakeoverBody, RefusalBody, ProblemBody, PoisonMessage> body;
};

/// `shards`: how many the pair has. kUnsupported: another control version; kInvalid: too short or too long, unknown
/// type, or a number out of range. Thread ids are positive and all different, devices and shards exist in the layout,
/// texts end and hold nothing but printable characters.
Result<MemberMessage> parse_member_message(std::span<const std::byte> bytes, std::uint32_t shards);

}  // namespace tandem
