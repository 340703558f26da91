// SPDX-License-Identifier: Apache-2.0
// The wire format between tandemd and tandem-vault: one header, a name, a body and descriptors per SOCK_SEQPACKET
// message.
//
// Every message is VaultHeader, then name_size bytes of name (an item's key or a nic's name), then body_size bytes,
// with fd_count descriptors as ancillary data. Integers are in host order: both ends run on one machine. kVaultRules
// says which message carries what; decode_vault_message() is the one function that validates. The first two fields
// (version, type) keep their place in every version; raise kVaultVersion whenever anything else in this file changes
// its meaning.
//
// The dialogue, as tandemd sees it:
//   HELLO -> WELCOME, then what the vault holds: per nic LISTENING, CONNECTED if there is a front end, and the message
//   (or disconnection) that is not applied yet, under the sequence it always had; then ANNOUNCED. From then on
//   CONNECTED, MESSAGE and DISCONNECTED as they happen. MESSAGE and DISCONNECTED are repeated to every new tandemd
//   until APPLIED names their sequence; a nic has at most one of them outstanding. Each DISCONNECTED follows a
//   CONNECTED of the same connection in the same dialogue; the next connection is accepted only after it is APPLIED.
//   The descriptor in CONNECTED is for holding, never for reading: a front end sees its connection end when the last
//   holder closes it, so whoever holds it says when, also where the vault was killed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "common/fd_channel.hpp"
#include "common/result.hpp"

