// SPDX-License-Identifier: Apache-2.0
// The vhost-user wire format and the one table of all requests a front end can send.
//
// Source: QEMU docs/interop/vhost-user.rst, "Message Specification" and "Front-end message types". Numbers are in host
// byte order. Parser, device, logs and tests read this table and nothing else about a message's shape. Pure functions,
// any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "common/layout/device_description.hpp"
#include "common/result.hpp"

namespace tandem {

enum class VhostUserRequest : std::uint32_t {
  kGetFeatures = 1,
  kSetFeatures = 2,
  kSetOwner = 3,
  kResetOwner = 4,
  kSetMemTable = 5,
  kSetLogBase = 6,
  kSetLogFd = 7,
  kSetVringNum = 8,
  kSetVringAddr = 9,
  kSetVringBase = 10,
  kGetVringBase = 11,
  kSetVringKick = 12,
  kSetVringCall = 13,
  kSetVringErr = 14,
  kGetProtocolFeatures = 15,
  kSetProtocolFeatures = 16,
  kGetQueueNum = 17,
  kSetVringEnable = 18,
  kSendRarp = 19,
  kNetSetMtu = 20,
  kSetBackendReqFd = 21,
  kIotlbMsg = 22,
  kSetVringEndian = 23,
  kGetConfig = 24,
  kSetConfig = 25,
  kCreateCryptoSession = 26,
  kCloseCryptoSession = 27,
  kPostcopyAdvise = 28,
  kPostcopyListen = 29,
  kPostcopyEnd = 30,
  kGetInflightFd = 31,
  kSetInflightFd = 32,
  kGpuSetSocket = 33,
  kResetDevice = 34,
  kVringKick = 35,
  kGetMaxMemSlots = 36,
  kAddMemReg = 37,
  kRemMemReg = 38,
  kSetStatus = 39,
  kGetStatus = 40,
  kGetSharedObject = 41,
  kSetDeviceStateFd = 42,
  kCheckDeviceState = 43,
};

/// Feature bits of the transport (not of virtio), as masks.
inline constexpr std::uint64_t kVhostUserFProtocolFeatures = 1ull << 30;
namespace protocol_feature {
inline constexpr std::uint64_t kMq = 1ull << 0;
inline constexpr std::uint64_t kLogShmfd = 1ull << 1;
inline constexpr std::uint64_t kRarp = 1ull << 2;
inline constexpr std::uint64_t kReplyAck = 1ull << 3;
inline constexpr std::uint64_t kNetMtu = 1ull << 4;
inline constexpr std::uint64_t kBackendReq = 1ull << 5;
inline constexpr std::uint64_t kCrossEndian = 1ull << 6;
inline constexpr std::uint64_t kCryptoSession = 1ull << 7;
inline constexpr std::uint64_t kPagefault = 1ull << 8;
inline constexpr std::uint64_t kConfig = 1ull << 9;
inline constexpr std::uint64_t kInflightShmfd = 1ull << 12;
inline constexpr std::uint64_t kResetDevice = 1ull << 13;
inline constexpr std::uint64_t kInbandNotifications = 1ull << 14;
inline constexpr std::uint64_t kConfigureMemSlots = 1ull << 15;
inline constexpr std::uint64_t kStatus = 1ull << 16;
inline constexpr std::uint64_t kSharedObject = 1ull << 18;
inline constexpr std::uint64_t kDeviceState = 1ull << 19;
}  // namespace protocol_feature

// ---- wire structures ----

struct VhostUserHeader {
  static constexpr std::uint32_t kVersionMask = 0x3;
  static constexpr std::uint32_t kVersion = 0x1;
  static constexpr std::uint32_t kReply = 1u << 2;
  static constexpr std::uint32_t kNeedReply = 1u << 3;

