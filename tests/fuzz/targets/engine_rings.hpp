// SPDX-License-Identifier: Apache-2.0
// A hostile guest at the shipping engine: rings written entry by entry, whole bursts both ways, heirs in between.
//
// One file per ring format instantiates this with the features that choose it (engine_split.cpp, engine_packed.cpp).
// Descriptors have 16 bytes in every format, so most steps are about areas of memory, not about a format.
//
// What must hold for any input: nothing in guest memory changes but the used rings and what some device-writable
// descriptor offered; the kernel gets no descriptor outside the transmit frames; every frame is somewhere, once; the
// record is empty between bursts; each chain taken is counted as a packet or as dropped.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "tests/fuzz/targets/input.hpp"
#include "tests/support/engine_world.hpp"

namespace tandem::fuzz {

class EngineRings {
 public:
  /// The features of byte `choice` besides `fixed`.
  explicit EngineRings(std::uint64_t features)
      : packed_((features & test::feature::kPacked) != 0),
        fresh_(shape(features)),
        world_(shape(features)),
        ports_(world_.make_ports()) {
    devices_.push_back(world_.make_device(world_.describe(1)));
    for (const std::uint32_t tag : {1u, 2u}) fence_.kill(tag);
    // Nobody's buffers: whatever the input offers is all there is.
    payload_from_ = fresh_.spare_address(0) - test::kGuestBase;
  }

  void run(Input& input) {
    world_.copy_from(fresh_);
    test::ShardStepper owner = make(1);
    test::ShardStepper heir = make(2);
    test::ShardStepper* active = &owner;
    must_hold(owner.take_over(), "a shard without an owner can be taken over");
    check();
    for (int steps = 0; !input.empty() && steps < 400; ++steps) {
      const std::uint8_t what = input.u8();
      switch (what % 9) {
        case 0:
          write_descriptor(input);
          break;
        case 1:
          offer_chain(queue(what), input, 1);
          break;
        case 2:  // an index out of nowhere; packed: several slots at once, also more than the ring has left
          if (packed_)
            offer_chain(queue(what), input, 1u + input.u8() % 16);
          else
            queue(what).publish_index(input.u16());
          break;
        case 3:
          write_bytes(input);
          break;
        case 4:
          receive(input);
          break;
        case 5: {
          const std::vector<std::byte> before = observe();
          active->poll_once();
          judge(before);
          break;
        }
        case 6:
          while (world_.kernels[0].send()) {
          }
          world_.kernels[0].complete(what / 9u);
          break;
        case 7: {
          const std::vector<std::byte> before = observe();
          active->sleep();
          judge(before);
          break;
        }
        case 8:
          if (active == &heir) break;
          {
            const std::vector<std::byte> before = observe();
            must_hold(heir.take_over(), "a dead owner's shard can be taken over");
            active = &heir;
            judge(before);
          }
          break;
      }
    }
    for (int round = 0; round < 4; ++round) {
      const std::vector<std::byte> before = observe();
      active->poll_once();
      judge(before);
    }
    finish();
  }

 private:
  static test::WorldShape shape(std::uint64_t features) {
    test::WorldShape shape;
    shape.nic.features = features;
    shape.nic.queue_size = 16;
    shape.nic.slot_size = 64;
    shape.xsk.frame_size = 512;
    shape.xsk.headroom = 256;
    shape.xsk.rx_frames = 16;
    shape.xsk.tx_entries = 16;
    shape.spare_bytes = 4096;
    return shape;
  }
  test::ShardStepper make(std::uint32_t tag) {
    test::ShardStepper shard(world_.segment(), fence_.view(), tag);
    shard.hold(ports_, devices_);
    return shard;
  }
  [[nodiscard]] test::GuestQueue& queue(std::uint8_t choice) {
    return choice / 9 % 2 != 0 ? world_.nics[0].receive : world_.nics[0].transmit;
  }

  void offer_chain(test::GuestQueue& queue, Input& input, std::uint32_t slots) const {
    const std::uint16_t head = input.u16();
    if (packed_)
      queue.offer_packed(head, slots);
    else
      queue.offer(head);
    queue.publish();
  }

