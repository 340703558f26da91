// SPDX-License-Identifier: Apache-2.0
// The long TCP connection: a pseudo-random stream from the outside, echoed by the guest, compared byte for byte.
//
// Byte n of the stream follows from n alone, so either end can check any stretch of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <thread>

#include "common/result.hpp"
#include "common/unique_fd.hpp"

namespace tandem::traffic {

/// Fills `bytes` with the stream's bytes from `offset` on.
void stream_bytes(std::uint64_t offset, std::span<std::byte> bytes);

/// Guest's side: accepts one connection after the other on `port`, checks each byte and sends it back. Threads of its
/// own.
class EchoServer {
 public:
  static Result<std::unique_ptr<EchoServer>> open(std::uint16_t port);
  ~EchoServer();

  /// Of the latest connection.
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }
  [[nodiscard]] std::uint64_t wrong_bytes() const { return wrong_; }

 private:
  explicit EchoServer(UniqueFd listener) : listener_(std::move(listener)) {}
  void serve(const std::stop_token& stop);
  void echo(int connection, const std::stop_token& stop);

  UniqueFd listener_;
  std::atomic<std::uint64_t> bytes_ = 0;
  std::atomic<std::uint64_t> wrong_ = 0;
  std::jthread thread_;
};

struct StreamResult {
  std::uint64_t sent = 0;
  std::uint64_t returned = 0;
  std::uint64_t wrong_bytes = 0;
  std::uint64_t retransmitted_segments = 0;  ///< this end's, for the curious: TCP repairs what the path loses
  std::string failure;  ///< empty when every byte came back as it went and the stream ended in order
};

/// Outside's side: sends at `rate` bytes a second until finish().
class StreamClient {
 public:
  StreamClient(UniqueFd connection, std::uint64_t rate);
  ~StreamClient();

  [[nodiscard]] std::uint64_t returned() const { return returned_; }
  /// Stops sending, waits for the rest of the echo (each step bounded by the socket's timeout) and judges.
  StreamResult finish();

 private:
  void send_loop(const std::stop_token& stop);
  void receive_loop();
  void note_failure(const std::string& text);

  UniqueFd connection_;
  std::uint64_t rate_;
  std::atomic<std::uint64_t> sent_ = 0;
  std::atomic<std::uint64_t> returned_ = 0;
  std::atomic<std::uint64_t> wrong_ = 0;
  std::mutex lock_;
  std::string failure_;  // the first one
  std::jthread receiver_;
  std::jthread sender_;
};

}  // namespace tandem::traffic
