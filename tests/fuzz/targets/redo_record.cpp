// SPDX-License-Identifier: Apache-2.0
// A segment that a dead owner damaged: record, cursors, busy bits, owner word and socket rings hold anything, also with
// a CRC that is right. The heir takes over and serves. Nothing may happen to it, nor to guest memory that nobody
// offered. Input: what record the owner left, of a guest alone or of one with a neighbour that it sends to (fill()),
// then patches (damage()).
#include "tests/fuzz/targets/input.hpp"
#include "tests/support/takeover_check.hpp"

using namespace tandem;
using namespace tandem::fuzz;
using namespace tandem::test;

namespace {

constexpr std::uint32_t kOwner = 1, kHeir = 2, kLast = 3, kPosted = 8;

class Site {
 public:
  Site(std::uint32_t devices, bool packed) : fresh_(shape(devices, packed)), world_(shape(devices, packed)) {
    for (std::uint32_t n = 0; n < devices; ++n) {
      ports_.push_back(world_.make_ports(n));
      devices_.push_back(world_.make_device(world_.describe(1, n)));
    }
    for (const std::uint32_t tag : {kOwner, kHeir}) fence_.kill(tag);
    ShardStepper owner(fresh_.segment(), fence_.view(), kOwner);
    hold_all(owner, fresh_);
    must_hold(owner.take_over(), "a shard without an owner can be taken over");
    for (GuestNic& nic : fresh_.nics) nic.post(kPosted);
    const PacketFlow flow{60, 100};
    send_from_guest(fresh_, flow, 0, 5);
    send_from_uplink(fresh_, flow, 0, 3);
    while (owner.poll_once()) {
    }
    // More than the heir will find time for, and half of it told to the kernel.
    send_from_guest(fresh_, flow, 5, 4);
    send_from_uplink(fresh_, flow, 3, 4);
    for (int i = 0; i < 3; ++i) fresh_.kernels[0].send();  // a neighbour's packets never come here
    fresh_.kernels[0].complete(2);
  }

  void run(std::uint8_t how, Input& input) {
    world_.copy_from(fresh_);
    fill(how);
    while (!input.empty()) damage(input);
    const auto guest = world_.guest_bytes();
    const std::vector<std::byte> before(guest.begin(), guest.end());
    ShardStepper heir = make(kHeir);
    if (!heir.take_over()) return;  // the owner word names somebody who lives
    must_hold(world_.record().arm.load() == 0, "the record is empty after a takeover");
    for (int round = 0; round < 4; ++round) heir.poll_once();
    heir.sleep();
    must_hold(world_.record().arm.load() == 0, "the record is empty between bursts");
    judge(before);
    ShardStepper last = make(kLast);
    must_hold(last.take_over(), "the next heir can take over");
    last.poll_once();
    judge(before);
  }

 private:
  static WorldShape shape(std::uint32_t devices, bool packed) {
    WorldShape shape;
    shape.devices = shape.queue_pairs = devices;
    shape.nic.features =
        feature::kVersion1 | feature::kMergeable | feature::kEventIndex | (packed ? feature::kPacked : 0);
    shape.nic.queue_size = 16;
    shape.nic.slot_size = 128;
    shape.nic.first_index = packed ? 10 : 65530;  // it wraps soon
    shape.xsk.frame_size = 512;
    shape.xsk.headroom = 256;
    shape.xsk.rx_frames = 16;
    shape.xsk.tx_entries = 16;
    return shape;
  }
  ShardStepper make(std::uint32_t tag) {
    ShardStepper shard(world_.segment(), fence_.view(), tag);
    for (std::size_t n = 1; n < ports_.size(); ++n) shard.post(AttachCommand{ports_[n]});
    shard.hold(ports_.front(), devices_);
    return shard;
  }

  // The position `slots` entries on, in a virtqueue of a device.
  std::uint16_t after(std::uint32_t device, std::uint32_t vring, std::uint16_t position, std::uint32_t slots) {
    return devices_[device]->vring(vring).queue.visit([&](const auto& queue) { return queue.next(position, slots); });
  }

