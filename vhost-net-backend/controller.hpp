// SPDX-License-Identifier: Apache-2.0
// Controller: a backend's control thread. Obeys the supervisor's control channel, maps what poll threads will need,
// reports back.
//
// Slow things (mapping, unmapping, reading messages) happen here so that poll threads never wait. When the supervisor
// goes away the datapath goes on; only when the channel is closed for good (supervisor and vault both gone) does run()
// return.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "common/fd_channel.hpp"
#include "common/fence_view.hpp"
#include "common/layout/control_message.hpp"
#include "common/mapping.hpp"
#include "vhost-net-backend/shard.hpp"

namespace tandem {

class Controller {
 public:
  explicit Controller(FdChannel channel) : channel_(std::move(channel)) {}

  /// Waits for the supervisor's greeting and makes the shards; the caller then starts their threads.
  Status greet(std::uint64_t tsc_hz);
  [[nodiscard]] std::vector<std::unique_ptr<Shard>>& shards() { return shards_; }
  /// Reports ready, then serves until the channel closes. An error if it cannot have what it is to serve before it is
  /// armed: it would be an heir of nothing.
  Status run();

 private:
  Status obey(ChannelMessage message);
  [[nodiscard]] bool owns() const;
  [[nodiscard]] int until_warming_ms() const;
  void warm_some();
  Status attach(std::span<const std::byte> body, std::vector<UniqueFd> fds);
  Status cannot_attach(std::uint32_t device, const std::string& why);
  Status describe(std::span<const std::byte> body, std::vector<UniqueFd> fds);
  void relay(std::uint32_t shard, ShardEvent& event);
  template <class Body>
  Status report(ControlType type, const Body& body);
  Status report_poison(std::uint32_t shard, const PoisonEvent& event);
  void problem(std::uint32_t device, const std::string& text);

  FdChannel channel_;
  Mapping segment_mapping_;
  Segment* segment_ = nullptr;
  FenceView fence_;
  std::vector<std::unique_ptr<Shard>> shards_;
  bool armed_ = false;  ///< some shard may own
  // When to begin warming buffers again (CLOCK_MONOTONIC), and how far this round of it has come.
  std::uint64_t warm_at_ns_ = 0;
  std::uint32_t warm_device_ = 0, warm_vring_ = 0;
  std::uint32_t warm_round_ = 0;
  std::vector<std::vector<std::uint64_t>> warmed_{kMaxDevices};  // by device and vring, see Device::warm_buffers()
  bool described_ = false;                                       ///< something new since the last round
  std::vector<std::uint32_t> tags_;                              ///< of each shard's thread; 0: it may not own
  // The newest generation of each device, whose memory mappings the next one may share.
  std::vector<std::shared_ptr<const Device>> newest_{kMaxDevices};
};

}  // namespace tandem
