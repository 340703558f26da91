// SPDX-License-Identifier: Apache-2.0
// The backend's side of the control channel (layout/control_message.hpp).
#include "vhost-net-backend/controller.hpp"

#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

namespace tandem {

namespace {

// How often a standby warms the buffers in use.
constexpr std::uint64_t kWarmEveryNs = 10'000'000'000;
// Every so many rounds also those of virtqueues that name the same pages as before: the kernel may have taken them out
// of the page tables since (reclaim, migration).
constexpr std::uint32_t kWarmAnewRounds = 6;
// How soon again after a description, for a ring that was just started names few yet.
constexpr std::uint64_t kWarmAgainNs = 1'000'000'000;

template <class Body>
bool read_body(std::span<const std::byte> bytes, Body& body) {
  if (bytes.size() < sizeof body) return false;
  std::memcpy(&body, bytes.data(), sizeof body);
  return true;
}

tl::unexpected<Error> malformed(const char* what) {
  return fail(ErrorKind::kInvalid, std::string("obey the supervisor: malformed ") + what + " message");
}

Result<ControlHeader> check_header(const ChannelMessage& message) {
  ControlHeader header;
  if (!read_body(message.bytes, header) || header.magic != kControlMagic ||
      header.body_size != message.bytes.size() - sizeof header)
    return malformed("control");
  if (header.version != kControlVersion)
    return fail(ErrorKind::kUnsupported, "obey the supervisor: it speaks control version " +
                                             std::to_string(header.version) + ", this backend version " +
                                             std::to_string(kControlVersion) +
                                             "; install backend and supervisor of one release");
  return header;
}

}  // namespace

template <class Body>
Status Controller::report(ControlType type, const Body& body) {
  struct {
    ControlHeader header;
    Body body;
  } message{};
  message.header.type = type;
  message.header.body_size = sizeof body;
  message.body = body;
  return channel_.send(std::as_bytes(std::span(&message, 1)).first(sizeof(ControlHeader) + sizeof body));
}

Status Controller::report_poison(std::uint32_t shard, const PoisonEvent& event) {
  const PoisonPacket& packet = event.packet;
  ControlHeader header;
  PoisonBody body{shard,
                  event.epoch,
                  event.device,
                  packet.queue_pair,
                  packet.direction,
                  packet.deaths,
                  packet.length,
                  static_cast<std::uint32_t>(std::min<std::size_t>(packet.bytes.size(), kMaxPoisonBytes))};
  header.type = ControlType::kPoison;
  header.body_size = static_cast<std::uint32_t>(sizeof body + body.captured);
  std::vector<std::byte> message(sizeof header + header.body_size);
  std::memcpy(message.data(), &header, sizeof header);
  std::memcpy(message.data() + sizeof header, &body, sizeof body);
  if (body.captured > 0) std::memcpy(message.data() + sizeof header + sizeof body, packet.bytes.data(), body.captured);
  return channel_.send(message);
}

void Controller::problem(std::uint32_t device, const std::string& text) {
  ProblemBody body;
  body.device = device;
  std::snprintf(body.text, sizeof body.text, "%s", text.c_str());
  if (!report(ControlType::kProblem, body)) std::fprintf(stderr, "tandem-backend: %s\n", text.c_str());
}

Status Controller::greet(std::uint64_t tsc_hz) {
  pollfd wait{channel_.fd(), POLLIN, 0};
  while (::poll(&wait, 1, -1) < 0 && errno == EINTR) {
  }
  auto message = channel_.receive();
  if (!message) return within("wait for the supervisor's greeting", std::move(message.error()));
  auto header = check_header(*message);
  if (!header) return tl::make_unexpected(std::move(header.error()));
  WelcomeBody welcome;
  if (header->type != ControlType::kWelcome ||
      !read_body(std::span(message->bytes).subspan(sizeof(ControlHeader)), welcome) || welcome.shard_count == 0 ||
      welcome.shard_count > kMaxShards || message->fds.size() != 2 + 3 * welcome.shard_count)
    return malformed("welcome");

  auto segment = Mapping::map(message->fds[0].get(), sizeof(Segment), PROT_READ | PROT_WRITE, 0, "pair segment",
                              MAP_SHARED | MAP_POPULATE);
  if (!segment) return tl::make_unexpected(std::move(segment.error()));
  segment_mapping_ = std::move(*segment);
  ::madvise(segment_mapping_.data(), segment_mapping_.size(), MADV_DONTFORK);
  segment_ = reinterpret_cast<Segment*>(segment_mapping_.data());
  if (segment_->magic != kSegmentMagic || segment_->version != kSegmentVersion || segment_->size != sizeof(Segment) ||
      segment_->shard_count != welcome.shard_count)
    return fail(ErrorKind::kUnsupported, "use the pair segment: it is of version " + std::to_string(segment_->version) +
                                             ", this backend knows version " + std::to_string(kSegmentVersion) +
                                             " only; it can be no standby");
  auto fence = FenceView::map(message->fds[1].get());
  if (!fence) return within("map the fence", std::move(fence.error()));
  fence_ = std::move(*fence);

  for (std::uint32_t i = 0; i < welcome.shard_count; ++i) {
    auto ring = WakeRing::open(std::move(message->fds[2 + i]));
    if (!ring) return within("open the fence's wake ring", std::move(ring.error()));
    DeadManSwitch timer{std::move(message->fds[2 + welcome.shard_count + i])};
    UniqueFd bell = std::move(message->fds[2 + 2 * welcome.shard_count + i]);
    auto shard = Shard::make({i, welcome.shard_count, segment_, &fence_, welcome.polling, welcome.heirs, tsc_hz},
                             std::move(*ring), std::move(timer), std::move(bell));
    if (!shard) return tl::make_unexpected(std::move(shard.error()));
    shards_.push_back(std::move(*shard));
  }
  return {};
}

Status Controller::run() {
  ReadyBody ready;
  ready.shard_count = static_cast<std::uint32_t>(shards_.size());
  for (std::uint32_t i = 0; i < shards_.size(); ++i) ready.thread_ids[i] = shards_[i]->thread_id();
  if (auto sent = report(ControlType::kReady, ready); !sent) return sent;

  std::vector<pollfd> files{{channel_.fd(), POLLIN, 0}};
  for (const auto& shard : shards_) files.push_back({shard->event_fd(), POLLIN, 0});
  for (;;) {
    const int count = ::poll(files.data(), files.size(), until_warming_ms());
    if (count == 0) warm_some();
    if (count <= 0) continue;
    if (files[0].revents != 0) {
      bool would_block = false;
      auto message = channel_.receive(&would_block);
      if (!message && !would_block) {
        if (message.error().kind == ErrorKind::kGone) return {};
        return within("obey the supervisor", std::move(message.error()));
      }
      if (message) {
        if (auto obeyed = obey(std::move(*message)); !obeyed) {
          if (obeyed.error().kind == ErrorKind::kGone) return obeyed;
          problem(0, obeyed.error().text);
        }
      }
    }
    for (std::uint32_t i = 0; i < shards_.size(); ++i) {
      if (files[1 + i].revents == 0) continue;
      for (ShardEvent& event : shards_[i]->take_events()) relay(i, event);
    }
  }
}

// Whether there is nothing that it is an heir of.
bool Controller::owns() const {
  for (std::size_t i = 0; i < shards_.size(); ++i)
    if (tags_.size() <= i || tags_[i] == 0 ||
        owner_tag(segment_->shards[i].owner.load(std::memory_order_relaxed)) != tags_[i])
      return false;
  return true;
}

int Controller::until_warming_ms() const {
  const std::uint64_t now = monotonic_ns();
  return now >= warm_at_ns_ ? 0 : static_cast<int>((warm_at_ns_ - now) / 1'000'000 + 1);
}

// One virtqueue at a time, whenever nobody wants anything: no message waits for longer.
void Controller::warm_some() {
  if (monotonic_ns() < warm_at_ns_) return;
  if (owns()) warm_device_ = kMaxDevices;
  const bool anew = warm_round_ % kWarmAnewRounds == 0;
  for (; warm_device_ < kMaxDevices; ++warm_device_, warm_vring_ = 0) {
    const auto& device = newest_[warm_device_];
    while (device && warm_vring_ < 2 * device->description().queue_pairs) {
      std::uint64_t& warmed = warmed_[warm_device_][warm_vring_];
      if (anew) warmed = 0;
      if (device->warm_buffers(warm_vring_++, warmed)) return;
    }
  }
  warm_device_ = warm_vring_ = 0;
  ++warm_round_;
  warm_at_ns_ = monotonic_ns() + (std::exchange(described_, false) ? kWarmAgainNs : kWarmEveryNs);
}

Status Controller::obey(ChannelMessage message) {
  auto header = check_header(message);
  if (!header) return tl::make_unexpected(std::move(header.error()));
  const auto body = std::span<const std::byte>(message.bytes).subspan(sizeof(ControlHeader));
  switch (header->type) {
    case ControlType::kAttach:
      return attach(body, std::move(message.fds));
    case ControlType::kDescribe:
      return describe(body, std::move(message.fds));
    case ControlType::kDetach: {
      DeviceBody device;
      if (!read_body(body, device) || device.device >= kMaxDevices) return malformed("detach");
      newest_[device.device].reset();
      for (auto& shard : shards_) shard->post(DetachCommand{device.device});
      return {};
    }
    case ControlType::kPrune: {
      DeviceBody device;
      if (!read_body(body, device) || device.device >= kMaxDevices) return malformed("prune");
      for (auto& shard : shards_) shard->post(PruneCommand{device.device, device.generation});
      return {};
    }
    case ControlType::kArm: {
      ArmBody arm;
      if (!read_body(body, arm) || arm.shard >= shards_.size() || arm.tag == 0) return malformed("arm");
      std::shared_ptr<Watchdog> peer;
      if (arm.peer_tag != 0 && message.fds.size() == 1)
        peer = std::make_shared<Watchdog>(std::move(message.fds[0]), static_cast<pid_t>(arm.peer_pid),
                                          static_cast<pid_t>(arm.peer_tid), arm.peer_tag);
      armed_ = true;
      tags_.resize(shards_.size());
      tags_[arm.shard] = arm.tag;
      shards_[arm.shard]->post(ArmCommand{arm.tag, std::move(peer)});
      return {};
    }
    case ControlType::kHandOver: {
      ShardBody shard;
      if (!read_body(body, shard) || shard.shard >= shards_.size()) return malformed("hand over");
      shards_[shard.shard]->post(HandOverCommand{});
      return {};
    }
    case ControlType::kDrill: {
      DrillBody drill;
      if (!read_body(body, drill) || drill.shard >= shards_.size()) return malformed("drill");
      shards_[drill.shard]->post(DrillCommand{drill.fault, drill.after_ms});
      return {};
    }
    default:
      return fail(ErrorKind::kUnsupported,
                  "obey the supervisor: unknown message " + std::to_string(static_cast<unsigned>(header->type)));
  }
}

Status Controller::attach(std::span<const std::byte> body, std::vector<UniqueFd> fds) {
  AttachBody attach;
  if (!read_body(body, attach)) return malformed("attach");
  body = body.subspan(sizeof attach);
  if (attach.device >= kMaxDevices || attach.queue_pairs == 0 || attach.queue_pairs > kMaxQueuePairsPerDevice ||
      attach.first_queue_pair > kMaxQueuePairs - attach.queue_pairs || fds.size() != 2 * attach.queue_pairs ||
      body.size() != attach.queue_pairs * sizeof(XskDescription))
    return malformed("attach");
  auto uplink = std::make_shared<UplinkPorts>();
  uplink->device = attach.device;
  uplink->first_queue_pair = attach.first_queue_pair;
  uplink->group = attach.group;
  uplink->mac = attach.mac;
  for (std::uint32_t i = 0; i < attach.queue_pairs; ++i) {
    XskDescription description;
    std::memcpy(&description, body.data() + i * sizeof description, sizeof description);
    auto port = XskPort::map(description, std::move(fds[2 * i]), std::move(fds[2 * i + 1]),
                             "uplink of device " + std::to_string(attach.device) + ", queue " + std::to_string(i));
    if (!port) return cannot_attach(attach.device, port.error().text);
    uplink->ports.push_back(std::move(*port));
  }
  // For a takeover. Here and not in poll threads, which would wait for the maps of the next uplinks.
  auto& segment = *reinterpret_cast<Segment*>(segment_mapping_.data());
  populate(&segment.queue_pairs[attach.first_queue_pair], attach.queue_pairs * sizeof(QueuePairState), true);
  populate(segment.shards, shards_.size() * sizeof(ShardState), true);
  for (auto& shard : shards_) shard->post(AttachCommand{uplink});
  return {};
}

// Not yet armed: leave, so that no takeover ever waits for us; the supervisor tries again later. Armed: other devices
// depend on this process, so it stays, and the supervisor decides what becomes of the new one.
Status Controller::cannot_attach(std::uint32_t device, const std::string& why) {
  if (!armed_) return fail(ErrorKind::kGone, "attach device " + std::to_string(device) + ": " + why);
  ProblemBody body;
  body.device = device;
  std::snprintf(body.text, sizeof body.text, "%s", why.c_str());
  return report(ControlType::kCannotAttach, body);
}

Status Controller::describe(std::span<const std::byte> body, std::vector<UniqueFd> fds) {
  DeviceDescription description;
  if (!read_body(body, description) || description.device >= kMaxDevices) return malformed("describe");
  std::vector<std::string> problems;
  auto device = Device::make(description, std::move(fds), newest_[description.device].get(), problems);
  for (const std::string& text : problems) problem(description.device, text);
  if (!device) {
    // The front end's memory cannot be had (too large for us, or cut off by now). Its device stands still, but the
    // generation takes force: whoever waits for it must not take us for hung.
    problem(description.device, device.error().text + "; the device stands still");
    description.region_count = 0;
    for (VringDescription& vring : description.vrings) vring.flags = 0;
    device = Device::make(description, {}, nullptr, problems);
    if (!device) return within("describe", std::move(device.error()));
  }
  newest_[description.device] = *device;
  warmed_[description.device].assign(2 * std::size_t{description.queue_pairs}, 0);
  described_ = true;
  warm_at_ns_ = 0;
  for (auto& shard : shards_) shard->post(DescribeCommand{*device});
  return {};
}

void Controller::relay(std::uint32_t shard, ShardEvent& event) {
  Status sent;
  if (const auto* held = std::get_if<HeldEvent>(&event)) {
    sent = report(ControlType::kHeld, DeviceBody{held->device, shard, held->generation});
  } else if (const auto* in_force = std::get_if<InForceEvent>(&event)) {
    sent = report(ControlType::kInForce, DeviceBody{in_force->device, shard, in_force->generation});
  } else if (const auto* detached = std::get_if<DetachedEvent>(&event)) {
    sent = report(ControlType::kDetached, DeviceBody{detached->device, shard, 0});
  } else if (const auto* took_over = std::get_if<TookOverEvent>(&event)) {
    sent = report(ControlType::kTookOver, TakeoverBody{shard, 0, took_over->timeline});
  } else if (const auto* first = std::get_if<FirstTransactionEvent>(&event)) {
    sent = report(ControlType::kFirstTransaction, TakeoverBody{shard, 0, first->timeline});
  } else if (const auto* refused = std::get_if<NotHandedOverEvent>(&event)) {
    RefusalBody refusal;
    refusal.shard = shard;
    std::snprintf(refusal.text, sizeof refusal.text, "%s", refused->text.c_str());
    sent = report(ControlType::kNotHandedOver, refusal);
  } else if (const auto* text = std::get_if<ProblemEvent>(&event)) {
    problem(text->device, text->text);
  } else if (const auto* poison = std::get_if<PoisonEvent>(&event)) {
    sent = report_poison(shard, *poison);
  }
  // GarbageEvent: destroyed with the vector. A report that cannot be sent is lost with its reader; the segment has the
  // facts.
  if (!sent) std::fprintf(stderr, "tandem-backend: report to the supervisor: %s\n", sent.error().text.c_str());
}

}  // namespace tandem
