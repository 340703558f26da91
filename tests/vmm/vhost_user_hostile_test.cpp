// SPDX-License-Identifier: Apache-2.0
// Front ends that lie: each row costs the liar the connection, changes nothing and leaks nothing.
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "tests/support/skip.hpp"
#include "tests/vmm/front_end.hpp"

using namespace tandem;
using namespace tandem::test;
using R = VhostUserRequest;

namespace {

constexpr std::uint64_t kUser = FrontEnd::kUser;
constexpr std::uint64_t kSize = FrontEnd::kHalf;
constexpr std::uint64_t kTop = ~0ull;

/// Negotiated, with memory, nothing started.
VhostUserDevice ready_device(const FrontEnd& front_end, std::uint32_t pairs = 2) {
  auto device = make_device(pairs);
  accept(device, u64(R::kSetProtocolFeatures, default_protocol_features()));
  accept(device, u64(R::kSetFeatures, FrontEnd::kFeatures));
  accept(device, front_end.mem_table());
  return device;
}

bool mentions(const std::string& text, const std::string& part) {
  INFO(text);
  return text.find(part) != std::string::npos;
}

}  // namespace

// CVE-2026-86561: region sizes believed before mmap. CVE-2018-1059: ranges translated without their length.
TEST_CASE("memory tables that are refused") {
  struct Row {
    const char* what;
    std::vector<VhostUserMemoryRegion> regions;
    const char* says;
  };
  const std::vector<Row> rows{
      {"no region", {}, "payload"},
      {"empty region", {{0, 0, kUser, 0}}, "empty"},
      {"guest range wraps", {{kTop - 0xfff, 0x2000, kUser, 0}}, "64-bit"},
      {"user range wraps", {{0, 0x2000, kTop - 0xfff, 0}}, "64-bit"},
      {"file range wraps", {{0, 0x2000, kUser, kTop - 0xfff}}, "64-bit"},
      {"size wraps everything", {{0x1000, kTop, kUser, 0}}, "64-bit"},
      {"larger than its file", {{0, 2 * kSize + 1, kUser, 0}}, "memory file has"},
      {"beyond its file", {{0, kSize, kUser, kSize + 1}}, "memory file has"},
      {"offset beyond its file", {{0, 0x1000, kUser, 16 * kSize}}, "memory file has"},
      {"guest ranges overlap", {{0, kSize, kUser, 0}, {kSize - 1, kSize, kUser + kSize, kSize}}, "overlaps"},
      {"user ranges overlap", {{0, kSize, kUser, 0}, {kSize, kSize, kUser + kSize - 1, kSize}}, "overlaps"},
      {"one inside the other", {{0, kSize, kUser, 0}, {0x1000, 0x1000, kUser + kSize, kSize}}, "overlaps"},
      {"the same twice", {{0, kSize, kUser, 0}, {0, kSize, kUser, 0}}, "overlaps"},
  };
  FrontEnd front_end;
  auto device = ready_device(front_end);
  for (const Row& row : rows) {
    INFO(row.what);
    // One descriptor at least, as the table demands: "no region" must fail for its own reason.
    const std::size_t count = std::max<std::size_t>(1, row.regions.size());
    Message message = front_end.mem_table(row.regions, std::vector<int>(count, front_end.memory()));
    if (row.regions.empty()) message = raw(R::kSetMemTable, std::vector<std::byte>(40), {front_end.memory()});
    CHECK(mentions(reject(device, message), row.says));
  }
  CHECK(device.description().region_count == 2);
}

TEST_CASE("memory tables whose count, payload and descriptors disagree") {
  FrontEnd front_end;
  auto device = ready_device(front_end);
  const int fd = front_end.memory();
  CHECK(mentions(reject(device, front_end.mem_table({FrontEnd::low(), FrontEnd::high()}, {fd})), "descriptors"));
  CHECK(mentions(reject(device, front_end.mem_table({FrontEnd::low()}, {fd, fd})), "descriptors"));
  for (const std::uint32_t count : {0u, 2u, 33u, 0x08000001u, 0xffffffffu}) {
    Message message = front_end.mem_table({FrontEnd::low()}, {fd});
    std::memcpy(message.bytes.data() + sizeof(VhostUserHeader), &count, sizeof count);
    CHECK(mentions(reject(device, message), "announces"));
  }
}

