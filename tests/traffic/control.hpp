// SPDX-License-Identifier: Apache-2.0
// The control connection: one JSON object a line, a request from the outside and its answer from the guest's agent.
//
//   {"do":"clock"}                                     -> {"ok":true,"ns":N}          guest's CLOCK_MONOTONIC
//   {"do":"start","flows":N,"rate":N,"port":N}         -> {"ok":true}                 UDP both ways begins
//   {"do":"stop"}                                      -> {"ok":true}                 the guest sends no more
//   {"do":"status"}                                    -> {"ok":true,"sent":[..],"received":N}
//   {"do":"report"}                                    -> {"ok":true, see guest_agent.cpp}  receiving ends as well
//   {"do":"arrivals"}                                  -> {"ok":true,"count":N} and then N Arrival records, raw
//   {"do":"link"}                                      -> {"ok":true,"carrier_changes":N,"carrier":N}
//   {"do":"reboot"} / {"do":"poweroff"}                -> {"ok":true} and the guest does so
// A failure is {"ok":false,"error":TEXT}.
#pragma once

#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "common/result.hpp"
#include "common/unique_fd.hpp"

namespace tandem::traffic {

using Json = nlohmann::json;

inline constexpr std::uint16_t kControlPort = 7100;
inline constexpr std::uint16_t kStreamPort = 7101;
inline constexpr std::uint16_t kFlowPort = 7110;
inline constexpr std::uint32_t kMaxFlows = 16;

/// A connected socket that speaks lines of JSON. One thread.
class ControlConnection {
 public:
  explicit ControlConnection(UniqueFd socket) : socket_(std::move(socket)) {}

  /// The next object; kGone when the peer has left.
  Result<Json> receive();
  Status send(const Json& object);
  Status send_raw(std::span<const std::byte> bytes);
  Status receive_raw(std::span<std::byte> bytes);
  /// Sends a request and returns its answer; an answer with "ok": false becomes an Error.
  Result<Json> ask(const Json& request);
  [[nodiscard]] int fd() const { return socket_.get(); }

 private:
  UniqueFd socket_;
};

}  // namespace tandem::traffic
