// SPDX-License-Identifier: Apache-2.0
// Front ends and guests that misbehave, each beside a good one on the same pair: the bad one pays, the good one loses
// nothing, no process dies for it and no descriptor stays behind.
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include <atomic>
#include <functional>

#include "tests/pair/fixture.hpp"

using namespace tandem;
using namespace tandem::test;
using R = VhostUserRequest;

namespace {

constexpr std::uint64_t kUser = ScriptedFrontEnd::kUser;

/// A pair with a NIC for the bad one and a good guest under traffic.
struct Neighbours {
  PairHost host;
  std::optional<ScriptedFrontEnd> good;
  std::optional<Traffic> traffic;
  pid_t owner = 0, heir = 0;
  std::map<pid_t, std::size_t> descriptors;

  Neighbours() {
    host.start();
    require_domain(host, "bad", {{.mac = kMac}});
    require_domain(host, "good", {{.mac = kOtherMac}});
    good.emplace(start_guest(host, kOtherMac));
    traffic.emplace(*good, kOtherMac);
    REQUIRE(traffic->pump_frames(50));
    owner = host.active();
    heir = host.standby();
    for (const pid_t pid : host.processes()) descriptors[pid] = descriptor_count(pid);
  }

  /// The bad one has gone: everything is as before.
  void require_as_before() {
    REQUIRE(traffic->pump_frames(50));
    CHECK(host.active() == owner);
    CHECK(host.standby() == heir);
    CHECK(eventually([&] { return host.nic(kMac)["connected"] == false; }));
    for (const auto& [pid, count] : descriptors) {
      std::size_t now = 0;
      const bool same = eventually([&, pid = pid, count = count] { return (now = descriptor_count(pid)) == count; },
                                   std::chrono::seconds{5});
      INFO(proc_status(pid, "Name") << " has " << now << " descriptors, had " << count);
      CHECK(same);
    }
  }

  void finish() {
    const TrafficResult result = traffic->finish();
    CAPTURE(result);
    CHECK(result.clean());
    CHECK(host.incidents().empty());
    good.reset();
    require_clean_end(host, {"bad", "good"});
  }
};

std::vector<std::byte> header(std::uint32_t request, std::uint32_t flags, std::uint32_t size) {
  const VhostUserHeader value{request, flags, size};
  const auto bytes = std::as_bytes(std::span(&value, 1));
  return {bytes.begin(), bytes.end()};
}

struct OneRegion {
  VhostUserMemoryHeader header{1, 0};
  VhostUserMemoryRegion region;
};
OneRegion one_region(const VhostUserMemoryRegion& region) { return {{1, 0}, region}; }
struct TwoRegions {
  VhostUserMemoryHeader header{2, 0};
  VhostUserMemoryRegion regions[2];
};

struct Row {
  const char* name;
  std::function<void(ScriptedFrontEnd&)> act;
  const char* said = nullptr;  ///< the connection must end with this in the log; else it may go on
};

const std::vector<Row> kRows{
    {"half a header, then nothing",
     [](auto& f) {
       f.send_raw(std::vector<std::byte>(6));
       f.disconnect();
     }},
    {"half a payload, then nothing",
     [](auto& f) {
       f.send_raw(header(2, 1, 8));
       f.send_raw(std::vector<std::byte>(3));
       f.disconnect();
     }},
    {"a payload of 4 GiB", [](auto& f) { f.send_raw(header(5, 1, 0xffffffff)); }, ""},
    {"a payload one byte too long", [](auto& f) { f.send_raw(header(5, 1, kMaxVhostUserPayload + 1)); }, ""},
    {"version 0", [](auto& f) { f.send_raw(header(1, 0, 0)); }, ""},
    {"an answer instead of a request", [](auto& f) { f.send_raw(header(1, 5, 0)); }, "marked as a reply"},
    {"an unknown request", [](auto& f) { f.send_raw(header(200, 1, 0)); }, "not supported"},
    {"an unknown request that wants an answer", [](auto& f) { f.send_raw(header(200, 9, 0)); }},
    {"a descriptor where there is none", [](auto& f) { f.send(R::kGetFeatures, {}, {{f.memory_fd()}}); },
     "came with 1 descriptors"},
    {"no descriptor where there must be one",
     [](auto& f) {
       f.send_body(R::kSetMemTable, one_region({0, 65536, kUser, 0}));
     },
     "came with 0 descriptors"},
    {"253 descriptors on one message",
     [](auto& f) { f.send(R::kGetFeatures, {}, std::vector<int>(253, f.memory_fd())); }, ""},
    {"a kick fd that is a file", [](auto& f) { f.send_body(R::kSetVringKick, std::uint64_t{0}, {{f.memory_fd()}}); },
     "an eventfd is needed"},
    {"memory that is an eventfd",
     [](auto& f) {
       f.send_body(R::kSetMemTable, one_region({0, 65536, kUser, 0}), {{f.queue(0).kick_fd}});
     },
     "SET_MEM_TABLE"},
    {"a region larger than its file",
     [](auto& f) {
       f.send_body(R::kSetMemTable, one_region({0, 1ull << 40, kUser, 0}), {{f.memory_fd()}});
     },
     "SET_MEM_TABLE"},
    {"a region that overflows",
     [](auto& f) {
       f.send_body(R::kSetMemTable, one_region({~0ull - 4095, 65536, kUser, 0}), {{f.memory_fd()}});
     },
     "SET_MEM_TABLE"},
    {"an offset that overflows",
     [](auto& f) {
       f.send_body(R::kSetMemTable, one_region({0, 65536, kUser, ~0ull - 4095}), {{f.memory_fd()}});
     },
     "SET_MEM_TABLE"},
    {"regions that overlap",
     [](auto& f) {
       const int fds[] = {f.memory_fd(), f.memory_fd()};
       f.send_body(R::kSetMemTable, TwoRegions{{2, 0}, {{0, 65536, kUser, 0}, {4096, 65536, kUser + (1 << 20), 0}}},
                   fds);
     },
     "overlap"},
    {"a ring of size 0", [](auto& f) { f.send_state(R::kSetVringNum, 0, 0); }, "0 entries"},
    {"a ring of size 3", [](auto& f) { f.send_state(R::kSetVringNum, 0, 3); }, "3 entries"},
    {"a ring of size 65536", [](auto& f) { f.send_state(R::kSetVringNum, 0, 65536); }, "65536 entries"},
    {"a ring index beyond the queues", [](auto& f) { f.send_state(R::kSetVringNum, 77, 256); }, "does not exist"},
    {"a ring outside memory",
     [](auto& f) {
       f.send_mem_table();
       f.send_state(R::kSetVringNum, 0, 256);
       f.send_body(R::kSetVringAddr, VhostUserVringAddress{0, 0, kUser + (1ull << 41), kUser + 65536, kUser + 4096, 0});
       f.send_body(R::kSetVringKick, std::uint64_t{0}, {{f.queue(0).kick_fd}});
       f.settle_or_closed();
     },
     "not inside one memory region"},
};

}  // namespace