  // A forward to the last device, likewise.
  void fill_forward(std::uint16_t count) {
    RedoRecord& record = world_.record();
    RedoDestination& to = record.destination;
    const VringCursors& vring = receiver().receive;
    record.kind = RedoKind::kForward;
    record.frame_count = 0;
    record.producer_before = record.producer_after = 0;
    to.generation = 1;
    to.queue_pair = 1;
    to.used_count = count;
    to.avail_before = vring.next_avail;
    const std::uint32_t last = world_.shape().devices - 1;
    to.avail_after = after(last, 0, vring.next_avail, count);
    to.used_before = vring.next_used;
    to.used_after = after(last, 0, vring.next_used, count);
    for (std::uint16_t i = 0; i < count; ++i) to.used[i] = {i, 1, 76};
    sign(record);
  }
  QueuePairState& receiver() { return world_.state(world_.shape().devices - 1); }

  // A record that fits the state it is found in, as if the owner had died right after it was armed. Bit 0: transmit,
  // or with a neighbour a forward; bits 1 and 2: packets.
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
    record.avail_after = after(0, transmit ? 1 : 0, vring.next_avail, count);
    record.used_before = vring.next_used;
    record.used_after = after(0, transmit ? 1 : 0, vring.next_used, count);
    record.queue_pair = 0;
    record.epoch = 1;
    record.poisoned = 0;
    record.generation = 1;
    const XskPort& port = *ports_.front()->ports[0];
    record.consumer_before = port.rx.consumer();
    record.consumer_after = record.consumer_before + count;
    record.producer_before = transmit ? port.tx.producer() : port.fill.producer();
    record.producer_after = record.producer_before + count;
    for (std::uint16_t i = 0; i < count; ++i) {
      record.frames[i] = {
          static_cast<std::uint32_t>(transmit ? port.transmit_address(20u + i) : std::uint64_t{i} * 512), 64};
      record.used[i] = {i, 1, 76};
    }
    if (transmit && ports_.size() > 1) return fill_forward(count);
    sign(record);
  }

  // Where (record, cursors, owner word, socket rings, busy bits), offset, length, bytes; or: make the CRC right again.
  void damage(Input& input) {
    const std::uint8_t where = input.u8();
    if (where % 8 == 7) return sign(world_.record());
    std::span<std::byte> area;
    switch (where % 8) {
      case 0:  // the head of the record has most of the fields
        area = {reinterpret_cast<std::byte*>(&world_.record()), offsetof(RedoRecord, used)};
        break;
      case 1:
        area = {reinterpret_cast<std::byte*>(&world_.record()), sizeof(RedoRecord)};
        break;
      case 2:
        area = {reinterpret_cast<std::byte*>(&receiver().receive), sizeof(VringCursors)};
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
    for (std::size_t i = 0; i < now.size(); ++i) {
      if (now[i] == before[i]) continue;
      bool allowed = false;
      for (const GuestNic& nic : world_.nics) {
        allowed = allowed || (i + kGuestBase >= nic.receive_slot(0) && i + kGuestBase < nic.receive_slot(kPosted));
        for (const GuestQueue* queue : {&nic.receive, &nic.transmit}) {
          // Packed: used descriptors are where the available ones were.
          const std::uint64_t ring = queue->place().descriptors - kGuestBase, used = queue->place().used - kGuestBase;
          allowed = allowed ||
                    (queue->place().packed ? (i >= ring && i < ring + 16 * queue->size()) || (i >= used && i < used + 4)
                                           : i >= used && i < used + 4 + 8 * queue->size() + 2);
        }
      }
      must_hold(allowed, "a damaged segment changes nothing but used rings and posted buffers");
    }
  }

  FakeFence fence_;
  EngineWorld fresh_, world_;
  std::vector<std::shared_ptr<const UplinkPorts>> ports_;
  std::vector<std::shared_ptr<const Device>> devices_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Site sites[] = {{1, false}, {2, false}, {1, true}, {2, true}};
  const DescriptorCheck all_closed;
  Input input(data, size);
  const std::uint8_t how = input.u8();
  sites[how >> 3 & 3u].run(how, input);  // with a neighbour or not, packed or split
  return 0;
}