TEST_CASE("descriptors that are no guest memory") {
  FrontEnd front_end;
  auto device = ready_device(front_end);
  const auto attempt = [&](int fd) { return reject(device, front_end.mem_table({FrontEnd::low()}, {fd})); };
  SECTION("an eventfd") { CHECK(mentions(attempt(make_eventfd().get()), "tmpfs")); }
  SECTION("a pipe") {
    std::array<int, 2> ends{};
    REQUIRE(::pipe2(ends.data(), O_CLOEXEC) == 0);
    const UniqueFd read_end{ends[0]};
    const UniqueFd write_end{ends[1]};
    CHECK(mentions(attempt(read_end.get()), "tmpfs"));
  }
  SECTION("a file of another file system") {
    const UniqueFd file{::open("/proc/self/status", O_RDONLY | O_CLOEXEC)};
    CHECK(mentions(attempt(file.get()), "tmpfs"));
  }
  SECTION("a file that was truncated") {
    const UniqueFd file = make_memfd(FrontEnd::kHalf);
    REQUIRE(::ftruncate(file.get(), 4096) == 0);
    CHECK(mentions(attempt(file.get()), "memory file has"));
  }
  SECTION("a read-only descriptor") {
    const UniqueFd file{::open(("/proc/self/fd/" + std::to_string(front_end.memory())).c_str(), O_RDONLY | O_CLOEXEC)};
    REQUIRE(file);
    CHECK(mentions(attempt(file.get()), "writing"));
  }
  SECTION("a file sealed against writing") {
    const UniqueFd file = make_memfd(FrontEnd::kHalf);
    REQUIRE(::fcntl(file.get(), F_ADD_SEALS, F_SEAL_WRITE) == 0);
    CHECK(mentions(attempt(file.get()), "writing"));
  }
}

TEST_CASE("memory slots") {
  FrontEnd front_end;
  auto device = ready_device(front_end);
  SECTION("at most as many as we said") {
    std::vector<VhostUserMemoryRegion> regions;
    for (std::uint64_t i = 0; i < kMaxMemoryRegions; ++i)
      regions.push_back({i << 32, 0x1000, kUser + (i << 32), 0x1000 * i});
    accept(device, front_end.mem_table(regions, std::vector<int>(regions.size(), front_end.memory())));
    CHECK(mentions(reject(device, front_end.add_region({64ull << 32, 0x1000, kUser + (64ull << 32), 0})), "32"));
  }
  SECTION("none that overlaps") {
    CHECK(mentions(reject(device, front_end.add_region({0x1000, 0x1000, kUser + (1ull << 40), 0})), "overlaps"));
  }
  SECTION("only whole ones are removed") {
    CHECK(mentions(reject(device, front_end.remove_region({0, 0x1000, kUser, 0})), "part of"));
    CHECK(device.description().region_count == 2);
  }
  SECTION("QEMU's stray descriptor at removal is closed") {
    const std::size_t before = open_fds();
    accept(device, front_end.remove_region(FrontEnd::high(), {front_end.memory()}));
    CHECK(open_fds() == before - 1);  // the region's own
  }
}

TEST_CASE("a hugetlbfs file is guest memory too") {
  FrontEnd front_end;
  auto device = ready_device(front_end);
  const UniqueFd file{::memfd_create("tandem-test-huge", MFD_CLOEXEC | MFD_HUGETLB)};
  if (!file) TANDEM_SKIP("the kernel has no hugetlbfs (CONFIG_HUGETLBFS)");
  REQUIRE(::ftruncate(file.get(), static_cast<off_t>(kSize)) == 0);  // takes no page from the pool
  accept(device, front_end.mem_table({FrontEnd::low()}, {file.get()}));
  CHECK(device.description().region_count == 1);
}

