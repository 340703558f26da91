// SPDX-License-Identifier: Apache-2.0
// Stepping an owner through a burst and heirs through their takeover.
#include "tests/crash-points/crash_trial.hpp"

#include <chrono>
#include <cstring>
#include <optional>

#include "tests/crash-points/single_step.hpp"
#include "vhost-net-backend/poison.hpp"

namespace tandem::test {

namespace {

// Incarnations: the one of the warm-up, the owner that is stepped, the heir that is stepped, and the one that finishes.
enum Tag : std::uint32_t { kWarmTag = 1, kOwnerTag = 2, kHeirTag = 3, kLastTag = 4 };

std::uint64_t hash(const Snapshot& bytes, std::uint64_t salt) {
  std::uint64_t value = bytes.size() + salt;
  std::size_t i = 0;
  for (; i + 8 <= bytes.size(); i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, 8);
    value = (value ^ word) * 0x9e3779b97f4a7c15u;
    value ^= value >> 29;
  }
  for (; i < bytes.size(); ++i) value = (value ^ std::to_integer<std::uint64_t>(bytes[i])) * 0x9e3779b97f4a7c15u;
  return value ^ value >> 32;
}

// Takes a snapshot; false if nothing differs from what `snapshot` holds already.
bool refresh(const EngineWorld& world, Snapshot& snapshot) {
  std::size_t at = 0;
  bool differs = false;
  for (const auto part : world.parts()) {
    if (snapshot.size() < at + part.size()) {
      snapshot.resize(at + part.size());
      differs = true;
    }
    if (differs || std::memcmp(snapshot.data() + at, part.data(), part.size()) != 0) {
      std::memcpy(snapshot.data() + at, part.data(), part.size());
      differs = true;
    }
    at += part.size();
  }
  return differs;
}

void restore(const EngineWorld& world, const Snapshot& snapshot) {
  std::size_t at = 0;
  for (const auto part : world.parts()) {
    std::memcpy(part.data(), snapshot.data() + at, part.size());
    at += part.size();
  }
}

// Where restarted rings begin: not where they were.
constexpr std::uint16_t kRestartBase = 500;

using Ports = std::vector<std::shared_ptr<const UplinkPorts>>;

Ports make_ports(const EngineWorld& world) {
  Ports ports;
  for (std::uint32_t n = 0; n < world.shape().devices; ++n) ports.push_back(world.make_ports(n));
  return ports;
}

std::vector<std::shared_ptr<const Device>> make_devices(const EngineWorld& world) {
  std::vector<std::shared_ptr<const Device>> devices;
  for (std::uint32_t n = 0; n < world.shape().devices; ++n) devices.push_back(world.make_device(world.describe(1, n)));
  return devices;
}

ShardStepper make_shard(const EngineWorld& world, const FakeFence& fence, std::uint32_t tag, const Ports& ports,
                        std::vector<std::shared_ptr<const Device>> devices) {
  ShardStepper shard(world.segment(), fence.view(), tag);
  for (std::size_t i = 1; i < ports.size(); ++i) shard.post(AttachCommand{ports[i]});
  shard.hold(ports.front(), std::move(devices));
  return shard;
}

}  // namespace

std::vector<std::shared_ptr<const Device>> CrashTrial::devices(const EngineWorld& world) const {
  if (row_.situation != Situation::kRestart) return make_devices(world);
  DeviceDescription stopped = world.describe(2), restarted = world.describe(3);
  for (std::uint32_t i = 0; i < 2; ++i) {
    stopped.vrings[i].flags &= ~VringDescription::kRunning;
    restarted.vrings[i].start_count = 2;
    restarted.vrings[i].base = world.nics[0].transmit.base_for(kRestartBase);
  }
  return {world.make_device(stopped), world.make_device(restarted)};
}

// The front end stopped both rings, which the owner acknowledged; the guest's driver has formatted them anew.
void CrashTrial::restart_driver(EngineWorld& world, ShardStepper& owner) const {
  owner.post(DescribeCommand{devices(world).front()});
  owner.run_commands();
  world.nics[0] = GuestNic(world.space, kGuestBase, row_.shape.nic);
  world.nics[0].receive.begin_at(kRestartBase);
  world.nics[0].transmit.begin_at(kRestartBase);
}

