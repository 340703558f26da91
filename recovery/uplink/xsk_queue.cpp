// SPDX-License-Identifier: Apache-2.0
// AF_XDP through system calls alone: the rings' indices are never cached in this process.
#include "recovery/uplink/xsk_queue.hpp"

#include <linux/if_xdp.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <string>

#include "common/mapping.hpp"
#include "recovery/fence/kernel_version.hpp"
#include "recovery/uplink/sealed_memory.hpp"

namespace tandem {
namespace {

constexpr int kBindAttempts = 200;
constexpr unsigned kBindRetryMicroseconds = 5000;

std::string name_of(const XskDescription& description) {
  return "AF_XDP socket of queue " + std::to_string(description.queue) + ", netdev " +
         std::to_string(description.ifindex);
}

Status set_option(int fd, int option, const void* value, socklen_t size, const std::string& doing) {
  if (::setsockopt(fd, SOL_XDP, option, value, size) != 0)
    return fail_errno(doing, errno == ENOPROTOOPT ? "the kernel needs CONFIG_XDP_SOCKETS=y, as Debian's have" : "");
  return {};
}

XskRing ring_at(const xdp_ring_offset& offsets, std::uint64_t mmap_offset, std::uint32_t entries,
                std::size_t entry_size) {
  XskRing ring;
  ring.mmap_offset = mmap_offset;
  ring.mmap_size = offsets.desc + entries * entry_size;
  ring.producer = offsets.producer;
  ring.consumer = offsets.consumer;
  ring.descriptors = offsets.desc;
  ring.flags = offsets.flags;
  ring.entries = entries;
  ring.entry_size = static_cast<std::uint32_t>(entry_size);
  return ring;
}

}  // namespace

Result<std::uint32_t> XskQueue::frame_size_for(std::uint32_t mtu) {
  if (mtu <= kXskSmallFrameMtu) return kXskSmallFrame;
  if (mtu <= kXskLargestMtu) return kXskLargeFrame;
  return fail(ErrorKind::kInvalid, "choose a frame size: MTU " + std::to_string(mtu) +
                                       " does not fit; an AF_XDP frame is at "
                                       "most one page, so set an MTU of at most " +
                                       std::to_string(kXskLargestMtu));
}

Result<XskQueue> XskQueue::open(std::uint32_t ifindex, std::uint32_t queue, std::uint32_t frame_size,
                                const XskMode& mode) {
  XskQueue made;
  XskDescription& description = made.description_;
  description.ifindex = ifindex;
  description.queue = queue;
  description.frame_size = frame_size;
  description.rx_frames = kXskRxFrames;
  description.tx_frames = kXskTxFrames;
  description.max_packet = frame_size - kXskKernelHeadroom;
  description.umem_size = std::uint64_t{kXskRxFrames + kXskTxFrames} * frame_size;

  made.socket_ = UniqueFd{::socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0)};
  if (!made.socket_)
    return fail_errno("make " + name_of(description),
                      errno == EAFNOSUPPORT ? "the kernel needs CONFIG_XDP_SOCKETS=y, as Debian's have" : "needs root");
  Status step = made.register_umem();
  if (step) step = made.make_rings();
  if (step) step = made.read_offsets();
  if (step) step = made.post_rx_frames();
  if (step) step = made.bind(mode.zero_copy);
  if (step && mode.busy_poll != 0) step = made.ask_for_busy_polling(mode.busy_poll);
  if (!step) return within("make " + name_of(description), std::move(step.error()));
  return made;
}

Status XskQueue::register_umem() {
  auto frames = make_frames("tandem-umem", description_.umem_size);
  if (!frames) return tl::make_unexpected(std::move(frames.error()));
  umem_ = std::move(*frames);
  // The kernel pins the pages; this mapping is not needed after registration.
  auto mapping = Mapping::map(umem_.get(), description_.umem_size, PROT_READ | PROT_WRITE, 0, "UMEM");
  if (!mapping) return tl::make_unexpected(std::move(mapping.error()));
  xdp_umem_reg registration{};
  registration.addr = reinterpret_cast<std::uint64_t>(mapping->data());
  registration.len = description_.umem_size;
  registration.chunk_size = description_.frame_size;
  registration.headroom = description_.headroom;
  return set_option(socket_.get(), XDP_UMEM_REG, &registration, sizeof registration,
                    "register " + std::to_string(description_.umem_size >> 20) + " MiB of UMEM");
}

Status XskQueue::make_rings() {
  const std::uint32_t rx = kXskRxFrames;
  const std::uint32_t tx = kXskTxFrames;
  Status step = set_option(socket_.get(), XDP_UMEM_FILL_RING, &rx, sizeof rx, "make the fill ring");
  if (step) step = set_option(socket_.get(), XDP_UMEM_COMPLETION_RING, &tx, sizeof tx, "make the completion ring");
  if (step) step = set_option(socket_.get(), XDP_RX_RING, &rx, sizeof rx, "make the RX ring");
  if (step) step = set_option(socket_.get(), XDP_TX_RING, &tx, sizeof tx, "make the TX ring");
  return step;
}