namespace tandem {

inline constexpr std::uint16_t kVaultVersion = 2;
inline constexpr std::size_t kMaxVaultName = 127;        ///< bytes
inline constexpr std::size_t kMaxVaultBlob = 60 * 1024;  ///< bytes
inline constexpr std::size_t kVhostUserHeader =
    12;  ///< bytes: request, flags, size (vhost-user, "Message Specification")
inline constexpr std::size_t kMaxRelayedPayload = 4096;  ///< bytes
inline constexpr std::size_t kMaxVhostUserFrame = kVhostUserHeader + kMaxRelayedPayload;
inline constexpr std::size_t kMaxVhostUserFds = 8;  ///< the specification's limit on regions in one SET_MEM_TABLE

enum class VaultType : std::uint16_t {
  // tandemd to vault
  kHello = 1,
  kPut = 2,  ///< replaces the item `name` by body and fds
  kDelete = 3,
  kDeletePrefix = 4,  ///< every item whose name begins with `name`; empty: all
  kFetch = 5,
  kListen = 6,    ///< fd: a listening SOCK_STREAM unix socket
  kUnlisten = 7,  ///< closes listener and connection without DISCONNECTED
  kClose = 8,     ///< closes this connection; DISCONNECTED follows
  kApplied = 9,   ///< `sequence` is done; body: reply, fd: sent with the reply
  // vault to tandemd
  kWelcome = 64,
  kListening = 65,
  kConnected = 66,  ///< fd: the connection itself, unless it is over already
  kMessage = 67,
  kDisconnected = 68,
  kAnnounced = 69,
  kItem = 70,
  kEnd = 71,
  kError = 72,  ///< body: text
};

struct VaultHeader {
  std::uint16_t version = kVaultVersion;
  std::uint16_t type = 0;
  std::uint16_t name_size = 0;
  std::uint16_t fd_count = 0;
  std::uint32_t body_size = 0;
  std::uint32_t reserved = 0;
  std::uint64_t connection = 0;
  std::uint64_t sequence = 0;
};
static_assert(std::is_trivially_copyable_v<VaultHeader> && sizeof(VaultHeader) == 32);
static_assert(offsetof(VaultHeader, version) == 0 && offsetof(VaultHeader, type) == 2);
static_assert(offsetof(VaultHeader, body_size) == 8 && offsetof(VaultHeader, connection) == 16);
static_assert(sizeof(VaultHeader) + kMaxVaultName + kMaxVaultBlob <= kMaxChannelMessage);
static_assert(kMaxVhostUserFrame <= kMaxVaultBlob && kMaxVhostUserFds <= kMaxFdsPerMessage);

enum class VaultSender : std::uint8_t { kTandemd, kVault };

/// What one type of message carries. A field that is not required must be empty or zero, except where a range is given.
struct VaultRule {
  VaultType type;
  const char* title;
  VaultSender sender;
  std::size_t min_name, max_name;
  std::size_t max_body;
  std::size_t min_fds, max_fds;
  bool connection, sequence;
};

// clang-format off
inline constexpr VaultRule kVaultRules[] = {
    // type, title, sender, name (min, max), body (max), fds (min, max), connection, sequence
    {VaultType::kHello, "HELLO", VaultSender::kTandemd, 0, 0, 0, 0, 0, false, false},
    {VaultType::kPut, "PUT", VaultSender::kTandemd, 1,
     kMaxVaultName, kMaxVaultBlob, 0, kMaxFdsPerMessage, false, false},
    {VaultType::kDelete, "DELETE", VaultSender::kTandemd, 1, kMaxVaultName, 0, 0, 0, false, false},
    {VaultType::kDeletePrefix, "DELETE_PREFIX", VaultSender::kTandemd, 0, kMaxVaultName, 0, 0, 0, false, false},
    {VaultType::kFetch, "FETCH", VaultSender::kTandemd, 0, 0, 0, 0, 0, false, false},
    {VaultType::kListen, "LISTEN", VaultSender::kTandemd, 1, kMaxVaultName, 0, 1, 1, false, false},
    {VaultType::kUnlisten, "UNLISTEN", VaultSender::kTandemd, 1, kMaxVaultName, 0, 0, 0, false, false},
    {VaultType::kClose, "CLOSE", VaultSender::kTandemd, 1, kMaxVaultName, 0, 0, 0, true, false},
    {VaultType::kApplied, "APPLIED", VaultSender::kTandemd, 1, kMaxVaultName, kMaxVhostUserFrame, 0, 1, false, true},
    {VaultType::kWelcome, "WELCOME", VaultSender::kVault, 0, 0, 0, 0, 0, false, false},
    {VaultType::kListening, "LISTENING", VaultSender::kVault, 1, kMaxVaultName, 0, 0, 0, false, false},
    {VaultType::kConnected, "CONNECTED", VaultSender::kVault, 1, kMaxVaultName, 0, 0, 1, true, false},
    {VaultType::kMessage, "MESSAGE", VaultSender::kVault, 1,
     kMaxVaultName, kMaxVhostUserFrame, 0, kMaxVhostUserFds, true, true},
    {VaultType::kDisconnected, "DISCONNECTED", VaultSender::kVault, 1, kMaxVaultName, 0, 0, 0, true, true},
    {VaultType::kAnnounced, "ANNOUNCED", VaultSender::kVault, 0, 0, 0, 0, 0, false, false},
    {VaultType::kItem, "ITEM", VaultSender::kVault, 1,
     kMaxVaultName, kMaxVaultBlob, 0, kMaxFdsPerMessage, false, false},
    {VaultType::kEnd, "END", VaultSender::kVault, 0, 0, 0, 0, 0, false, false},
    {VaultType::kError, "ERROR", VaultSender::kVault, 0, 0, kMaxVaultBlob, 0, 0, false, false},
};
// clang-format on

/// A validated message. Owns its descriptors.
struct VaultMessage {
  VaultType type = VaultType::kHello;
  std::string name;
  std::uint64_t connection = 0;
  std::uint64_t sequence = 0;
  std::vector<std::byte> body;
  std::vector<UniqueFd> fds;
};

/// The rule of a type that `sender` may send, or nullptr.
const VaultRule* find_vault_rule(std::uint16_t type, VaultSender sender);

/// The bytes of one message; `fd_count` descriptors are sent beside them. kInvalid when kVaultRules forbids it.
Result<std::vector<std::byte>> encode_vault_message(VaultType type, std::string_view name, std::uint64_t connection,
                                                    std::uint64_t sequence, std::span<const std::byte> body,
                                                    std::size_t fd_count);

/// Validates what `sender` sent. kUnsupported: another version; kInvalid: breaks a rule. The descriptors are closed
/// then.
Result<VaultMessage> decode_vault_message(ChannelMessage received, VaultSender sender);

/// FdChannel::receive() that does not lose a dead peer's last messages: a unix socket whose peer closed with unread
/// data reports ECONNRESET once *before* what the peer had sent (net/unix/af_unix.c, unix_release_sock). kGone is the
/// true end.
Result<ChannelMessage> receive_to_the_end(FdChannel& channel, bool* would_block);

}  // namespace tandem