// Up to the burst: a few packets have crossed each way, the kernel still owes completions for some.
void CrashTrial::prepare(EngineWorld& world, FakeFence& fence, Flows& flows) const {
  const bool starved = row_.situation == Situation::kStarved;
  ShardStepper owner = make_shard(world, fence, kWarmTag, make_ports(world), make_devices(world));
  GuestNic& receiver = world.nics.back();
  if (!owner.take_over()) std::abort();
  if (row_.forward) world.nics[0].post();
  receiver.post(starved ? 2 * kWarmUp : ~0u);
  flows.send(world, kWarmUp, kWarmUp);
  while (owner.poll_once()) {
  }
  std::vector<std::byte> packet;
  while (const auto bytes = world.kernels[0].send()) flows.uplink.note(*bytes);
  while (row_.forward && receiver.take(packet)) flows.uplink.note(packet);
  while (world.nics[0].take(packet)) flows.guest.note(packet);
  world.nics[0].reap();
  if (row_.situation == Situation::kRestart) restart_driver(world, owner);
  if (row_.forward) world.nics[0].post();
  receiver.post(starved ? row_.burst / 2 : ~0u);
  fence.kill(kWarmTag);
}

CrashTrial::CrashTrial(const MatrixRow& row) : row_(row) {
  // How far the warm-up moves each ring decides where they have to begin for the burst to wrap.
  EngineWorld rehearsal(row_.shape);
  FakeFence fence;
  Flows flows(row_.flow);
  prepare(rehearsal, fence, flows);
  // Of a forward, each of its two rings once.
  const GuestQueue& queue = row_.receive                                ? rehearsal.nics[0].receive
                            : row_.forward && row_.wrap == Wrap::kIndex ? rehearsal.nics[1].receive
                                                                        : rehearsal.nics[0].transmit;
  const auto half = (row_.burst + 1) / 2;
  // Packed: positions count slots; as many a packet as in the warm-up.
  const std::uint32_t before =
      queue.entries_taken() + (queue.packed() ? (queue.entries_taken() * row_.burst / kWarmUp + 1) / 2 : half);
  const std::uint32_t xsk_before = (kWarmUp + half) * row_.flow.segments;
  // Enough that it does not become negative; packed: odd, so that the second round begins there.
  const std::uint32_t rounds = queue.packed() ? before / queue.size() / 2 * 2 + 3 : 2;
  if (row_.wrap == Wrap::kRing) {
    row_.shape.nic.first_index = static_cast<std::uint16_t>(rounds * queue.size() - before);
    row_.shape.xsk_index = 2 * row_.shape.xsk.tx_entries - xsk_before;
  } else if (row_.wrap == Wrap::kIndex) {
    row_.shape.nic.first_index = static_cast<std::uint16_t>((queue.packed() ? rounds + 1 : 0) * queue.size() - before);
    row_.shape.xsk_index = 0u - xsk_before;
  }
  world_ = std::make_unique<EngineWorld>(row_.shape);
  trial_ = std::make_unique<EngineWorld>(row_.shape);
  fence_ = std::make_unique<FakeFence>();
  flows_ = std::make_unique<Flows>(row_.flow);
  devices_ = devices(*trial_);
  ports_ = make_ports(*trial_);
}

void CrashTrial::judge(const Snapshot& snapshot, RowResult& result) {
  for (const bool moves_on : {false, true}) {
    const auto make_heir = [&] { return make_shard(*trial_, *fence_, kLastTag, ports_, devices_); };
    // It has bound its queue pairs to what is in force, or to what was in an earlier snapshot.
    std::optional<ShardStepper> heir;
    if (moves_on) heir.emplace(make_heir());
    restore(*trial_, snapshot);
    trial_->copy_ends_from(*world_);
    Flows flows = *flows_;
    if (!moves_on) heir.emplace(make_heir());
    if (moves_on) world_moves_on(*trial_, flows, 2);
    result.verdict += take_over_and_judge(*trial_, *heir, flows);
    ++result.takeovers;
  }
}

// One more packet, which two owners have died on.
void CrashTrial::condemn_next() {
  std::vector<std::byte> packet(60, std::byte{0xee});
  Suspect suspect{kWarmTag, kPoisonDeaths, 0};
  if (row_.transmit) {
    suspect.position = 1u << 16 | world_->nics[0].transmit.avail_index();  // of start 1
    if (!world_->nics[0].send(packet)) std::abort();
    world_->state().transmit_suspicion.suspect.store(suspect.word());
    flows_->bad_from_guest = 1;
  } else {
    suspect.position = world_->make_ports()->ports[0]->rx.producer();
    if (!world_->kernels[0].receive(packet)) std::abort();
    world_->state().receive_suspicion.suspect.store(suspect.word());
    flows_->bad_from_uplink = 1;
  }
  flows_->poisoned = 1;
}

void CrashTrial::begin_burst() {
  world_->kernels[0].complete();
  const std::uint32_t out = row_.transmit ? row_.burst : 0, in = row_.receive ? row_.burst : 0;
  if (row_.situation == Situation::kBadChain) {
    flows_->send(*world_, out / 2, in);
    const Piece runt{world_->nics[0].transmit_slot(row_.shape.nic.queue_size - 1), 20, false};
    if (!world_->nics[0].transmit.add({&runt, 1})) std::abort();
    flows_->bad_from_guest = 1;
    flows_->send(*world_, out - out / 2, 0);
  } else if (row_.situation == Situation::kPoison) {
    flows_->send(*world_, out / 2, in / 2);
    condemn_next();
    flows_->send(*world_, out - out / 2, in - in / 2);
  } else {
    flows_->send(*world_, out, in);
  }
  if (flows_->from_guest != kWarmUp + out || flows_->from_uplink != kWarmUp + in) std::abort();
}