Status XskQueue::read_offsets() {
  xdp_mmap_offsets offsets{};
  socklen_t size = sizeof offsets;
  if (::getsockopt(socket_.get(), SOL_XDP, XDP_MMAP_OFFSETS, &offsets, &size) != 0)
    return fail_errno("read ring offsets");
  if (size != sizeof offsets)
    return fail(ErrorKind::kUnsupported, "read ring offsets: this kernel reports no flags words");
  description_.rx = ring_at(offsets.rx, XDP_PGOFF_RX_RING, kXskRxFrames, sizeof(xdp_desc));
  description_.tx = ring_at(offsets.tx, XDP_PGOFF_TX_RING, kXskTxFrames, sizeof(xdp_desc));
  description_.fill = ring_at(offsets.fr, XDP_UMEM_PGOFF_FILL_RING, kXskRxFrames, sizeof(std::uint64_t));
  description_.completion = ring_at(offsets.cr, XDP_UMEM_PGOFF_COMPLETION_RING, kXskTxFrames, sizeof(std::uint64_t));
  return {};
}

Status XskQueue::post_rx_frames() {
  const XskRing& fill = description_.fill;
  auto mapping = Mapping::map(socket_.get(), fill.mmap_size, PROT_READ | PROT_WRITE,
                              static_cast<off_t>(fill.mmap_offset), "fill ring");
  if (!mapping) return tl::make_unexpected(std::move(mapping.error()));
  auto* entries = reinterpret_cast<std::uint64_t*>(mapping->data() + fill.descriptors);
  for (std::uint64_t frame = 0; frame < description_.rx_frames; ++frame)
    entries[frame] = frame * description_.frame_size;
  // Release: the kernel reads the entries after it has seen the producer index.
  __atomic_store_n(reinterpret_cast<std::uint32_t*>(mapping->data() + fill.producer), description_.rx_frames,
                   __ATOMIC_RELEASE);
  return {};
}

Status XskQueue::ask_for_busy_polling(int budget) {
  unsigned napi = 0;
  socklen_t size = sizeof napi;
  if (::getsockopt(socket_.get(), SOL_SOCKET, SO_INCOMING_NAPI_ID, &napi, &size) != 0) napi = 0;
  if (napi == 0 && !frames_tell_napi(running_kernel_release())) return {};
  // A call that does not wait polls once, however long the time is; but 0 switches it off (sk_can_busy_loop()).
  constexpr int kMicroseconds = 1;
  constexpr int kOn = 1;
  const std::pair<int, const int*> options[] = {
      {SO_PREFER_BUSY_POLL, &kOn}, {SO_BUSY_POLL, &kMicroseconds}, {SO_BUSY_POLL_BUDGET, &budget}};
  for (const auto& [option, value] : options) {
    if (::setsockopt(socket_.get(), SOL_SOCKET, option, value, sizeof *value) == 0) continue;
    if (errno == ENOPROTOOPT) return {};
    return fail_errno("ask the kernel for busy polling with a budget of " + std::to_string(budget),
                      errno == EPERM ? "needs CAP_NET_ADMIN; else set pair.busy_poll = 0" : "");
  }
  description_.flags |= XskDescription::kBusyPoll;
  return {};
}

Status XskQueue::bind(bool zero_copy) {
  sockaddr_xdp address{};
  address.sxdp_family = AF_XDP;
  address.sxdp_ifindex = description_.ifindex;
  address.sxdp_queue_id = description_.queue;
  // Without XDP_USE_NEED_WAKEUP the flags words stay 0, and a consumer that knows only the rings needs no more rules
  // than those in xsk_description.hpp. No mode flag means: zero-copy if the driver can, else copy.
  address.sxdp_flags = zero_copy ? std::uint16_t{0} : std::uint16_t{XDP_COPY};
  // The kernel frees the queue of a closed socket from a work item (xp_release_deferred, net/xdp/xsk_buff_pool.c), and
  // tells nobody when: a netdev that was an uplink a moment ago answers EBUSY for some milliseconds.
  int error = 0;
  for (int attempt = 0; attempt < kBindAttempts; ++attempt) {
    error = ::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ? 0 : errno;
    if (error != EBUSY) break;
    ::usleep(kBindRetryMicroseconds);
  }
  const char* remedy = error == EBUSY    ? "another program has an AF_XDP socket on this queue: stop it"
                       : error == EINVAL ? "the netdev has fewer queues than the device has queue pairs"
                                         : "";
  if (error != 0) return fail_errno("bind it", remedy, error);
  xdp_options options{};
  socklen_t size = sizeof options;
  if (::getsockopt(socket_.get(), SOL_XDP, XDP_OPTIONS, &options, &size) == 0 &&
      (options.flags & XDP_OPTIONS_ZEROCOPY) != 0)
    description_.flags |= XskDescription::kZeroCopy;
  return {};
}

Result<XskStatistics> xsk_statistics(int fd) {
  xdp_statistics counters{};
  socklen_t size = sizeof counters;
  if (::getsockopt(fd, SOL_XDP, XDP_STATISTICS, &counters, &size) != 0)
    return fail_errno("read AF_XDP statistics of descriptor " + std::to_string(fd));
  return XskStatistics{counters.rx_dropped,   counters.rx_invalid_descs,         counters.tx_invalid_descs,
                       counters.rx_ring_full, counters.rx_fill_ring_empty_descs, counters.tx_ring_empty_descs};
}

}  // namespace tandem
