// SPDX-License-Identifier: Apache-2.0
// memory_model: the shipping engine's stores, in every order that a weakly ordered CPU may show them to guest and
// kernel, with a crash after each of them. What is modelled and what is assumed is in README.md.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <unordered_set>

#include "tests/memory-model/recorder.hpp"
#include "tests/support/takeover_check.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

enum Tag : std::uint32_t { kWarmTag = 1, kOwnerTag = 2, kHeirTag = 3 };
constexpr PacketFlow kFlow{18, 120};
constexpr std::uint32_t kWarmUp = 3;

struct Row {
  const char* name;
  std::uint32_t transmit, receive;  ///< packets of the burst
  ChainStyle style;
  bool mergeable, event_index;
  std::uint16_t first_index;
  bool packed = false, in_order = false;
};
const Row kRows[] = {
    {"guest->uplink, direct, burst 1", 1, 0, ChainStyle::kDirect, false, false, 0},
    {"guest->uplink, chained, EVENT_IDX, index wrap, burst 2", 2, 0, ChainStyle::kChained, true, true, 65532},
    {"guest->uplink, indirect, burst 3", 3, 0, ChainStyle::kIndirect, true, true, 0},
    {"uplink->guest, direct, burst 1", 0, 1, ChainStyle::kDirect, false, false, 0},
    {"uplink->guest, chained, EVENT_IDX, index wrap, burst 2", 0, 2, ChainStyle::kChained, false, true, 65532},
    {"uplink->guest, mergeable, burst 2", 0, 2, ChainStyle::kDirect, true, true, 0},
    {"both ways, direct, mergeable, burst 1", 1, 1, ChainStyle::kDirect, true, true, 0},
    {"guest->uplink, packed, direct, burst 1", 1, 0, ChainStyle::kDirect, false, false, 0, true},
    {"guest->uplink, packed, chained, EVENT_IDX, wrap, burst 2", 2, 0, ChainStyle::kChained, true, true, 22, true},
    {"guest->uplink, packed, IN_ORDER, chained, wrap, burst 3", 3, 0, ChainStyle::kChained, true, true, 22, true, true},
    {"uplink->guest, packed, direct, wrap, burst 2", 0, 2, ChainStyle::kDirect, false, true, 28, true},
    {"uplink->guest, packed, mergeable, burst 2", 0, 2, ChainStyle::kDirect, true, true, 0, true},
};

WorldShape shape_of(const Row& row) {
  WorldShape shape;
  shape.nic.features = feature::kIndirect | feature::kVersion1 | (row.mergeable ? feature::kMergeable : 0) |
                       (row.event_index ? feature::kEventIndex : 0) | (row.packed ? feature::kPacked : 0) |
                       (row.in_order ? feature::kInOrder : 0);
  shape.nic.transmit = shape.nic.receive = row.style;
  shape.nic.slot_size = 136;
  if (row.mergeable) shape.nic.receive_slot_size = 56;
  shape.nic.queue_size = 32;
  shape.nic.cuts = {7, 30};
  shape.nic.first_index = row.first_index;
  shape.xsk.frame_size = 256;
  shape.xsk.headroom = 64;
  shape.xsk.rx_frames = 16;
  return shape;
}

// What guest and kernel look at: each place belongs to one object; 0 is what only owner and heir look at.
using Object = std::uint32_t;

class Places {
 public:
  explicit Places(const EngineWorld& world) : world_(world) {
    // EngineWorld::parts(): guest memory, head of the segment, owner word and record of the shard, queue pairs, socket.
    guest_ = 0;
    socket_ = static_cast<std::uint32_t>(world.parts().size() - 1);
  }
  [[nodiscard]] Object object(const Access& store) const {
    if (store.part == guest_) return guest_object(store.offset);
    if (store.part == socket_) return socket_object(store.offset);
    return 0;
  }

 private:
  [[nodiscard]] Object guest_object(std::uint32_t offset) const {
    const GuestNic& nic = world_.nics[0];
    const std::uint64_t address = kGuestBase + offset;
    for (std::uint32_t n = 0; n < 2; ++n) {
      const GuestQueue& queue = n == 0 ? nic.receive : nic.transmit;
      const std::uint64_t ring = queue.place().descriptors, used = queue.place().used;
      if (queue.place().packed && address >= ring && address < ring + 16 * queue.size())
        return 1000 * (n + 1) + 1 + static_cast<Object>(address - ring) / 16;
      if (address < used || address >= used + 4 + 8 * queue.size() + 2) continue;
      return 1000 * (n + 1) + (address - used < 4 ? 0 : 1 + static_cast<Object>(address - used - 4) / 8);
    }
    // A buffer; the size of a slot differs by direction, and only receive slots are written.
    if (address >= nic.receive_slot(0))
      return 3000 + static_cast<Object>((address - nic.receive_slot(0)) / nic.shape().receive_slot_bytes());
    return 2999;
  }
  [[nodiscard]] Object socket_object(std::uint32_t offset) const {
    const XskDescription& description = world_.kernels[0].description();
    Object base = 10000;
    for (const XskRing* ring : {&description.rx, &description.tx, &description.fill, &description.completion}) {
      base += 1000;
      if (offset < ring->mmap_offset || offset >= ring->mmap_offset + ring->mmap_size) continue;
      const std::uint64_t inside = offset - ring->mmap_offset;
      if (inside < ring->descriptors) return base + static_cast<Object>(inside / 64);
      return base + 10 + static_cast<Object>((inside - ring->descriptors) / ring->entry_size);
    }
    return 20000 + static_cast<Object>((offset - xsk_ring_bytes(description)) / description.frame_size);
  }

