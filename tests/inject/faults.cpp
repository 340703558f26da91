// SPDX-License-Identifier: Apache-2.0
// Choosing places and breaking them.
#include "tests/inject/faults.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "common/layout/segment.hpp"
#include "tests/support/process_limit.hpp"

namespace tandem::test {

namespace {

using Random = std::mt19937_64;

std::uint64_t below(Random& random, std::uint64_t end) {
  return std::uniform_int_distribution<std::uint64_t>(0, end - 1)(random);
}

std::string place(const Victim& victim, std::uint64_t address) {
  const Region* region = victim.region_of(address);
  char text[64];
  std::snprintf(
      text, sizeof text, "+0x%llx",
      static_cast<unsigned long long>(region == nullptr ? address : address - region->begin + region->offset));
  return (region == nullptr ? "nowhere" : region->path.empty() ? "anonymous" : region->path) + text;
}

// What the poll thread executes under traffic; the rest hardly ever.
bool is_hot(const Function& function) {
  static constexpr const char* kHot[] = {"transmit_burst", "receive_burst", "poll_once",    "poll_as_owner",
                                         "has_work",       "apply_",        "5place",       "6gather",
                                         "wake_transmit",  "Shard5sleep",   "enable_kicks", "Scatter",
                                         "ChainWalker",    "drain_compl",   "view_some",    "authorize_some"};
  return std::any_of(std::begin(kHot), std::end(kHot),
                     [&](const char* part) { return function.name.find(part) != std::string::npos; });
}

Injected flip_code(const Victim& victim, Random& random) {
  std::vector<Function> hot;
  std::copy_if(victim.functions().begin(), victim.functions().end(), std::back_inserter(hot), is_hot);
  // Half of the faults anywhere: most of that code never runs again, as in life.
  const auto& from = below(random, 4) == 0 || hot.empty() ? victim.functions() : hot;
  if (from.empty()) return {};
  const Function& function = from[below(random, from.size())];
  const std::uint64_t offset = below(random, function.size);
  const auto bit = static_cast<unsigned>(below(random, 8));
  return {.done = victim.flip(function.address + offset, bit),
          .what = {{"function", function.name}, {"offset", offset}, {"bit", bit}}};
}

Injected flip_stack(const Victim& victim, pid_t tid, Random& random) {
  constexpr std::uint64_t kDepth = 2048;  // frames of the poll loop and what it calls
  const StoppedThread thread(tid);
  const auto registers = thread.registers();
  if (!registers) return {};
  const std::uint64_t offset = below(random, kDepth);
  const auto bit = static_cast<unsigned>(below(random, 8));
  return {.done = victim.flip(registers->rsp + offset, bit), .what = {{"above_rsp", offset}, {"bit", bit}}};
}

// The words of the process's private data that are not zero: its heap, arenas, data and bss.
struct Word {
  std::uint64_t address, value;
};
std::vector<Word> live_words(const Victim& victim) {
  constexpr std::uint64_t kLargest = 16 << 20;  // larger ones are reserves and DPDK's memory, empty for the most part
  std::vector<Word> words;
  for (const Region& region : victim.regions()) {
    if (!region.writable() || region.shared() || region.size() > kLargest || region.path.find("[stack") == 0) continue;
    if (!region.path.empty() && region.path.find("[heap]") == std::string::npos &&
        region.path.find("tandem-backend") == std::string::npos)
      continue;
    std::vector<std::uint64_t> content(region.size() / sizeof(std::uint64_t));
    if (!victim.read(region.begin, std::as_writable_bytes(std::span(content)))) continue;
    for (std::size_t i = 0; i < content.size(); ++i)
      if (content[i] != 0) words.push_back({region.begin + i * sizeof(std::uint64_t), content[i]});
  }
  return words;
}

Injected flip_heap(const Victim& victim, Random& random) {
  const std::vector<Word> words = live_words(victim);
  if (words.empty()) return {};
  const Word& word = words[below(random, words.size())];
  const std::uint64_t byte = below(random, 8);
  const auto bit = static_cast<unsigned>(below(random, 8));
  return {.done = victim.flip(word.address + byte, bit),
          .what = {{"place", place(victim, word.address + byte)}, {"bit", bit}}};
}

Injected corrupt_pointer(const Victim& victim, Random& random) {
  std::vector<Word> pointers = live_words(victim);
  std::erase_if(pointers, [&](const Word& word) { return victim.region_of(word.value) == nullptr; });
  // Pointers into guest memory, segment, frames and rings are few and are what the poll loop lives on: every second
  // fault takes one of those.
  std::vector<Word> shared(pointers);
  std::erase_if(shared, [&](const Word& word) {
    const Region& region = *victim.region_of(word.value);
    return !region.shared() || region.path.find("nohuge") != std::string::npos;
  });
  const auto& from = below(random, 2) == 0 && !shared.empty() ? shared : pointers;
  if (from.empty()) return {};
  const Word& pointer = from[below(random, from.size())];
  std::uint64_t value = 0;
  switch (below(random, 3)) {
    case 0:
      break;
    case 1:
      value = pointer.value ^ std::uint64_t{1} << below(random, 47);
      break;
    default:
      value = pointer.value + 8 * (1 + below(random, 512));
  }
  return {.done = victim.write(pointer.address, std::as_bytes(std::span(&value, 1))),
          .what = {{"place", place(victim, pointer.address)},
                   {"from", place(victim, pointer.value)},
                   {"to", place(victim, value)}}};
}

// Makes the poll thread itself execute a store through a wild pointer into guest memory.
Injected store_wildly(const Victim& victim, pid_t tid, Random& random) {
  static constexpr std::array kStore{std::byte{0x48}, std::byte{0x89}, std::byte{0x07}};  // mov %rax,(%rdi)
  // Any library has one.
  std::uint64_t instruction = 0;
  for (const Region& region : victim.regions()) {
    if (region.permissions[2] != 'x' || region.path.empty() || region.path[0] != '/' || instruction != 0) continue;
    std::vector<std::byte> code(region.size());
    if (!victim.read(region.begin, code)) continue;
    const auto found = std::search(code.begin(), code.end(), kStore.begin(), kStore.end());
    if (found != code.end()) instruction = region.begin + static_cast<std::uint64_t>(found - code.begin());
  }
  std::vector<Region> guest;
  std::copy_if(victim.regions().begin(), victim.regions().end(), std::back_inserter(guest),
               [](const Region& region) { return region.path.find("tandem-test-guest") != std::string::npos; });
  if (instruction == 0 || guest.empty()) return {};
  const Region& region = guest[below(random, guest.size())];
  const std::uint64_t target = region.begin + below(random, region.size() / 8) * 8;
  StoppedThread thread(tid);
  const int signal = thread.store(instruction, target, random());
  return {.done = signal >= 0,
          .window_hit = signal == 0,
          .what = {{"place", place(victim, target)}, {"mapping", region.permissions}, {"signal", signal}}};
}

// What a wild store of a dying owner may do to the memory it shares with its heir.
Injected damage_segment(const Victim& victim, Random& random) {
  const auto segment = std::find_if(victim.regions().begin(), victim.regions().end(), [](const Region& region) {
    return region.path.find("tandem-pair") != std::string::npos && region.shared();
  });
  if (segment == victim.regions().end()) return {};
  // The parts that are in use: header, the first shard with its record, the first queue pairs.
  constexpr std::uint64_t kPairs = 3;
  constexpr std::uint64_t kFirst = offsetof(Segment, shards) + sizeof(ShardState);
  const std::uint64_t at = below(random, kFirst + kPairs * sizeof(QueuePairState));
  const std::uint64_t offset = at < kFirst ? at : at - kFirst + offsetof(Segment, queue_pairs);
  const auto bit = static_cast<unsigned>(below(random, 8));
  return {.done = victim.flip(segment->begin + offset, bit),
          .end_at_once = true,
          .what = {{"segment_offset", offset}, {"bit", bit}}};
}

Injected limit(const Victim& victim, int resource, rlim_t value) {
  const int error = set_soft_limit(victim.pid(), resource, value);
  nlohmann::json what{{"limit", value}};
  if (error != 0) what["error"] = std::strerror(error);
  return {.done = error == 0, .what = std::move(what)};
}

}  // namespace

const char* fault_name(FaultKind kind) {
  constexpr const char* kNames[] = {"code",    "stack",          "heap",     "pointer", "wild store into guest memory",
                                    "segment", "no descriptors", "no memory"};
  static_assert(std::size(kNames) == static_cast<std::size_t>(FaultKind::kCount));
  return kNames[static_cast<std::size_t>(kind)];
}

Injected inject(FaultKind kind, const Victim& victim, pid_t tid, std::mt19937_64& random) {
  switch (kind) {
    case FaultKind::kCode:
      return flip_code(victim, random);
    case FaultKind::kStack:
      return flip_stack(victim, tid, random);
    case FaultKind::kHeap:
      return flip_heap(victim, random);
    case FaultKind::kPointer:
      return corrupt_pointer(victim, random);
    case FaultKind::kWildStore:
      return store_wildly(victim, tid, random);
    case FaultKind::kSegment:
      return damage_segment(victim, random);
    case FaultKind::kDescriptors:
      return limit(victim, RLIMIT_NOFILE, 3);
    case FaultKind::kMemory:
      return limit(victim, RLIMIT_AS, 1 << 20);  // less than it has: it gets no more
    case FaultKind::kCount:
      break;
  }
  return {};
}

}  // namespace tandem::test
