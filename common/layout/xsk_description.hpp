// SPDX-License-Identifier: Apache-2.0
// XskDescription: everything a process needs to drive one AF_XDP socket from its shared rings alone, as plain data.
//
// The supervisor makes the socket and its UMEM (recovery/uplink/) and sends one XskDescription per queue pair, with two
// descriptors in this order: the socket, the UMEM memfd. A backend maps the four rings and the UMEM and knows all there
// is: the rings' indices live only in that shared memory, so an heir goes on where the dead owner stood. Source:
// include/uapi/linux/if_xdp.h, net/xdp/xsk.c, Documentation/networking/af_xdp.rst.
//
// Rules for whoever drives the rings (one owner at a time, each ring is single producer, single consumer):
//  - Frames are named by their offset in the UMEM. RX frames are [0, rx_frames), TX frames
//    [rx_frames, rx_frames + tx_frames), times frame_size. The maker has posted every RX frame on the fill ring.
//  - A received descriptor's address points somewhere inside its frame. The frame's start, address & ~(frame_size - 1),
//    is what goes back on the fill ring.
//  - No XDP_USE_NEED_WAKEUP: the flags word never says "no need". After publishing on TX call
//    sendto(fd, nullptr, 0, MSG_DONTWAIT, nullptr, 0) until the TX consumer has caught up. In copy mode one call sends
//    at most 32 frames, then EAGAIN: call again. EBUSY: the netdev dropped a frame (it completes all the same) or the
//    queue is full; ENOBUFS: no memory or completion ring full; for both call again later. ENETDOWN, ENXIO: the uplink
//    is down or gone, and the consumer will not move: stop calling until the supervisor says more. The fill ring needs
//    no call.
//  - With kBusyPoll the netdev's interrupts wait for whoever owns the rings:
//    recvfrom(fd, nullptr, 0, MSG_DONTWAIT, nullptr, nullptr) runs the queue's NAPI once in the caller
//    (Documentation/networking/napi.rst), and so does the call for TX. Call when RX is empty. If nobody does for
//    kInterruptDelayNs, the kernel goes on by itself.
//  - The socket is readable in epoll when RX is not empty. When its netdev went it reports EPOLLERR, and SO_ERROR is
//    ENETDOWN.
//
// A description with kInMemory has no socket: "measurement only" uplinks (docs/operations.md). The first descriptor is
// a memfd with the same four rings, all indices 0 at first and every RX frame posted, and whoever owns the rings plays
// the kernel too (vhost-net-backend/null_port.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace tandem {

inline constexpr std::uint32_t kXskDescriptionVersion = 2;
/// Frames per socket. Equal to the ring sizes, so that neither the fill nor the completion ring can ever overflow.
inline constexpr std::uint32_t kXskRxFrames = 2048;
inline constexpr std::uint32_t kXskTxFrames = 2048;
/// Room that the kernel leaves in front of each received frame (XDP_PACKET_HEADROOM, include/uapi/linux/bpf.h).
inline constexpr std::uint32_t kXskKernelHeadroom = 256;
/// The two frame sizes in use; a frame is never larger than a page. The larger one is for MTUs above kXskSmallFrameMtu.
inline constexpr std::uint32_t kXskSmallFrame = 2048;
inline constexpr std::uint32_t kXskLargeFrame = 4096;
/// Ethernet header and two VLAN tags, which an MTU does not count.
inline constexpr std::uint32_t kXskLinkHeader = 14 + 2 * 4;
inline constexpr std::uint32_t kXskSmallFrameMtu = kXskSmallFrame - kXskKernelHeadroom - kXskLinkHeader;  // 1770
inline constexpr std::uint32_t kXskLargestMtu = kXskLargeFrame - kXskKernelHeadroom - kXskLinkHeader;     // 3818
/// kBusyPoll: so long the kernel waits for the next call before it runs the queue's NAPI itself.
inline constexpr std::uint64_t kInterruptDelayNs = 200'000;
/// Descriptors that travel beside each XskDescription: the socket (kInMemory: the rings), then the UMEM.
inline constexpr std::uint32_t kXskFdsPerQueue = 2;

/// One ring as mmap() sees it: map `mmap_size` bytes of the socket at `mmap_offset`; the other fields are byte offsets
/// in that mapping. `producer` and `consumer` are free-running 32-bit indices (entry = index & (entries - 1)).
struct XskRing {
  std::uint64_t mmap_offset = 0;
  std::uint64_t mmap_size = 0;
  std::uint64_t producer = 0;
  std::uint64_t consumer = 0;
  std::uint64_t descriptors = 0;
  std::uint64_t flags = 0;
  std::uint32_t entries = 0;     ///< a power of two
  std::uint32_t entry_size = 0;  ///< 16 (struct xdp_desc) for RX and TX, 8 (address) for fill and completion
};

struct XskDescription {
  static constexpr std::uint32_t kZeroCopy = 1u << 0;
  /// Rings in a memfd, no netdev behind them. Frames on TX vanish and complete at once, unless kLoopback.
  static constexpr std::uint32_t kInMemory = 1u << 1;
  /// kInMemory: every frame on the fill ring comes back on RX at once, with what it holds, source_length bytes long.
  static constexpr std::uint32_t kSource = 1u << 2;
  /// kInMemory: frames on TX come back on RX, in order; they wait on TX for a frame on the fill ring.
  static constexpr std::uint32_t kLoopback = 1u << 3;
  /// The owner is to run the queue's NAPI. Never with kInMemory.
  static constexpr std::uint32_t kBusyPoll = 1u << 4;

  std::uint32_t version = kXskDescriptionVersion;
  std::uint32_t flags = 0;
  std::uint32_t ifindex = 0;  ///< netdev the socket is bound to, in the supervisor's network namespace
  std::uint32_t queue = 0;    ///< its RX/TX queue, equal to the queue pair's number
  std::uint32_t frame_size = 0;
  std::uint32_t headroom = 0;  ///< extra bytes in front of received frames beyond the kernel's own; 0 here
  std::uint32_t rx_frames = 0;
  std::uint32_t tx_frames = 0;
  std::uint32_t max_packet = 0;     ///< longest frame in bytes, link header included, that fits RX and TX frames alike
  std::uint32_t source_length = 0;  ///< kSource: bytes of each frame, from kXskKernelHeadroom on; else 0
  std::uint64_t umem_size = 0;      ///< (rx_frames + tx_frames) * frame_size
  XskRing rx;
  XskRing tx;
  XskRing fill;
  XskRing completion;
};

static_assert(std::is_trivially_copyable_v<XskDescription>);
static_assert(sizeof(XskRing) == 56);
static_assert(offsetof(XskDescription, rx) == 48);
static_assert(sizeof(XskDescription) == 48 + 4 * 56);

}  // namespace tandem