  // Addresses that are often right: the two payload regions, their ends, the NIC's own memory, and anything.
  std::uint64_t address(Input& input) {
    const std::uint8_t where = input.u8();
    const std::uint16_t at = input.u16();
    switch (where % 6) {
      case 0:
        return world_.spare_address(0) + at % 4096;
      case 1:
        return world_.spare_address(1) + at % 4096;
      case 2:
        return world_.spare_address(where / 6 % 2) + 4096 - at % 64;
      case 3:
        return test::kGuestBase + at % payload_from_;
      case 4:
        return ~std::uint64_t{0} - at;
      default:
        return input.u64();
    }
  }

  // A descriptor of either ring, or of the slots where the NIC's buffers were: indirect tables lie there.
  void write_descriptor(Input& input) {
    const std::uint8_t where = input.u8();
    const std::uint16_t index = input.u16();
    std::uint64_t at = test::kGuestBase;
    if (where % 4 == 0)
      at = world_.nics[0].receive.place().descriptors + index % 16 * 16;
    else if (where % 4 == 1)
      at = world_.nics[0].transmit.place().descriptors + index % 16 * 16;
    else
      at = world_.nics[0].transmit_slot(0) + index % 64 * 16;
    struct {
      std::uint64_t address;
      std::uint32_t length;
      std::uint16_t third, fourth;  // flags and next, or id and flags
    } made{};
    made.address = address(input);
    made.length = (where & 0x80u) != 0 ? input.u32() : input.u8();
    made.third = input.u16();
    made.fourth = input.u16();
    std::memcpy(world_.space.at(at), &made, sizeof made);
  }

  // Anywhere in the NIC's own memory: rings, event fields, tables.
  void write_bytes(Input& input) {
    const std::uint64_t at = input.u16() % payload_from_;
    const auto bytes = input.take(std::min<std::uint64_t>(input.u8() % 32, payload_from_ - at));
    if (!bytes.empty()) std::memcpy(world_.guest_bytes().data() + at, bytes.data(), bytes.size());
  }

  void receive(Input& input) {
    std::byte packet[256];
    std::memset(packet, 0xa5, sizeof packet);
    world_.kernels[0].receive({packet, std::size_t{1} + input.u8() % std::size(packet)});
  }

  [[nodiscard]] std::vector<std::byte> observe() const {
    const auto bytes = world_.guest_bytes();
    return {bytes.begin(), bytes.end()};
  }

  // Every place in the NIC's memory may have served as a descriptor, at any alignment and in any format.
  void scan(const std::byte* memory) {
    for (std::uint64_t at = 0; at + 16 <= payload_from_; ++at) {
      std::uint16_t third = 0, fourth = 0;
      std::memcpy(&third, memory + at + 12, 2);
      std::memcpy(&fourth, memory + at + 14, 2);
      constexpr unsigned kWrite = 2;
      if ((third & kWrite) == 0 && (fourth & kWrite) == 0) continue;
      std::uint64_t address = 0;
      std::uint32_t length = 0;
      std::memcpy(&address, memory + at, 8);
      std::memcpy(&length, memory + at + 8, 4);
      offer(address, length);
    }
  }
  // Into a difference array over guest_bytes(): the first two regions are adjacent, the third lies after a hole.
  void offer(std::uint64_t address, std::uint64_t length) {
    const std::uint64_t ends[][3] = {{test::kGuestBase, payload_from_ + 4096, 0},
                                     {world_.spare_address(1), 4096, payload_from_ + 4096}};
    const std::uint64_t end = address + length < address ? ~std::uint64_t{0} : address + length;
    for (const auto& [begin, size, offset] : ends) {
      const std::uint64_t first = std::max(address, begin), last = std::min(end, begin + size);
      if (first >= last) continue;
      ++offered_[offset + first - begin];
      --offered_[offset + last - begin];
    }
  }

