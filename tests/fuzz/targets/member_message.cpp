// SPDX-License-Identifier: Apache-2.0
// The control channel, supervisor's side. Input: number of shards, then the message's bytes.
#include "recovery/supervisor/member_message.hpp"

#include <algorithm>
#include <set>

#include "tests/fuzz/targets/input.hpp"

using namespace tandem;
using namespace tandem::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  const std::uint32_t shards = 1 + input.u8() % kMaxShards;
  const auto message = parse_member_message(input.take(input.left()), shards);
  if (!message) {
    must_hold(!message.error().text.empty(), "a refusal says why");
    return 0;
  }
  if (const auto* ready = std::get_if<ReadyBody>(&message->body)) {
    must_hold(message->type == ControlType::kReady && ready->shard_count == shards, "the shards are the pair's");
    std::set<std::uint32_t> threads(ready->thread_ids, ready->thread_ids + shards);
    must_hold(threads.size() == shards && !threads.contains(0) && *threads.rbegin() < 1u << 31,
              "threads are different ones, and none is a process group");
  } else if (const auto* device = std::get_if<DeviceBody>(&message->body)) {
    must_hold(device->device < kMaxDevices, "the device is one that can be");
  } else if (const auto* takeover = std::get_if<TakeoverBody>(&message->body)) {
    must_hold(takeover->shard < shards, "the shard is the pair's");
  } else {
    const auto& problem = std::get<ProblemBody>(message->body);
    const auto* end = std::find(problem.text, problem.text + sizeof problem.text, '\0');
    must_hold(end != problem.text + sizeof problem.text, "the text ends");
    must_hold(std::all_of(problem.text, end, [](char c) { return c >= ' ' && c <= '~'; }), "the text can be printed");
  }
  return 0;
}
