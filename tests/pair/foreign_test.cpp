// SPDX-License-Identifier: Apache-2.0
// DPDK's virtio_user as the front end of a real pair, with the active killed under its traffic.
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "tests/pair/fixture.hpp"

extern char** environ;

using namespace tandem;
using namespace tandem::test;

namespace {

const std::string kOutsideMac = "02:00:00:00:00:01";

/// dpdk-testpmd on a NIC's socket.
class Testpmd {
 public:
  /// `device`: more of virtio_user's arguments, each with a comma in front.
  Testpmd(const std::string& socket, const std::string& mode, const std::string& device = "")
      : prefix_("tandem-pair-test-" + std::to_string(::getpid())) {
    std::string pattern = "/tmp/tandem-testpmd-XXXXXX";
    const UniqueFd output{::mkstemp(pattern.data())};
    output_ = pattern;
    std::vector<std::string> words{"dpdk-testpmd",
                                   "-l",
                                   "0,1",
                                   "--no-huge",
                                   "-m",
                                   "64",
                                   "--no-pci",
                                   "--no-shconf",
                                   "--iova-mode=va",
                                   "--file-prefix=" + prefix_,
                                   "--vdev=net_virtio_user0,path=" + socket + ",queues=1,mac=" + kMac + device,
                                   "--",
                                   "--forward-mode=" + mode,
                                   "--port-topology=loop",
                                   "--total-num-mbufs=4096",
                                   "--eth-peer=0," + kOutsideMac,
                                   "--no-flush-rx",
                                   "--stats-period=1000",
                                   "--burst=32"};
    // --no-flush-rx: else testpmd throws away what is in the ring when it begins to forward.
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, output.get(), 1);
    posix_spawn_file_actions_adddup2(&actions, output.get(), 2);
    REQUIRE(::posix_spawnp(&pid_, arguments[0], &actions, nullptr, arguments.data(), environ) == 0);
    posix_spawn_file_actions_destroy(&actions);
  }
  Testpmd(const Testpmd&) = delete;
  Testpmd& operator=(const Testpmd&) = delete;
  ~Testpmd() {
    end(SIGKILL);
    std::error_code ignored;
    std::filesystem::remove(output_, ignored);
    std::filesystem::remove_all("/var/run/dpdk/" + prefix_, ignored);
  }
  /// Whether it forwards, soon. The driver empties the receive ring when its port starts, some time after its device
  /// runs: what is sent before is lost in there.
  [[nodiscard]] bool forwards() const {
    return eventually([this] { return output().find("packet forwarding packets/burst") != std::string::npos; });
  }
  /// SIGTERM, and what it printed; its statistics come at the end.
  std::string finish() {
    end(SIGTERM);
    return output();
  }

 private:
  [[nodiscard]] std::string output() const {
    std::ostringstream text;
    text << std::ifstream(output_).rdbuf();
    return text.str();
  }
  void end(int signal) {
    if (pid_ <= 0) return;
    ::kill(pid_, signal);
    ::waitpid(std::exchange(pid_, -1), nullptr, 0);
  }
  std::string prefix_, output_;
  pid_t pid_ = -1;
};

bool in_path(const std::string& program) { return std::filesystem::exists("/usr/bin/" + program); }

/// The first number after `label` in testpmd's last block of accumulated statistics.
std::uint64_t statistic(const std::string& text, const std::string& label) {
  const std::size_t block = text.rfind("Accumulated forward statistics");
  const std::size_t at = block == std::string::npos ? block : text.find(label, block);
  return at == std::string::npos ? ~std::uint64_t{0} : std::stoull(text.substr(at + label.size()));
}

/// Numbered frames to testpmd, which sends each back (or only counts it); few on their way at a time.
struct Echo {
  Outside outside;
  FlowAccount account;
  std::uint32_t sent = 0;