  const EngineWorld& world_;
  std::uint32_t guest_, socket_;
};

// The stores of a burst in program order, and which of them must be visible to an observer who sees a later one.
struct Sequence {
  std::vector<Access> stores;
  std::vector<Object> objects;
  std::vector<std::uint32_t> fences;  ///< full fences before each store

  /// Whether store `i` (earlier) must be visible wherever `j` is.
  [[nodiscard]] bool before(std::size_t i, std::size_t j) const {
    if (stores[j].kind == AccessKind::kReleaseStore || fences[i] != fences[j]) return true;
    return stores[i].part == stores[j].part && stores[i].offset / 4 == stores[j].offset / 4;  // coherence
  }
};

Sequence sequence_of(const std::vector<Access>& accesses, const Places& places) {
  Sequence sequence;
  std::uint32_t fences = 0;
  for (const Access& access : accesses) {
    fences += access.kind == AccessKind::kFullFence;
    if (!access.is_store()) continue;
    sequence.stores.push_back(access);
    sequence.objects.push_back(places.object(access));
    sequence.fences.push_back(fences);
  }
  return sequence;
}

using Seen = std::vector<bool>;  // by store

// Neighbouring plain stores into one object, with nothing ordered between them.
std::vector<std::vector<std::size_t>> units_of(const Sequence& sequence) {
  std::vector<std::vector<std::size_t>> units;
  std::vector<std::size_t> since_order;  // units since the last ordered store
  std::uint32_t fences = 0;
  for (std::size_t i = 0; i < sequence.stores.size(); ++i) {
    if (sequence.fences[i] != fences || sequence.stores[i].kind == AccessKind::kReleaseStore) since_order.clear();
    fences = sequence.fences[i];
    if (sequence.objects[i] == 0) continue;
    const bool plain = sequence.stores[i].kind == AccessKind::kPlainStore;
    const auto same = std::find_if(since_order.begin(), since_order.end(), [&](std::size_t unit) {
      return sequence.objects[units[unit].front()] == sequence.objects[i];
    });
    if (plain && same != since_order.end()) {
      units[*same].push_back(i);
      continue;
    }
    units.push_back({i});
    if (plain) since_order.push_back(units.size() - 1);
  }
  return units;
}

class Explorer {
 public:
  explicit Explorer(const Row& row) : row_(row), world_(shape_of(row)), trial_(shape_of(row)), flows_(kFlow) {
    devices_.push_back(trial_.make_device(trial_.describe(1)));
    ports_ = trial_.make_ports();
  }

  bool run() {
    const auto begin = std::chrono::steady_clock::now();
    record();
    const Sequence sequence = sequence_of(accesses_, Places(world_));
    explore(sequence);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const Tally& tally = verdict_.tally;
    std::printf("%-56s %5zu %5zu %7llu %7llu %6.1f  %s\n", row_.name, sequence.stores.size(), units_of(sequence).size(),
                static_cast<unsigned long long>(views_), static_cast<unsigned long long>(takeovers_), seconds,
                verdict_.clean() && handshakes_ok_ ? "ok" : "FAILED");
    if (!verdict_.clean())
      std::printf(
          "  lost %llu, duplicated %llu, reordered %llu, corrupt %llu, frames %llu, descriptors %llu, counters "
          "%llu, stopped %llu\n",
          static_cast<unsigned long long>(tally.lost), static_cast<unsigned long long>(tally.duplicated),
          static_cast<unsigned long long>(tally.reordered), static_cast<unsigned long long>(tally.corrupt),
          static_cast<unsigned long long>(verdict_.leaked_frames),
          static_cast<unsigned long long>(verdict_.descriptor_errors),
          static_cast<unsigned long long>(verdict_.miscounted), static_cast<unsigned long long>(verdict_.stopped));
    std::fflush(stdout);
    return verdict_.clean() && handshakes_ok_;
  }

