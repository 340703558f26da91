// SPDX-License-Identifier: Apache-2.0
// Null queues: the rings and frames of an AF_XDP socket without the socket, for uplinks that exist to measure.
//
// What they look like and who serves them is in common/layout/xsk_description.hpp (kInMemory).
#pragma once

#include <cstdint>
#include <string>

#include "common/result.hpp"
#include "recovery/uplink/xsk_queue.hpp"

namespace tandem {

struct NullQueuePlan {
  std::uint32_t frame_size = kXskSmallFrame;
  std::uint32_t flags = 0;          ///< XskDescription::kSource or kLoopback; 0: what is sent vanishes, nothing comes
  std::uint32_t source_length = 0;  ///< kSource: bytes of each frame
  std::string to;                   ///< kSource: its destination, six bytes
};

/// Makes both memfds, sealed against resizing, with every RX frame posted. With kSource each RX frame holds an Ethernet
/// frame to `to` of type 0x88b5 (IEEE Std 802, local experiments).
Result<XskQueue> make_null_queue(std::uint32_t queue, const NullQueuePlan& plan);

}  // namespace tandem
