// SPDX-License-Identifier: Apache-2.0
// The traffic thread.
#include "tests/support/load.hpp"

#include <sys/prctl.h>

#include <algorithm>
#include <cstring>
#include <ctime>

namespace tandem::test {

namespace {

constexpr std::uint64_t kBurst = 32;
constexpr long kNapNs = 20'000;
constexpr std::uint16_t kFlowsOfGuest = 64, kFirstBetween = 16, kFirstInward = 32;
constexpr std::size_t kMostTexts = 20;
constexpr std::size_t kNoFlow = ~std::size_t{0};

std::int64_t now_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return std::int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

}  // namespace

Load::Count Load::Count::operator-(const Count& earlier) const {
  Count difference;
  // Lost ones may come after all (then they are reordered), so that a difference may be below zero: none, then.
  difference.tally.lost = tally.lost - std::min(tally.lost, earlier.tally.lost);
  difference.tally.duplicated = tally.duplicated - earlier.tally.duplicated;
  difference.tally.reordered = tally.reordered - earlier.tally.reordered;
  difference.tally.corrupt = tally.corrupt - earlier.tally.corrupt;
  difference.sent_in = sent_in - earlier.sent_in;
  difference.sent_out = sent_out - earlier.sent_out;
  difference.sent_between = sent_between - earlier.sent_between;
  difference.arrived = arrived - earlier.arrived;
  difference.stalls = stalls - earlier.stalls;
  difference.ring_errors = ring_errors - earlier.ring_errors;
  return difference;
}

Load::Load(std::vector<LoadGuest*> guests, const std::vector<std::string>& macs, Options options)
    : guests_(std::move(guests)), options_(options) {
  const MacAddress outside = parse_mac("02:00:00:00:00:01");
  for (std::size_t i = 0; i < guests_.size(); ++i) {
    const auto base = static_cast<std::uint16_t>(i * kFlowsOfGuest);
    const std::size_t next = (i + 1) % guests_.size();
    const auto add = [&](unsigned id, std::size_t from, std::size_t to, std::uint32_t pair) {
      const auto address = [&](std::size_t end) { return end == kOutside ? outside : parse_mac(macs[end].c_str()); };
      flows_.push_back({{static_cast<std::uint16_t>(base + id), address(to), address(from)}, from, to, pair});
    };
    for (std::uint32_t pair = 0; pair < guests_[i]->queue_pairs(); ++pair) {
      add(pair, i, kOutside, pair);
      if (options_.between_guests && next != i) add(kFirstBetween + pair, i, next, pair);
    }
    for (unsigned n = 0; n < options_.flows_in; ++n) add(kFirstInward + n, kOutside, i, 0);
  }
  flow_of_id_.assign(guests_.size() * kFlowsOfGuest, kNoFlow);
  for (std::size_t i = 0; i < flows_.size(); ++i) flow_of_id_[flows_[i].frames.flow()] = i;
  // Nothing waits for a guest's buffers but what came from the outside, so all flows towards one guest must fit into
  // one of its rings, even if each frame takes two of its buffers.
  std::size_t most_towards = 1;
  for (std::size_t i = 0; i < guests_.size(); ++i)
    most_towards = std::max<std::size_t>(
        most_towards, std::count_if(flows_.begin(), flows_.end(), [i](const Flow& flow) { return flow.to == i; }));
  const std::uint64_t fits = options_.between_guests ? LoadGuest::kSlots / 2 / most_towards : options_.credit;
  credit_ = std::max<std::uint64_t>(1, std::min(options_.credit / flows_.size(), fits));
}

Load::~Load() {
  stop_.store(true);
  if (thread_.joinable()) thread_.join();
}

void Load::start() {
  const std::int64_t now = now_ns();
  for (Flow& flow : flows_) flow.last_ns = now;
  allowance_ns_ = now;
  sending_.store(true);
  thread_ = std::thread([this] { run(); });
}

Load::Count Load::stop() {
  sending_.store(false);
  drain_until_ns_.store(now_ns() + std::chrono::nanoseconds(options_.patience).count());
  stop_.store(true);
  if (thread_.joinable()) thread_.join();
  for (Flow& flow : flows_) flow.ledger.write_off(flow.sent);
  return count();
}

Load::Count Load::count() const {
  Count count;
  const auto locked = lock();
  for (const Flow& flow : flows_) {
    count.tally += flow.ledger.tally();
    (flow.from == kOutside ? count.sent_in : flow.to == kOutside ? count.sent_out : count.sent_between) += flow.sent;
    count.arrived += flow.ledger.arrived();
  }
  count.stalls = stalls_;
  for (const LoadGuest* guest : guests_) count.ring_errors += guest->ring_errors();
  return count;
}

Tally Load::tally_of(std::size_t guest) const {
  Tally tally;
  const auto locked = lock();
  for (const Flow& flow : flows_)
    if (flow.from == guest || flow.to == guest) tally += flow.ledger.tally();
  return tally;
}

std::vector<std::uint64_t> Load::arrived_by_flow() const {
  std::vector<std::uint64_t> arrived;
  const auto locked = lock();
  for (const Flow& flow : flows_) arrived.push_back(flow.ledger.arrived());
  return arrived;
}

std::uint64_t Load::damaged_bytes(std::size_t guest) const {
  const auto locked = lock();
  return guests_[guest]->damaged_bytes();
}

void Load::begin_stretch() {
  const auto locked = lock();
  for (Flow& flow : flows_) flow.longest_ns = 0;
  longest_pause_ns_ = 0;
}

Load::Stretch Load::end_stretch() {
  const auto locked = lock();
  const std::int64_t now = now_ns();
  std::int64_t longest = 0;
  for (const Flow& flow : flows_) longest = std::max({longest, flow.longest_ns, now - flow.last_ns});
  return {std::chrono::nanoseconds(longest), std::chrono::nanoseconds(std::max(longest_pause_ns_, now - round_ns_))};
}

std::vector<std::string> Load::stall_texts() const {
  const auto locked = lock();
  return stall_texts_;
}

bool Load::all_arrived() const {
  const auto locked = lock();
  return std::all_of(flows_.begin(), flows_.end(), [](const Flow& flow) { return flow.on_their_way() == 0; });
}

void Load::run() {
  ::prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
  for (;;) {
    const bool send = sending_.load(std::memory_order_relaxed);
    if (!send && stop_.load(std::memory_order_relaxed) &&
        (all_arrived() || now_ns() > drain_until_ns_.load(std::memory_order_relaxed)))
      return;
    if (stop_.load(std::memory_order_relaxed) && drain_until_ns_.load(std::memory_order_relaxed) == 0) return;
    if (round(send) != 0) continue;
    const timespec nap{0, kNapNs};
    ::nanosleep(&nap, nullptr);
  }
}

std::size_t Load::round(bool send) {
  const auto locked = lock();
  std::size_t moved = 0;
  const std::int64_t begun = now_ns();
  if (round_ns_ != 0) longest_pause_ns_ = std::max(longest_pause_ns_, begun - round_ns_);
  round_ns_ = begun;
  for (std::size_t guest = 0; guest < guests_.size(); ++guest)
    for (std::uint32_t pair = 0; pair < guests_[guest]->queue_pairs(); ++pair) {
      const std::int64_t now = now_ns();
      moved += guests_[guest]->receive(pair, [&](std::span<const std::byte> frame) { take(frame, guest, now); });
    }
  std::int64_t now = now_ns();
  moved += outside_.receive([&](std::span<const std::byte> frame) { take(frame, kOutside, now); });
  now = now_ns();
  look_for_stalls(now);
  if (!send) return moved;
  if (options_.rate != 0) {
    allowance_ += static_cast<double>(now - allowance_ns_) * 1e-9 * static_cast<double>(options_.rate);
    allowance_ = std::min(allowance_, static_cast<double>(kBurst * flows_.size()));
    allowance_ns_ = now;
  }
  // Each round begins with another flow, or those at the end would get what a low rate leaves them: nothing.
  first_flow_ = (first_flow_ + 1) % flows_.size();
  for (std::size_t i = 0; i < flows_.size(); ++i) {
    Flow& flow = flows_[(first_flow_ + i) % flows_.size()];
    std::uint64_t most = std::min(kBurst, credit_ - std::min(credit_, flow.on_their_way()));
    if (options_.rate != 0) most = std::min(most, static_cast<std::uint64_t>(std::max(allowance_, 0.0)));
    const std::size_t sent = most == 0               ? 0
                             : flow.from == kOutside ? send_from_outside(flow, most)
                                                     : send_from_guest(flow, most);
    allowance_ -= static_cast<double>(sent);
    moved += sent;
  }
  outside_.flush();
  return moved;
}

std::size_t Load::send_from_outside(Flow& flow, std::uint64_t most) {
  for (std::uint64_t i = 0; i < most; ++i) {
    if (outside_.full()) outside_.flush();
    outside_.queue(flow.frames.write(flow.sent++, outside_.next()));
  }
  return most;
}

std::size_t Load::send_from_guest(Flow& flow, std::uint64_t most) {
  LoadGuest& guest = *guests_[flow.from];
  std::size_t sent = 0;
  while (sent < most &&
         guest.send(flow.pair, [&](std::span<std::byte> room) { return flow.frames.write(flow.sent, room); })) {
    ++flow.sent;
    ++sent;
  }
  if (sent != 0) guest.publish(flow.pair);
  return sent;
}

void Load::take(std::span<const std::byte> frame, std::size_t receiver, std::int64_t now) {
  const auto name = PrimeFrames::name(frame);
  if (!name) return;  // the host's own, or nothing but noise: what was ours before is then missing
  if (name->flow >= flow_of_id_.size() || flow_of_id_[name->flow] == kNoFlow) return;
  Flow& flow = flows_[flow_of_id_[name->flow]];
  // The bridge floods what it has not learned: frames for somebody else are not ours to count.
  if (flow.to != receiver) return;
  flow.ledger.note(name->number, flow.frames.intact(name->number, frame), flow.sent);
  flow.longest_ns = std::max(flow.longest_ns, now - flow.last_ns);
  flow.last_ns = now;
}

void Load::look_for_stalls(std::int64_t now) {
  const auto name_of = [](std::size_t end) {
    return end == kOutside ? std::string("outside") : "guest " + std::to_string(end);
  };
  const std::int64_t patience = std::chrono::nanoseconds(options_.patience).count();
  for (Flow& flow : flows_) {
    if (now - flow.last_ns < patience || flow.on_their_way() == 0) continue;
    if (stall_texts_.size() < kMostTexts)
      stall_texts_.push_back("flow " + std::to_string(flow.frames.flow()) + " from " + name_of(flow.from) + " to " +
                             name_of(flow.to) + ", " + std::to_string(flow.on_their_way()) + " on their way, last " +
                             std::to_string((now - flow.last_ns) / 1'000'000) + " ms ago, at " + std::to_string(now) +
                             " ns: " + guests_[flow.from == kOutside ? flow.to : flow.from]->describe() +
                             (flow.from == kOutside || flow.to == kOutside ? "" : guests_[flow.to]->describe()));
    flow.ledger.write_off(flow.sent);
    flow.longest_ns = std::max(flow.longest_ns, now - flow.last_ns);
    flow.last_ns = now;
    ++stalls_;
  }
}

}  // namespace tandem::test
