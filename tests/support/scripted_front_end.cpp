// SPDX-License-Identifier: Apache-2.0
// Messages and rings of the scripted front end.
#include "tests/support/scripted_front_end.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <array>
#include <atomic>
#include <catch2/catch.hpp>
#include <cstring>

namespace tandem::test {

namespace {

using R = VhostUserRequest;
constexpr int kFailsafeMs = 30'000;

// Virtio 1.2, 2.7.10: whether `event` lies in the range just published.
bool need_event(std::uint16_t event, std::uint16_t now, std::uint16_t before) {
  return static_cast<std::uint16_t>(now - event - 1) < static_cast<std::uint16_t>(now - before);
}

}  // namespace

std::uint16_t DriverQueue::used_index() const {
  return std::atomic_ref<std::uint16_t>(used->idx).load(std::memory_order_acquire);
}

void DriverQueue::make_available(std::span<const std::uint16_t> heads) {
  if (heads.empty()) return;
  const std::uint16_t before = avail_index;
  for (const std::uint16_t head : heads) avail->ring[avail_index++ & (size - 1)] = head;
  std::atomic_ref<std::uint16_t>(avail->idx).store(avail_index, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  std::uint16_t event = 0;
  std::memcpy(&event, &used->ring[size], sizeof event);
  const bool wanted =
      event_index ? need_event(event, avail_index, before) : (used->flags & VRING_USED_F_NO_NOTIFY) == 0;
  if (wanted) kick();
}

void DriverQueue::kick() {
  ++kicks;
  const std::uint64_t one = 1;
  REQUIRE(::write(kick_fd, &one, sizeof one) == sizeof one);
}

ScriptedFrontEnd::ScriptedFrontEnd(const std::string& path, FrontEndOptions options) : options_(options) {
  reconnect(path);
  make_memory();
}

void ScriptedFrontEnd::reconnect(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  REQUIRE(path.size() < sizeof address.sun_path);
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  socket_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (::connect(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    FAIL("connect to " << path << ": " << std::strerror(errno));
}

void ScriptedFrontEnd::resume() {
  for (std::uint32_t pair = 0; pair < options_.queue_pairs; ++pair) {
    for (std::uint32_t vring = 2 * pair; vring < 2 * pair + 2; ++vring) send_state(R::kSetVringEnable, vring, 1);
    send_body(R::kSetFeatures, options_.features);
    send_body(R::kSetStatus, std::uint64_t{8});
    if (pair == 0) {
      send_mem_table(true);
      REQUIRE(reply_u64(R::kSetMemTable) == 0);
    }
    for (std::uint32_t vring = 2 * pair; vring < 2 * pair + 2; ++vring) send_vring(vring, queues_[vring].used_index());
  }
  send_body(R::kSetStatus, std::uint64_t{15});
  settle();
}

VhostUserMemoryRegion ScriptedFrontEnd::extra_region() const {
  return {kBuffersGuest + mapping_.size(), 0x10000, kUser + mapping_.size(), 0};
}

void ScriptedFrontEnd::send_larger_mem_table(bool need_reply) {
  struct {
    VhostUserMemoryHeader header{3, 0};
    VhostUserMemoryRegion regions[3];
  } table;
  table.regions[0] = {0, rings_size_, kUser, 0};
  table.regions[1] = {kBuffersGuest, mapping_.size() - rings_size_, kUser + rings_size_, rings_size_};
  table.regions[2] = extra_region();
  const int fds[] = {memory_.get(), memory_.get(), extra_.get()};
  send_body(R::kSetMemTable, table, fds, need_reply);
}

void ScriptedFrontEnd::make_memory() {
  const std::uint32_t vrings = 2 * options_.queue_pairs;
  const std::uint64_t buffers = std::uint64_t{options_.ring_size} * DriverQueue::kBufferSize;
  rings_size_ = (vrings * DriverQueue::kAreaSize + 0xffff) & ~std::uint64_t{0xffff};
  const std::uint64_t size = rings_size_ + vrings * buffers;
  memory_.reset(::memfd_create("tandem-test-guest", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(::ftruncate(memory_.get(), static_cast<off_t>(size)) == 0);
  extra_.reset(::memfd_create("tandem-test-dimm", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(::ftruncate(extra_.get(), 0x10000) == 0);
  auto mapping = Mapping::map(memory_.get(), size, PROT_READ | PROT_WRITE, 0, "the scripted guest's memory");
  REQUIRE(mapping.has_value());
  mapping_ = std::move(*mapping);
  free_slots_.resize(options_.queue_pairs);
  for (std::uint32_t vring = 0; vring < vrings; ++vring) {
    DriverQueue queue;
    std::byte* area = mapping_.data() + vring * DriverQueue::kAreaSize;
    queue.size = options_.ring_size;
    queue.descriptors = reinterpret_cast<vring_desc*>(area);
    queue.avail = reinterpret_cast<vring_avail*>(area + DriverQueue::kAvailAt);
    queue.used = reinterpret_cast<vring_used*>(area + DriverQueue::kUsedAt);
    queue.buffers = mapping_.data() + rings_size_ + vring * buffers;
    queue.buffers_guest = kBuffersGuest + vring * buffers;
    queue.event_index = (options_.features & virtio_feature::kEventIdx) != 0;
    for (int* event : {&queue.kick_fd, &queue.call_fd}) {
      events_.emplace_back(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      *event = events_.back().get();
    }
    if (vring % 2 == 1)
      for (std::uint32_t slot = 0; slot < options_.ring_size / 2; ++slot)
        free_slots_[vring / 2].push_back(static_cast<std::uint16_t>(slot));
    queues_.push_back(queue);
  }
}

bool ScriptedFrontEnd::send_raw(std::span<const std::byte> bytes, std::span<const int> fds) {
  alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(253 * sizeof(int))> control{};
  iovec data{const_cast<std::byte*>(bytes.data()), bytes.size()};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* entry = CMSG_FIRSTHDR(&message);
    entry->cmsg_level = SOL_SOCKET;
    entry->cmsg_type = SCM_RIGHTS;
    entry->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(entry), fds.data(), fds.size_bytes());
  }
  return ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size());
}

void ScriptedFrontEnd::send(R request, std::span<const std::byte> payload, std::span<const int> fds, bool need_reply) {
  INFO("send " << vhost_user_message_name(static_cast<std::uint32_t>(request)));
  const auto bytes = make_vhost_user_message(request, need_reply ? VhostUserHeader::kNeedReply : 0, payload);
  REQUIRE(send_raw(bytes, fds));
}

bool ScriptedFrontEnd::readable(std::chrono::milliseconds limit) const {
  pollfd wait{socket_.get(), POLLIN, 0};
  return ::poll(&wait, 1, static_cast<int>(limit.count())) == 1;
}

bool ScriptedFrontEnd::read_exactly(void* data, std::size_t size) {
  std::size_t have = 0;
  while (have < size) {
    if (!readable(std::chrono::milliseconds{kFailsafeMs})) return false;
    const ssize_t got = ::recv(socket_.get(), static_cast<std::byte*>(data) + have, size - have, 0);
    if (got <= 0) return false;
    have += static_cast<std::size_t>(got);
  }
  return true;
}

std::vector<std::byte> ScriptedFrontEnd::reply(R request) {
  INFO("answer to " << vhost_user_message_name(static_cast<std::uint32_t>(request)));
  VhostUserHeader header;
  REQUIRE(read_exactly(&header, sizeof header));
  REQUIRE(header.request == static_cast<std::uint32_t>(request));
  REQUIRE(header.flags == (VhostUserHeader::kReply | VhostUserHeader::kVersion));
  REQUIRE(header.size <= kMaxVhostUserPayload);
  std::vector<std::byte> payload(header.size);
  REQUIRE(read_exactly(payload.data(), payload.size()));
  return payload;
}

std::uint64_t ScriptedFrontEnd::reply_u64(R request) {
  const auto payload = reply(request);
  REQUIRE(payload.size() == sizeof(std::uint64_t));
  return load_wire<std::uint64_t>(payload);
}

bool ScriptedFrontEnd::wait_closed() {
  std::byte bytes[256];
  while (readable(std::chrono::milliseconds{kFailsafeMs}))
    if (::recv(socket_.get(), bytes, sizeof bytes, 0) <= 0) return true;
  return false;
}

void ScriptedFrontEnd::settle_or_closed() {
  if (!send_raw(make_vhost_user_message(R::kGetFeatures, 0, {}))) return;
  VhostUserHeader header;
  while (read_exactly(&header, sizeof header)) {
    std::vector<std::byte> payload(std::min(header.size, kMaxVhostUserPayload));
    if (!read_exactly(payload.data(), payload.size()) || header.request == static_cast<std::uint32_t>(R::kGetFeatures))
      return;
  }
}

void ScriptedFrontEnd::negotiate() {
  for (std::uint32_t pair = 0; pair < options_.queue_pairs; ++pair) {
    ask(R::kGetFeatures);
    ask(R::kGetProtocolFeatures);
    send_body(R::kSetProtocolFeatures, protocol_feature::kMq | protocol_feature::kReplyAck | protocol_feature::kNetMtu |
                                           protocol_feature::kStatus);
    if (pair == 0) {
      REQUIRE(ask(R::kGetQueueNum) >= options_.queue_pairs);
      send(R::kSetOwner);
    }
    ask(R::kGetFeatures);
    for (std::uint32_t vring = 2 * pair; vring < 2 * pair + 2; ++vring) {
      const int call = queue(vring).call_fd;
      send_body(R::kSetVringCall, std::uint64_t{vring}, {{call}});
    }
  }
}

void ScriptedFrontEnd::send_mem_table(bool need_reply) {
  struct {
    VhostUserMemoryHeader header{2, 0};
    VhostUserMemoryRegion regions[2];
  } table;
  table.regions[0] = {0, rings_size_, kUser, 0};
  table.regions[1] = {kBuffersGuest, mapping_.size() - rings_size_, kUser + rings_size_, rings_size_};
  const int fds[] = {memory_.get(), memory_.get()};
  send_body(R::kSetMemTable, table, fds, need_reply);
}

void ScriptedFrontEnd::send_rings_only_table() {
  struct {
    VhostUserMemoryHeader header{1, 0};
    VhostUserMemoryRegion region;
  } table;
  table.region = {0, rings_size_, kUser, 0};
  const int fds[] = {memory_.get()};
  send_body(R::kSetMemTable, table, fds, true);
}

void ScriptedFrontEnd::reset_rings() {
  std::memset(mapping_.data(), 0, rings_size_);
  for (std::uint32_t vring = 0; vring < queues_.size(); ++vring) {
    queues_[vring].avail_index = queues_[vring].last_used = 0;
    if (vring % 2 == 0) continue;
    auto& slots = free_slots_[vring / 2];
    slots.clear();
    for (std::uint32_t slot = 0; slot < options_.ring_size / 2; ++slot)
      slots.push_back(static_cast<std::uint16_t>(slot));
  }
}

void ScriptedFrontEnd::send_vring(std::uint32_t vring, std::uint32_t base) {
  DriverQueue& queue = queues_[vring];
  const std::uint64_t area = kUser + vring * DriverQueue::kAreaSize;
  send_state(R::kSetVringNum, vring, queue.size);
  send_state(R::kSetVringBase, vring, base);
  send_body(R::kSetVringAddr,
            VhostUserVringAddress{vring, 0, area, area + DriverQueue::kUsedAt, area + DriverQueue::kAvailAt, 0});
  send_body(R::kSetVringKick, std::uint64_t{vring}, {{queue.kick_fd}});
  send_body(R::kSetVringCall, std::uint64_t{vring}, {{queue.call_fd}});
}

void ScriptedFrontEnd::start() {
  for (std::uint32_t pair = 0; pair < options_.queue_pairs; ++pair) {
    for (std::uint32_t vring = 2 * pair; vring < 2 * pair + 2; ++vring) send_state(R::kSetVringEnable, vring, 1);
    send_body(R::kSetFeatures, options_.features);
    send_body(R::kSetStatus, std::uint64_t{8});
    if (pair == 0) {
      send_mem_table(true);
      REQUIRE(reply_u64(R::kSetMemTable) == 0);
    }
    for (std::uint32_t vring = 2 * pair; vring < 2 * pair + 2; ++vring)
      send_vring(vring, packed() ? kPackedStartBase : queues_[vring].avail_index);
  }
  send_body(R::kSetStatus, std::uint64_t{15});
  settle();
  for (std::uint32_t pair = 0; options_.post_buffers && pair < options_.queue_pairs; ++pair) post_receive_buffers(pair);
}

void ScriptedFrontEnd::stop() {
  send_body(R::kSetStatus, std::uint64_t{0});
  for (std::uint32_t vring = 0; vring < 2 * options_.queue_pairs; ++vring) get_base(vring);
}

std::uint32_t ScriptedFrontEnd::get_base(std::uint32_t vring) {
  send_state(R::kGetVringBase, vring, 0);
  const auto state = load_wire<VhostUserVringState>(reply(R::kGetVringBase));
  REQUIRE(state.index == vring);
  return state.num;
}

void ScriptedFrontEnd::post_receive_buffers(std::uint32_t pair) {
  DriverQueue& queue = queues_[2 * pair];
  std::vector<std::uint16_t> heads;
  for (std::uint32_t slot = 0; slot < queue.size; ++slot) {
    queue.descriptors[slot] = {queue.buffers_guest + slot * DriverQueue::kBufferSize, DriverQueue::kBufferSize,
                               VRING_DESC_F_WRITE, 0};
    heads.push_back(static_cast<std::uint16_t>(slot));
  }
  queue.make_available(heads);
}

bool ScriptedFrontEnd::transmit(std::uint32_t pair, std::span<const std::uint8_t> frame) {
  DriverQueue& queue = queues_[2 * pair + 1];
  auto& slots = free_slots_[pair];
  if (slots.empty()) reclaim(pair);
  if (slots.empty()) return false;
  const std::uint16_t slot = slots.back();
  slots.pop_back();
  // Header and frame in a descriptor each, as Linux drivers lay them out without VERSION_1's freedom.
  const auto head = static_cast<std::uint16_t>(2 * slot);
  const std::uint64_t at = std::uint64_t{slot} * DriverQueue::kBufferSize;
  std::memset(queue.buffers + at, 0, kHeader);
  std::memcpy(queue.buffers + at + kHeader, frame.data(), frame.size());
  queue.descriptors[head] = {queue.buffers_guest + at, kHeader, VRING_DESC_F_NEXT,
                             static_cast<std::uint16_t>(head + 1)};
  queue.descriptors[head + 1] = {queue.buffers_guest + at + kHeader, static_cast<std::uint32_t>(frame.size()), 0, 0};
  queue.make_available({&head, 1});
  return true;
}

void ScriptedFrontEnd::reclaim(std::uint32_t pair) {
  DriverQueue& queue = queues_[2 * pair + 1];
  for (const std::uint16_t used = queue.used_index(); queue.last_used != used; ++queue.last_used) {
    const std::uint32_t id = queue.used->ring[queue.last_used & (queue.size - 1)].id;
    REQUIRE(id < queue.size);
    REQUIRE(id % 2 == 0);
    free_slots_[pair].push_back(static_cast<std::uint16_t>(id / 2));
  }
  REQUIRE(free_slots_[pair].size() <= queue.size / 2);  // more: one was returned twice
}

std::uint32_t ScriptedFrontEnd::in_flight(std::uint32_t pair) {
  reclaim(pair);
  return queues_[2 * pair + 1].size / 2 - static_cast<std::uint32_t>(free_slots_[pair].size());
}

std::vector<Frame> ScriptedFrontEnd::receive(std::uint32_t pair, bool repost) {
  DriverQueue& queue = queues_[2 * pair];
  std::vector<Frame> frames;
  std::vector<std::uint16_t> heads;
  for (const std::uint16_t used = queue.used_index(); queue.last_used != used; ++queue.last_used) {
    const vring_used_elem element = queue.used->ring[queue.last_used & (queue.size - 1)];
    REQUIRE(element.id < queue.size);
    REQUIRE(element.len >= kHeader);
    REQUIRE(element.len <= DriverQueue::kBufferSize);
    const auto* start = reinterpret_cast<const std::uint8_t*>(queue.buffers) + element.id * DriverQueue::kBufferSize;
    frames.emplace_back(start + kHeader, start + element.len);
    heads.push_back(static_cast<std::uint16_t>(element.id));
  }
  if (repost) queue.make_available(heads);
  return frames;
}

}  // namespace tandem::test