  void judge(const std::vector<std::byte>& before) {
    const auto now = world_.guest_bytes();
    if (std::equal(now.begin(), now.end(), before.begin())) return check();
    offered_.assign(now.size() + 1, 0);
    scan(before.data());
    scan(now.data());  // descriptors that came to be while the burst ran
    // What the device may write without a descriptor: used rings (split), descriptors and event areas (packed).
    for (const auto& [begin, length] : device_areas()) offer(begin, length);
    std::int64_t depth = 0;
    bool strayed = false, self_harm = false;
    for (std::size_t i = 0; i < now.size(); ++i) {
      depth += offered_[i];
      if (now[i] == before[i]) continue;
      strayed = strayed || depth == 0;
      // A guest that offers its own rings and tables as buffers gets what it asked for: not all descriptors that were
      // read can be told afterwards.
      self_harm = self_harm || (i < payload_from_ && !is_devices(i));
    }
    must_hold(!strayed || self_harm, "only what was offered is written");
    check();
  }
  [[nodiscard]] std::vector<std::pair<std::uint64_t, std::uint64_t>> device_areas() const {
    std::vector<std::pair<std::uint64_t, std::uint64_t>> areas;
    for (const test::GuestQueue* queue : {&world_.nics[0].receive, &world_.nics[0].transmit}) {
      areas.emplace_back(queue->place().used, packed_ ? 4 : 4 + 8 * queue->size() + 2);
      if (packed_) areas.emplace_back(queue->place().descriptors, 16 * queue->size());
    }
    return areas;
  }
  [[nodiscard]] bool is_devices(std::uint64_t at) const {
    const auto areas = device_areas();
    return std::any_of(areas.begin(), areas.end(), [address = test::kGuestBase + at](const auto& area) {
      return address >= area.first && address < area.first + area.second;
    });
  }

  void check() {
    must_hold(world_.record().arm.load() == 0, "the record is empty between bursts");
    must_hold(world_.kernels[0].bad_descriptors() == 0, "the kernel gets transmit frames only");
    must_hold(world_.audit().clean(), "every frame is somewhere, once");
  }

  void finish() {
    const QueuePairState& state = world_.state();
    const auto taken = [](const VringCursors& now, const VringCursors& first) {
      return static_cast<std::uint16_t>(now.next_avail - first.next_avail);
    };
    const VringCursors none{};
    // Positions of a packed ring count slots, and a chain may have many.
    must_hold(packed_ || taken(state.transmit, none) ==
                             static_cast<std::uint16_t>(state.transmit.packets + state.transmit.dropped),
              "each chain to send is a packet or dropped");
    must_hold(
        state.transmit.next_used == state.transmit.next_avail && state.receive.next_used == state.receive.next_avail,
        "each chain taken is given back");
  }

  bool packed_;
  test::EngineWorld fresh_, world_;
  test::FakeFence fence_;
  std::shared_ptr<const UplinkPorts> ports_;
  std::vector<std::shared_ptr<const Device>> devices_;
  std::uint64_t payload_from_ = 0;
  std::vector<std::int64_t> offered_;
};

/// Byte 0 chooses the features: bit 0 mergeable, 1 EVENT_IDX, 2 indirect, 3 VERSION_1, 4 offloads, 5 IN_ORDER; the
/// rest of the input is steps.
inline int run_engine(Input input, std::uint64_t fixed_features) {
  static std::map<std::uint64_t, std::unique_ptr<EngineRings>> engines;
  const std::uint8_t choice = input.u8();
  const std::uint64_t features =
      fixed_features | ((choice & 1u) != 0 ? test::feature::kMergeable : 0) |
      ((choice & 2u) != 0 ? test::feature::kEventIndex : 0) | ((choice & 4u) != 0 ? test::feature::kIndirect : 0) |
      ((choice & 8u) != 0 ? test::feature::kVersion1 : 0) | ((choice & 16u) != 0 ? test::feature::kAsksOffloads : 0) |
      ((choice & 32u) != 0 ? test::feature::kInOrder : 0);
  auto& engine = engines[features];
  if (!engine) engine = std::make_unique<EngineRings>(features);
  const DescriptorCheck all_closed;
  engine->run(input);
  return 0;
}

}  // namespace tandem::fuzz