TEST_CASE("messages that no front end should send") {
  SKIP_UNLESS_PAIR();
  Neighbours pair;
  for (const Row& row : kRows) {
    INFO(row.name);
    const std::size_t log_before = pair.host.log().size();
    ScriptedFrontEnd bad(pair.host.nic_socket(kMac));
    bad.negotiate();
    bad.send_body(R::kSetFeatures, bad.options().features);  // memory and rings come after it
    row.act(bad);
    if (row.said != nullptr) {
      CHECK(bad.wait_closed());
      CHECK(pair.host.log().find(row.said, log_before) != std::string::npos);
    }
    bad.disconnect();
    pair.require_as_before();
  }
  // The NIC is as good as new for one that behaves.
  ScriptedFrontEnd guest = start_guest(pair.host, kMac);
  Traffic traffic(guest, kMac);
  REQUIRE(traffic.pump_frames(100));
  CHECK(traffic.finish().clean());
  guest.disconnect();
  pair.finish();
}

TEST_CASE("memory files as large as they can be: refused, or served, but nobody dies of them") {
  SKIP_UNLESS_PAIR();
  Neighbours pair;
  for (const unsigned bits : {40u, 45u, 46u, 47u, 62u}) {
    INFO("2^" << bits << " bytes");
    ScriptedFrontEnd bad(pair.host.nic_socket(kMac));
    bad.negotiate();
    bad.send_body(R::kSetFeatures, bad.options().features);
    const UniqueFd file{::memfd_create("huge", MFD_CLOEXEC)};
    REQUIRE(::ftruncate(file.get(), static_cast<off_t>(1ull << bits)) == 0);
    bad.send_body(R::kSetMemTable, one_region({0, 1ull << bits, 0x1000, 0}), {{file.get()}}, true);
    // An answer, or the end of the connection, and neither must need anybody's death.
    bad.settle_or_closed();
    bad.disconnect();
    pair.require_as_before();
  }
  pair.finish();
}

