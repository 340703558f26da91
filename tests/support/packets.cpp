// SPDX-License-Identifier: Apache-2.0
// Making and recognizing numbered packets.
#include "tests/support/packets.hpp"

#include <cstring>

namespace tandem::test {

namespace {
constexpr unsigned char kEthernet[14] = {2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5};

// A pattern that repeats neither with any power of two nor with the packet's number.
std::byte payload(std::uint32_t number, std::uint32_t at) {
  return static_cast<std::byte>((at * 7 + number * 131 + at / 23) & 0xffu);
}
}  // namespace

std::uint32_t PacketFlow::write(std::uint32_t number, std::span<std::byte> room) const {
  const std::uint32_t size = length(number);
  std::memcpy(room.data(), kEthernet, sizeof kEthernet);
  std::memcpy(room.data() + sizeof kEthernet, &number, sizeof number);
  for (std::uint32_t i = kShortestPacket; i < size; ++i) room[i] = payload(number, i);
  return size;
}

bool PacketFlow::intact(std::span<const std::byte> packet, std::uint32_t& number) const {
  if (packet.size() < kShortestPacket) return false;
  std::memcpy(&number, packet.data() + sizeof kEthernet, sizeof number);
  if (packet.size() != length(number) || std::memcmp(packet.data(), kEthernet, sizeof kEthernet) != 0) return false;
  for (std::uint32_t i = kShortestPacket; i < packet.size(); ++i)
    if (packet[i] != payload(number, i)) return false;
  return true;
}

Tally& Tally::operator+=(const Tally& other) {
  lost += other.lost;
  duplicated += other.duplicated;
  reordered += other.reordered;
  corrupt += other.corrupt;
  return *this;
}

void Ledger::note(std::span<const std::byte> packet) {
  ++arrived_;
  std::uint32_t number = 0;
  if (!flow_.intact(packet, number)) {
    ++tally_.corrupt;
    return;
  }
  constexpr std::uint32_t kMost = 1u << 24;  // a bound against nonsense
  if (number >= kMost) {
    ++tally_.corrupt;
    return;
  }
  if (seen_.size() <= number) seen_.resize(number + 1);
  if (seen_[number] != 0)
    ++tally_.duplicated;
  else if (number < next_)
    ++tally_.reordered;
  seen_[number] = 1;
  if (number >= next_) next_ = number + 1;
}

Tally Ledger::finish(std::uint32_t sent) const {
  Tally tally = tally_;
  for (std::uint32_t i = 0; i < sent; ++i)
    if (i >= seen_.size() || seen_[i] == 0) ++tally.lost;
  for (std::size_t i = sent; i < seen_.size(); ++i)
    if (seen_[i] != 0) ++tally.corrupt;
  return tally;
}

}  // namespace tandem::test