TEST_CASE("huge page offsets need no page alignment in the protocol") {
  FrontEnd front_end;
  auto device = ready_device(front_end);
  accept(device, front_end.mem_table({{0x200, kSize, kUser + 0x200, 0x200}}, {front_end.memory()}));
  CHECK(device.description().regions[0].mmap_offset == 0x200);
}

// CVE-2020-10723: an index truncated after its check.
TEST_CASE("vring indices that do not exist") {
  FrontEnd front_end;
  auto device = ready_device(front_end, 2);
  for (const std::uint32_t index : {4u, 64u, 255u, 256u, 65536u, 0x80000000u, 0xffffffffu}) {
    INFO(index);
    for (const R request : {R::kSetVringNum, R::kSetVringBase, R::kGetVringBase, R::kSetVringEnable})
      CHECK(mentions(reject(device, state(request, index, 1)), "does not exist"));
    auto address = FrontEnd::addresses(0);
    address.index = index;
    CHECK(mentions(reject(device, with(R::kSetVringAddr, address)), "does not exist"));
  }
  for (const R request : {R::kSetVringKick, R::kSetVringCall, R::kSetVringErr}) {
    CHECK(mentions(reject(device, u64(request, 4, {front_end.call_fd(0)})), "does not exist"));
    CHECK(mentions(reject(device, u64(request, 0x100000000, {front_end.call_fd(0)})), "bits"));
    CHECK(mentions(reject(device, u64(request, 0x200, {front_end.call_fd(0)})), "bits"));
  }
}

TEST_CASE("vring sizes that are refused") {
  FrontEnd front_end;
  auto device = ready_device(front_end);
  for (const std::uint32_t size : {0u, 3u, 100u, 257u, 32769u, 65536u, 0x80000000u, 0xffffffffu})
    CHECK(mentions(reject(device, FrontEnd::num(0, size)), "power of two"));
  for (const std::uint32_t size : {1u, 2u, 256u, 32768u}) accept(device, FrontEnd::num(0, size));
}

TEST_CASE("avail indices above 16 bits are refused") {
  FrontEnd front_end;
  auto device = ready_device(front_end);
  CHECK(mentions(reject(device, FrontEnd::base(0, 65536)), "16 bits"));
  accept(device, FrontEnd::base(0, 65535));
}

TEST_CASE("vring addresses that are refused") {
  struct Row {
    const char* what;
    std::uint64_t descriptors, avail, used;
    const char* says;
  };
  constexpr std::uint64_t kGood = kUser + 0x10000;
  // 256 entries: descriptors 4096 bytes, avail 518, used 2054.
  const std::vector<Row> rows{
      {"descriptor table unaligned", kGood + 8, kGood + 0x4000, kGood + 0x8000, "aligned"},
      {"avail ring unaligned", kGood, kGood + 0x4001, kGood + 0x8000, "aligned"},
      {"used ring unaligned", kGood, kGood + 0x4000, kGood + 0x8002, "aligned"},
      {"all zero", 0, 0, 0, "inside one memory region"},
      {"below memory", kUser - 16, kGood + 0x4000, kGood + 0x8000, "inside one memory region"},
      {"descriptor table past the end", kUser + 2 * kSize - 4080, kGood, kGood, "inside one memory region"},
      {"avail ring past the end", kGood, kUser + 2 * kSize - 516, kGood, "inside one memory region"},
      {"used ring past the end", kGood, kGood, kUser + 2 * kSize - 2052, "inside one memory region"},
      {"across two regions", kUser + kSize - 16, kGood, kGood, "inside one memory region"},
      {"end wraps", kTop - 15, kGood, kGood, "inside one memory region"},
      {"a guest address", 0x10000, 0x14000, 0x18000, "inside one memory region"},
  };
  FrontEnd front_end;
  auto device = ready_device(front_end);
  accept(device, FrontEnd::num(0));
  for (const Row& row : rows) {
    INFO(row.what);
    const VhostUserVringAddress address{0, 0, row.descriptors, row.used, row.avail, 0};
    CHECK(mentions(reject(device, with(R::kSetVringAddr, address)), row.says));
  }
  // The last byte of each part may be the last of memory.
  const std::uint64_t end = kUser + 2 * kSize;
  accept(device, with(R::kSetVringAddr, VhostUserVringAddress{0, 0, end - 4096, end - 2056, end - 518, 0}));
}