  std::size_t take() {
    std::size_t moved = 0;
    for (const Frame& frame : outside.receive()) {
      const auto found = parse_numbered(frame);
      if (!found) continue;
      account.note(found->number, found->intact);
      ++moved;
    }
    return moved;
  }
  void send() {
    outside.send(numbered_frame(kMac, kOutsideMac, 0, sent, 64 + sent * 41 % 1400));
    ++sent;
  }
  /// Until `frames` more have come back.
  bool run(std::uint64_t frames) {
    const std::uint64_t target = account.arrived() + frames;
    return eventually([&] {
      do {
        for (int burst = 0; burst < 16 && sent - account.arrived() < 96; ++burst) send();
      } while (take() != 0 && account.arrived() < target);
      return account.arrived() >= target;
    });
  }
};

// Frames to testpmd and back, the active killed twice in the middle: every frame is back once, in order.
void echo_through_kills(const std::string& device, bool packed) {
  INFO("virtio_user's arguments: " << device);
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    Testpmd testpmd(host.nic_socket(kMac), "macswap", device);
    REQUIRE(eventually([&] { return host.nic(kMac)["running_queues"] == 2; }));
    REQUIRE(host.nic(kMac)["packed"] == packed);
    REQUIRE(testpmd.forwards());
    Echo echo;
    const auto require_echo = [&] {
      const bool done = echo.run(500);
      INFO("testpmd: " << (done ? std::string{} : testpmd.finish()));
      INFO("sent " << echo.sent << ", back " << echo.account.arrived() << "; " << host.nic(kMac).dump()
                   << host.incidents().dump());
      REQUIRE(done);
    };
    require_echo();
    for (int kill = 0; kill < 2; ++kill) {
      const pid_t victim = host.active();
      ::kill(victim, SIGKILL);
      require_echo();
      REQUIRE(host.wait_paired(victim));
    }
    REQUIRE(eventually([&] { return echo.take(), echo.account.arrived() == echo.sent; }));
    CHECK(echo.account.lost(echo.sent) == 0);
    CHECK(echo.account.duplicated == 0);
    CHECK(echo.account.reordered == 0);
    CHECK(echo.account.corrupt == 0);
    const std::string said = testpmd.finish();
    CAPTURE(said);
    CHECK(statistic(said, "RX-packets:") == echo.sent);
    CHECK(statistic(said, "TX-packets:") == echo.sent);
    CHECK(host.nic(kMac)["fault"] == "");
  }
  CHECK(eventually([&] { return host.nic(kMac)["connected"] == false; }));
  require_clean_end(host, {"one"});
}

}  // namespace

TEST_CASE(
    "virtio_user sends back what it gets, the active is killed in the middle: every frame is back once, in order") {
  SKIP_UNLESS_PAIR();
  if (!in_path("dpdk-testpmd")) TANDEM_SKIP("needs the package dpdk-dev");
  echo_through_kills("", false);
}

// virtio_user's data paths for packed rings: with and without mergeable buffers, IN_ORDER, and a longer ring.
// vectorized=1 asks for a path that DPDK 22.11 takes with IN_ORDER and AVX-512 only; without it must fall back.
TEST_CASE("virtio_user with packed rings sends back what it gets, through two kills") {
  SKIP_UNLESS_PAIR();
  if (!in_path("dpdk-testpmd")) TANDEM_SKIP("needs the package dpdk-dev");
  echo_through_kills(GENERATE(",packed_vq=1,in_order=0,mrg_rxbuf=1", ",packed_vq=1,in_order=0,mrg_rxbuf=0",
                              ",packed_vq=1,in_order=0,mrg_rxbuf=0,vectorized=1", ",packed_vq=1,in_order=1,mrg_rxbuf=1",
                              ",packed_vq=1,in_order=1,mrg_rxbuf=0,vectorized=1",
                              ",packed_vq=1,in_order=0,mrg_rxbuf=1,queue_size=512"),
                     true);
}

