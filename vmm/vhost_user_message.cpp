// SPDX-License-Identifier: Apache-2.0
// The table of vhost-user requests, and the parser that believes nothing but the table.
#include "vmm/vhost_user_message.hpp"

namespace tandem {
namespace {

namespace pf = protocol_feature;
using R = VhostUserRequest;
constexpr auto kAlways = ReplyRule::kAlways;
constexpr auto kOnRequest = ReplyRule::kOnRequest;

constexpr std::uint32_t kU64 = 8;
constexpr std::uint32_t kState = sizeof(VhostUserVringState);
constexpr std::uint32_t kAddress = sizeof(VhostUserVringAddress);
constexpr std::uint32_t kRegion = sizeof(VhostUserMemoryRegion);
constexpr std::uint32_t kTableMin = sizeof(VhostUserMemoryHeader) + kRegion;
constexpr std::uint32_t kTableMax = sizeof(VhostUserMemoryHeader) + kMaxMemoryRegions * kRegion;
constexpr std::uint32_t kSingle = sizeof(VhostUserSingleRegion);
constexpr std::uint32_t kLog = 16;
constexpr std::uint32_t kIotlb = 32;  // 26 bytes, padded
constexpr std::uint32_t kConfigMin = 12;
constexpr std::uint32_t kConfigMax = 12 + 256;
constexpr std::uint32_t kInflightMin = 20;  // packed by some front ends,
constexpr std::uint32_t kInflightMax = 24;  // padded by others
constexpr std::uint32_t kUuid = 16;

constexpr bool kYes = true;
constexpr bool kNo = false;

}  // namespace

// A vring's error descriptor is accepted and dropped: we have nothing to say that the guest could act on.
// REM_MEM_REG should come without a descriptor, but QEMU up to 7.x attaches one: taken and closed.
// clang-format off
constexpr std::array<VhostUserMessageInfo, kVhostUserMessageCount> kVhostUserMessages = {{
  // request               name                     payload min, max            fds   their kind       reply       takes away               supported  protocol feature
  {R::kGetFeatures,         "GET_FEATURES",          0, 0,                       0, 0, FdKind::kNone,   kAlways,    TakesAway::kNever,       kYes, 0},
  {R::kSetFeatures,         "SET_FEATURES",          kU64, kU64,                 0, 0, FdKind::kNone,   kOnRequest, TakesAway::kWhenRunning, kYes, 0},
  {R::kSetOwner,            "SET_OWNER",             0, 0,                       0, 0, FdKind::kNone,   kOnRequest, TakesAway::kNever,       kYes, 0},
  {R::kResetOwner,          "RESET_OWNER",           0, 0,                       0, 0, FdKind::kNone,   kOnRequest, TakesAway::kAlways,      kYes, 0},
  {R::kSetMemTable,         "SET_MEM_TABLE",         kTableMin, kTableMax,       1, kMaxMemoryRegions,
                                                                                       FdKind::kMemory, kOnRequest, TakesAway::kAlways,      kYes, 0},
  {R::kSetLogBase,          "SET_LOG_BASE",          kU64, kLog,                 0, 1, FdKind::kLog,    kAlways,    TakesAway::kAlways,      kNo,  pf::kLogShmfd},
  {R::kSetLogFd,            "SET_LOG_FD",            0, 0,                       1, 1, FdKind::kEvent,  kOnRequest, TakesAway::kNever,       kNo,  0},
  {R::kSetVringNum,         "SET_VRING_NUM",         kState, kState,             0, 0, FdKind::kNone,   kOnRequest, TakesAway::kNever,       kYes, 0},
  {R::kSetVringAddr,        "SET_VRING_ADDR",        kAddress, kAddress,         0, 0, FdKind::kNone,   kOnRequest, TakesAway::kNever,       kYes, 0},
  {R::kSetVringBase,        "SET_VRING_BASE",        kState, kState,             0, 0, FdKind::kNone,   kOnRequest, TakesAway::kNever,       kYes, 0},
  {R::kGetVringBase,        "GET_VRING_BASE",        kState, kState,             0, 0, FdKind::kNone,   kAlways,    TakesAway::kAlways,      kYes, 0},
  {R::kSetVringKick,        "SET_VRING_KICK",        kU64, kU64,                 0, 1, FdKind::kEvent,  kOnRequest, TakesAway::kWhenRunning, kYes, 0},
  {R::kSetVringCall,        "SET_VRING_CALL",        kU64, kU64,                 0, 1, FdKind::kEvent,  kOnRequest, TakesAway::kWhenRunning, kYes, 0},
  {R::kSetVringErr,         "SET_VRING_ERR",         kU64, kU64,                 0, 1, FdKind::kEvent,  kOnRequest, TakesAway::kNever,       kYes, 0},
  {R::kGetProtocolFeatures, "GET_PROTOCOL_FEATURES", 0, 0,                       0, 0, FdKind::kNone,   kAlways,    TakesAway::kNever,       kYes, 0},
  {R::kSetProtocolFeatures, "SET_PROTOCOL_FEATURES", kU64, kU64,                 0, 0, FdKind::kNone,   kOnRequest, TakesAway::kNever,       kYes, 0},
  {R::kGetQueueNum,         "GET_QUEUE_NUM",         0, 0,                       0, 0, FdKind::kNone,   kAlways,    TakesAway::kNever,       kYes, pf::kMq},
  {R::kSetVringEnable,      "SET_VRING_ENABLE",      kState, kState,             0, 0, FdKind::kNone,   kOnRequest, TakesAway::kWhenZero,    kYes, 0},
  {R::kSendRarp,            "SEND_RARP",             kU64, kU64,                 0, 0, FdKind::kNone,   kOnRequest, TakesAway::kNever,       kYes, pf::kRarp},
  {R::kNetSetMtu,           "NET_SET_MTU",           kU64, kU64,                 0, 0, FdKind::kNone,   kOnRequest, TakesAway::kNever,       kYes, pf::kNetMtu},
  {R::kSetBackendReqFd,     "SET_BACKEND_REQ_FD",    0, 0,                       1, 1, FdKind::kSocket, kOnRequest, TakesAway::kNever,       kNo,  pf::kBackendReq},
  {R::kIotlbMsg,            "IOTLB_MSG",             kIotlb, kIotlb,             0, 0, FdKind::kNone,   kAlways,    TakesAway::kAlways,      kNo,  0},
  {R::kSetVringEndian,      "SET_VRING_ENDIAN",      kState, kState,             0, 0, FdKind::kNone,   kOnRequest, TakesAway::kNever,       kNo,  pf::kCrossEndian},
  {R::kGetConfig,           "GET_CONFIG",            kConfigMin, kConfigMax,     0, 0, FdKind::kNone,   kAlways,    TakesAway::kNever,       kNo,  pf::kConfig},
  {R::kSetConfig,           "SET_CONFIG",            kConfigMin, kConfigMax,     0, 0, FdKind::kNone,   kOnRequest, TakesAway::kNever,       kNo,  pf::kConfig},
  {R::kCreateCryptoSession, "CREATE_CRYPTO_SESSION", 0, kMaxVhostUserPayload,    0, 0, FdKind::kNone,   kAlways,    TakesAway::kNever,       kNo,  pf::kCryptoSession},
  {R::kCloseCryptoSession,  "CLOSE_CRYPTO_SESSION",  kU64, kU64,                 0, 0, FdKind::kNone,   kOnRequest, TakesAway::kNever,       kNo,  pf::kCryptoSession},
  {R::kPostcopyAdvise,      "POSTCOPY_ADVISE",       0, 0,                       0, 0, FdKind::kNone,   kAlways,    TakesAway::kNever,       kNo,  pf::kPagefault},
  {R::kPostcopyListen,      "POSTCOPY_LISTEN",       0, 0,                       0, 0, FdKind::kNone,   kOnRequest, TakesAway::kNever,       kNo,  pf::kPagefault},
  {R::kPostcopyEnd,         "POSTCOPY_END",          0, 0,                       0, 0, FdKind::kNone,   kAlways,    TakesAway::kNever,       kNo,  pf::kPagefault},
  {R::kGetInflightFd,       "GET_INFLIGHT_FD",       kInflightMin, kInflightMax, 0, 0, FdKind::kNone,   kAlways,    TakesAway::kNever,       kNo,  pf::kInflightShmfd},
  {R::kSetInflightFd,       "SET_INFLIGHT_FD",       kInflightMin, kInflightMax, 1, 1, FdKind::kOther,  kOnRequest, TakesAway::kAlways,      kNo,  pf::kInflightShmfd},
  {R::kGpuSetSocket,        "GPU_SET_SOCKET",        0, 0,                       1, 1, FdKind::kSocket, kOnRequest, TakesAway::kNever,       kNo,  0},
  {R::kResetDevice,         "RESET_DEVICE",          0, 0,                       0, 0, FdKind::kNone,   kOnRequest, TakesAway::kAlways,      kNo,  pf::kResetDevice},
  {R::kVringKick,           "VRING_KICK",            kState, kState,             0, 0, FdKind::kNone,   kOnRequest, TakesAway::kNever,       kNo,  pf::kInbandNotifications},
  {R::kGetMaxMemSlots,      "GET_MAX_MEM_SLOTS",     0, 0,                       0, 0, FdKind::kNone,   kAlways,    TakesAway::kNever,       kYes, pf::kConfigureMemSlots},
  {R::kAddMemReg,           "ADD_MEM_REG",           kSingle, kSingle,           1, 1, FdKind::kMemory, kOnRequest, TakesAway::kNever,       kYes, pf::kConfigureMemSlots},
  {R::kRemMemReg,           "REM_MEM_REG",           kSingle, kSingle,           0, 1, FdKind::kOther,  kOnRequest, TakesAway::kAlways,      kYes, pf::kConfigureMemSlots},
  {R::kSetStatus,           "SET_STATUS",            kU64, kU64,                 0, 0, FdKind::kNone,   kOnRequest, TakesAway::kWhenZero,    kYes, pf::kStatus},
  {R::kGetStatus,           "GET_STATUS",            0, 0,                       0, 0, FdKind::kNone,   kAlways,    TakesAway::kNever,       kYes, pf::kStatus},
  {R::kGetSharedObject,     "GET_SHARED_OBJECT",     kUuid, kUuid,               0, 0, FdKind::kNone,   kAlways,    TakesAway::kNever,       kNo,  pf::kSharedObject},
  {R::kSetDeviceStateFd,    "SET_DEVICE_STATE_FD",   kU64, kU64,                 1, 1, FdKind::kOther,  kAlways,    TakesAway::kNever,       kNo,  pf::kDeviceState},
  {R::kCheckDeviceState,    "CHECK_DEVICE_STATE",    0, 0,                       0, 0, FdKind::kNone,   kAlways,    TakesAway::kNever,       kNo,  pf::kDeviceState},
}};
// clang-format on

namespace {

constexpr bool rows_are_in_order() {
  for (std::size_t row = 0; row < kVhostUserMessages.size(); ++row) {
    const VhostUserMessageInfo& info = kVhostUserMessages[row];
    if (static_cast<std::uint32_t>(info.request) != row + 1) return false;
    if (info.payload_min > info.payload_max || info.payload_max > kMaxVhostUserPayload) return false;
    if (info.fds_min > info.fds_max || (info.fds_max == 0) != (info.fd_kind == FdKind::kNone)) return false;
  }
  return true;
}
static_assert(rows_are_in_order(), "row n describes request n + 1, with sane limits");

std::string limits(std::uint32_t low, std::uint32_t high) {
  return low == high ? std::to_string(low) : std::to_string(low) + " to " + std::to_string(high);
}

}  // namespace

const VhostUserMessageInfo* find_vhost_user_message(std::uint32_t request) noexcept {
  if (request == 0 || request > kVhostUserMessages.size()) return nullptr;
  return &kVhostUserMessages[request - 1];
}

std::string vhost_user_message_name(std::uint32_t request) {
  const VhostUserMessageInfo* info = find_vhost_user_message(request);
  return info != nullptr ? std::string{info->name} : "request " + std::to_string(request);
}

Result<VhostUserHeader> parse_vhost_user_header(std::span<const std::byte> bytes) {
  if (bytes.size() < sizeof(VhostUserHeader))
    return fail(ErrorKind::kInvalid, "read vhost-user message: only " + std::to_string(bytes.size()) +
                                         " of the header's 12 bytes are there");
  const auto header = load_wire<VhostUserHeader>(bytes);
  const std::string name = vhost_user_message_name(header.request);
  if ((header.flags & VhostUserHeader::kVersionMask) != VhostUserHeader::kVersion)
    return fail(ErrorKind::kInvalid, "read " + name + ": protocol version " +
                                         std::to_string(header.flags & VhostUserHeader::kVersionMask) +
                                         " in its flags, only version 1 exists");
  if ((header.flags & VhostUserHeader::kReply) != 0)
    return fail(ErrorKind::kInvalid, "read " + name + ": it is marked as a reply, but we asked nothing");
  if ((header.flags & ~(VhostUserHeader::kVersionMask | VhostUserHeader::kNeedReply)) != 0)
    return fail(ErrorKind::kInvalid, "read " + name + ": unknown flags " + std::to_string(header.flags));
  if (header.size > kMaxVhostUserPayload)
    return fail(ErrorKind::kInvalid, "read " + name + ": announces " + std::to_string(header.size) +
                                         " bytes of payload, more than the " + std::to_string(kMaxVhostUserPayload) +
                                         " that any request has");
  return header;
}

Result<VhostUserFrame> parse_frame(std::span<const std::byte> bytes, std::size_t fd_count) {
  auto header = parse_vhost_user_header(bytes);
  if (!header) return tl::make_unexpected(std::move(header.error()));
  VhostUserFrame frame{find_vhost_user_message(header->request), *header, bytes.subspan(sizeof(VhostUserHeader))};
  const std::string name = vhost_user_message_name(header->request);
  if (frame.payload.size() != header->size)
    return fail(ErrorKind::kInvalid, "read " + name + ": header announces " + std::to_string(header->size) +
                                         " bytes of payload, " + std::to_string(frame.payload.size()) + " came");
  if (frame.info == nullptr) return frame;
  const VhostUserMessageInfo& info = *frame.info;
  if (header->size < info.payload_min || header->size > info.payload_max)
    return fail(ErrorKind::kInvalid, "read " + name + ": " + std::to_string(header->size) +
                                         " bytes of payload, it has " + limits(info.payload_min, info.payload_max));
  if (fd_count < info.fds_min || fd_count > info.fds_max)
    return fail(ErrorKind::kInvalid, "read " + name + ": came with " + std::to_string(fd_count) +
                                         " descriptors, it takes " + limits(info.fds_min, info.fds_max));
  return frame;
}

std::vector<std::byte> make_vhost_user_message(VhostUserRequest request, std::uint32_t flags,
                                               std::span<const std::byte> payload) {
  const VhostUserHeader header{static_cast<std::uint32_t>(request), flags | VhostUserHeader::kVersion,
                               static_cast<std::uint32_t>(payload.size())};
  std::vector<std::byte> message(sizeof header + payload.size());
  std::memcpy(message.data(), &header, sizeof header);
  if (!payload.empty()) std::memcpy(message.data() + sizeof header, payload.data(), payload.size());
  return message;
}

}  // namespace tandem
