// SPDX-License-Identifier: Apache-2.0
// Every row of the vault's message table, and what must be refused.
#include <catch2/catch.hpp>
#include <cstring>
#include <set>

#include "recovery/vault/protocol.hpp"
#include "tests/vault/support.hpp"

using namespace tandem;
using namespace tandem::test;

namespace {

/// A message that fulfils `rule` with its smallest contents.
Result<Bytes> smallest(const VaultRule& rule) {
  const Bytes body(rule.type == VaultType::kMessage ? kVhostUserHeader : 0);
  return encode_vault_message(rule.type, std::string(rule.min_name, 'n'), rule.connection ? 7 : 0,
                              rule.sequence ? 9 : 0, body, rule.min_fds);
}

ChannelMessage as_received(const Bytes& bytes, std::size_t fds) {
  ChannelMessage message{bytes, {}};
  for (std::size_t i = 0; i < fds; ++i) message.fds.push_back(some_file());
  return message;
}

VaultHeader header_of(const Bytes& bytes) {
  VaultHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  return header;
}

}  // namespace

TEST_CASE("each type has one row and survives the round trip") {
  std::set<VaultType> seen;
  for (const VaultRule& rule : kVaultRules) {
    INFO(rule.title);
    CHECK(seen.insert(rule.type).second);
    const auto bytes = smallest(rule);
    REQUIRE(bytes);
    const auto message = decode_vault_message(as_received(*bytes, rule.min_fds), rule.sender);
    REQUIRE(message);
    CHECK(message->type == rule.type);
    CHECK(message->name == std::string(rule.min_name, 'n'));
    CHECK(message->connection == (rule.connection ? 7u : 0u));
    CHECK(message->sequence == (rule.sequence ? 9u : 0u));
    CHECK(message->fds.size() == rule.min_fds);
  }
}

TEST_CASE("a message of the other side, a wrong version and every wrong field are refused") {
  for (const VaultRule& rule : kVaultRules) {
    INFO(rule.title);
    const auto bytes = smallest(rule);
    REQUIRE(bytes);
    const auto other = rule.sender == VaultSender::kVault ? VaultSender::kTandemd : VaultSender::kVault;
    CHECK_FALSE(decode_vault_message(as_received(*bytes, rule.min_fds), other));
    const auto refused = [&](auto change, std::size_t more_fds = 0) {
      Bytes copy = *bytes;
      VaultHeader header = header_of(copy);
      change(header, copy);
      std::memcpy(copy.data(), &header, sizeof header);
      return decode_vault_message(as_received(copy, rule.min_fds + more_fds), rule.sender);
    };
    const auto version = refused([](VaultHeader& header, Bytes&) { header.version = kVaultVersion + 1; });
    REQUIRE_FALSE(version);
    CHECK(version.error().kind == ErrorKind::kUnsupported);
    CHECK_FALSE(refused([](VaultHeader& header, Bytes&) { header.type = 999; }));
    CHECK_FALSE(refused([](VaultHeader& header, Bytes&) { header.reserved = 1; }));
    CHECK_FALSE(refused([](VaultHeader& header, Bytes&) { header.connection = header.connection == 0 ? 1 : 0; }));
    CHECK_FALSE(refused([](VaultHeader& header, Bytes&) { header.sequence = header.sequence == 0 ? 1 : 0; }));
    CHECK_FALSE(refused([](VaultHeader& header, Bytes&) { header.name_size = 128; }));
    CHECK_FALSE(refused([](VaultHeader& header, Bytes&) { header.body_size = 0xffffffffu; }));
    CHECK_FALSE(refused([](VaultHeader&, Bytes& copy) { copy.push_back(std::byte{0}); }));
    CHECK_FALSE(refused([](VaultHeader&, Bytes&) {}, 1));
    CHECK_FALSE(
        refused([&](VaultHeader& header, Bytes&) { header.fd_count = static_cast<std::uint16_t>(rule.max_fds + 1); },
                rule.max_fds + 1 - rule.min_fds));
  }
}

TEST_CASE("truncated messages are refused at every length") {
  const auto bytes = encode_vault_message(VaultType::kPut, "key", 0, 0, Bytes(100), 0);
  REQUIRE(bytes);
  for (std::size_t size = 0; size < bytes->size(); ++size)
    CHECK_FALSE(decode_vault_message({Bytes(bytes->begin(), bytes->begin() + static_cast<std::ptrdiff_t>(size)), {}},
                                     VaultSender::kTandemd));
}

TEST_CASE("limits hold when encoding") {
  CHECK(encode_vault_message(VaultType::kPut, std::string(127, 'k'), 0, 0, Bytes(kMaxVaultBlob), kMaxFdsPerMessage));
  CHECK_FALSE(encode_vault_message(VaultType::kPut, std::string(128, 'k'), 0, 0, {}, 0));
  CHECK_FALSE(encode_vault_message(VaultType::kPut, "", 0, 0, {}, 0));
  CHECK_FALSE(encode_vault_message(VaultType::kPut, "k", 0, 0, Bytes(kMaxVaultBlob + 1), 0));
  CHECK_FALSE(encode_vault_message(VaultType::kPut, "k", 0, 0, {}, kMaxFdsPerMessage + 1));
  CHECK_FALSE(encode_vault_message(VaultType::kApplied, "n", 0, 1, {}, 1));
  CHECK_FALSE(encode_vault_message(VaultType::kApplied, "n", 0, 1, Bytes(kMaxVhostUserFrame + 1), 0));
  CHECK_FALSE(encode_vault_message(VaultType::kMessage, "n", 1, 1, Bytes(11), 0));
}

TEST_CASE("what a peer sent before it died is received after the reset") {
  auto ends = FdChannel::make_pair();
  REQUIRE(ends);
  auto& [ours, theirs] = *ends;
  REQUIRE(ours.send(Bytes(3)));  // never read: the peer's close becomes a reset
  REQUIRE(theirs.send(Bytes(5)));
  theirs.release().reset();
  bool would_block = false;
  const auto last_words = receive_to_the_end(ours, &would_block);
  REQUIRE(last_words);
  CHECK(last_words->bytes.size() == 5);
  const auto end = receive_to_the_end(ours, &would_block);
  REQUIRE_FALSE(end);
  CHECK(end.error().kind == ErrorKind::kGone);
}
