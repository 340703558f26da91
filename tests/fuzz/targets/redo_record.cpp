// SPDX-License-Identifier: Apache-2.0
// A segment that a dead owner damaged: record, cursors, busy bits, owner word and socket rings hold anything, also with
// a CRC that is right. The heir takes over and serves. Nothing may happen to it, nor to guest memory that nobody
// offered. Input: features, flow before the death, then patches; see damage().
#include "common/layout/redo_checksum.hpp"
#include "tests/fuzz/targets/input.hpp"
#include "tests/support/engine_world.hpp"

using namespace tandem;
using namespace tandem::fuzz;
using namespace tandem::test;

namespace {

constexpr std::uint32_t kOwner = 1, kHeir = 2, kLast = 3;

class Site {
 public:
  Site() : fresh_(shape()), world_(shape()), ports_(world_.make_ports()) {
    devices_.push_back(world_.make_device(world_.describe(1)));
    for (const std::uint32_t tag : {kOwner, kHeir}) fence_.kill(tag);
    ShardStepper owner = make(fresh_, kOwner, fresh_.make_ports(), {fresh_.make_device(fresh_.describe(1))});
    must_hold(owner.take_over(), "a shard without an owner can be taken over");
    fresh_.nics[0].post(8);
    const PacketFlow flow{60, 100};
    send_from_guest(fresh_, flow, 0, 5);
    send_from_uplink(fresh_, flow, 0, 3);
    while (owner.poll_once()) {
    }
    // More than the heir will find time for, and half of it told to the kernel.
    send_from_guest(fresh_, flow, 5, 4);
    send_from_uplink(fresh_, flow, 3, 4);
    for (int i = 0; i < 3; ++i) fresh_.kernels[0].send();
    fresh_.kernels[0].complete(2);
  }

  void run(Input& input) {
    world_.copy_from(fresh_);
    fill(input.u8());
    while (!input.empty()) damage(input);
    const auto guest = world_.guest_bytes();
    const std::vector<std::byte> before(guest.begin(), guest.end());
    ShardStepper heir = make(world_, kHeir, ports_, devices_);
    if (!heir.take_over()) return;  // the owner word names somebody who lives
    must_hold(world_.record().arm.load() == 0, "the record is empty after a takeover");
    for (int round = 0; round < 4; ++round) heir.poll_once();
    heir.sleep();
    must_hold(world_.record().arm.load() == 0, "the record is empty between bursts");
    judge(before);
    ShardStepper last = make(world_, kLast, ports_, devices_);
    must_hold(last.take_over(), "the next heir can take over");
    last.poll_once();
    judge(before);
  }

 private:
  static WorldShape shape() {
    WorldShape shape;
    shape.nic.features = feature::kVersion1 | feature::kMergeable | feature::kEventIndex;
    shape.nic.queue_size = 16;
    shape.nic.slot_size = 128;
    shape.nic.first_index = 65530;
    shape.xsk.frame_size = 512;
    shape.xsk.headroom = 256;
    shape.xsk.rx_frames = 16;
    shape.xsk.tx_entries = 16;
    return shape;
  }
  ShardStepper make(EngineWorld& world, std::uint32_t tag, std::shared_ptr<const UplinkPorts> ports,
                    std::vector<std::shared_ptr<const Device>> devices) {
    ShardStepper shard(world.segment(), fence_.view(), tag);
    shard.hold(std::move(ports), std::move(devices));
    return shard;
  }