 private:
  ShardStepper make(EngineWorld& world, std::uint32_t tag, std::shared_ptr<const UplinkPorts> ports,
                    std::vector<std::shared_ptr<const Device>> devices) {
    ShardStepper shard(world.segment(), fence_.view(), tag);
    shard.hold(std::move(ports), std::move(devices));
    return shard;
  }

  // A few packets cross, a new owner takes over, and its next round of the poll loop is recorded.
  void record() {
    const auto ports = world_.make_ports();
    const std::vector<std::shared_ptr<const Device>> devices{world_.make_device(world_.describe(1))};
    {
      ShardStepper warm = make(world_, kWarmTag, ports, devices);
      if (!warm.take_over()) std::abort();
      world_.nics[0].post();
      flows_.send(world_, kWarmUp, kWarmUp);
      while (warm.poll_once()) {
      }
    }
    std::vector<std::byte> packet;
    while (const auto bytes = world_.kernels[0].send()) flows_.uplink.note(*bytes);
    while (world_.nics[0].take(packet)) flows_.guest.note(packet);
    world_.nics[0].reap();
    world_.nics[0].post();
    fence_.kill(kWarmTag);
    ShardStepper owner = make(world_, kOwnerTag, ports, devices);
    if (!owner.take_over()) std::abort();
    world_.kernels[0].complete();
    flows_.send(world_, row_.transmit, row_.receive);
    for (const auto part : world_.parts()) start_.emplace_back(part.begin(), part.end());
    Recorder recorder;
    recorder.start(world_.parts());
    owner.poll_once();
    accesses_ = recorder.stop();
    recorder.start(world_.parts());
    owner.sleep();
    const std::vector<Access> going_to_sleep = recorder.stop();
    handshakes_ok_ = handshakes(accesses_, "a call", false);
    handshakes_ok_ = handshakes(going_to_sleep, "a kick", true) && handshakes_ok_;
    fence_.kill(kOwnerTag);
  }

  // Store what the other side waits for, full fence, load what it wishes. After each publication that is followed by
  // such a load there must be a fence in between: without one, both sides may miss the other (litmus test SB).
  bool handshakes(const std::vector<Access>& accesses, const char* what, bool taken_back) {
    const Places places(world_);
    bool good = true;
    bool published = false, fenced = false, fenced_once = false;
    for (const Access& access : accesses) {
      if (access.is_store()) {
        const Object object = places.object(access);
        const bool used_index = object == 1000 || object == 2000;
        // Split: flags and avail_event, behind the elements. Packed: the device's event area, and every used
        // descriptor.
        const bool event = object >= 1000 && object < 3000 && (row_.packed || object % 1000 == 0 || object % 1000 > 32);
        if (used_index || event) {
          published = true;
          fenced = false;
        }
      } else if (access.kind == AccessKind::kFullFence) {
        fenced = true;
        fenced_once = true;
      } else if (access.size == 2 && published && !row_.packed) {
        if (!fenced && !both_may_sleep(false)) std::abort();
        if (!fenced) {
          std::printf("  no fence between what the guest waits for and its wish: %s may be missed\n", what);
          good = false;
        }
        published = false;
      }
    }
    // Loads are recorded without their places, and a packed ring's wish is as long as much else: there must be a fence
    // after what was published last; or, before a sleep, at all, for the wish is taken back afterwards, and one that
    // changes no byte of memory is not seen here.
    if (row_.packed && published && !(taken_back ? fenced_once : fenced)) {
      std::printf("  no fence after what the guest waits for: %s may be missed\n", what);
      good = false;
    }
    return good && !both_may_sleep(true);
  }

  // SB by brute force: each side stores, then loads; without a fence its store may reach memory after its load. The
  // guest's barrier is the driver's own (virtio_mb). True if both can read the old value.
  static bool both_may_sleep(bool owner_fences) {
    // Events: owner's store reaches memory (0), owner loads (1), guest's store (2), guest loads (3).
    int order[] = {0, 1, 2, 3};
    bool found = false;
    do {
      const auto at = [&](int event) { return std::find(order, order + 4, event) - order; };
      if (at(2) > at(3) || (owner_fences && at(0) > at(1))) continue;
      found = found || (at(1) < at(2) && at(3) < at(0));
    } while (std::next_permutation(order, order + 4));
    return found;
  }