TEST_CASE("a storm of connections") {
  SKIP_UNLESS_PAIR();
  Neighbours pair;
  for (int round = 0; round < 60; ++round) {
    ScriptedFrontEnd bad(pair.host.nic_socket(kMac));
    switch (round % 4) {
      case 0:
        break;
      case 1:
        bad.negotiate();
        break;
      case 2:
        bad.send_raw(header(11, 1, 8));
        break;
      case 3:
        bad.negotiate();
        bad.start();
        break;
    }
    pair.traffic->pump();
  }
  pair.require_as_before();
  ScriptedFrontEnd guest = start_guest(pair.host, kMac);
  Traffic traffic(guest, kMac);
  REQUIRE(traffic.pump_frames(100));
  CHECK(traffic.finish().clean());
  guest.disconnect();
  pair.require_as_before();
  pair.finish();
}

TEST_CASE("descriptors in floods, one message after the other") {
  SKIP_UNLESS_PAIR();
  Neighbours pair;
  ScriptedFrontEnd bad(pair.host.nic_socket(kMac));
  bad.negotiate();
  bad.start();
  const std::size_t before = descriptor_count(pair.owner);
  for (int round = 0; round < 300; ++round) {
    // New files each time: the last one counts, the others must be closed.
    const UniqueFd kick{::fcntl(bad.queue(0).kick_fd, F_DUPFD_CLOEXEC, 0)},
        call{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    bad.send_body(R::kSetVringCall, std::uint64_t{static_cast<std::uint64_t>(round) % 2}, {{call.get()}});
    if (round % 10 == 0) bad.settle();
    pair.traffic->pump();
  }
  bad.settle();
  REQUIRE(pair.traffic->pump_frames(50));
  CHECK(eventually([&] { return descriptor_count(pair.owner) <= before + 4; }, std::chrono::seconds{5}));
  bad.disconnect();
  pair.require_as_before();
  pair.finish();
}

TEST_CASE("memory that is cut off under a running device stops that device") {
  SKIP_UNLESS_PAIR();
  const bool rings = GENERATE(false, true);
  INFO((rings ? "rings and buffers" : "buffers only"));
  Neighbours pair;
  {
    ScriptedFrontEnd bad = start_guest(pair.host, kMac);
    Traffic traffic(bad, kMac);
    REQUIRE(traffic.pump_frames(50));
    REQUIRE(traffic.finish().clean());
    REQUIRE(::ftruncate(bad.memory_fd(), rings ? 0 : static_cast<off_t>(bad.rings_size())) == 0);
    for (int frame = 0; frame < 64; ++frame)
      pair.traffic->outside().send(numbered_frame(kMac, "02:00:00:00:00:01", kUncountedFlow, 1, 200));
    REQUIRE(pair.traffic->pump_until([&] { return pair.host.nic(kMac)["fault"] != ""; }));
    CHECK(pair.host.nic(kMac)["fault"] == "guest memory disappeared");
    CHECK(pair.host.nic(kOtherMac)["fault"] == "");
    // It can say good-bye all the same.
    bad.get_base(0);
  }
  pair.require_as_before();
  ScriptedFrontEnd guest = start_guest(pair.host, kMac);
  Traffic traffic(guest, kMac);
  CHECK(traffic.pump_frames(100));
  CHECK(traffic.finish().clean());
  CHECK(pair.host.nic(kMac)["fault"] == "");
  guest.disconnect();
  pair.finish();
}

TEST_CASE("an avail index that jumps stops its device") {
  SKIP_UNLESS_PAIR();
  const std::uint32_t vring = GENERATE(0u, 1u);
  INFO("vring " << vring);
  Neighbours pair;
  ScriptedFrontEnd bad = start_guest(pair.host, kMac);
  {
    Traffic traffic(bad, kMac);
    REQUIRE(traffic.pump_frames(50));
    REQUIRE(traffic.finish().clean());
  }
  DriverQueue& queue = bad.queue(vring);
  std::atomic_ref<std::uint16_t>(queue.avail->idx)
      .store(static_cast<std::uint16_t>(queue.avail_index + 2 * queue.size + 1));
  queue.kick();
  pair.traffic->outside().send(numbered_frame(kMac, "02:00:00:00:00:01", kUncountedFlow, 1, 200));
  REQUIRE(pair.traffic->pump_until([&] { return pair.host.nic(kMac)["fault"] != ""; }));
  CHECK(pair.host.nic(kMac)["fault"] == "the guest's avail index ran ahead of its ring");
  // A reset of the device is enough to go on.
  bad.stop();
  bad.reset_rings();
  bad.start();
  Traffic traffic(bad, kMac);
  const bool enough = traffic.pump_frames(100);
  const TrafficResult result = traffic.finish();
  CHECK(enough);
  CAPTURE(result, pair.host.nic(kMac).dump());
  CHECK(result.clean());
  CHECK(pair.host.nic(kMac)["fault"] == "");
  bad.disconnect();
  pair.require_as_before();
  pair.finish();
}

TEST_CASE("descriptor chains that are wrong are dropped and counted") {
  SKIP_UNLESS_PAIR();
  Neighbours pair;
  FrontEndOptions options;
  options.features |= virtio_feature::kIndirectDesc;
  ScriptedFrontEnd bad = start_guest(pair.host, kMac, options);
  constexpr std::uint16_t kNext = VRING_DESC_F_NEXT, kWrite = VRING_DESC_F_WRITE, kIndirect = VRING_DESC_F_INDIRECT;
  DriverQueue& queue = bad.queue(1);
  const std::uint64_t at = queue.buffers_guest;
  struct Chain {
    const char* name;
    std::vector<vring_desc> descriptors;
    std::uint16_t head = 0;
  };
  std::vector<Chain> chains{
      {"head beyond the ring", {}, 60000},
      {"next beyond the ring", {{at, 100, kNext, 9999}}},
      {"a loop", {{at, 100, kNext, 1}, {at, 100, kNext, 0}}},
      {"a loop of one", {{at, 100, kNext, 0}}},
      {"address outside memory", {{1ull << 50, 100, 0, 0}}},
      {"address and length that overflow", {{~0ull - 10, 100, 0, 0}}},
      {"length beyond the region", {{at, 0xffffffff, 0, 0}}},
      {"zero length", {{at, 0, 0, 0}}},
      {"zero length after the header", {{at, 12, kNext, 1}, {at, 0, 0, 0}}},
      {"a buffer for the device to write", {{at, 100, kWrite, 0}}},
      {"shorter than the header", {{at, 5, 0, 0}}},
      {"header only", {{at, 12, 0, 0}}},
      {"a runt", {{at, 12 + 10, 0, 0}}},
      {"longer than a frame", {{at, 60'000, 0, 0}}},
      {"an indirect table of odd length", {{at, 17, kIndirect, 0}}},
      {"an empty indirect table", {{at, 0, kIndirect, 0}}},
      {"an indirect table outside memory", {{1ull << 50, 32, kIndirect, 0}}},
      {"an indirect table with another inside", {{at, 16, kIndirect, 0}}},
      {"an indirect table that is chained", {{at, 16, kIndirect | kNext, 1}, {at, 100, 0, 0}}},
  };
  // At `at` lies a descriptor that is itself an indirect one.
  const vring_desc inner{at, 16, kIndirect, 0};
  std::memcpy(queue.buffers, &inner, sizeof inner);
  Chain longest{"longer than the ring", {}};
  for (std::uint32_t n = 0; n < queue.size; ++n)
    longest.descriptors.push_back({at, 4, kNext, static_cast<std::uint16_t>((n + 1) % queue.size)});
  chains.push_back(longest);
  for (const Chain& chain : chains) {
    INFO(chain.name);
    const auto dropped = pair.host.nic(kMac)["tx"]["dropped"].get<std::uint64_t>();
    std::copy(chain.descriptors.begin(), chain.descriptors.end(), queue.descriptors);
    queue.make_available({&chain.head, 1});
    const bool counted = pair.traffic->pump_until([&] {
      const auto nic = pair.host.nic(kMac);
      return nic["tx"]["dropped"] == dropped + 1 || nic["fault"] != "";
    });
    CAPTURE(pair.host.nic(kMac).dump());
    CHECK(counted);
    // Whatever was wrong with it, the buffer comes back, so that the guest's driver does not starve.
    CHECK(eventually([&] { return queue.used_index() == queue.avail_index; }, std::chrono::seconds{5}));
    queue.last_used = queue.used_index();
  }
  CHECK(pair.host.nic(kMac)["fault"] == "");
  // And one that is right.
  Outside outside;
  const Frame frame = numbered_frame("02:00:00:00:00:01", kMac, 7, 1, 300);
  REQUIRE(bad.transmit(0, frame));
  bool came = false;
  REQUIRE(eventually([&] {
    for (const Frame& got : outside.receive()) came = came || got == frame;
    return came;
  }));
  bad.disconnect();
  pair.require_as_before();
  pair.finish();
}