  std::uint32_t request = 0;
  std::uint32_t flags = 0;
  std::uint32_t size = 0;  ///< bytes of payload that follow
};
static_assert(sizeof(VhostUserHeader) == 12);

// linux/vhost_types.h and linux/virtio_ring.h have the same structures, but cannot be included from C++.
struct VhostUserVringState {
  std::uint32_t index = 0;
  std::uint32_t num = 0;
};
struct VhostUserVringAddress {
  std::uint32_t index = 0;
  std::uint32_t flags = 0;
  std::uint64_t descriptor_user_address = 0;
  std::uint64_t used_user_address = 0;
  std::uint64_t avail_user_address = 0;
  std::uint64_t log_guest_address = 0;
};
static_assert(sizeof(VhostUserVringState) == 8 && sizeof(VhostUserVringAddress) == 40);

struct VhostUserMemoryRegion {
  std::uint64_t guest_address = 0;
  std::uint64_t size = 0;
  std::uint64_t user_address = 0;
  std::uint64_t mmap_offset = 0;
};
static_assert(sizeof(VhostUserMemoryRegion) == 32);

/// SET_MEM_TABLE: this, then `count` regions.
struct VhostUserMemoryHeader {
  std::uint32_t count = 0;
  std::uint32_t padding = 0;
};
static_assert(sizeof(VhostUserMemoryHeader) == 8);

/// ADD_MEM_REG and REM_MEM_REG.
struct VhostUserSingleRegion {
  std::uint64_t padding = 0;
  VhostUserMemoryRegion region;
};
static_assert(sizeof(VhostUserSingleRegion) == 40);

/// SET_VRING_KICK, _CALL and _ERR: vring index in bits 0-7, "no descriptor attached" in bit 8, the rest zero.
inline constexpr std::uint64_t kVringFileIndexMask = 0xff;
inline constexpr std::uint64_t kVringFileNoFd = 1ull << 8;

/// No request has a longer payload; a header that announces more is refused before anything is read or allocated for
/// it.
inline constexpr std::uint32_t kMaxVhostUserPayload = 4096;

// ---- the table ----

enum class FdKind { kNone, kMemory, kEvent, kSocket, kLog, kOther };

/// kAlways: the answer is part of the request. kOnRequest: a u64 (0 = success) if NEED_REPLY is set and REPLY_ACK was
/// negotiated. The protocol has no request that is never answered: NEED_REPLY may be set on any.
enum class ReplyRule { kAlways, kOnRequest };

/// When a request takes something away that an owner may be using: it may be answered only after every owner let go.
enum class TakesAway {
  kNever,
  kAlways,
  kWhenZero,     ///< SET_VRING_ENABLE with num 0, SET_STATUS with 0
  kWhenRunning,  ///< SET_FEATURES if any vring was started, SET_VRING_KICK and _CALL if theirs was
};

struct VhostUserMessageInfo {
  VhostUserRequest request;
  std::string_view name;
  std::uint32_t payload_min;
  std::uint32_t payload_max;
  std::uint32_t fds_min;
  std::uint32_t fds_max;
  FdKind fd_kind;
  ReplyRule reply;
  TakesAway takes_away;
  bool supported;
  std::uint64_t protocol_feature;  ///< must have been acknowledged by SET_PROTOCOL_FEATURES; 0: none needed
};

inline constexpr std::size_t kVhostUserMessageCount = 43;
/// Row n describes request n + 1.
extern const std::array<VhostUserMessageInfo, kVhostUserMessageCount> kVhostUserMessages;

/// The row of a request number; nullptr for a number nobody has defined.
const VhostUserMessageInfo* find_vhost_user_message(std::uint32_t request) noexcept;

/// Name for logs: "SET_FEATURES", or "request 77".
std::string vhost_user_message_name(std::uint32_t request);

// ---- parsing and building ----

struct VhostUserFrame {
  const VhostUserMessageInfo* info = nullptr;  ///< nullptr: unknown request, its payload was not looked at
  VhostUserHeader header;
  std::span<const std::byte> payload;  ///< of the bytes given to parse_frame
  [[nodiscard]] bool needs_reply() const noexcept { return (header.flags & VhostUserHeader::kNeedReply) != 0; }
};

/// Validates the first 12 bytes of a message: version 1, no unknown flag, not a reply, payload within
/// kMaxVhostUserPayload. Whoever reads the socket asks this first, to know how many bytes follow.
Result<VhostUserHeader> parse_vhost_user_header(std::span<const std::byte> bytes);

/// Validates one whole message and the number of descriptors that came with it against the table.
Result<VhostUserFrame> parse_frame(std::span<const std::byte> bytes, std::size_t fd_count);

/// Copies a wire structure out of a payload. The caller (the table's sizes) guarantees that it is long enough.
template <class T>
T load_wire(std::span<const std::byte> payload, std::size_t offset = 0) {
  static_assert(std::is_trivially_copyable_v<T>);
  T value;
  std::memcpy(&value, payload.data() + offset, sizeof value);
  return value;
}

/// A complete message: header with `flags` | version 1, then `payload`. With kReply, an answer to the same request.
std::vector<std::byte> make_vhost_user_message(VhostUserRequest request, std::uint32_t flags,
                                               std::span<const std::byte> payload);

template <class T>
std::vector<std::byte> make_vhost_user_reply(VhostUserRequest request, const T& payload) {
  return make_vhost_user_message(request, VhostUserHeader::kReply, std::as_bytes(std::span{&payload, 1}));
}

}  // namespace tandem
