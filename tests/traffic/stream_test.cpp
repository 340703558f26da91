// SPDX-License-Identifier: Apache-2.0
// The TCP stream: generator, echo and the check of what comes back.
#include "tests/traffic/stream.hpp"

#include <sys/socket.h>

#include <array>
#include <catch2/catch.hpp>
#include <functional>
#include <vector>

using namespace tandem;
using namespace tandem::traffic;

namespace {

/// A peer that passes `change` over each chunk before it sends it back, and closes after `limit` bytes.
std::jthread echo_through(int socket, std::function<void(std::span<char>)> change, std::size_t limit = SIZE_MAX) {
  return std::jthread{[=] {
    const UniqueFd owned{socket};
    std::array<char, 4096> chunk;
    for (std::size_t done = 0; done < limit;) {
      const ssize_t got = ::recv(owned.get(), chunk.data(), chunk.size(), 0);
      if (got <= 0) return;
      change(std::span{chunk}.first(static_cast<std::size_t>(got)));
      if (::send(owned.get(), chunk.data(), static_cast<std::size_t>(got), MSG_NOSIGNAL) <= 0) return;
      done += static_cast<std::size_t>(got);
    }
  }};
}

StreamResult run_against(const std::function<void(std::span<char>)>& change, std::size_t limit = SIZE_MAX) {
  std::array<int, 2> ends;
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) == 0);
  const std::jthread peer = echo_through(ends[1], change, limit);
  StreamClient client{UniqueFd{ends[0]}, 1 << 20};
  while (client.returned() < 20'000 && client.returned() < limit) std::this_thread::yield();
  return client.finish();
}

}  // namespace

TEST_CASE("any stretch of the stream is the same however it is cut") {
  std::vector<std::byte> whole(1000);
  stream_bytes(0, whole);
  for (std::size_t from = 0; from < 20; ++from) {
    std::vector<std::byte> part(333);
    stream_bytes(from, part);
    CHECK(std::equal(part.begin(), part.end(), whole.begin() + static_cast<std::ptrdiff_t>(from)));
  }
}

TEST_CASE("a faithful echo passes") {
  const StreamResult result = run_against([](std::span<char>) {});
  CHECK(result.failure.empty());
  CHECK(result.sent == result.returned);
  CHECK(result.sent > 0);
}

TEST_CASE("one flipped bit in the echo is noticed") {
  const StreamResult result = run_against([first = true](std::span<char> bytes) mutable {
    if (std::exchange(first, false)) bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
  });
  CHECK(result.wrong_bytes == 1);
  CHECK_FALSE(result.failure.empty());
}

TEST_CASE("a peer that leaves early is noticed") {
  const StreamResult result = run_against([](std::span<char>) {}, 4096);
  CHECK_FALSE(result.failure.empty());
}
