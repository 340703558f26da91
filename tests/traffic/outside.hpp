// SPDX-License-Identifier: Apache-2.0
// The outside's end of the traffic: drives the guest's agent, measures, writes the report.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "common/result.hpp"
#include "tests/traffic/control.hpp"

namespace tandem::traffic {

struct OutsideOptions {
  std::string guest;                      ///< IPv4 address of the agent
  double seconds = 0;                     ///< 0: until SIGTERM or SIGINT
  std::uint32_t flows = 2;                ///< UDP flows, each both ways
  std::uint16_t port = kFlowPort;         ///< of the first flow, at both ends
  std::uint32_t rate = 1000;              ///< datagrams a second each way, all flows together
  std::uint64_t stream_rate = 256 << 10;  ///< bytes a second of the TCP stream
  std::string json;                       ///< report file; empty: standard output
  std::string arrivals;                   ///< prefix of the two arrivals files; empty: none
  std::chrono::milliseconds connect_limit{60'000};
  std::chrono::milliseconds drain_limit{10'000};
};

/// Runs the traffic and writes the report. Prints "running" and then one progress object a line four times a second.
/// True when nothing was lost, duplicated, reordered or corrupted, the stream is whole and the guest's link never
/// changed.
Result<bool> run_outside(const OutsideOptions& options);

}  // namespace tandem::traffic