void CrashTrial::step_owner(RowResult& result) {
  prepare(*world_, *fence_, *flows_);
  SteppedProcess child([this] {
    fence_->view_again();
    const auto held = devices(*world_);
    const bool restart = row_.situation == Situation::kRestart;
    ShardStepper owner =
        make_shard(*world_, *fence_, kOwnerTag, make_ports(*world_), restart ? std::vector{held.front()} : held);
    if (!owner.take_over()) std::abort();
    if (restart) owner.post(DescribeCommand{held.back()});
    stepped::pause();
    if (restart) owner.run_commands();
    if (row_.situation == Situation::kPoison) {
      for (QueuePair& pair : owner.pairs()) load_suspects(pair);
      for (int round = 0; round < 2; ++round) owner.poll_once();
    }
    owner.poll_once();
    if (row_.situation == Situation::kHandover) {
      if (!owner.let_go()) std::abort();
      owner.poll_once();  // touches nothing any more, although there is work
    }
    stepped::pause();
  });
  if (row_.situation == Situation::kHandover)
    make_shard(*world_, *fence_, kHeirTag, make_ports(*world_), make_devices(*world_)).ask_owner();
  fence_->kill(kOwnerTag);
  begin_burst();
  world_->calls(0);
  world_->calls(1);
  Snapshot snapshot;
  look(snapshot, result);
  child.step([&](bool could_store) {
    const std::uint64_t changes = result.changes;
    look(snapshot, result);
    if (!could_store && result.changes != changes) ++result.unforeseen;
  });
  if (row_.situation == Situation::kHandover && !let_go_) std::abort();
}

void CrashTrial::look(Snapshot& snapshot, RowResult& result) {
  ++result.points;
  if (!refresh(*world_, snapshot)) return;
  ++result.changes;
  if (let_go_) ++result.verdict.trespasses;
  if (!let_go_ && let_go(*world_)) {
    let_go_ = true;
    // Whoever let go leaves nobody waiting. (With EVENT_IDX this guest asks for no interrupt.)
    const bool wants_calls = (row_.shape.nic.features & feature::kEventIndex) == 0;
    if (wants_calls && (world_->calls(0) == 0 || world_->calls(1) == 0)) ++result.verdict.not_notified;
    flows_->send(*world_, 1, 1);
    refresh(*world_, snapshot);
  }
  if (!seen_.insert(hash(snapshot, 0)).second) return;
  ++result.distinct;
  judge(snapshot, result);
  if (row_.nested) starts_.push_back({snapshot, world_->nics, world_->kernels, *flows_});
}

void CrashTrial::step_heirs(bool moved, bool every_instruction, RowResult& result) {
  SteppedProcess child([this] {
    fence_->view_again();
    const auto ports = make_ports(*world_);
    const auto held = devices(*world_);
    for (;;) {
      stepped::pause();  // the parent puts a snapshot in place
      ShardStepper heir = make_shard(*world_, *fence_, kHeirTag, ports, held);
      stepped::pause();
      if (!heir.take_over_and_poll()) std::abort();
      stepped::pause();
    }
  });
  fence_->kill(kHeirTag);
  for (const Start& start : starts_) {
    restore(*world_, start.snapshot);
    world_->nics = start.nics;
    world_->kernels = start.kernels;
    *flows_ = start.flows;
    if (moved) world_moves_on(*world_, *flows_, 2);
    child.run();
    Snapshot snapshot;
    refresh(*world_, snapshot);
    const auto look_at_heir = [&] {
      ++result.nested_points;
      if (!refresh(*world_, snapshot)) return;
      ++result.nested_changes;
      if (!seen_.insert(hash(snapshot, moved)).second) return;
      ++result.nested_distinct;
      judge(snapshot, result);
    };
    if (every_instruction) {
      child.step([&](bool could_store) {
        const std::uint64_t changes = result.nested_changes;
        look_at_heir();
        if (!could_store && result.nested_changes != changes) ++result.unforeseen;
      });
    } else {
      child.step_stores(look_at_heir);
    }
    child.run();
  }
}

RowResult CrashTrial::run(const TrialOptions& options) {
  RowResult result;
  const auto begin = std::chrono::steady_clock::now();
  step_owner(result);
  for (const bool moved : {false, true})
    if (row_.nested && (!options.until_harm || result.verdict.clean()))
      step_heirs(moved, options.every_instruction, result);
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  result.done = true;
  return result;
}

}  // namespace tandem::test
