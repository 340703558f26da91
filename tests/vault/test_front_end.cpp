// SPDX-License-Identifier: Apache-2.0
// Framing of a hostile byte stream, and replies to a front end that does not read.
#include <catch2/catch.hpp>

#include "recovery/vault/front_end.hpp"
#include "tests/vault/support.hpp"

using namespace tandem;
using namespace tandem::test;
using Progress = FrontEnd::Progress;

namespace {

/// A FrontEnd under test and the peer that writes to it.
struct Wire {
  Wire() : Wire(make()) {}
  explicit Wire(std::array<int, 2> ends) : peer(ends[0]), front_end(UniqueFd{ends[1]}) {}
  static std::array<int, 2> make() {
    std::array<int, 2> ends{};
    require(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) == 0, "socketpair");
    return ends;
  }
  UniqueFd peer;
  FrontEnd front_end;
};

}  // namespace

TEST_CASE("a message written byte by byte, descriptors on the first byte") {
  Wire wire;
  const UniqueFd file = some_file();
  const Bytes sent = frame(5, 40);
  for (std::size_t i = 0; i < sent.size(); ++i) {
    write_raw(wire.peer.get(), std::span{sent}.subspan(i, 1), i == 0 ? std::vector{file.get()} : std::vector<int>{});
    CHECK(wire.front_end.read() == (i + 1 == sent.size() ? Progress::kComplete : Progress::kIncomplete));
  }
  const VhostUserFrame got = wire.front_end.take();
  CHECK(got.bytes == sent);
  REQUIRE(got.fds.size() == 1);
  CHECK(inode(got.fds[0].get()) == inode(file.get()));
}

TEST_CASE("of two glued messages only the second has the descriptors") {
  Wire wire;
  const UniqueFd file = some_file();
  const Bytes first = frame(1, 8);
  const Bytes second = frame(2, 16);
  write_raw(wire.peer.get(), first);
  write_raw(wire.peer.get(), second, {file.get()});
  REQUIRE(wire.front_end.read() == Progress::kComplete);
  VhostUserFrame got = wire.front_end.take();
  CHECK(got.bytes == first);
  CHECK(got.fds.empty());
  REQUIRE(wire.front_end.read() == Progress::kComplete);
  got = wire.front_end.take();
  CHECK(got.bytes == second);
  REQUIRE(got.fds.size() == 1);
  CHECK(inode(got.fds[0].get()) == inode(file.get()));
  CHECK(wire.front_end.read() == Progress::kIncomplete);
}

TEST_CASE("two messages in one write come one after the other") {
  Wire wire;
  Bytes both = frame(1, 8);
  const Bytes second = frame(2);
  both.insert(both.end(), second.begin(), second.end());
  write_raw(wire.peer.get(), both);
  REQUIRE(wire.front_end.read() == Progress::kComplete);
  CHECK(request_of(wire.front_end.take().bytes) == 1);
  REQUIRE(wire.front_end.read() == Progress::kComplete);
  CHECK(wire.front_end.take().bytes == second);
}

