// SPDX-License-Identifier: Apache-2.0
// Mapping of an AF_XDP socket's rings, and waking the kernel to transmit.
#include "vhost-net-backend/xsk_port.hpp"

#include <sys/mman.h>
#include <sys/socket.h>

#include <string>

#include "common/layout/segment.hpp"

namespace tandem {

namespace {

bool ring_is_sane(const XskRing& ring, std::uint64_t entry_size) {
  const bool power_of_two = ring.entries != 0 && (ring.entries & (ring.entries - 1)) == 0;
  const bool aligned = ring.producer % 4 == 0 && ring.consumer % 4 == 0 && ring.descriptors % 8 == 0;
  const auto inside = [&](std::uint64_t offset, std::uint64_t length) {
    return offset <= ring.mmap_size && length <= ring.mmap_size - offset;
  };
  return power_of_two && aligned && ring.entries <= (1u << 20) && inside(ring.producer, 4) &&
         inside(ring.consumer, 4) && inside(ring.descriptors, ring.entries * entry_size);
}

bool memory_is_sane(const XskDescription& description) {
  const bool source = (description.flags & XskDescription::kSource) != 0;
  const bool loopback = (description.flags & XskDescription::kLoopback) != 0;
  const bool polls = (description.flags & XskDescription::kBusyPoll) != 0;
  if ((description.flags & XskDescription::kInMemory) == 0) return !source && !loopback;
  // Neither ring of a pair may overflow: each entry that is taken from one is put on the other.
  return description.rx.entries >= description.rx_frames && description.rx.entries >= description.fill.entries &&
         description.completion.entries >= description.tx.entries &&
         description.max_packet <= description.frame_size - kXskKernelHeadroom && !(source && loopback) && !polls &&
         (!source || (description.source_length > 0 && description.source_length <= description.max_packet));
}

}  // namespace

Result<std::unique_ptr<XskPort>> XskPort::map(const XskDescription& description, UniqueFd socket, UniqueFd umem,
                                              const std::string& what) {
  if (description.version != kXskDescriptionVersion || !ring_is_sane(description.rx, sizeof(xdp_desc)) ||
      !ring_is_sane(description.tx, sizeof(xdp_desc)) || !ring_is_sane(description.fill, 8) ||
      !ring_is_sane(description.completion, 8) || description.frame_size < kXskSmallFrame ||
      description.frame_size > kXskLargeFrame || (description.frame_size & (description.frame_size - 1)) != 0 ||
      description.max_packet > description.frame_size || description.tx_frames % 64 != 0 ||
      description.tx_frames == 0 || description.tx_frames > kTransmitFrames ||
      (std::uint64_t{description.rx_frames} + description.tx_frames) * description.frame_size !=
          description.umem_size ||
      description.umem_size > std::uint64_t{1} << 32 ||  // RedoFrame::address
      !memory_is_sane(description))
    return fail(ErrorKind::kInvalid,
                "map " + what + ": the socket's description is inconsistent or of another version");
  std::unique_ptr<XskPort> port{new XskPort(description)};
  const XskRing* rings[] = {&description.rx, &description.tx, &description.fill, &description.completion};
  for (int i = 0; i < 4; ++i) {
    auto mapping = Mapping::map(socket.get(), rings[i]->mmap_size, PROT_READ | PROT_WRITE,
                                static_cast<off_t>(rings[i]->mmap_offset), what, MAP_SHARED | MAP_POPULATE);
    if (!mapping) return within("map AF_XDP ring", std::move(mapping.error()));
    port->maps_[i] = std::move(*mapping);
  }
  auto frames =
      Mapping::map_large(umem.get(), description.umem_size, PROT_READ | PROT_WRITE, what, MAP_SHARED | MAP_POPULATE);
  if (!frames) return within("map AF_XDP frames", std::move(frames.error()));
  port->maps_[4] = std::move(*frames);
  for (const Mapping& mapping : port->maps_) {
    ::madvise(mapping.data(), mapping.size(), MADV_DONTDUMP);
    ::madvise(mapping.data(), mapping.size(), MADV_DONTFORK);
  }
  port->rx = {port->maps_[0].data(), description.rx};
  port->tx = {port->maps_[1].data(), description.tx};
  port->fill = {port->maps_[2].data(), description.fill};
  port->completion = {port->maps_[3].data(), description.completion};
  port->frames_ = port->maps_[4].data();
  port->umem_size_ = description.umem_size;
  (port->in_memory() ? port->rings_ : port->socket_) = std::move(socket);
  port->umem_ = std::move(umem);
  port->seal_ = port->checksum();
  return port;
}

std::unique_ptr<XskPort> XskPort::over_memory(const XskDescription& description, std::byte* rings, std::byte* frames) {
  std::unique_ptr<XskPort> port{new XskPort(description)};
  port->rx = {rings + description.rx.mmap_offset, description.rx};
  port->tx = {rings + description.tx.mmap_offset, description.tx};
  port->fill = {rings + description.fill.mmap_offset, description.fill};
  port->completion = {rings + description.completion.mmap_offset, description.completion};
  port->frames_ = frames;
  port->umem_size_ = description.umem_size;
  port->seal_ = port->checksum();
  return port;
}

bool XskPort::wake_transmit() const {
  if (in_memory()) {
    play_kernel();
    return tx.consumer() == tx.producer();
  }
  if (!socket_) return true;
  // A call in copy mode sends at most 32 frames (net/xdp/xsk.c, TX_BATCH_SIZE); a burst fits one, a backlog needs more.
  for (int attempt = 0; attempt < 4 && tx.consumer() != tx.producer(); ++attempt) {
    if (::sendto(socket_.get(), nullptr, 0, MSG_DONTWAIT, nullptr, 0) < 0 && errno != EAGAIN) break;
  }
  return tx.consumer() == tx.producer();
}

void XskPort::poll_netdev() const {
  // A netdev that is down or gone answers ENETDOWN or ENXIO; there is nothing to poll then, and the supervisor says so.
  if (socket_ && rx.consumer() == rx.producer())
    (void)::recvfrom(socket_.get(), nullptr, 0, MSG_DONTWAIT, nullptr, nullptr);
}

}  // namespace tandem