TEST_CASE("virtio_user starts while the active is killed: the heir serves the rings as they were started") {
  SKIP_UNLESS_PAIR();
  if (!in_path("dpdk-testpmd")) TANDEM_SKIP("needs the package dpdk-dev");
  const std::string device = GENERATE("", ",packed_vq=1,in_order=0");
  INFO("virtio_user's arguments: " << device);
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  // Somewhere between the first message and the first packet; where exactly is left to chance.
  for (const int delay : {0, 5, 10, 20, 40, 80, 160, 320}) {
    INFO("killed " << delay << " ms after virtio_user had connected");
    Testpmd testpmd(host.nic_socket(kMac), "macswap", device);
    REQUIRE(eventually([&] { return host.nic(kMac)["connected"] == true; }));
    std::this_thread::sleep_for(std::chrono::milliseconds{delay});
    const pid_t victim = host.active();
    ::kill(victim, SIGKILL);
    REQUIRE(eventually([&] { return host.nic(kMac)["running_queues"] == 2; }));
    REQUIRE(testpmd.forwards());
    Echo echo;
    const bool done = echo.run(200);
    INFO("testpmd: " << (done ? std::string{} : testpmd.finish()));
    INFO("sent " << echo.sent << ", back " << echo.account.arrived() << "; " << host.nic(kMac).dump()
                 << host.incidents().dump());
    REQUIRE(done);
    REQUIRE(host.wait_paired(victim));
    static_cast<void>(testpmd.finish());
    REQUIRE(eventually([&] { return host.nic(kMac)["connected"] == false; }));
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("virtio_user only receives, the active is killed in the middle: it counts every frame that was sent") {
  SKIP_UNLESS_PAIR();
  if (!in_path("dpdk-testpmd")) TANDEM_SKIP("needs the package dpdk-dev");
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    Testpmd testpmd(host.nic_socket(kMac), "rxonly");
    REQUIRE(eventually([&] { return host.nic(kMac)["running_queues"] == 2; }));
    REQUIRE(testpmd.forwards());
    Outside outside;
    std::uint64_t sent = 0;
    const auto send = [&](std::uint64_t frames) {
      for (std::uint64_t end = sent + frames; sent < end;) {
        outside.send(numbered_frame(kMac, kOutsideMac, 0, static_cast<std::uint32_t>(sent), 200));
        if (++sent % 64 == 0) REQUIRE(eventually([&] { return host.nic(kMac)["rx"]["packets"] == sent; }));
      }
    };
    send(640);
    const pid_t victim = host.active();
    for (int frame = 0; frame < 32; ++frame, ++sent)
      outside.send(numbered_frame(kMac, kOutsideMac, 0, static_cast<std::uint32_t>(sent), 200));
    ::kill(victim, SIGKILL);
    send(320);
    REQUIRE(host.wait_paired(victim));
    REQUIRE(eventually([&] { return host.nic(kMac)["rx"]["packets"] == sent; }));
    CHECK(statistic(testpmd.finish(), "RX-packets:") == sent);
  }
  require_clean_end(host, {"one"});
}

TEST_CASE(
    "virtio_user only sends, as fast as it can, the active is killed in the middle: it goes on, and the count is "
    "right") {
  SKIP_UNLESS_PAIR();
  if (!in_path("dpdk-testpmd")) TANDEM_SKIP("needs the package dpdk-dev");
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    Testpmd testpmd(host.nic_socket(kMac), "txonly");
    REQUIRE(eventually([&] { return host.nic(kMac)["tx"]["packets"].get<std::uint64_t>() > 20'000; }));
    const pid_t victim = host.active();
    ::kill(victim, SIGKILL);
    REQUIRE(host.wait_paired(victim));
    const auto then = host.nic(kMac)["tx"]["packets"].get<std::uint64_t>();
    REQUIRE(eventually([&] { return host.nic(kMac)["tx"]["packets"].get<std::uint64_t>() > then + 20'000; }));
    // What testpmd gave away and what the queue had taken differ by what still lay in the ring when testpmd stopped.
    const std::uint64_t given = statistic(testpmd.finish(), "TX-packets:");
    REQUIRE(eventually([&] { return host.nic(kMac)["connected"] == false; }));
    const auto nic = host.nic(kMac);
    CAPTURE(given, nic.dump());
    CHECK(nic["tx"]["packets"].get<std::uint64_t>() <= given);
    CHECK(nic["tx"]["packets"].get<std::uint64_t>() + 256 >= given);
    CHECK(nic["tx"]["dropped"] == 0);
    CHECK(nic["fault"] == "");
  }
  require_clean_end(host, {"one"});
}
