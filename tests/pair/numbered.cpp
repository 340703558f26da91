// SPDX-License-Identifier: Apache-2.0
// Making, sending and counting numbered frames.
#include "tests/pair/numbered.hpp"

#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <sys/socket.h>

#include <catch2/catch.hpp>
#include <cstdio>
#include <cstring>

namespace tandem::test {

namespace {

const std::string kOutsideMac = "02:00:00:00:00:01";
constexpr std::size_t kPayloadAt = 14 + 20 + 8;
constexpr std::uint16_t kFirstPort = 20'000;
constexpr std::uint32_t kMagic = 0x6d646e74;

void put_mac(std::uint8_t* at, const std::string& text) {
  unsigned bytes[6] = {};
  std::sscanf(text.c_str(), "%x:%x:%x:%x:%x:%x", &bytes[0], &bytes[1], &bytes[2], &bytes[3], &bytes[4], &bytes[5]);
  for (int i = 0; i < 6; ++i) at[i] = static_cast<std::uint8_t>(bytes[i]);
}

void put16(std::uint8_t* at, std::size_t value) {
  at[0] = static_cast<std::uint8_t>(value >> 8);
  at[1] = static_cast<std::uint8_t>(value);
}

std::uint8_t pattern(std::uint16_t flow, std::uint32_t number, std::size_t at) {
  return static_cast<std::uint8_t>(number * 31 + flow * 7 + at);
}

}  // namespace

Frame numbered_frame(const std::string& to, const std::string& from, std::uint16_t flow, std::uint32_t number,
                     std::size_t size) {
  Frame frame(std::max<std::size_t>(size, 64));
  put_mac(frame.data(), to);
  put_mac(frame.data() + 6, from);
  put16(frame.data() + 12, ETH_P_IP);
  const std::uint8_t ip[] = {0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 9, 8, 1, 10, 9, 8, 2};
  std::memcpy(frame.data() + 14, ip, sizeof ip);
  put16(frame.data() + 16, frame.size() - 14);
  std::uint32_t sum = 0;
  for (int i = 0; i < 20; i += 2) sum += static_cast<std::uint32_t>(frame[14 + i] << 8 | frame[15 + i]);
  while (sum >> 16 != 0) sum = (sum & 0xffff) + (sum >> 16);
  put16(frame.data() + 24, ~sum & 0xffff);
  put16(frame.data() + 34, 1000u + flow * 37u);
  put16(frame.data() + 36, kFirstPort + flow);
  put16(frame.data() + 38, frame.size() - 34);
  std::memcpy(frame.data() + kPayloadAt, &kMagic, 4);
  std::memcpy(frame.data() + kPayloadAt + 4, &number, 4);
  const auto length = static_cast<std::uint32_t>(frame.size());
  std::memcpy(frame.data() + kPayloadAt + 8, &length, 4);
  for (std::size_t at = kPayloadAt + 12; at < frame.size(); ++at) frame[at] = pattern(flow, number, at);
  return frame;
}

std::optional<Numbered> parse_numbered(const Frame& frame) {
  std::uint32_t magic = 0, length = 0;
  if (frame.size() < kPayloadAt + 12 || frame[12] != 8 || frame[13] != 0) return {};
  std::memcpy(&magic, frame.data() + kPayloadAt, sizeof magic);
  if (magic != kMagic) return {};
  Numbered found;
  found.flow = static_cast<std::uint16_t>((frame[36] << 8 | frame[37]) - kFirstPort);
  std::memcpy(&found.number, frame.data() + kPayloadAt + 4, 4);
  std::memcpy(&length, frame.data() + kPayloadAt + 8, 4);
  found.intact = length == frame.size();
  for (std::size_t at = kPayloadAt + 12; found.intact && at < frame.size(); ++at)
    found.intact = frame[at] == pattern(found.flow, found.number, at);
  return found;
}

void FlowAccount::note(std::uint32_t number, bool intact) {
  if (!intact) {
    ++corrupt;
    return;
  }
  if (number >= seen_.size()) seen_.resize(number + 1024);
  if (seen_[number]) {
    ++duplicated;
    return;
  }
  seen_[number] = true;
  if (arrived_++ > 0 && number < highest_) ++reordered;
  highest_ = std::max(highest_, number);
}

std::uint64_t FlowAccount::lost(std::uint32_t sent) const {
  std::uint64_t missing = 0;
  for (std::uint32_t number = 0; number < sent; ++number) missing += number >= seen_.size() || !seen_[number];
  return missing;
}

Outside::Outside(const char* netdev) : socket_(::socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) {
  REQUIRE(socket_);
  const int bytes = 64 << 20, one = 1;
  ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes);
  ::setsockopt(socket_.get(), SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof one);
  sockaddr_ll address{};
  address.sll_family = AF_PACKET;
  address.sll_protocol = htons(ETH_P_IP);
  address.sll_ifindex = static_cast<int>(::if_nametoindex(netdev));
  REQUIRE(::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
}

void Outside::send(std::span<const std::uint8_t> frame) {
  while (::send(socket_.get(), frame.data(), frame.size(), 0) < 0) {
    if (errno != EAGAIN && errno != ENOBUFS) FAIL("send from the outside: " << std::strerror(errno));
    pollfd wait{socket_.get(), POLLOUT, 0};
    ::poll(&wait, 1, 1);
  }
}

std::vector<Frame> Outside::receive() {
  std::vector<Frame> frames;
  std::uint8_t buffer[4096];
  for (ssize_t got = 0; frames.size() < 256 && (got = ::recv(socket_.get(), buffer, sizeof buffer, 0)) > 0;)
    frames.emplace_back(buffer, buffer + got);
  return frames;
}

std::ostream& operator<<(std::ostream& out, const TrafficResult& result) {
  return out << result.sent_in << " in, " << result.sent_out << " out: " << result.lost << " lost, "
             << result.duplicated << " duplicated, " << result.reordered << " reordered, " << result.corrupt
             << " corrupt";
}

Traffic::Traffic(ScriptedFrontEnd& guest, std::string mac, Options options)
    : guest_(guest), mac_(std::move(mac)), options_(options) {
  next_in_.resize(options_.in ? options_.flows_in : 0);
  next_out_.resize(options_.out ? guest.options().queue_pairs : 0);
  by_pair_.resize(guest.options().queue_pairs);
}

std::uint64_t Traffic::arrived_in() const {
  std::uint64_t sum = 0;
  for (const auto& [flow, account] : in_) sum += account.arrived();
  return sum;
}

std::uint64_t Traffic::arrived_out() const {
  std::uint64_t sum = 0;
  for (const auto& [flow, account] : out_) sum += account.arrived();
  return sum;
}

std::uint64_t Traffic::least_out() const {
  if (out_.size() < next_out_.size()) return 0;
  std::uint64_t least = ~std::uint64_t{0};
  for (const auto& [flow, account] : out_) least = std::min(least, account.arrived());
  return least;
}

std::size_t Traffic::send_in() {
  std::uint64_t sent = 0;
  for (const std::uint32_t next : next_in_) sent += next;
  std::size_t moved = 0;
  for (; !next_in_.empty() && moved < 32 && sent - arrived_in() + moved < options_.window_in; ++moved) {
    const auto flow = static_cast<std::uint16_t>(turn_++ % next_in_.size());
    const std::uint32_t number = next_in_[flow]++;
    outside_.send(numbered_frame(mac_, kOutsideMac, flow, number, 64 + number * 41 % 1400));
  }
  return moved;
}

std::size_t Traffic::send_out() {
  std::size_t moved = 0;
  for (std::uint32_t pair = 0; pair < next_out_.size(); ++pair) {
    for (int burst = 0; burst < 16; ++burst, ++moved) {
      const std::uint32_t number = next_out_[pair];
      const auto flow = static_cast<std::uint16_t>(pair);
      if (!guest_.transmit(pair, numbered_frame(kOutsideMac, mac_, flow, number, 64 + number * 53 % 1400))) break;
      ++next_out_[pair];
    }
  }
  return moved;
}

void Traffic::account(const Frame& frame, std::map<std::uint16_t, FlowAccount>& flows, const std::string& to) {
  std::uint8_t mac[6];
  put_mac(mac, to);
  // The bridge floods what it has not learned: not ours.
  const auto found = parse_numbered(frame);
  if (!found || std::memcmp(frame.data(), mac, 6) != 0 || found->flow >= kUncountedFlow) return;
  flows[found->flow].note(found->number, found->intact);
}

std::size_t Traffic::take() {
  std::size_t moved = 0;
  for (std::uint32_t pair = 0; pair < guest_.options().queue_pairs; ++pair) {
    for (const Frame& frame : guest_.receive(pair)) {
      account(frame, in_, mac_);
      ++by_pair_[pair];
      ++moved;
    }
  }
  std::uint8_t mac[6];
  put_mac(mac, mac_);
  for (const Frame& frame : outside_.receive()) {
    // Another guest's traffic arrives here too.
    if (std::memcmp(frame.data() + 6, mac, 6) == 0) account(frame, out_, kOutsideMac);
    ++moved;
  }
  return moved;
}

std::size_t Traffic::pump(bool send) {
  std::size_t moved = take();
  if (send) moved += send_in() + send_out();
  return moved;
}

bool Traffic::pump_until(const std::function<bool()>& done) {
  const auto deadline = std::chrono::steady_clock::now() + kFailsafe;
  while (!done()) {
    if (pump() != 0) continue;
    if (std::chrono::steady_clock::now() > deadline) return false;
    ::poll(nullptr, 0, 1);
  }
  return true;
}

bool Traffic::pump_frames(std::uint64_t frames) {
  const std::uint64_t in = arrived_in() + frames, out = arrived_out() + frames;
  return pump_until([&] { return (!options_.in || arrived_in() >= in) && (!options_.out || arrived_out() >= out); });
}

TrafficResult Traffic::finish(std::chrono::milliseconds patience) {
  TrafficResult result;
  for (const std::uint32_t next : next_in_) result.sent_in += next;
  for (const std::uint32_t next : next_out_) result.sent_out += next;
  auto deadline = std::chrono::steady_clock::now() + patience;
  while (arrived_in() < result.sent_in || arrived_out() < result.sent_out) {
    if (pump(false) != 0)
      deadline = std::chrono::steady_clock::now() + patience;
    else if (std::chrono::steady_clock::now() > deadline)
      break;
    else
      ::poll(nullptr, 0, 1);
  }
  for (std::size_t flow = 0; flow < next_in_.size(); ++flow)
    result.lost += in_[static_cast<std::uint16_t>(flow)].lost(next_in_[flow]);
  for (std::size_t flow = 0; flow < next_out_.size(); ++flow)
    result.lost += out_[static_cast<std::uint16_t>(flow)].lost(next_out_[flow]);
  for (const auto* flows : {&in_, &out_}) {
    for (const auto& [flow, account] : *flows) {
      result.duplicated += account.duplicated;
      result.reordered += account.reordered;
      result.corrupt += account.corrupt;
    }
  }
  return result;
}

}  // namespace tandem::test
