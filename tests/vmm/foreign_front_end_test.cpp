// SPDX-License-Identifier: Apache-2.0
// Real front ends, QEMU with its network boot ROM as the guest's driver and DPDK's virtio_user, against a device
// without a datapath: from connect to DRIVER_OK to a clean stop.
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <filesystem>

#include "tests/support/skip.hpp"
#include "tests/vmm/front_end.hpp"

extern char** environ;

using namespace tandem;
using namespace tandem::test;

namespace {

constexpr int kFailsafeMs = 60'000;
constexpr std::uint16_t kIndex = 100;

/// A child process; ended and reaped when it goes out of scope.
class Process {
 public:
  explicit Process(std::vector<std::string> arguments) {
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
    REQUIRE(::posix_spawnp(&pid_, argv[0], &actions, nullptr, argv.data(), environ) == 0);
    posix_spawn_file_actions_destroy(&actions);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  ~Process() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  void terminate() const { ::kill(pid_, SIGTERM); }

 private:
  pid_t pid_ = -1;
};

bool readable(int fd) {
  pollfd entry{fd, POLLIN, 0};
  return ::poll(&entry, 1, kFailsafeMs) == 1;
}

/// The listening socket in a directory of its own, and the one connection.
class Server {
 public:
  Server() {
    std::string pattern = "/tmp/tandem-vmm-test-XXXXXX";
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    directory_ = pattern;
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path().copy(address.sun_path, sizeof address.sun_path - 1);
    listener_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    REQUIRE(::bind(listener_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
    REQUIRE(::listen(listener_.get(), 1) == 0);
  }
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;
  ~Server() { std::filesystem::remove_all(directory_); }

  [[nodiscard]] std::string path() const { return directory_ + "/s.sock"; }

  void accept_connection() {
    REQUIRE(readable(listener_.get()));
    connection_.reset(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    REQUIRE(connection_);
  }

  /// One message into the device and its reply out. False at the end of the stream.
  bool serve_one(VhostUserDevice& device) {
    REQUIRE(readable(connection_.get()));
    std::vector<std::byte> bytes(sizeof(VhostUserHeader));
    std::vector<UniqueFd> fds;
    if (!receive_header(bytes, fds)) return false;
    const auto header = parse_vhost_user_header(bytes);
    REQUIRE(header.has_value());
    bytes.resize(sizeof(VhostUserHeader) + header->size);
    if (header->size != 0)
      REQUIRE(::recv(connection_.get(), bytes.data() + sizeof(VhostUserHeader), header->size, MSG_WAITALL) ==
              static_cast<ssize_t>(header->size));
    last = header->request;
    auto outcome = device.handle(bytes, std::move(fds));
    INFO((outcome ? std::string{} : outcome.error().text));
    REQUIRE(outcome.has_value());
    CHECK(outcome->refusal.empty());
    auto reply = outcome->reply;
    if (outcome->vring_base_index) reply = device.vring_base_reply(*outcome->vring_base_index, kIndex);
    if (reply) REQUIRE(::send(connection_.get(), reply->data(), reply->size(), MSG_NOSIGNAL) > 0);
    return true;
  }

  std::uint32_t last = 0;  ///< request number of the last message

 private:
  bool receive_header(std::vector<std::byte>& bytes, std::vector<UniqueFd>& fds) {
    alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(kMaxMemoryRegions * sizeof(int))> control{};
    iovec data{bytes.data(), bytes.size()};
    msghdr message{};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    const ssize_t got = ::recvmsg(connection_.get(), &message, MSG_WAITALL | MSG_CMSG_CLOEXEC);
    for (cmsghdr* entry = CMSG_FIRSTHDR(&message); got > 0 && entry != nullptr; entry = CMSG_NXTHDR(&message, entry))
      for (std::size_t at = 0; CMSG_LEN(at + sizeof(int)) <= entry->cmsg_len; at += sizeof(int)) {
        int fd = -1;
        std::memcpy(&fd, CMSG_DATA(entry) + at, sizeof fd);
        fds.emplace_back(fd);
      }
    if (got <= 0) return false;
    REQUIRE(got == static_cast<ssize_t>(bytes.size()));
    return true;
  }

  std::string directory_;
  UniqueFd listener_;
  UniqueFd connection_;
};

/// What DPDK leaves behind in its runtime directory.
struct DpdkRuntime {
  std::string prefix = "tandem-vmm-test-" + std::to_string(::getpid());
  DpdkRuntime() = default;
  DpdkRuntime(const DpdkRuntime&) = delete;
  DpdkRuntime& operator=(const DpdkRuntime&) = delete;
  ~DpdkRuntime() {
    std::error_code ignored;
    std::filesystem::remove_all("/var/run/dpdk/" + prefix, ignored);
  }
};

bool in_path(const std::string& program) {
  return std::filesystem::exists("/usr/bin/" + program) || std::filesystem::exists("/usr/local/bin/" + program);
}

/// Serves until the driver is up and the vrings of the first pair run.
void serve_until_up(Server& server, VhostUserDevice& device) {
  while (
      !(runs(device, 0) && runs(device, 1) && server.last == static_cast<std::uint32_t>(VhostUserRequest::kSetStatus)))
    REQUIRE(server.serve_one(device));
}

}  // namespace

TEST_CASE("QEMU with its boot ROM as the driver") {
  if (!in_path("qemu-system-x86_64") || !std::filesystem::exists("/usr/lib/ipxe/qemu/pxe-virtio.rom"))
    TANDEM_SKIP("needs the packages qemu-system-x86 and ipxe-qemu");
  const bool successors = GENERATE(false, true);
  Server server;
  const Process qemu{{"qemu-system-x86_64",
                      "-machine",
                      "pc,accel=tcg,memory-backend=m0",
                      "-m",
                      "128",
                      "-object",
                      "memory-backend-memfd,id=m0,size=128M,share=on",
                      "-display",
                      "none",
                      "-serial",
                      "none",
                      "-monitor",
                      "none",
                      "-nodefaults",
                      "-chardev",
                      "socket,id=c0,path=" + server.path(),
                      "-netdev",
                      "vhost-user,id=n0,chardev=c0,queues=2",
                      "-device",
                      "virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56,vectors=0,mq=on,host_mtu=1400,bootindex=1"}};
  auto device = make_device(2);
  server.accept_connection();
  if (successors) {  // a supervisor that is replaced after every message
    while (!(runs(device, 0) && runs(device, 1))) {
      REQUIRE(server.serve_one(device));
      std::vector<RestoredItem> items;
      for (const SavedItem& item : device.save()) items.push_back({item.item, item.bytes, copies(item.fds)});
      auto restored = VhostUserDevice::restore(std::move(items));
      REQUIRE(restored.has_value());
      device = std::move(*restored);
    }
  }
  serve_until_up(server, device);
  CHECK(device.description().mtu == 1400);
  CHECK(device.description().region_count >= 1);
  CHECK_FALSE(runs(device, 2));
  qemu.terminate();
  while (server.serve_one(device)) continue;
  CHECK(server.last == static_cast<std::uint32_t>(VhostUserRequest::kGetVringBase));
  CHECK_FALSE(runs(device, 0));
}

TEST_CASE("DPDK's virtio_user") {
  if (!in_path("dpdk-testpmd")) TANDEM_SKIP("needs the package dpdk-dev");
  const DpdkRuntime runtime;
  Server server;
  const Process testpmd{{"dpdk-testpmd", "-l", "0,1", "--no-huge", "-m", "64", "--no-pci", "--no-shconf",
                         "--iova-mode=va", "--file-prefix=" + runtime.prefix,
                         "--vdev=net_virtio_user0,path=" + server.path() + ",queues=1", "--", "--forward-mode=rxonly",
                         "--total-num-mbufs=2048", "--stats-period=1000"}};
  auto device = make_device(2);
  server.accept_connection();
  serve_until_up(server, device);
  CHECK(device.description().region_count == 1);
  testpmd.terminate();
  while (server.serve_one(device)) continue;
  CHECK_FALSE(runs(device, 0));
}