TEST_CASE("a vring aligned for the front end but not in its file is refused") {
  FrontEnd front_end;
  auto device = ready_device(front_end);
  accept(device, front_end.mem_table({{0, kSize, kUser, 2}}, {front_end.memory()}));
  accept(device, FrontEnd::num(0));
  CHECK(mentions(reject(device, FrontEnd::addr(0)), "aligned in its memory file"));
}

TEST_CASE("a vring grown out of memory after its addresses came does not start") {
  FrontEnd front_end;
  auto device = ready_device(front_end);
  accept(device, FrontEnd::num(0, 4));
  const std::uint64_t end = kUser + 2 * kSize;
  accept(device, with(R::kSetVringAddr, VhostUserVringAddress{0, 0, end - 64, end - 0x4000, end - 0x8000, 0}));
  accept(device, FrontEnd::num(0, 32768));
  accept(device, FrontEnd::enable(0));
  CHECK(mentions(reject(device, front_end.kick(0)), "inside one memory region"));
  CHECK_FALSE(runs(device, 0));
}

TEST_CASE("kick, call and err descriptors") {
  FrontEnd front_end;
  auto device = ready_device(front_end);
  const R request = GENERATE(R::kSetVringKick, R::kSetVringCall, R::kSetVringErr);
  CHECK(mentions(reject(device, u64(request, 0)), "missing"));
  CHECK(mentions(reject(device, u64(request, 0 | kVringFileNoFd, {front_end.call_fd(0)})), "but one came"));
  CHECK(mentions(reject(device, u64(request, 0, {front_end.memory()})), "eventfd is needed"));
  accept(device, u64(request, 0 | kVringFileNoFd));
}

// CVE-2019-14818: repeated messages must not pile up descriptors.
TEST_CASE("a thousand repetitions leave no descriptor behind") {
  FrontEnd front_end;
  auto device = ready_device(front_end);
  play(device, front_end.qemu_start(2, false));
  const std::size_t before = open_fds();
  for (int i = 0; i < 1000; ++i) {
    const UniqueFd event = make_eventfd();
    for (const R request : {R::kSetVringKick, R::kSetVringCall, R::kSetVringErr})
      accept(device, u64(request, 1, {event.get()}));
    accept(device, front_end.mem_table());
    accept(device, FrontEnd::num(1));
  }
  CHECK(open_fds() == before);
}

TEST_CASE("messages before their time") {
  FrontEnd front_end;
  auto device = make_device();
  for (const Message& message :
       {front_end.mem_table(), FrontEnd::num(0), FrontEnd::base(0), FrontEnd::addr(0), front_end.kick(0)})
    CHECK(mentions(reject(device, message), "before SET_FEATURES"));
}

TEST_CASE("messages of a protocol feature that was not negotiated") {
  FrontEnd front_end;
  for (const VhostUserMessageInfo& info : kVhostUserMessages) {
    if (!info.supported || info.protocol_feature == 0) continue;
    INFO(info.name);
    auto device = make_device();
    accept(device, u64(R::kSetProtocolFeatures, default_protocol_features() & ~info.protocol_feature));
    const std::vector<std::byte> payload(info.payload_min);
    CHECK(mentions(reject(device, raw(info.request, payload, std::vector<int>(info.fds_min, front_end.memory()))),
                   "not negotiated"));
  }
}

