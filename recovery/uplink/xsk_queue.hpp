// SPDX-License-Identifier: Apache-2.0
// XskQueue: one AF_XDP socket with its UMEM, made by the supervisor and handed to backends by descriptor.
#pragma once

#include <cstdint>

#include "common/layout/xsk_description.hpp"
#include "common/result.hpp"
#include "common/unique_fd.hpp"

namespace tandem {

/// What the kernel counted for one socket (struct xdp_statistics, include/uapi/linux/if_xdp.h), in frames.
struct XskStatistics {
  std::uint64_t rx_dropped = 0;          ///< longer than a frame, or no memory
  std::uint64_t rx_invalid_descs = 0;    ///< bad addresses on the fill ring
  std::uint64_t tx_invalid_descs = 0;    ///< bad descriptors on the TX ring
  std::uint64_t rx_ring_full = 0;        ///< overflow: the consumer was too slow
  std::uint64_t rx_fill_ring_empty = 0;  ///< overflow: no free RX frame
  std::uint64_t tx_ring_empty = 0;       ///< wake-ups that found nothing to send
};

/// How a socket is driven.
struct XskMode {
  bool zero_copy = false;  ///< zero-copy if the driver has it; else copy mode
  /// Frames that one poll of whoever owns the rings takes from the netdev's queue at the most (SO_BUSY_POLL_BUDGET); 0:
  /// interrupts bring them. XskDescription::kBusyPoll tells whether it took effect: not without
  /// CONFIG_NET_RX_BUSY_POLL, and from Linux 6.13 on not with a driver that does not say which NAPI serves the queue
  /// (netif_queue_set_napi(): virtio_net does, veth does not). Before, the first frame tells, and it is only assumed
  /// here that the driver lets it (igb and tun do not).
  std::uint16_t busy_poll = 0;
};

/// Sole owner of its two descriptors. The socket stays bound, and in the XSKMAP, while any process holds a copy.
class XskQueue {
 public:
  /// Frame size for an MTU; kInvalid names the largest MTU when none is large enough.
  static Result<std::uint32_t> frame_size_for(std::uint32_t mtu);

  /// Makes socket and UMEM for `queue` of netdev `ifindex` and posts all RX frames on the fill ring. Needs CAP_NET_RAW,
  /// CAP_IPC_LOCK for the pinned UMEM, and CAP_NET_ADMIN to poll busily.
  static Result<XskQueue> open(std::uint32_t ifindex, std::uint32_t queue, std::uint32_t frame_size,
                               const XskMode& mode);

  /// A queue that another process made.
  XskQueue(const XskDescription& description, UniqueFd socket, UniqueFd umem) noexcept
      : socket_(std::move(socket)), umem_(std::move(umem)), description_(description) {}

  [[nodiscard]] const XskDescription& description() const noexcept { return description_; }
  [[nodiscard]] int socket_fd() const noexcept { return socket_.get(); }
  [[nodiscard]] int umem_fd() const noexcept { return umem_.get(); }

 private:
  XskQueue() = default;
  Status register_umem();
  Status make_rings();
  Status read_offsets();
  Status post_rx_frames();
  Status ask_for_busy_polling(int budget);
  Status bind(bool zero_copy);

  UniqueFd socket_;
  UniqueFd umem_;
  XskDescription description_;
};

/// Counters of the AF_XDP socket `fd`. Fails for anything that is not one, /dev/null for example.
Result<XskStatistics> xsk_statistics(int fd);

}  // namespace tandem
