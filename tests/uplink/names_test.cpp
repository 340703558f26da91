// SPDX-License-Identifier: Apache-2.0
// Names and sizes, without a kernel.
#include <fcntl.h>
#include <net/if.h>

#include <catch2/catch.hpp>

#include "common/unique_fd.hpp"
#include "recovery/uplink/uplink_names.hpp"
#include "recovery/uplink/xsk_queue.hpp"

using namespace tandem;

TEST_CASE("MAC addresses are normalized or refused") {
  CHECK(normalized_mac("52:54:00:AB:cd:EF") == "52:54:00:ab:cd:ef");
  for (const char* wrong : {"", "52:54:00:ab:cd", "52-54-00-ab-cd-ef", "52:54:00:ab:cd:eg", "52:54:00:ab:cd:ef:",
                            "525400abcdef", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"})
    CHECK_FALSE(normalized_mac(wrong));
}

TEST_CASE("veth names are the same every time, short, and differ by attempt") {
  const std::string mac = "52:54:00:12:34:56";
  CHECK(veth_name(mac, 0, 'a') == "tdm123456a");
  CHECK(veth_name(mac, 0, 'b') == "tdm123456b");
  CHECK(veth_name(mac, 1, 'a') == veth_name(mac, 1, 'a'));
  CHECK(veth_name(mac, 1, 'a') != veth_name(mac, 0, 'a'));
  CHECK(veth_name(mac, 1, 'a') != veth_name(mac, 2, 'a'));
  CHECK(veth_name(mac, 1, 'a') != veth_name("52:54:00:12:34:57", 1, 'a'));
  for (std::uint32_t attempt = 0; attempt < 20; ++attempt) {
    CHECK(veth_name(mac, attempt, 'a').size() < IFNAMSIZ);
    CHECK(is_veth_name(veth_name(mac, attempt, 'b')));
  }
  for (const char* other : {"tdm", "tdm12345a", "tdm1234567a", "tdm12345ga", "tdm123456c", "eth0123456", ""})
    CHECK_FALSE(is_veth_name(other));
}

TEST_CASE("an alias names its instance and nobody else's") {
  const std::string alias = uplink_alias("default", "52:54:00:12:34:56");
  CHECK(alias == "tandem:default:52:54:00:12:34:56");
  CHECK(is_alias_of(alias, "default"));
  for (const char* other : {"def", "default:52", "defaul", "", "default:"}) CHECK_FALSE(is_alias_of(alias, other));
  CHECK_FALSE(is_alias_of("", "default"));
  CHECK(pin_name("eth0.100") == "eth0_100");
}

TEST_CASE("the frame size follows from the MTU, up to what a page holds") {
  CHECK(XskQueue::frame_size_for(68) == 2048u);
  CHECK(XskQueue::frame_size_for(1500) == 2048u);
  CHECK(XskQueue::frame_size_for(kXskSmallFrameMtu) == 2048u);
  CHECK(XskQueue::frame_size_for(kXskSmallFrameMtu + 1) == 4096u);
  CHECK(XskQueue::frame_size_for(kXskLargestMtu) == 4096u);
  const auto refused = XskQueue::frame_size_for(9000);
  REQUIRE_FALSE(refused);
  CHECK(refused.error().text.find(std::to_string(kXskLargestMtu)) != std::string::npos);
}

TEST_CASE("statistics of something that is no AF_XDP socket are an error") {
  const UniqueFd null{::open("/dev/null", O_RDWR | O_CLOEXEC)};
  CHECK_FALSE(xsk_statistics(null.get()));
  CHECK_FALSE(xsk_statistics(-1));
}