TEST_CASE("values outside what was offered or defined") {
  FrontEnd front_end;
  auto device = ready_device(front_end);
  CHECK(mentions(reject(device, u64(R::kSetFeatures, FrontEnd::kFeatures | 1ull << 40)), "offered"));
  CHECK(mentions(reject(device, u64(R::kSetFeatures, 1ull << 26)), "offered"));
  CHECK(mentions(reject(device, u64(R::kSetProtocolFeatures, protocol_feature::kInflightShmfd)), "offered"));
  CHECK(mentions(reject(device, u64(R::kSetStatus, 256)), "8 bits"));
  CHECK(mentions(reject(device, FrontEnd::enable(0, 2)), "enabled"));
  auto logging = FrontEnd::addresses(0);
  logging.flags = 1;
  CHECK(mentions(reject(device, with(R::kSetVringAddr, logging)), "logging"));
}

// What is not offered is refused as a whole, whatever it carries: nothing of it is looked at, mapped or kept.
// CVE-2020-10722 (log size plus offset overflows), CVE-2026-86563 (log offset applied twice), CVE-2021-3839 and
// CVE-2026-86565 (counts of an inflight region believed).
TEST_CASE("requests of features that are not offered are refused, whatever they carry") {
  struct Log {
    std::uint64_t size, offset;
  };
  struct Inflight {
    std::uint64_t size, offset;
    std::uint16_t queues, queue_size;
    std::uint32_t padding = 0;
  };
  FrontEnd front_end;
  const int fd = front_end.memory();
  const int event = front_end.call_fd(0);
  struct Row {
    const char* what;
    Message message;
    const char* says;
  };
  const std::vector<Row> rows{
      {"log, size and offset wrap", with(R::kSetLogBase, Log{kTop - 0xfff, 0x2000}, {fd}), "not supported"},
      {"log larger than its file", with(R::kSetLogBase, Log{1ull << 40, 0}, {fd}), "not supported"},
      {"log that would be right", with(R::kSetLogBase, Log{0x1000, 0x1000}, {fd}), "not supported"},
      {"log without a descriptor", u64(R::kSetLogBase, 0x1000), "not supported"},
      {"log eventfd", raw(R::kSetLogFd, {}, {event}), "not supported"},
      {"inflight region, asked for", with(R::kGetInflightFd, Inflight{0, 0, 2, 256}), "not supported"},
      {"inflight region, too many queues", with(R::kGetInflightFd, Inflight{0, 0, 0xffff, 0xffff}), "not supported"},
      {"inflight region, given", with(R::kSetInflightFd, Inflight{0x1000, 0, 0xffff, 0xffff}, {fd}), "not supported"},
      {"inflight region, wraps", with(R::kSetInflightFd, Inflight{kTop, 0x1000, 2, 256}, {fd}), "not supported"},
      {"channel for our own requests", raw(R::kSetBackendReqFd, {}, {event}), "not supported"},
      {"postcopy", raw(R::kPostcopyAdvise), "not supported"},
      {"IOTLB", raw(R::kIotlbMsg, std::vector<std::byte>(32)), "not supported"},
  };
  auto device = ready_device(front_end);
  play(device, front_end.qemu_start(1, false));
  for (const Row& row : rows) {
    INFO(row.what);
    CHECK(mentions(reject(device, row.message), row.says));
    CHECK(runs(device, 0));
  }
  for (const std::uint64_t feature : {protocol_feature::kLogShmfd, protocol_feature::kInflightShmfd,
                                      protocol_feature::kBackendReq, protocol_feature::kPagefault}) {
    CHECK((default_protocol_features() & feature) == 0);
    CHECK(mentions(reject(device, u64(R::kSetProtocolFeatures, feature)), "offered"));
  }
}

TEST_CASE("offloads that nothing here does cannot be negotiated") {
  FrontEnd front_end;
  auto device = ready_device(front_end);
  // CTRL_GUEST_OFFLOADS, GSO, GUEST_UFO, HOST_UFO, LOG_ALL, USO, HASH_REPORT, RSS.
  for (const unsigned bit : {2u, 6u, 10u, 14u, 26u, 54u, 55u, 56u, 57u, 60u}) {
    INFO(bit);
    CHECK((default_virtio_features() >> bit & 1) == 0);
    CHECK(mentions(reject(device, u64(R::kSetFeatures, FrontEnd::kFeatures | 1ull << bit)), "offered"));
  }
}
