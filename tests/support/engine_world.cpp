// SPDX-License-Identifier: Apache-2.0
// Building a world, and stepping a shard through it.
#include "tests/support/engine_world.hpp"

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace tandem {

// The steps of Shard::run(), for whoever drives a shard from a thread of its own.
struct ShardSteps {
  static void run_commands(Shard& shard) { shard.run_commands(); }
  static void prepare(Shard& shard) { shard.prepare(); }
  static bool take_over(Shard& shard, bool polls) {
    if (!shard.take_over()) return false;
    if (polls) shard.poll_once();
    shard.tell();
    return true;
  }
  static bool poll_once(Shard& shard) { return shard.poll_once(); }
  static bool work_waits(Shard& shard) { return shard.work_waits(); }
  static void ask_owner(Shard& shard) { shard.ask_owner(); }
  static void follow_request(Shard& shard) { shard.follow_request(); }
  static bool let_go(Shard& shard) { return shard.let_go(); }
  static bool left_to_another(Shard& shard) { return shard.left_to_another(shard.state().owner.load()); }
  static void sleep(Shard& shard) { shard.sleep(); }
  static std::vector<QueuePair>& pairs(Shard& shard) { return shard.pairs_; }
};

namespace test {

namespace {

constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t page_up(std::uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// A failure in here is a mistake in the test.
template <class T>
T must(Result<T> result) {
  if (!result) {
    std::fprintf(stderr, "%s\n", result.error().text.c_str());
    std::abort();
  }
  return std::move(*result);
}

UniqueFd make_memfd(const char* name, std::uint64_t bytes) {
  UniqueFd fd{::memfd_create(name, MFD_CLOEXEC)};
  if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) std::abort();
  return fd;
}

}  // namespace

FakeFence::FakeFence() {
  constexpr std::size_t kBytes = TANDEM_FENCE_SLOTS * sizeof(tandem_fence_slot);
  fd_ = make_memfd("fence", kBytes);
  slots_ = must(Mapping::map(fd_.get(), kBytes, PROT_READ | PROT_WRITE, 0, "fence slots"));
  view_again();
}

void FakeFence::view_again() { views_.push_back(must(FenceView::map(fd_.get()))); }

void FakeFence::kill(std::uint32_t tag, int signal, bool own_doing) {
  auto& slot = reinterpret_cast<tandem_fence_slot*>(slots_.data())[tag % TANDEM_FENCE_SLOTS];
  slot.time_ns = monotonic_ns();
  slot.cause = TANDEM_FENCE_SIGNAL;
  slot.signal = static_cast<std::uint32_t>(signal);
  slot.own_doing = own_doing ? 1 : 0;
  __atomic_store_n(&slot.tag, std::uint64_t{tag}, __ATOMIC_RELEASE);
}

EngineWorld::EngineWorld(const WorldShape& shape) : shape_(shape), xsk_(describe_xsk(shape.xsk)) {
  nic_bytes_ = (GuestNic::bytes(shape.nic) + 63) / 64 * 64;
  guest_bytes_ = page_up(nic_bytes_ * shape.queue_pairs);
  segment_at_ = guest_bytes_ + 2 * page_up(shape.spare_bytes);
  xsk_at_ = segment_at_ + page_up(sizeof(Segment));
  xsk_stride_ = page_up(xsk_ring_bytes(xsk_) + xsk_.umem_size);
  const std::uint64_t total = xsk_at_ + shape.queue_pairs * xsk_stride_;
  memory_ = make_memfd("world", total);
  area_ = must(Mapping::map(memory_.get(), total, PROT_READ | PROT_WRITE, 0, "world"));
  space.add(kGuestBase, guest_bytes_, area_.data());
  for (int i = 0; i < 2 && shape.spare_bytes > 0; ++i)
    space.add(spare_address(i), page_up(shape.spare_bytes),
              area_.data() + guest_bytes_ + static_cast<std::uint64_t>(i) * page_up(shape.spare_bytes));
  Segment& shared = segment();
  shared.magic = kSegmentMagic;
  shared.version = kSegmentVersion;
  shared.shard_count = shape.shards;
  shared.size = sizeof(Segment);
  for (std::uint32_t n = 0; n < shape.queue_pairs; ++n) {
    nics.emplace_back(space, kGuestBase + n * nic_bytes_, shape.nic);
    kernels.emplace_back(xsk_, rings(n), frames(n));
    kernels.back().reset(shape.xsk_index);
    for (int i = 0; i < 2; ++i) call_fds_.emplace_back(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  }
  parts_.emplace_back(area_.data(), segment_at_);
  parts_.emplace_back(area_.data() + segment_at_, offsetof(Segment, shards));
  for (std::uint32_t n = 0; n < shape.shards; ++n) {
    ShardState& shard = shared.shards[n];
    // Request, grant and tags, but not when they were written.
    const auto* end = reinterpret_cast<std::byte*>(&shard.handover.requested_ns);
    auto* begin = reinterpret_cast<std::byte*>(&shard.owner);
    parts_.emplace_back(begin, static_cast<std::size_t>(end - begin));
    parts_.emplace_back(reinterpret_cast<std::byte*>(&shard.owner_inverted), sizeof shard.owner_inverted);
    parts_.emplace_back(reinterpret_cast<std::byte*>(&shard.record), sizeof shard.record);
  }
  parts_.emplace_back(reinterpret_cast<std::byte*>(&state()), shape.queue_pairs * sizeof(QueuePairState));
  for (std::uint32_t n = 0; n < shape.queue_pairs; ++n)
    parts_.emplace_back(rings(n), xsk_ring_bytes(xsk_) + xsk_.umem_size);
}

std::byte* EngineWorld::rings(std::uint32_t pair) const { return area_.data() + xsk_at_ + pair * xsk_stride_; }
std::byte* EngineWorld::frames(std::uint32_t pair) const { return rings(pair) + xsk_ring_bytes(xsk_); }
Segment& EngineWorld::segment() const { return *reinterpret_cast<Segment*>(area_.data() + segment_at_); }

QueuePairState& EngineWorld::state(std::uint32_t pair) const {
  return segment().queue_pairs[shape_.first_queue_pair + pair];
}

FrameAudit EngineWorld::audit(std::uint32_t pair) const { return kernels[pair].audit(state(pair).transmit_busy); }

std::span<std::byte> EngineWorld::guest_bytes() const { return {area_.data(), segment_at_}; }

std::uint64_t EngineWorld::spare_address(int region) const {
  return kGuestBase + guest_bytes_ + (region == 0 ? 0 : page_up(shape_.spare_bytes) + 0x10000);
}

DeviceDescription EngineWorld::describe(std::uint64_t generation, std::uint32_t nth) const {
  const std::uint32_t queue_pairs = shape_.queue_pairs / shape_.devices;
  DeviceDescription description;
  description.device = shape_.device + nth;
  description.generation = generation;
  description.features = shape_.nic.features;
  description.queue_pairs = queue_pairs;
  description.regions[0] = {kGuestBase, guest_bytes_, kUserBase, 0};
  description.region_count = 1;
  const std::uint64_t spare = page_up(shape_.spare_bytes);
  for (int i = 0; i < 2 && spare > 0; ++i)
    description.regions[description.region_count++] = {spare_address(i), spare,
                                                       kUserBase + 0x100000000u * static_cast<std::uint64_t>(i + 1),
                                                       guest_bytes_ + static_cast<std::uint64_t>(i) * spare};
  for (std::uint32_t i = 0; i < 2 * queue_pairs; ++i) {
    const GuestNic& nic = nics[nth * queue_pairs + i / 2];
    const GuestQueue& queue = i % 2 == 0 ? nic.receive : nic.transmit;
    VringDescription& vring = description.vrings[i];
    vring.flags = VringDescription::kHasCall | VringDescription::kRunning;
    vring.size = queue.size();
    vring.base = queue.base_for(shape_.nic.first_index);
    vring.start_count = 1;
    vring.descriptor_user_address = queue.place().descriptors - kGuestBase + kUserBase;
    vring.avail_user_address = queue.place().avail - kGuestBase + kUserBase;
    vring.used_user_address = queue.place().used - kGuestBase + kUserBase;
  }
  return description;
}

std::shared_ptr<const Device> EngineWorld::make_device(const DeviceDescription& description,
                                                       const Device* previous) const {
  const std::uint32_t first = 2 * (description.device - shape_.device) * (shape_.queue_pairs / shape_.devices);
  std::vector<UniqueFd> fds;
  for (std::uint32_t i = 0; i < description.region_count; ++i) fds.emplace_back(::dup(memory_.get()));
  for (std::uint32_t i = 0; i < 2 * description.queue_pairs; ++i)
    if ((description.vrings[i].flags & VringDescription::kHasCall) != 0)
      fds.emplace_back(::dup(call_fds_[first + i].get()));
  std::vector<std::string> problems;
  auto device = must(Device::make(description, std::move(fds), previous, problems));
  for (const std::string& problem : problems) std::fprintf(stderr, "%s\n", problem.c_str());
  return device;
}

std::shared_ptr<const UplinkPorts> EngineWorld::make_ports(std::uint32_t nth) const {
  const std::uint32_t queue_pairs = shape_.queue_pairs / shape_.devices;
  auto ports = std::make_shared<UplinkPorts>();
  ports->device = shape_.device + nth;
  ports->first_queue_pair = shape_.first_queue_pair + nth * queue_pairs;
  ports->group = shape_.devices > 1 ? 1 : 0;
  ports->mac = mac(nth);
  for (std::uint32_t n = nth * queue_pairs; n < (nth + 1) * queue_pairs; ++n)
    ports->ports.push_back(XskPort::over_memory(xsk_, rings(n), frames(n)));
  return ports;
}

std::uint64_t EngineWorld::calls(std::uint32_t vring) const {
  std::uint64_t count = 0;
  return ::read(call_fds_[vring].get(), &count, sizeof count) == sizeof count ? count : 0;
}

void EngineWorld::copy_from(const EngineWorld& other) {
  for (std::size_t i = 0; i < parts_.size(); ++i)
    std::memcpy(parts_[i].data(), other.parts_[i].data(), parts_[i].size());
  copy_ends_from(other);
}

void EngineWorld::copy_ends_from(const EngineWorld& other) {
  nics = other.nics;
  kernels = other.kernels;
  for (std::uint32_t n = 0; n < shape_.queue_pairs; ++n) {
    nics[n].rebase(space);
    kernels[n].rebase(rings(n), frames(n));
  }
}

ShardStepper::ShardStepper(Segment& segment, const FenceView& fence, std::uint32_t tag, std::uint32_t index)
    : tag_(tag) {
  ShardConfig config;
  config.index = index;
  config.shards = std::max(segment.shard_count, 1u);
  config.segment = &segment;
  config.fence = &fence;
  config.tsc_hz = 1'000'000'000;
  shard_ = must(Shard::make(config, WakeRing{}, DeadManSwitch{}));
}

void ShardStepper::run_commands() { ShardSteps::run_commands(*shard_); }

void ShardStepper::hold(std::shared_ptr<const UplinkPorts> ports, std::vector<std::shared_ptr<const Device>> devices) {
  post(AttachCommand{std::move(ports)});
  for (auto& device : devices) post(DescribeCommand{std::move(device)});
  post(ArmCommand{tag_, nullptr});
  run_commands();
  ShardSteps::prepare(*shard_);
}

bool ShardStepper::take_over() { return ShardSteps::take_over(*shard_, false); }
bool ShardStepper::take_over_and_poll() { return ShardSteps::take_over(*shard_, true); }
bool ShardStepper::work_waits() { return ShardSteps::work_waits(*shard_); }
void ShardStepper::ask_owner() {
  post(HandOverCommand{});
  run_commands();
  ShardSteps::ask_owner(*shard_);
}
void ShardStepper::follow_request() { ShardSteps::follow_request(*shard_); }
bool ShardStepper::let_go() { return ShardSteps::let_go(*shard_); }
bool ShardStepper::left_to_another() { return ShardSteps::left_to_another(*shard_); }
bool ShardStepper::poll_once() { return ShardSteps::poll_once(*shard_); }
void ShardStepper::sleep() {
  shard_->post(ArmCommand{tag_, nullptr});  // the mailbox wakes it at once
  ShardSteps::sleep(*shard_);
  run_commands();
}
std::vector<QueuePair>& ShardStepper::pairs() { return ShardSteps::pairs(*shard_); }

void hold_all(ShardStepper& shard, const EngineWorld& world, std::uint64_t generation) {
  std::vector<std::shared_ptr<const Device>> devices;
  for (std::uint32_t n = 0; n < world.shape().devices; ++n) {
    if (n != 0) shard.post(AttachCommand{world.make_ports(n)});
    devices.push_back(world.make_device(world.describe(generation, n)));
  }
  shard.hold(world.make_ports(), std::move(devices));
}

std::uint32_t peer_goes_on(EngineWorld& world, Ledger& ledger) {
  GuestNic& peer = world.nics.back();
  std::vector<std::byte> packet;
  std::uint32_t moved = 0;
  for (; peer.take(packet); ++moved) ledger.note(packet);
  return moved + peer.post();
}

Drained drain(EngineWorld& world, ShardStepper& shard, Ledger& uplink, Ledger& guest, std::uint32_t pair) {
  Drained drained;
  std::vector<std::byte> packet;
  constexpr int kMostRounds = 1000;
  int rounds = 0;
  for (bool moved = true; moved && drained.quiet; drained.quiet = ++rounds < kMostRounds) {
    moved = shard.poll_once();
    while (const auto bytes = world.kernels[pair].send()) {
      if (world.shape().devices == 1) uplink.note(*bytes);
      ++drained.sent;
      moved = true;
    }
    moved |= world.kernels[pair].complete() != 0;
    moved |= world.nics[pair].reap() != 0;
    while (world.nics[pair].take(packet)) {
      guest.note(packet);
      ++drained.received;
      moved = true;
    }
    moved |= world.nics[pair].post() != 0;
    if (world.shape().devices > 1) moved |= peer_goes_on(world, uplink) != 0;
  }
  for (QueuePair& queue_pair : shard.pairs()) drain_completions(queue_pair);
  return drained;
}

std::uint32_t send_from_guest(EngineWorld& world, const PacketFlow& flow, std::uint32_t first, std::uint32_t count,
                              std::uint32_t pair) {
  std::vector<std::byte> room(flow.longest);
  std::uint32_t done = 0;
  for (; done < count; ++done) {
    const std::uint32_t length = flow.write(first + done, room);
    if (!world.nics[pair].send({room.data(), length}, flow.header())) break;
  }
  world.nics[pair].transmit.publish();
  return done;
}

std::uint32_t send_from_uplink(EngineWorld& world, const PacketFlow& flow, std::uint32_t first, std::uint32_t count,
                               std::uint32_t pair) {
  std::vector<std::byte> room(flow.longest);
  std::uint32_t done = 0;
  for (; done < count; ++done) {
    const std::uint32_t length = flow.write(first + done, room);
    if (!world.kernels[pair].receive({room.data(), length})) break;
  }
  return done;
}

}  // namespace test
}  // namespace tandem
