// SPDX-License-Identifier: Apache-2.0
// A backend that lies to its supervisor: sizes, numbers out of range, texts that are none.
#include "recovery/supervisor/member_message.hpp"

#include <catch2/catch.hpp>
#include <cstring>
#include <functional>
#include <vector>

using namespace tandem;

namespace {

constexpr std::uint32_t kShards = 2;

template <class Body>
std::vector<std::byte> message(ControlType type, const Body& body) {
  ControlHeader header;
  header.type = type;
  header.body_size = sizeof body;
  std::vector<std::byte> bytes(sizeof header + sizeof body);
  std::memcpy(bytes.data(), &header, sizeof header);
  std::memcpy(bytes.data() + sizeof header, &body, sizeof body);
  return bytes;
}

ReadyBody ready(std::uint32_t shards, std::uint32_t first, std::uint32_t second) {
  ReadyBody body;
  body.shard_count = shards;
  body.thread_ids[0] = first;
  body.thread_ids[1] = second;
  return body;
}

}  // namespace

TEST_CASE("messages of a backend") {
  CHECK(parse_member_message(message(ControlType::kReady, ready(2, 100, 101)), kShards).has_value());
  for (const ControlType type : {ControlType::kHeld, ControlType::kInForce, ControlType::kDetached}) {
    const auto parsed = parse_member_message(message(type, DeviceBody{kMaxDevices - 1, 0, 9}), kShards);
    REQUIRE(parsed.has_value());
    CHECK(parsed->type == type);
    CHECK(std::get<DeviceBody>(parsed->body).generation == 9);
  }
  for (const ControlType type : {ControlType::kTookOver, ControlType::kFirstTransaction})
    CHECK(parse_member_message(message(type, TakeoverBody{1, 0, {}}), kShards).has_value());
  const auto refused =
      parse_member_message(message(ControlType::kNotHandedOver, RefusalBody{1, 0, "later\n"}), kShards);
  REQUIRE(refused.has_value());
  CHECK(std::get<RefusalBody>(refused->body).text == std::string("later?"));
  const PoisonBody poison{1, 3, 0, kMaxQueuePairs - 1, PacketPhase::kReceive, 2, 60, 0};
  const auto empty = message(ControlType::kPoison, poison);
  REQUIRE(parse_member_message(empty, kShards).has_value());
  ProblemBody problem;
  std::memset(problem.text, 'x', sizeof problem.text);
  std::memcpy(problem.text, "\x1b[2J\n\xff", 6);
  const auto parsed = parse_member_message(message(ControlType::kProblem, problem), kShards);
  REQUIRE(parsed.has_value());
  const std::string text = std::get<ProblemBody>(parsed->body).text;
  CHECK(text == "?[2J??" + std::string(sizeof problem.text - 7, 'x'));
}

TEST_CASE("messages that no backend should send are refused with what is wrong") {
  struct Row {
    const char* what;
    std::vector<std::byte> bytes;
    const char* says;
  };
  const auto held = message(ControlType::kHeld, DeviceBody{});
  const auto changed = [](std::vector<std::byte> bytes, const std::function<void(ControlHeader&)>& change) {
    ControlHeader header;
    std::memcpy(&header, bytes.data(), sizeof header);
    change(header);
    std::memcpy(bytes.data(), &header, sizeof header);
    return bytes;
  };
  const auto cut = [](std::vector<std::byte> bytes, std::size_t size) {
    bytes.resize(size);
    return bytes;
  };
  const Row rows[] = {
      {"nothing", {}, "header"},
      {"half a header", cut(held, 8), "header"},
      {"other magic", changed(held, [](auto& h) { h.magic = 0; }), "version"},
      {"other version", changed(held, [](auto& h) { h.version = 99; }), "version 99"},
      {"body shorter than said", cut(held, held.size() - 1), "size"},
      {"body longer than said", cut(held, held.size() + 1), "size"},
      {"body of another type", changed(held, [](auto& h) { h.type = ControlType::kProblem; }), "bytes instead"},
      {"unknown type", changed(held, [](auto& h) { h.type = ControlType{999}; }), "type 999"},
      {"a supervisor's message", changed(held, [](auto& h) { h.type = ControlType::kDetach; }), "type 3"},
      {"a device that cannot be", message(ControlType::kHeld, DeviceBody{kMaxDevices, 0, 1}), "device 64"},
      {"a device far out", message(ControlType::kInForce, DeviceBody{~0u, 0, 1}), "device"},
      {"a shard the pair has not", message(ControlType::kTookOver, TakeoverBody{kShards, 0, {}}), "shard 2"},
      {"the same later", message(ControlType::kFirstTransaction, TakeoverBody{~0u, 0, {}}), "shard"},
      {"another number of shards", message(ControlType::kReady, ready(1, 100, 101)), "1 shards"},
      {"more shards than there can be", message(ControlType::kReady, ready(~0u, 100, 101)), "shards"},
      {"thread 0", message(ControlType::kReady, ready(2, 100, 0)), "poll thread"},
      {"a negative thread", message(ControlType::kReady, ready(2, 0x80000001, 101)), "poll thread"},
      {"poison of no direction", message(ControlType::kPoison, PoisonBody{}), "direction 0"},
      {"poison while applying", message(ControlType::kPoison, PoisonBody{0, 0, 0, 0, PacketPhase::kApply, 2, 0, 0}),
       "direction 3"},
      {"poison of a queue pair that cannot be",
       message(ControlType::kPoison, PoisonBody{0, 0, 0, kMaxQueuePairs, PacketPhase::kReceive, 2, 0, 0}),
       "queue pair 256"},
      {"poison that promises bytes",
       message(ControlType::kPoison, PoisonBody{0, 0, 0, 0, PacketPhase::kReceive, 2, 60, 60}), "poison packet"},
      {"poison that promises too many",
       message(ControlType::kPoison, PoisonBody{0, 0, 0, 0, PacketPhase::kReceive, 2, 60, ~0u}), "poison packet"},
      {"one thread twice", message(ControlType::kReady, ready(2, 100, 100)), "poll thread"},
  };
  for (const Row& row : rows) {
    INFO(row.what);
    const auto parsed = parse_member_message(row.bytes, kShards);
    REQUIRE_FALSE(parsed.has_value());
    INFO(parsed.error().text);
    CHECK(parsed.error().text.find(row.says) != std::string::npos);
  }
}