  void explore(const Sequence& sequence) {
    const auto units = units_of(sequence);
    if (units.size() > 40) std::abort();
    Seen seen(sequence.stores.size(), false);
    pick(sequence, units, 0, seen);
    // Torn objects: each single store missing from all that may be seen without it, or alone with what it needs.
    for (std::size_t i = 0; i < sequence.stores.size(); ++i) {
      if (sequence.objects[i] == 0) continue;
      Seen without(sequence.stores.size(), true), only(sequence.stores.size(), false);
      close_upwards(sequence, i, without);
      close_downwards(sequence, i, only);
      look(sequence, without);
      look(sequence, only);
    }
  }
  static void close_upwards(const Sequence& sequence, std::size_t missing, Seen& seen) {
    seen[missing] = false;
    for (std::size_t j = missing + 1; j < seen.size(); ++j)
      for (std::size_t i = missing; i < j && seen[j]; ++i)
        if (!seen[i] && sequence.before(i, j)) seen[j] = false;
  }
  static void close_downwards(const Sequence& sequence, std::size_t wanted, Seen& seen) {
    seen[wanted] = true;
    for (std::size_t j = wanted + 1; j-- > 0;)
      for (std::size_t i = 0; i < j && seen[j]; ++i)
        if (sequence.before(i, j)) seen[i] = true;
  }

  // All sets of units that an observer may see: with each store everything that is ordered before it.
  void pick(const Sequence& sequence, const std::vector<std::vector<std::size_t>>& units, std::size_t next,
            Seen& seen) {
    if (next == units.size()) return look(sequence, seen);
    pick(sequence, units, next + 1, seen);
    for (const std::size_t j : units[next])
      for (std::size_t i = 0; i < j; ++i)
        if (sequence.objects[i] != 0 && !seen[i] && sequence.before(i, j) &&
            std::find(units[next].begin(), units[next].end(), i) == units[next].end())
          return;
    for (const std::size_t j : units[next]) seen[j] = true;
    pick(sequence, units, next + 1, seen);
    for (const std::size_t j : units[next]) seen[j] = false;
  }

  // Guest and kernel see `seen` and act on it; the owner dies after any later store; its retired stores all arrive; the
  // heir takes over.
  void look(const Sequence& sequence, const Seen& all) {
    Seen seen = all;
    for (std::size_t i = 0; i < seen.size(); ++i) seen[i] = seen[i] && sequence.objects[i] != 0;
    if (!views_seen_.insert(seen).second) return;
    ++views_;
    std::size_t first = 0;
    for (std::size_t i = 0; i < seen.size(); ++i)
      if (seen[i]) first = i + 1;
    for (std::size_t dead = first; dead <= seen.size(); ++dead) {
      // Between two plain stores that nobody but the heir sees, and it only with the next, deaths are alike: the
      // crash points step through all of them.
      const bool turn = dead == first || dead == seen.size() ||
                        sequence.stores[dead - 1].kind != AccessKind::kPlainStore ||
                        sequence.objects[dead - 1] != sequence.objects[dead];
      if (turn) judge(sequence, seen, dead);
    }
  }

  void judge(const Sequence& sequence, const Seen& seen, std::size_t dead) {
    const auto& parts = trial_.parts();
    for (std::size_t i = 0; i < parts.size(); ++i) std::memcpy(parts[i].data(), start_[i].data(), start_[i].size());
    trial_.copy_ends_from(world_);
    Flows flows = flows_;
    const auto apply = [&](bool visible) {
      for (std::size_t i = 0; i < dead; ++i)
        if (seen[i] == visible)
          std::memcpy(parts[sequence.stores[i].part].data() + sequence.stores[i].offset, sequence.stores[i].bytes,
                      sequence.stores[i].size);
    };
    apply(true);
    world_moves_on(trial_, flows, 1);
    apply(false);
    ShardStepper heir = make(trial_, kHeirTag, ports_, devices_);
    verdict_ += take_over_and_judge(trial_, heir, flows);
    ++takeovers_;
  }

  Row row_;
  FakeFence fence_;
  EngineWorld world_, trial_;
  Flows flows_;
  std::vector<std::shared_ptr<const Device>> devices_;
  std::shared_ptr<const UplinkPorts> ports_;
  std::vector<std::vector<std::byte>> start_;  // shared memory when the burst begins
  std::vector<Access> accesses_;
  std::unordered_set<Seen> views_seen_;
  bool handshakes_ok_ = true;
  std::uint64_t views_ = 0, takeovers_ = 0;
  Verdict verdict_;
};

}  // namespace

int main(int argc, char** argv) {
  const bool must_fail = argc == 2 && std::strcmp(argv[1], "--must-fail") == 0;
  if (argc > 1 && !must_fail) {
    std::fprintf(stderr, "usage: memory_model [--must-fail]\n");
    return 2;
  }
  std::printf("%-56s %5s %5s %7s %7s %6s\n", "row", "stores", "units", "views", "heirs", "s");
  bool clean = true;
  for (const Row& row : kRows) {
    clean = Explorer(row).run() && clean;
    if (must_fail && !clean) return 0;
  }
  return clean != must_fail ? 0 : 1;
}
