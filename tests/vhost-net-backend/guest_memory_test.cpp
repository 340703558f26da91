// SPDX-License-Identifier: Apache-2.0
// Guest memory: the read-only view, the window and its key, region edges, pages that go away.
#include "vhost-net-backend/guest_memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <csignal>
#include <functional>
#include <stdexcept>

#include "tests/support/skip.hpp"
#include "tests/vhost-net-backend/bench.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

// Runs `act` in a child with default signal actions; returns the signal that ended it, 0 if it came to its end.
int signal_of(const std::function<void()>& act) {
  const pid_t child = ::fork();
  if (child == 0) {
    for (const int number : {SIGSEGV, SIGBUS, SIGABRT}) ::signal(number, SIG_DFL);
    act();
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

constexpr long kSmallPage = 4096;

// Whether this process's page tables have the page (bit 63 of its word in /proc/self/pagemap, proc(5)).
bool in_page_tables(const std::byte* at) {
  const UniqueFd file{::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)};
  std::uint64_t word = 0;
  if (::pread(file.get(), &word, sizeof word,
              static_cast<off_t>(reinterpret_cast<std::uintptr_t>(at) / kSmallPage * 8)) != sizeof word)
    throw std::runtime_error("read /proc/self/pagemap");
  return (word >> 63) != 0;
}

WorldShape spare_world() {
  WorldShape shape = small_world();
  shape.spare_bytes = 4096;
  return shape;
}

}  // namespace

TEST_CASE("the view of guest memory faults on a store") {
  const EngineWorld world(spare_world());
  CHECK(signal_of([&] {
          const auto device = world.make_device(world.describe(1));
          const std::byte* view = device->memory()->view(kGuestBase, 1);
          const_cast<volatile std::byte*>(view)[0] = std::byte{1};
        }) == SIGSEGV);
  // What an operator's drill does is that very store.
  CHECK(signal_of([&] {
          const auto device = world.make_device(world.describe(1));
          fail_on_purpose(DrillFault::kBadStore, device->memory()->view(kGuestBase, 1));
        }) == SIGSEGV);
}

TEST_CASE("the window is writable only while it is open, where there are protection keys") {
  if (!guest_windows_have_key()) TANDEM_SKIP("this CPU or kernel has no memory protection keys");
  const EngineWorld world(spare_world());
  const auto store = [&](bool open) {
    return signal_of([&world, open] {
      const auto device = world.make_device(world.describe(1));
      const WritableSpan span = device->memory()->authorize_some(kGuestBase, 8);
      std::optional<WindowOpen> window;
      if (open) window.emplace();
      *static_cast<volatile std::byte*>(span.data()) = std::byte{0x77};
    });
  };
  CHECK(store(false) == SIGSEGV);
  CHECK(*world.space.at(kGuestBase) != std::byte{0x77});
  CHECK(store(true) == 0);
  CHECK(*world.space.at(kGuestBase) == std::byte{0x77});
}

TEST_CASE("a child does not inherit guest memory") {
  const EngineWorld world(spare_world());
  const auto device = world.make_device(world.describe(1));
  const volatile std::byte* view = device->memory()->view(kGuestBase, 1);
  CHECK(signal_of([&] { [[maybe_unused]] const std::byte byte = *view; }) == SIGSEGV);
}

TEST_CASE("region edges: guest addresses") {
  const EngineWorld world(spare_world());
  const auto device = world.make_device(world.describe(1));
  const GuestMemory& memory = *device->memory();
  const std::uint64_t first = world.describe(1).regions[0].size;
  const std::uint64_t adjacent = world.spare_address(0);
  const std::uint64_t far = world.spare_address(1);
  REQUIRE(adjacent == kGuestBase + first);
  CHECK(memory.view(kGuestBase, first) != nullptr);
  CHECK(memory.view(kGuestBase, first + 1) == nullptr);  // adjacent in guest addresses only
  CHECK(memory.view(kGuestBase - 1, 1) == nullptr);
  CHECK(memory.view(kGuestBase - 1, 2) == nullptr);
  CHECK(memory.view(adjacent - 1, 1) != nullptr);
  CHECK(memory.view(adjacent - 1, 2) == nullptr);
  CHECK(memory.view(far + 4095, 1) != nullptr);
  CHECK(memory.view(far + 4095, 2) == nullptr);
  CHECK(memory.view(far + 4096, 1) == nullptr);
  CHECK(memory.view(kGuestBase, 0) == nullptr);
  CHECK(memory.view(kGuestBase + 8, ~std::uint64_t{0}) == nullptr);
  CHECK(memory.view(~std::uint64_t{0}, 2) == nullptr);
  CHECK(memory.view(~std::uint64_t{0} - 3, ~std::uint64_t{0}) == nullptr);
  CHECK(memory.view_some(adjacent - 20, 100).size() == 20);
  CHECK(memory.view_some(adjacent, 100).size() == 100);
  CHECK(memory.view_some(adjacent, 0).empty());
  CHECK(memory.view_some(adjacent + 4096, 1).empty());
  CHECK(memory.authorize_some(far + 4000, 4096).size() == 96);
  CHECK(memory.authorize_some(far - 1, 8).size() == 0);
  CHECK(memory.authorize_some(far, 0).size() == 0);
  // Reads and writes through both mappings are of the same bytes.
  {
    const WindowOpen window;
    *memory.authorize_some(adjacent + 5, 1).data() = std::byte{0x42};
  }
  CHECK(*memory.view(adjacent + 5, 1) == std::byte{0x42});
  CHECK(*world.space.at(adjacent + 5) == std::byte{0x42});
}

