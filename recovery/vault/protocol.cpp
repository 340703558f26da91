// SPDX-License-Identifier: Apache-2.0
// Encoding and the one validation of messages between tandemd and the vault.
#include "recovery/vault/protocol.hpp"

#include <cstring>

namespace tandem {
namespace {

/// Why (header, fds) breaks `rule`; nullptr when it does not.
const char* violation(const VaultRule& rule, const VaultHeader& header, std::size_t fds) {
  if (header.name_size < rule.min_name || header.name_size > rule.max_name) return "name too short or too long";
  if (header.body_size > rule.max_body) return "body too long";
  if (fds < rule.min_fds || fds > rule.max_fds) return "wrong number of descriptors";
  if ((header.connection != 0) != rule.connection) return "connection missing or not expected";
  if ((header.sequence != 0) != rule.sequence) return "sequence missing or not expected";
  if (header.reserved != 0) return "reserved field in use";
  // A descriptor can only travel with a byte of the reply it belongs to.
  if (rule.type == VaultType::kApplied && fds != 0 && header.body_size == 0) return "reply descriptor without a reply";
  if (rule.type == VaultType::kMessage && header.body_size < kVhostUserHeader) return "frame shorter than its header";
  return nullptr;
}

}  // namespace

const VaultRule* find_vault_rule(std::uint16_t type, VaultSender sender) {
  for (const VaultRule& rule : kVaultRules)
    if (static_cast<std::uint16_t>(rule.type) == type && rule.sender == sender) return &rule;
  return nullptr;
}

Result<std::vector<std::byte>> encode_vault_message(VaultType type, std::string_view name, std::uint64_t connection,
                                                    std::uint64_t sequence, std::span<const std::byte> body,
                                                    std::size_t fd_count) {
  const auto number = static_cast<std::uint16_t>(type);
  const VaultRule* rule = find_vault_rule(number, VaultSender::kTandemd);
  if (rule == nullptr) rule = find_vault_rule(number, VaultSender::kVault);
  if (rule == nullptr) return fail(ErrorKind::kInvalid, "encode vault message: unknown type " + std::to_string(number));
  if (name.size() > kMaxVaultName || body.size() > kMaxVaultBlob || fd_count > kMaxFdsPerMessage)
    return fail(ErrorKind::kInvalid, std::string{"encode "} + rule->title + ": " + std::to_string(name.size()) +
                                         " bytes of name, " + std::to_string(body.size()) + " of body and " +
                                         std::to_string(fd_count) + " descriptors exceed the vault's limits");
  VaultHeader header;
  header.type = number;
  header.name_size = static_cast<std::uint16_t>(name.size());
  header.fd_count = static_cast<std::uint16_t>(fd_count);
  header.body_size = static_cast<std::uint32_t>(body.size());
  header.connection = connection;
  header.sequence = sequence;
  if (const char* why = violation(*rule, header, fd_count))
    return fail(ErrorKind::kInvalid, std::string{"encode "} + rule->title + ": " + why);
  std::vector<std::byte> bytes(sizeof header + name.size() + body.size());
  std::memcpy(bytes.data(), &header, sizeof header);
  if (!name.empty()) std::memcpy(bytes.data() + sizeof header, name.data(), name.size());
  if (!body.empty()) std::memcpy(bytes.data() + sizeof header + name.size(), body.data(), body.size());
  return bytes;
}

Result<VaultMessage> decode_vault_message(ChannelMessage received, VaultSender sender) {
  VaultHeader header;
  if (received.bytes.size() < offsetof(VaultHeader, name_size))
    return fail(ErrorKind::kInvalid, "vault message: shorter than version and type");
  std::memcpy(&header.version, received.bytes.data(), sizeof header.version);
  if (header.version != kVaultVersion)
    return fail(ErrorKind::kUnsupported, "vault message: version " + std::to_string(header.version) +
                                             ", this side speaks " + std::to_string(kVaultVersion) +
                                             "; run tandemd and tandem-vault of compatible releases");
  if (received.bytes.size() < sizeof header) return fail(ErrorKind::kInvalid, "vault message: truncated header");
  std::memcpy(&header, received.bytes.data(), sizeof header);
  const VaultRule* rule = find_vault_rule(header.type, sender);
  if (rule == nullptr) return fail(ErrorKind::kInvalid, "vault message: unknown type " + std::to_string(header.type));
  const std::string what = std::string{"vault message "} + rule->title + ": ";
  if (header.fd_count != received.fds.size())
    return fail(ErrorKind::kInvalid, what + std::to_string(received.fds.size()) + " descriptors arrived of " +
                                         std::to_string(header.fd_count) + "; raise the descriptor limit (ulimit -n)");
  if (const char* why = violation(*rule, header, received.fds.size())) return fail(ErrorKind::kInvalid, what + why);
  if (received.bytes.size() != sizeof header + header.name_size + std::size_t{header.body_size})
    return fail(ErrorKind::kInvalid, what + "length differs from what its header says");
  VaultMessage message;
  message.type = rule->type;
  message.name.assign(reinterpret_cast<const char*>(received.bytes.data()) + sizeof header, header.name_size);
  message.connection = header.connection;
  message.sequence = header.sequence;
  message.body.assign(received.bytes.begin() + static_cast<std::ptrdiff_t>(sizeof header + header.name_size),
                      received.bytes.end());
  message.fds = std::move(received.fds);
  return message;
}

Result<ChannelMessage> receive_to_the_end(FdChannel& channel, bool* would_block) {
  auto received = channel.receive(would_block);
  if (received || received.error().kind != ErrorKind::kGone) return received;
  return channel.receive(would_block);
}

}  // namespace tandem
