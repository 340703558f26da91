// SPDX-License-Identifier: Apache-2.0
// The TCP stream's generator, echo and check.
#include "tests/traffic/stream.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <cstring>
#include <memory>

#include "tests/traffic/net.hpp"

namespace tandem::traffic {
namespace {

using Chunk = std::array<std::byte, 16384>;

/// The finalizer of splitmix64: neighbouring counters give unrelated words.
std::uint64_t word_at(std::uint64_t index) {
  std::uint64_t z = (index + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

std::uint64_t count_wrong(std::uint64_t offset, std::span<const std::byte> bytes) {
  Chunk expected;
  stream_bytes(offset, std::span{expected}.first(bytes.size()));
  if (std::memcmp(expected.data(), bytes.data(), bytes.size()) == 0) return 0;
  std::uint64_t wrong = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i) wrong += expected[i] != bytes[i] ? 1 : 0;
  return wrong;
}

bool wait_readable(int fd, int milliseconds) {
  pollfd waiting{fd, POLLIN, 0};
  return ::poll(&waiting, 1, milliseconds) > 0;
}

}  // namespace

void stream_bytes(std::uint64_t offset, std::span<std::byte> bytes) {
  for (std::size_t done = 0; done < bytes.size();) {
    const std::uint64_t word = word_at((offset + done) / 8);
    const std::size_t skip = (offset + done) % 8;
    const std::size_t take = std::min<std::size_t>(8 - skip, bytes.size() - done);
    std::memcpy(bytes.data() + done, reinterpret_cast<const char*>(&word) + skip, take);
    done += take;
  }
}

Result<std::unique_ptr<EchoServer>> EchoServer::open(std::uint16_t port) {
  auto listener = listen_tcp(port);
  if (!listener) return tl::make_unexpected(std::move(listener.error()));
  std::unique_ptr<EchoServer> server{new EchoServer{std::move(*listener)}};
  server->thread_ = std::jthread{[raw = server.get()](const std::stop_token& stop) { raw->serve(stop); }};
  return server;
}

EchoServer::~EchoServer() = default;

void EchoServer::serve(const std::stop_token& stop) {
  while (!stop.stop_requested()) {
    if (!wait_readable(listener_.get(), 100)) continue;
    const UniqueFd connection{::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC)};
    if (connection) echo(connection.get(), stop);
  }
}

void EchoServer::echo(int connection, const std::stop_token& stop) {
  bytes_ = 0;
  wrong_ = 0;
  Chunk chunk;
  while (!stop.stop_requested()) {
    // A second connection means that the first one's owner is gone: do not keep the new one waiting.
    std::array<pollfd, 2> waiting{pollfd{connection, POLLIN, 0}, pollfd{listener_.get(), POLLIN, 0}};
    if (::poll(waiting.data(), waiting.size(), 100) <= 0) continue;
    if (waiting[0].revents == 0) return;
    const ssize_t got = ::recv(connection, chunk.data(), chunk.size(), 0);
    if (got <= 0) return;
    const auto bytes = std::span<const std::byte>{chunk}.first(static_cast<std::size_t>(got));
    wrong_ += count_wrong(bytes_, bytes);
    bytes_ += bytes.size();
    if (!send_all(connection, bytes.data(), bytes.size())) return;
  }
}

StreamClient::StreamClient(UniqueFd connection, std::uint64_t rate) : connection_(std::move(connection)), rate_(rate) {
  set_timeouts(connection_.get(), std::chrono::seconds{30});
  receiver_ = std::jthread{[this] { receive_loop(); }};
  sender_ = std::jthread{[this](const std::stop_token& stop) { send_loop(stop); }};
}

StreamClient::~StreamClient() {
  sender_.request_stop();
  ::shutdown(connection_.get(), SHUT_RDWR);
}

void StreamClient::send_loop(const std::stop_token& stop) {
  constexpr std::uint64_t kSlices = 50;  // a second
  Chunk chunk;
  auto due = std::chrono::steady_clock::now();
  while (!stop.stop_requested()) {
    for (std::uint64_t left = rate_ / kSlices; left > 0;) {
      const std::size_t size = std::min<std::uint64_t>(left, chunk.size());
      stream_bytes(sent_, std::span{chunk}.first(size));
      if (!send_all(connection_.get(), chunk.data(), size)) {
        note_failure(std::string{"sending: "} + std::strerror(errno));
        return;
      }
      sent_ += size;
      left -= size;
    }
    due = std::max(due + std::chrono::milliseconds{1000 / kSlices}, std::chrono::steady_clock::now());
    std::this_thread::sleep_until(due);
  }
}

void StreamClient::receive_loop() {
  Chunk chunk;
  for (;;) {
    const ssize_t got = ::recv(connection_.get(), chunk.data(), chunk.size(), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) note_failure(std::string{"receiving the echo: "} + std::strerror(errno));
    if (got <= 0) return;
    const auto bytes = std::span<const std::byte>{chunk}.first(static_cast<std::size_t>(got));
    wrong_ += count_wrong(returned_, bytes);
    returned_ += bytes.size();
  }
}

void StreamClient::note_failure(const std::string& text) {
  const std::lock_guard guard{lock_};
  if (failure_.empty()) failure_ = text;
}

StreamResult StreamClient::finish() {
  sender_.request_stop();
  if (sender_.joinable()) sender_.join();
  ::shutdown(connection_.get(), SHUT_WR);
  if (receiver_.joinable()) receiver_.join();
  if (wrong_ != 0) note_failure(std::to_string(wrong_) + " bytes came back changed");
  if (returned_ != sent_)
    note_failure("sent " + std::to_string(sent_) + " bytes, " + std::to_string(returned_) + " came back");
  tcp_info info{};
  socklen_t size = sizeof info;
  ::getsockopt(connection_.get(), IPPROTO_TCP, TCP_INFO, &info, &size);
  return {sent_, returned_, wrong_, info.tcpi_total_retrans, failure_};
}

}  // namespace tandem::traffic