TEST_CASE("region edges: user addresses") {
  const EngineWorld world(spare_world());
  const auto device = world.make_device(world.describe(1));
  const GuestMemory& memory = *device->memory();
  const std::uint64_t first = world.describe(1).regions[0].size;
  CHECK(memory.view_user(kUserBase, first) != nullptr);
  CHECK(memory.view_user(kUserBase, first + 1) == nullptr);
  CHECK(memory.view_user(kUserBase - 1, 1) == nullptr);
  CHECK(memory.view_user(kGuestBase, 1) == nullptr);
  CHECK(memory.view_user(~std::uint64_t{0}, 16) == nullptr);
  CHECK(memory.authorize_user(kUserBase + first - 4, 4).size() == 4);
  CHECK(memory.authorize_user(kUserBase + first - 4, 5).data() == nullptr);
}

TEST_CASE("a region larger than its file is refused") {
  const EngineWorld world(spare_world());
  DeviceDescription description = world.describe(1);
  struct Row {
    std::uint64_t size, offset;
  };
  for (const Row& row : {Row{0, 0}, Row{std::uint64_t{1} << 40, 0}, Row{4096, std::uint64_t{1} << 40},
                         Row{~std::uint64_t{0}, 4096}, Row{4096, ~std::uint64_t{0} - 4095}}) {
    description.regions[1].size = row.size;
    description.regions[1].mmap_offset = row.offset;
    std::vector<UniqueFd> fds;
    for (std::uint32_t i = 0; i < description.region_count; ++i) fds.emplace_back(::dup(world.memory_fd()));
    const auto memory = GuestMemory::map(description, fds);
    REQUIRE_FALSE(memory.has_value());
    CHECK(memory.error().kind == ErrorKind::kInvalid);
  }
}

TEST_CASE("warming brings named buffers into the page tables, once for the same ones") {
  Bench bench(spare_world());
  const DeviceDescription description = bench.world.describe(2);
  const auto device = bench.world.make_device(description, nullptr);
  constexpr std::uint32_t kTransmit = 1;
  // In a mapping of its own: to read the descriptors must not bring it in.
  const Piece piece{bench.world.spare_address(0), 200, false};
  bench.nic().transmit.add({&piece, 1});
  auto* const buffer = const_cast<std::byte*>(device->memory()->view_some(piece.address, piece.length).data());
  unsigned char resident = 0;
  REQUIRE(::mincore(buffer, kSmallPage, &resident) == 0);
  if (::sysconf(_SC_PAGESIZE) != kSmallPage || (resident & 1) != 0)
    TANDEM_SKIP("needs pages of 4 KiB, for memfds as well (transparent_hugepage/shmem_enabled)");
  const auto forget = [&] {
    REQUIRE(::madvise(buffer, kSmallPage, MADV_DONTNEED) == 0);
    REQUIRE_FALSE(in_page_tables(buffer));
  };
  std::uint64_t warmed = 0;
  CHECK(device->warm_buffers(kTransmit, warmed));
  CHECK_FALSE(in_page_tables(buffer));  // memory that no guest has used, or that it has given back, stays so
  CHECK(*buffer == std::byte{0});       // from here on there is a page

  forget();
  CHECK(device->warm_buffers(kTransmit, warmed));
  CHECK(in_page_tables(buffer));
  const std::uint64_t once = warmed;
  forget();
  CHECK(device->warm_buffers(kTransmit, warmed));
  CHECK(warmed == once);
  CHECK_FALSE(in_page_tables(buffer));

  const Piece other{bench.world.spare_address(1), 200, false};
  REQUIRE(*device->memory()->view_some(other.address, 1).data() == std::byte{0});
  bench.nic().transmit.add({&other, 1});
  CHECK(device->warm_buffers(kTransmit, warmed));
  CHECK(warmed != once);
  CHECK(in_page_tables(buffer));
  CHECK_FALSE(device->warm_buffers(2 * description.queue_pairs, warmed));
}