  // A record that fits the state it is found in, as if the owner had died right after it was armed.
  void fill(std::uint8_t how) {
    RedoRecord& record = world_.record();
    const bool transmit = (how & 1u) != 0;
    const QueuePairState& state = world_.state();
    const VringCursors& vring = transmit ? state.transmit : state.receive;
    const std::uint16_t count = how >> 1 & 3u;
    record.version = kRedoVersion;
    record.kind = transmit ? RedoKind::kTransmit : RedoKind::kReceive;
    record.used_count = record.frame_count = count;
    record.avail_before = vring.next_avail;
    record.avail_after = static_cast<std::uint16_t>(vring.next_avail + count);
    record.used_before = vring.next_used;
    record.used_after = static_cast<std::uint16_t>(vring.next_used + count);
    record.queue_pair = 0;
    record.epoch = 1;
    record.poisoned = 0;
    record.generation = 1;
    const XskPort& port = *ports_->ports[0];
    record.consumer_before = port.rx.consumer();
    record.consumer_after = record.consumer_before + count;
    record.producer_before = transmit ? port.tx.producer() : port.fill.producer();
    record.producer_after = record.producer_before + count;
    for (std::uint16_t i = 0; i < count; ++i) {
      record.frames[i] = {
          static_cast<std::uint32_t>(transmit ? port.transmit_address(20u + i) : std::uint64_t{i} * 512), 64};
      record.used[i] = {i, 1, 76};
    }
    seal();
  }

  void seal() {
    RedoRecord& record = world_.record();
    record.arm.store(std::uint64_t{record.epoch} << 32 | redo_checksum(record));
  }

  // Where (record, cursors, owner word, socket rings, busy bits), offset, length, bytes; or: make the CRC right again.
  void damage(Input& input) {
    const std::uint8_t where = input.u8();
    if (where % 8 == 7) return seal();
    std::span<std::byte> area;
    switch (where % 8) {
      case 0:  // the head of the record has most of the fields
        area = {reinterpret_cast<std::byte*>(&world_.record()), offsetof(RedoRecord, used)};
        break;
      case 1:
        area = {reinterpret_cast<std::byte*>(&world_.record()), sizeof(RedoRecord)};
        break;
      case 2:
        area = {reinterpret_cast<std::byte*>(&world_.state().receive), sizeof(VringCursors)};
        break;
      case 3:
        area = {reinterpret_cast<std::byte*>(&world_.state().transmit), sizeof(VringCursors)};
        break;
      case 4:
        area = {reinterpret_cast<std::byte*>(&world_.state()), sizeof(QueuePairState)};
        break;
      case 5:
        area = {reinterpret_cast<std::byte*>(&world_.segment().shards[0]), offsetof(ShardState, record)};
        break;
      default: {
        const XskDescription& description = world_.kernels[0].description();
        area = {reinterpret_cast<std::byte*>(&world_.kernels[0].word(0)), xsk_ring_bytes(description)};
      }
    }
    const std::uint64_t at = input.u16() % area.size();
    const auto bytes = input.take(std::min<std::uint64_t>(1 + input.u8() % 16, area.size() - at));
    if (!bytes.empty()) std::memcpy(area.data() + at, bytes.data(), bytes.size());
  }

  // Whatever the record said: only used rings and the buffers the guest had posted may have changed.
  void judge(const std::vector<std::byte>& before) {
    const auto now = world_.guest_bytes();
    const GuestNic& nic = world_.nics[0];
    for (std::size_t i = 0; i < now.size(); ++i) {
      if (now[i] == before[i]) continue;
      bool allowed = i + kGuestBase >= nic.receive_slot(0) && i + kGuestBase < nic.receive_slot(8);
      for (const GuestQueue* queue : {&nic.receive, &nic.transmit}) {
        const std::uint64_t used = queue->place().used - kGuestBase;
        allowed = allowed || (i >= used && i < used + 4 + 8 * queue->size() + 2);
      }
      must_hold(allowed, "a damaged segment changes nothing but used rings and posted buffers");
    }
  }

  FakeFence fence_;
  EngineWorld fresh_, world_;
  std::shared_ptr<const UplinkPorts> ports_;
  std::vector<std::shared_ptr<const Device>> devices_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Site site;
  const DescriptorCheck all_closed;
  Input input(data, size);
  site.run(input);
  return 0;
}
