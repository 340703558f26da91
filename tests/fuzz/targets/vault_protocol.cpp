// SPDX-License-Identifier: Apache-2.0
// Messages between tandemd and the vault, in both directions. Input: sender, descriptor kinds, the message's bytes.
#include "recovery/vault/protocol.hpp"
#include "tests/fuzz/targets/descriptors.hpp"

using namespace tandem;
using namespace tandem::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Descriptors descriptors;
  const DescriptorCheck all_closed;
  Input input(data, size);
  const std::uint8_t how = input.u8();
  const VaultSender sender = (how & 1u) != 0 ? VaultSender::kVault : VaultSender::kTandemd;
  ChannelMessage received;
  received.fds = descriptors.copies(input.take(how >> 1 & 0xfu));
  const auto bytes = input.take(input.left());
  received.bytes.assign(bytes.begin(), bytes.end());
  const std::size_t fds = received.fds.size();
  auto message = decode_vault_message(std::move(received), sender);
  if (!message) {
    must_hold(!message.error().text.empty(), "a refusal says why");
    return 0;
  }
  // What was understood can be said again, in the same bytes.
  must_hold(message->fds.size() == fds, "every descriptor is there");
  const auto again = encode_vault_message(message->type, message->name, message->connection, message->sequence,
                                          message->body, message->fds.size());
  must_hold(again.has_value(), "a message that was accepted can be encoded");
  must_hold(std::equal(again->begin(), again->end(), bytes.begin(), bytes.end()), "decoding loses nothing");
  return 0;
}