TEST_CASE("memory that shrinks stops its own device and no other") {
  // In a child, because the handler is for the whole process.
  const int ended = signal_of([] {
    if (!install_guest_fault_handler()) std::abort();
    const PacketFlow flow{};
    for (const bool receive : {false, true}) {
      Bench healthy(small_world());
      WorldShape shape = small_world();
      shape.spare_bytes = 4096;
      Bench bench(shape);
      // A file of its own under the spare region: a front end that did not seal it, and now truncates it.
      UniqueFd file{::memfd_create("shrinks", MFD_CLOEXEC)};
      if (::ftruncate(file.get(), 4096) != 0) std::abort();
      DeviceDescription description = bench.world.describe(2);
      description.regions[1].mmap_offset = 0;
      std::vector<UniqueFd> fds;
      for (int i = 0; i < 3; ++i) fds.emplace_back(::dup(i == 1 ? file.get() : bench.world.memory_fd()));
      for (VringDescription& vring : description.vrings) vring.flags &= ~VringDescription::kHasCall;
      std::vector<std::string> problems;
      auto device = Device::make(description, std::move(fds), nullptr, problems);
      if (!device) std::abort();
      bench.owner.post(DescribeCommand{*device});
      bench.owner.run_commands();
      GuestQueue& queue = receive ? bench.nic().receive : bench.nic().transmit;
      VringCursors& cursors = receive ? bench.state().receive : bench.state().transmit;
      const Piece piece{bench.world.spare_address(0), 200, receive};
      queue.add({&piece, 1});
      queue.publish();
      if (receive) send_from_uplink(bench.world, flow, 0, 1);
      if (::ftruncate(file.get(), 0) != 0) std::abort();
      bench.owner.poll_once();
      if (!(*device)->memory()->faulted()) std::abort();
      if (cursors.fault.load() != QueueFault::kMemoryFault || cursors.packets != 0) std::abort();
      if (queue.used_index() != 0 || bench.world.record().arm.load() != 0) std::abort();
      // The other direction stops as soon as it has something to do.
      if (receive)
        send_from_guest(bench.world, flow, 0, 1);
      else
        send_from_uplink(bench.world, flow, 0, 1);
      bench.nic().post(1);
      bench.owner.poll_once();
      VringCursors& other = receive ? bench.state().transmit : bench.state().receive;
      if (other.fault.load() != QueueFault::kMemoryFault) std::abort();
      Ledger out(flow), in(flow);
      healthy.nic().post();
      send_from_guest(healthy.world, flow, 0, 20);
      send_from_uplink(healthy.world, flow, 0, 20);
      drain(healthy.world, healthy.owner, out, in);
      if (!out.finish(20).clean() || !in.finish(20).clean()) std::abort();
    }
  });
  CHECK(ended == 0);
}

TEST_CASE("memory whose rings go away stops both queues") {
  const int ended = signal_of([] {
    if (!install_guest_fault_handler()) std::abort();
    const PacketFlow flow{};
    Bench bench(small_world());
    bench.nic().post(4);
    send_from_guest(bench.world, flow, 0, 4);
    send_from_uplink(bench.world, flow, 0, 4);
    UniqueFd file{::memfd_create("rings", MFD_CLOEXEC)};
    const DeviceDescription description = [&] {
      DeviceDescription d = bench.world.describe(2);
      for (VringDescription& vring : d.vrings) vring.flags &= ~VringDescription::kHasCall;
      return d;
    }();
    if (::ftruncate(file.get(), static_cast<off_t>(description.regions[0].size)) != 0) std::abort();
    std::vector<UniqueFd> fds;
    fds.emplace_back(::dup(file.get()));
    std::vector<std::string> problems;
    auto device = Device::make(description, std::move(fds), nullptr, problems);
    if (!device || !problems.empty()) std::abort();
    bench.owner.post(DescribeCommand{*device});
    bench.owner.run_commands();
    if (::ftruncate(file.get(), 0) != 0) std::abort();
    for (int i = 0; i < 3; ++i) bench.owner.poll_once();
    if (!(*device)->memory()->faulted()) std::abort();
    if (bench.state().transmit.fault.load() != QueueFault::kMemoryFault) std::abort();
    if (bench.state().receive.fault.load() != QueueFault::kMemoryFault) std::abort();
  });
  CHECK(ended == 0);
}

TEST_CASE("any other bus error keeps its default action") {
  CHECK(signal_of([] {
          if (!install_guest_fault_handler()) std::abort();
          fail_on_purpose(DrillFault::kBusError, nullptr);
        }) == SIGBUS);
  CHECK(signal_of([] {
          if (!install_guest_fault_handler()) std::abort();
          ::raise(SIGBUS);
        }) == SIGBUS);
}
