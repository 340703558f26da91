// SPDX-License-Identifier: Apache-2.0
// Every row of the message table against messages that are too short, too long, or carry the wrong number of
// descriptors.
#include "vmm/vhost_user_message.hpp"

#include "tests/vmm/front_end.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

std::vector<std::byte> frame_of(const VhostUserMessageInfo& info, std::uint32_t size) {
  return make_vhost_user_message(info.request, 0, std::vector<std::byte>(size));
}

/// Handled by a device, with `count` descriptors of the row's kind; how many of them are open afterwards is checked.
bool device_rejects(const VhostUserMessageInfo& info, std::uint32_t size, std::size_t count) {
  auto device = make_device();
  accept(device, u64(VhostUserRequest::kSetProtocolFeatures, default_protocol_features()));
  const UniqueFd fd = info.fd_kind == FdKind::kEvent ? make_eventfd() : make_memfd(1u << 20);
  const std::vector<int> fds(count, fd.get());
  const std::size_t before = open_fds();
  const bool rejected = !send(device, {frame_of(info, size), fds}).has_value();
  if (rejected) CHECK(open_fds() == before);
  return rejected;
}

}  // namespace

TEST_CASE("every row accepts its own limits and nothing beyond them") {
  for (const VhostUserMessageInfo& info : kVhostUserMessages) {
    INFO(info.name);
    CHECK(parse_frame(frame_of(info, info.payload_min), info.fds_min).has_value());
    CHECK(parse_frame(frame_of(info, info.payload_max), info.fds_max).has_value());
    if (info.payload_min > 0) CHECK_FALSE(parse_frame(frame_of(info, info.payload_min - 1), info.fds_min).has_value());
    CHECK_FALSE(parse_frame(frame_of(info, info.payload_max + 1), info.fds_min).has_value());
    if (info.fds_min > 0) CHECK_FALSE(parse_frame(frame_of(info, info.payload_min), info.fds_min - 1).has_value());
    CHECK_FALSE(parse_frame(frame_of(info, info.payload_min), info.fds_max + 1).has_value());
  }
}

// CVE-2019-14818, CVE-2022-0669: descriptors on messages that take none, or too many, leaked until the process had none
// left.
TEST_CASE("a device rejects wrong sizes and descriptor counts of every row and closes what came") {
  for (const VhostUserMessageInfo& info : kVhostUserMessages) {
    INFO(info.name);
    if (info.payload_min > 0) CHECK(device_rejects(info, info.payload_min - 1, info.fds_min));
    CHECK(device_rejects(info, info.payload_max + 1, info.fds_min));
    if (info.fds_min > 0) CHECK(device_rejects(info, info.payload_min, info.fds_min - 1));
    CHECK(device_rejects(info, info.payload_min, info.fds_max + 1));
    if (!info.supported) CHECK(device_rejects(info, info.payload_min, info.fds_min));
  }
}

TEST_CASE("every row that says supported has a handler") {
  for (const VhostUserMessageInfo& info : kVhostUserMessages) {
    if (!info.supported) continue;
    INFO(info.name);
    auto device = make_device();
    accept(device, u64(VhostUserRequest::kSetProtocolFeatures, default_protocol_features()));
    const UniqueFd fd = info.fd_kind == FdKind::kEvent ? make_eventfd() : make_memfd(1u << 20);
    const auto outcome = send(device, {frame_of(info, info.payload_min), std::vector<int>(info.fds_min, fd.get())});
    if (!outcome) CHECK(outcome.error().text.find("no handler") == std::string::npos);
    if (outcome && info.reply == ReplyRule::kAlways)
      CHECK((outcome->reply.has_value() || outcome->vring_base_index.has_value()));
  }
}

TEST_CASE("headers that are not requests of version 1 are refused") {
  struct Row {
    const char* what;
    std::uint32_t flags;
    std::uint32_t size;
    bool good;
  };
  const Row row = GENERATE(values<Row>({
      {"plain", 1, 0, true},
      {"need_reply", 9, 0, true},
      {"version 0", 0, 0, false},
      {"version 2", 2, 0, false},
      {"version 3", 3, 0, false},
      {"a reply", 5, 0, false},
      {"unknown flag", 1 | 16, 0, false},
      {"highest flag", 1 | 0x80000000u, 0, false},
      {"largest payload", 1, kMaxVhostUserPayload, true},
      {"payload above the limit", 1, kMaxVhostUserPayload + 1, false},
      {"payload of 4 GiB", 1, 0xffffffffu, false},
  }));
  INFO(row.what);
  const VhostUserHeader header{1, row.flags, row.size};
  CHECK(parse_vhost_user_header(std::as_bytes(std::span{&header, 1})).has_value() == row.good);
}

TEST_CASE("truncated frames are refused at every length") {
  const Message whole = FrontEnd::addr(0);
  for (std::size_t length = 0; length < whole.bytes.size(); ++length)
    CHECK_FALSE(parse_frame(std::span{whole.bytes}.first(length), 0).has_value());
  CHECK(parse_frame(whole.bytes, 0).has_value());
}

TEST_CASE("unknown and unsupported requests") {
  auto device = make_device();
  const auto request = GENERATE(std::uint32_t{0}, 7, 21, 34, 35, 44, 1000, 0xffffffffu);
  const UniqueFd fd = make_eventfd();
  const VhostUserMessageInfo* info = find_vhost_user_message(request);
  const std::vector<int> fds(info != nullptr ? info->fds_min : 1, fd.get());
  const std::vector<std::byte> payload(info != nullptr ? info->payload_min : 24);
  const Message asking = raw(static_cast<VhostUserRequest>(request), payload, fds, true);
  const Message silent = raw(static_cast<VhostUserRequest>(request), payload, fds);
  INFO(request);

  SECTION("end the connection without REPLY_ACK") { CHECK_FALSE(reject(device, asking).empty()); }
  SECTION("are answered with no if the front end asks") {
    accept(device, u64(VhostUserRequest::kSetProtocolFeatures, protocol_feature::kReplyAck));
    CHECK_FALSE(reject(device, silent).empty());
    const std::size_t before = open_fds();
    const Outcome outcome = accept(device, asking);
    CHECK(open_fds() == before);
    CHECK(reply_u64(outcome) != 0);
    CHECK_FALSE(outcome.refusal.empty());
    CHECK_FALSE(outcome.description_changed);
  }
}

TEST_CASE("an unsupported request with an answer of its own ends the connection") {
  auto device = make_device();
  accept(device, u64(VhostUserRequest::kSetProtocolFeatures, protocol_feature::kReplyAck));
  const std::vector<std::byte> payload(16);
  CHECK_FALSE(reject(device, raw(VhostUserRequest::kGetConfig, payload, {}, true)).empty());
}
