// SPDX-License-Identifier: Apache-2.0
// Sizes and ranges of a backend's messages.
#include "recovery/supervisor/member_message.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

namespace tandem {

namespace {

Status check(const ReadyBody& ready, std::uint32_t shards) {
  if (ready.shard_count != shards)
    return fail(ErrorKind::kInvalid,
                "it has " + std::to_string(ready.shard_count) + " shards instead of " + std::to_string(shards));
  for (std::uint32_t i = 0; i < shards; ++i) {
    const std::uint32_t* begin = ready.thread_ids;
    if (begin[i] == 0 || begin[i] > std::uint32_t{std::numeric_limits<std::int32_t>::max()} ||
        std::count(begin, begin + shards, begin[i]) != 1)
      return fail(ErrorKind::kInvalid, "it names " + std::to_string(begin[i]) + " as a poll thread");
  }
  return {};
}

Status check(const DeviceBody& device, std::uint32_t) {
  if (device.device < kMaxDevices) return {};
  return fail(ErrorKind::kInvalid,
              "it names device " + std::to_string(device.device) + " of " + std::to_string(kMaxDevices));
}

Status check(const TakeoverBody& takeover, std::uint32_t shards) {
  if (takeover.shard < shards) return {};
  return fail(ErrorKind::kInvalid,
              "it names shard " + std::to_string(takeover.shard) + " of " + std::to_string(shards));
}

// The text goes to logs and terminals.
template <std::size_t kSize>
void make_printable(char (&text)[kSize]) {
  char* const end = text + kSize - 1;
  *end = '\0';
  std::replace_if(
      text, std::find(text, end, '\0'), [](char c) { return c < ' ' || c > '~'; }, '?');
}

Status check(ProblemBody& problem, std::uint32_t) {
  make_printable(problem.text);
  return {};
}

Status check(RefusalBody& refusal, std::uint32_t shards) {
  make_printable(refusal.text);
  if (refusal.shard < shards) return {};
  return fail(ErrorKind::kInvalid, "it names shard " + std::to_string(refusal.shard) + " of " + std::to_string(shards));
}

template <class Body>
Result<MemberMessage> read(ControlType type, std::span<const std::byte> bytes, std::uint32_t shards) {
  Body body;
  if (bytes.size() != sizeof body)
    return fail(ErrorKind::kInvalid, "its message of type " + std::to_string(static_cast<unsigned>(type)) + " has " +
                                         std::to_string(bytes.size()) + " bytes instead of " +
                                         std::to_string(sizeof body));
  std::memcpy(&body, bytes.data(), sizeof body);
  if (auto checked = check(body, shards); !checked) return tl::make_unexpected(std::move(checked.error()));
  return MemberMessage{type, body};
}

Result<MemberMessage> read_poison(std::span<const std::byte> bytes, std::uint32_t shards) {
  PoisonMessage poison;
  if (bytes.size() >= sizeof poison.fixed) std::memcpy(&poison.fixed, bytes.data(), sizeof poison.fixed);
  if (bytes.size() < sizeof poison.fixed || poison.fixed.captured > kMaxPoisonBytes ||
      bytes.size() != sizeof poison.fixed + poison.fixed.captured)
    return fail(ErrorKind::kInvalid, "its message of a poison packet has " + std::to_string(bytes.size()) + " bytes");
  const bool direction =
      poison.fixed.direction == PacketPhase::kTransmit || poison.fixed.direction == PacketPhase::kReceive;
  if (poison.fixed.shard >= shards || poison.fixed.queue_pair >= kMaxQueuePairs || !direction)
    return fail(ErrorKind::kInvalid, "it names shard " + std::to_string(poison.fixed.shard) + ", queue pair " +
                                         std::to_string(poison.fixed.queue_pair) + ", direction " +
                                         std::to_string(static_cast<unsigned>(poison.fixed.direction)) +
                                         " of a poison packet");
  poison.bytes = bytes.subspan(sizeof poison.fixed);
  return MemberMessage{ControlType::kPoison, poison};
}

}  // namespace

Result<MemberMessage> parse_member_message(std::span<const std::byte> bytes, std::uint32_t shards) {
  ControlHeader header;
  if (bytes.size() < sizeof header) return fail(ErrorKind::kInvalid, "it sent a message without a header");
  std::memcpy(&header, bytes.data(), sizeof header);
  if (header.magic != kControlMagic || header.version != kControlVersion)
    return fail(ErrorKind::kUnsupported, "it speaks control version " + std::to_string(header.version) + ", we speak " +
                                             std::to_string(kControlVersion));
  const auto body = bytes.subspan(sizeof header);
  if (header.body_size != body.size())
    return fail(ErrorKind::kInvalid, "the size of its message differs from what the header says");
  switch (header.type) {
    case ControlType::kReady:
      return read<ReadyBody>(header.type, body, shards);
    case ControlType::kHeld:
    case ControlType::kInForce:
    case ControlType::kDetached:
      return read<DeviceBody>(header.type, body, shards);
    case ControlType::kTookOver:
    case ControlType::kFirstTransaction:
      return read<TakeoverBody>(header.type, body, shards);
    case ControlType::kNotHandedOver:
      return read<RefusalBody>(header.type, body, shards);
    case ControlType::kPoison:
      return read_poison(body, shards);
    case ControlType::kCannotAttach:
    case ControlType::kProblem:
      return read<ProblemBody>(header.type, body, shards);
    default:
      return fail(ErrorKind::kInvalid,
                  "it sent a message of type " + std::to_string(static_cast<unsigned>(header.type)));
  }
}

}  // namespace tandem
