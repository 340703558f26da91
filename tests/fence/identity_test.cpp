// SPDX-License-Identifier: Apache-2.0
// Kernel versions and /proc stat lines, without a kernel.
#include <unistd.h>

#include <catch2/catch.hpp>

#include "recovery/fence/kernel_version.hpp"
#include "recovery/fence/thread_identity.hpp"

using namespace tandem;

TEST_CASE("kernels from 6.4 on are supported, older ones refused with a remedy") {
  for (const char* good : {"6.4.0", "6.4", "6.12.48+deb13-amd64", "6.18.44", "7.0-rc1", "10.1.2"})
    CHECK(kernel_is_supported(good));
  for (const char* old : {"6.1.0-40-amd64", "6.3.13", "5.10.0", "4.19"}) {
    const auto refused = kernel_is_supported(old);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().kind == ErrorKind::kUnsupported);
    CHECK(refused.error().text.find("backports") != std::string::npos);
  }
  for (const char* strange : {"", "6", "6.", "six.four", ".4", "6-4"}) {
    const auto refused = kernel_is_supported(strange);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().kind == ErrorKind::kInvalid);
  }
  CHECK_FALSE(running_kernel_release().empty());
}

TEST_CASE("kernels from 5.11 to 6.12 learn a socket's NAPI from frames") {
  for (const char* telling : {"5.11", "6.4.0", "6.12.117+deb12-cloud-amd64"}) CHECK(frames_tell_napi(telling));
  for (const char* silent : {"5.10.0", "6.13", "6.18.44", "7.0-rc1", "", "six.four"})
    CHECK_FALSE(frames_tell_napi(silent));
}

TEST_CASE("a stat line is read past any command name") {
  const std::string rest = " S 1 2 3 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 987654 1000 5 18446744073709551615";
  for (const char* name : {"cat", "a) S 1 (b", "", ") )", "with space"}) {
    const auto identity = parse_thread_stat("42 (" + std::string{name} + ")" + rest + "\n");
    REQUIRE(identity);
    CHECK(identity->tid == 42);
    CHECK(identity->start_ticks == 987654);
    CHECK_FALSE(identity->exiting);
  }
  for (const char* line :
       {"", "42", "42 (cat)", "42 (cat) S 1 2", "x (cat) S 1 2 3 0 -1 0 1 2 3 4 5 6 7 8 20 0 1 0 9", ") ("})
    CHECK_FALSE(parse_thread_stat(line));
}

TEST_CASE("a thread that exits is seen as exiting, by state or by flag") {
  const std::string tail = " 1 2 3 4 5 6 7 8 20 0 1 0 55 1000 5";
  CHECK(parse_thread_stat("7 (x) Z 1 2 3 0 -1 0" + tail)->exiting);
  CHECK(parse_thread_stat("7 (x) X 1 2 3 0 -1 0" + tail)->exiting);
  CHECK(parse_thread_stat("7 (x) R 1 2 3 0 -1 4194308" + tail)->exiting);
  CHECK_FALSE(parse_thread_stat("7 (x) R 1 2 3 0 -1 4194304" + tail)->exiting);
}

TEST_CASE("threads are found under their own process only") {
  const auto self = identify_thread(::getpid());
  REQUIRE(self);
  CHECK(identify_thread(::getpid(), ::getpid())->same_thread(*self));
  const auto stranger = identify_thread(::getpid(), ::getppid());
  REQUIRE_FALSE(stranger);
  CHECK(stranger.error().kind == ErrorKind::kGone);
  CHECK_FALSE(self->same_thread({self->tid, self->start_ticks + 1, false}));
}
