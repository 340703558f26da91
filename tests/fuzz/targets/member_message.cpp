// SPDX-License-Identifier: Apache-2.0
// The control channel, supervisor's side. Input: number of shards, then the message's bytes.
#include "recovery/supervisor/member_message.hpp"

#include <algorithm>
#include <set>
#include <variant>

#include "tests/fuzz/targets/input.hpp"

using namespace tandem;
using namespace tandem::fuzz;

namespace {

template <std::size_t kSize>
void must_be_printable(const char (&text)[kSize]) {
  const auto* end = std::find(text, text + kSize, '\0');
  must_hold(end != text + kSize, "the text ends");
  must_hold(std::all_of(text, end, [](char c) { return c >= ' ' && c <= '~'; }), "the text can be printed");
}

// One for each body; a body without one does not compile.
struct Check {
  ControlType type;
  std::uint32_t shards;

  void operator()(const ReadyBody& ready) const {
    must_hold(type == ControlType::kReady && ready.shard_count == shards, "the shards are the pair's");
    std::set<std::uint32_t> threads(ready.thread_ids, ready.thread_ids + shards);
    must_hold(threads.size() == shards && !threads.contains(0) && *threads.rbegin() < 1u << 31,
              "threads are different ones, and none is a process group");
  }
  void operator()(const DeviceBody& device) const {
    must_hold(device.device < kMaxDevices, "the device is one that can be");
  }
  void operator()(const TakeoverBody& takeover) const {
    must_hold(takeover.shard < shards, "the shard is the pair's");
  }
  void operator()(const RefusalBody& refusal) const {
    must_hold(refusal.shard < shards, "the shard is the pair's");
    must_be_printable(refusal.text);
  }
  void operator()(const ProblemBody& problem) const { must_be_printable(problem.text); }
  void operator()(const PoisonMessage& poison) const {
    must_hold(type == ControlType::kPoison && poison.fixed.shard < shards, "the shard is the pair's");
    must_hold(poison.fixed.queue_pair < kMaxQueuePairs, "the queue pair is one that can be");
    must_hold(poison.bytes.size() == poison.fixed.captured && poison.bytes.size() <= kMaxPoisonBytes,
              "the packet is as long as it says");
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  const std::uint32_t shards = 1 + input.u8() % kMaxShards;
  const auto message = parse_member_message(input.take(input.left()), shards);
  if (!message)
    must_hold(!message.error().text.empty(), "a refusal says why");
  else
    std::visit(Check{message->type, shards}, message->body);
  return 0;
}