TEST_CASE("the largest payload passes, malformed messages end the connection") {
  const std::size_t before = count_fds(::getpid());
  {
    Wire wire;
    const auto refused = [&](CloseReason reason) {
      CHECK(wire.front_end.read() == Progress::kClosed);
      CHECK(wire.front_end.reason() == reason);
    };
    SECTION("largest") {
      write_raw(wire.peer.get(), frame(1, kMaxRelayedPayload));
      CHECK(wire.front_end.read() == Progress::kComplete);
    }
    SECTION("one byte more") {
      write_raw(wire.peer.get(), frame(1, kMaxRelayedPayload + 1));
      refused(CloseReason::kOversize);
    }
    SECTION("size -1, with descriptors") {
      Bytes bytes = frame(1);
      std::memset(bytes.data() + 8, 0xff, 4);
      const UniqueFd file = some_file();
      write_raw(wire.peer.get(), bytes, {file.get()});
      refused(CloseReason::kOversize);
    }
    SECTION("version 0") {
      write_raw(wire.peer.get(), frame(1, 0, 0));
      refused(CloseReason::kBadVersion);
    }
    SECTION("version 2") {
      write_raw(wire.peer.get(), frame(1, 0, 2));
      refused(CloseReason::kBadVersion);
    }
    SECTION("closed inside the header") {
      write_raw(wire.peer.get(), Bytes(5));
      wire.peer.reset();
      refused(CloseReason::kMidMessage);
    }
    SECTION("closed inside the payload, with descriptors") {
      const UniqueFd file = some_file();
      const Bytes bytes = frame(1, 100);
      write_raw(wire.peer.get(), std::span{bytes}.first(50), {file.get()});
      wire.peer.reset();
      refused(CloseReason::kMidMessage);
    }
    SECTION("closed between messages") {
      wire.peer.reset();
      refused(CloseReason::kHangUp);
    }
    SECTION("eight descriptors pass") {
      const UniqueFd file = some_file();
      write_raw(wire.peer.get(), frame(1), std::vector<int>(8, file.get()));
      CHECK(wire.front_end.read() == Progress::kComplete);
    }
    SECTION("nine do not") {
      const UniqueFd file = some_file();
      write_raw(wire.peer.get(), frame(1), std::vector<int>(9, file.get()));
      refused(CloseReason::kTooManyFds);
    }
    SECTION("a flood of 253") {
      const UniqueFd file = some_file();
      write_raw(wire.peer.get(), frame(1), std::vector<int>(253, file.get()));
      refused(CloseReason::kTooManyFds);
    }
    SECTION("descriptors with the payload") {
      const UniqueFd file = some_file();
      const Bytes bytes = frame(1, 10);
      write_raw(wire.peer.get(), std::span{bytes}.first(12));
      CHECK(wire.front_end.read() == Progress::kIncomplete);
      write_raw(wire.peer.get(), std::span{bytes}.subspan(12), {file.get()});
      refused(CloseReason::kStrayFds);
    }
  }
  CHECK(count_fds(::getpid()) == before);
}

TEST_CASE("replies are written in order, the descriptor with the first byte") {
  Wire wire;
  const UniqueFd file = some_file();
  REQUIRE(wire.front_end.reply(frame(1, 4), file.duplicate()));
  REQUIRE(wire.front_end.reply(frame(2), UniqueFd{}));
  CHECK_FALSE(wire.front_end.has_unwritten());
  FrontEnd reader{std::move(wire.peer)};
  REQUIRE(reader.read() == Progress::kComplete);
  const VhostUserFrame got = reader.take();
  CHECK(got.bytes == frame(1, 4));
  REQUIRE(got.fds.size() == 1);
  CHECK(inode(got.fds[0].get()) == inode(file.get()));
  REQUIRE(reader.read() == Progress::kComplete);
  CHECK(request_of(reader.take().bytes) == 2);
}

TEST_CASE("a front end that never reads is ended when its buffer is full") {
  Wire wire;
  const int small = 1;
  ::setsockopt(wire.front_end.fd(), SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
  std::size_t replies = 0;
  while (wire.front_end.reply(frame(1, 1000), UniqueFd{})) REQUIRE(++replies < 1000);
  CHECK(wire.front_end.reason() == CloseReason::kUnreadReplies);
  CHECK(replies >= FrontEnd::kMaxUnreadReplies / 1012);
}

TEST_CASE("a slow reader gets every byte once") {
  Wire wire;
  const int small = 1;
  ::setsockopt(wire.front_end.fd(), SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
  for (std::uint32_t i = 0; i < 20; ++i) REQUIRE(wire.front_end.reply(frame(i, 2000), UniqueFd{}));
  REQUIRE(wire.front_end.has_unwritten());
  FrontEnd reader{std::move(wire.peer)};
  for (std::uint32_t i = 0; i < 20; ++i) {
    while (reader.read() == Progress::kIncomplete) REQUIRE(wire.front_end.flush());
    const VhostUserFrame got = reader.take();
    CHECK(got.bytes == frame(i, 2000));
  }
  CHECK_FALSE(wire.front_end.has_unwritten());
}
