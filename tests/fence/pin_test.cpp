// SPDX-License-Identifier: Apache-2.0
// The fence outlives its loader, is adopted by the next one, and goes without a trace.
#include <filesystem>

#include "recovery/fence/pins.hpp"
#include "tests/fence/fixture.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

struct Stage {
  std::atomic<bool> ready{false};
};

void pause_forever() {
  for (;;) ::pause();
}

}  // namespace

TEST_CASE("watches stay in force when the loader is killed, and its successor adopts them") {
  SKIP_UNLESS_FENCE();
  Shared<Stage> stage;
  Child victim{pause_forever};
  Child bystander{pause_forever};
  Child loader([&] {
    auto fence = Fence::load(kPinDir);
    if (!fence || !fence->watch(victim.pid(), 7, TANDEM_FENCE_NO_RING) || !fence->make_ring() ||
        !fence->watch(bystander.pid(), 8, 0))
      ::_exit(1);
    stage->ready = true;
    pause_forever();
  });
  REQUIRE(wait_until([&] { return stage->ready.load(); }));
  loader.kill(SIGKILL);
  loader.reap();
  victim.kill(SIGKILL);
  victim.reap();

  auto fence = Fence::adopt(kPinDir);
  REQUIRE_OK(fence);
  CHECK(fence->dead(7));
  CHECK_FALSE(fence->dead(8));
  CHECK(fence->ring_fd(0));
  CHECK(fence->make_ring() == 1u);
  REQUIRE_OK(fence->set_ring(bystander.pid(), 8, 1));
  bystander.kill(SIGKILL);
  bystander.reap();
  CHECK(fence->dead(8));
  REQUIRE_OK(fence->unpin_all());
  CHECK_FALSE(std::filesystem::exists("/sys/fs/bpf/tandem"));
}

TEST_CASE("loading again replaces what a dead predecessor pinned") {
  SKIP_UNLESS_FENCE();
  Child victim{pause_forever};
  {
    Fence before = load_fence();
    REQUIRE_OK(before.watch(victim.pid(), 1, TANDEM_FENCE_NO_RING));
  }
  Fence after = load_fence();
  REQUIRE_OK(after.watch(victim.pid(), 2, TANDEM_FENCE_NO_RING));
  victim.kill(SIGKILL);
  victim.reap();
  CHECK_FALSE(after.dead(1));
  CHECK(after.dead(2));
}

TEST_CASE("nothing to adopt is a plain answer") {
  SKIP_UNLESS_FENCE();
  const auto nothing = Fence::adopt("/sys/fs/bpf/tandem/nobody");
  REQUIRE_FALSE(nothing);
  CHECK(nothing.error().kind == ErrorKind::kGone);
}

TEST_CASE("bpffs is mounted when it is missing, other file systems are refused") {
  SKIP_UNLESS_FENCE();
  while (::umount2("/sys/fs/bpf", MNT_DETACH) == 0) {
  }
  REQUIRE_OK(make_pin_directory("/sys/fs/bpf/tandem/fresh"));
  CHECK(std::filesystem::is_directory("/sys/fs/bpf/tandem/fresh"));
  REQUIRE_OK(remove_pin_directory("/sys/fs/bpf/tandem/fresh"));
  REQUIRE_OK(remove_pin_directory("/sys/fs/bpf/tandem/fresh"));
  CHECK_FALSE(std::filesystem::exists("/sys/fs/bpf/tandem"));
  const auto elsewhere = make_pin_directory("/tmp/tandem-pins");
  REQUIRE_FALSE(elsewhere);
  CHECK(elsewhere.error().text.find("/sys/fs/bpf") != std::string::npos);
  CHECK_FALSE(std::filesystem::exists("/tmp/tandem-pins"));
  ::mount("bpf", "/sys/fs/bpf", "bpf", 0, nullptr);
}

TEST_CASE("without root the refusal says so") {
  SKIP_UNLESS_FENCE();
  Child nobody([] {
    if (::setresuid(65534, 65534, 65534) != 0) ::_exit(1);
    const auto refused = Fence::load(kPinDir);
    if (refused || refused.error().text.find("root") == std::string::npos) ::_exit(2);
  });
  CHECK(nobody.reap() == 0);
}
