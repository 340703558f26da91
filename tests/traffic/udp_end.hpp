// SPDX-License-Identifier: Apache-2.0
// UdpEnd: one end of a set of numbered UDP flows, sending and receiving at once.
//
// Flow i runs between port base+i here and the same port there. One thread sends, paced, round robin over the flows;
// one receives. Both ends run the same code, so "to the guest" and "from the guest" are judged alike.
#pragma once

#include <netinet/in.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "common/result.hpp"
#include "common/unique_fd.hpp"
#include "tests/traffic/ledger.hpp"

namespace tandem::traffic {

/// One intact datagram: when this end's kernel took it from its device (CLOCK_MONOTONIC), and which it was.
struct Arrival {
  std::int64_t time_ns = 0;
  std::uint64_t flow_and_sequence = 0;  ///< flow in the upper 16 bits
};
static_assert(sizeof(Arrival) == 16);

struct FlowSetup {
  sockaddr_in peer{};  ///< its port is ignored
  std::uint16_t base_port = 0;
  std::uint32_t flows = 0;
  std::uint32_t rate = 0;  ///< datagrams a second, all flows together
};

struct SenderTotals {
  std::vector<std::uint64_t> sent;  ///< per flow, only what the socket accepted
  std::uint64_t refused = 0;        ///< tries that the socket or device queue refused; the number was used again
};

struct ReceiverTotals {
  std::vector<Ledger> ledgers;  ///< per flow
  std::uint64_t corrupt = 0;    ///< datagrams on our ports that are not as anyone sent them
  std::uint64_t socket_drops =
      0;  ///< lost by this end's own socket buffer: a fault of the measurement, not of the path
};

class UdpEnd {
 public:
  /// Opens the sockets and begins to receive. `send` may be called once, later.
  static Result<std::unique_ptr<UdpEnd>> open(const FlowSetup& setup);
  ~UdpEnd();
  UdpEnd(const UdpEnd&) = delete;
  UdpEnd& operator=(const UdpEnd&) = delete;

  void send();
  /// Returns when the last datagram has been handed to the kernel. Receiving goes on.
  void stop_sending();
  /// Ends receiving too; arrivals() may be used after that.
  void stop();

  [[nodiscard]] SenderTotals sender_totals() const;
  [[nodiscard]] ReceiverTotals receiver_totals() const;
  [[nodiscard]] std::uint64_t received() const;
  [[nodiscard]] const std::vector<Arrival>& arrivals() const { return arrivals_; }

 private:
  explicit UdpEnd(const FlowSetup& setup);
  void send_loop(const std::stop_token& stop);
  bool send_one(std::uint32_t flow);
  void receive_loop(const std::stop_token& stop);
  void receive_ready(std::uint32_t flow, std::int64_t realtime_to_monotonic);

  FlowSetup setup_;
  std::vector<UniqueFd> sockets_;
  mutable std::mutex lock_;  // guards the two totals
  SenderTotals sender_;
  ReceiverTotals receiver_;
  std::vector<std::uint64_t> drops_seen_;  // per flow, the socket's running count
  std::vector<Arrival> arrivals_;          // receiver thread's until stop()
  std::jthread receive_thread_;
  std::jthread send_thread_;
};

}  // namespace tandem::traffic
