// SPDX-License-Identifier: Apache-2.0
// Small helpers around sockets and clocks for both ends. IPv4 only; errors as Result.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <chrono>
#include <cstdint>
#include <string>

#include "common/result.hpp"
#include "common/unique_fd.hpp"

namespace tandem::traffic {

/// CLOCK_MONOTONIC, or another clock, in ns.
std::int64_t now_ns(clockid_t clock = CLOCK_MONOTONIC);

Result<sockaddr_in> parse_address(const std::string& ip, std::uint16_t port);
std::string to_string(const sockaddr_in& address);

/// A listening TCP socket on all addresses.
Result<UniqueFd> listen_tcp(std::uint16_t port);

/// Connects over TCP, trying again until `limit` has passed: the peer may be booting.
Result<UniqueFd> connect_tcp(const sockaddr_in& peer, std::chrono::milliseconds limit);

/// Bounds how long a blocking send or receive on `socket` may take.
void set_timeouts(int socket, std::chrono::milliseconds limit);

/// Sends all of `size` bytes. False when the connection is gone or its timeout has passed (errno tells).
bool send_all(int socket, const void* data, std::size_t size);
/// Receives exactly `size` bytes. False as in send_all, or at the end of the stream.
bool receive_all(int socket, void* data, std::size_t size);

}  // namespace tandem::traffic
