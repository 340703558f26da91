// SPDX-License-Identifier: Apache-2.0
// Uplink: connects one NIC to the outside, as AF_XDP sockets on a veth of ours (bridge=) or on a whole netdev (dev=);
// or to nothing, with rings in memory that backends serve themselves (null=), to measure.
//
// Made by the supervisor (root, one thread, in the network namespace of the bridge or netdev). Backends get, per queue
// pair, one XskDescription and two descriptors; everything about using them is in common/layout/xsk_description.hpp.
// Frames keep queueing in the kernel's rings while no process reads them.
//
// bridge=: a veth pair tdmXXXXXXa (ours) and tdmXXXXXXb (a port of the bridge). The port's transmit offloads are off,
// so that frames arrive with checksums done, one MTU long at most, VLAN tags in place; neither end speaks IPv6 by
// itself. dev=: the whole netdev. Queues that no queue pair serves must not get frames, so its channels are set to
// match. Promiscuous mode ends with the last holder of keep_fds(); channels, features, the deferral of interrupts and
// the up state are put back by close() only. Limits: veth queues 256 frames per queue between two polls
// (VETH_RING_SIZE, drivers/net/veth.c) and has no setting for it; native XDP on veth needs an MTU of at most about
// 3500, above it generic mode is used.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/layout/xsk_description.hpp"
#include "common/result.hpp"
#include "common/unique_fd.hpp"
#include "recovery/uplink/ethtool.hpp"
#include "recovery/uplink/interrupt_deferral.hpp"
#include "recovery/uplink/link_monitor.hpp"
#include "recovery/uplink/rtnetlink.hpp"
#include "recovery/uplink/xdp_redirect.hpp"
#include "recovery/uplink/xsk_queue.hpp"

namespace tandem {

enum class UplinkKind { kBridge, kDev, kSink, kSource, kLoopback };

/// Whether there is no netdev behind it (null_queue.hpp).
constexpr bool is_null(UplinkKind kind) { return kind != UplinkKind::kBridge && kind != UplinkKind::kDev; }

struct UplinkConfig {
  UplinkKind kind = UplinkKind::kBridge;
  std::string name;  ///< of the bridge or netdev; else only for messages
  std::string mac;   ///< the NIC's, by which the uplink is named
  std::uint32_t queue_pairs = 1;
  std::uint32_t mtu = 0;  ///< the guest's; 0: as the bridge or netdev has it
  std::string instance = "default";
  std::string pin_dir;             ///< all uplinks of the instance, e.g. /sys/fs/bpf/tandem/default/uplink
  bool pass_host_traffic = false;  ///< dev=: frames on queues without a socket go to the host's stack
  bool promiscuous = true;         ///< dev=: else only frames to `mac` and all multicast
  bool zero_copy = false;          ///< dev=: let the driver use zero-copy if it can
  /// Not null=: XskMode::busy_poll of its sockets, and interrupts that wait for it.
  std::uint16_t busy_poll = 0;
  std::uint32_t frame_length = 0;  ///< kSource: bytes of each frame
};

/// A flag that moves with its owner: what was moved from has nothing to undo.
class OwnedFlag {
 public:
  OwnedFlag() noexcept = default;
  OwnedFlag(OwnedFlag&& other) noexcept : set_(other.take()) {}
  OwnedFlag& operator=(OwnedFlag&&) = delete;
  ~OwnedFlag() = default;
  void set() noexcept { set_ = true; }
  /// Clears the flag and tells whether it was set.
  bool take() noexcept { return std::exchange(set_, false); }

 private:
  bool set_ = false;
};

/// What an uplink must remember beside its descriptors, for a supervisor that adopts it.
struct UplinkRecord {
  std::string netdev, port;
  std::uint32_t mtu = 0;
  // dev=: what close() puts back
  bool was_down = false;
  bool channels_changed = false;
  Channels channels_before;
  std::vector<std::string> features_before;
  std::optional<InterruptDeferral> deferral_before;  ///< empty: it was not changed
};

/// Cleans up when it goes, unless leave_in_place() was called.
class Uplink {
 public:
  /// Makes everything but the last step, connect(). Does not wait for anything.
  /// kInvalid: the configuration does not fit the host (bridge missing, name taken, MTU too large); the text says what
  /// to change. Whatever was made before a failure is removed again.
  static Result<Uplink> begin(const UplinkConfig& config);
  /// begin(), then connect() when the time has come: waits up to 2 s. For callers that have nothing else to do.
  static Result<Uplink> open(const UplinkConfig& config);

  /// bridge=: makes the port a member of the bridge, once it carries or when `late`. True: connected, now or before.
  /// False: try again when monitor_fd() is readable. dev= is connected from the beginning.
  Result<bool> connect(bool late);
  [[nodiscard]] bool connected() const noexcept { return connected_; }

  /// Goes on with what a dead supervisor opened with the same `config`. `fds`: its descriptors(), then its keep_fds().
  /// kGone: the netdev or its pins are not there any more.
  static Result<Uplink> adopt(const UplinkConfig& config, const UplinkRecord& record,
                              std::span<const XskDescription> queues, std::vector<UniqueFd> fds);
  [[nodiscard]] UplinkRecord record() const;

  /// Removes every veth and pin that uplinks of `instance` left behind, but those of the netdevs `in_use`. Returns what
  /// it removed, for the log.
  static Result<std::vector<std::string>> remove_stale(const std::string& instance, const std::string& pin_dir,
                                                       const std::vector<std::string>& in_use = {});

  Uplink(Uplink&& other) noexcept = default;
  Uplink& operator=(Uplink&&) = delete;
  ~Uplink();

  [[nodiscard]] std::vector<XskDescription> descriptions() const;
  /// Socket and UMEM of each queue pair in turn; they stay this object's.
  [[nodiscard]] std::vector<int> descriptors() const;
  /// What else must stay open for the uplink to work without this process (the vault's to hold); they stay this
  /// object's.
  [[nodiscard]] std::vector<int> keep_fds() const;

  [[nodiscard]] std::uint32_t mtu() const noexcept { return mtu_; }
  [[nodiscard]] const std::string& netdev() const noexcept { return ours_.name; }  ///< empty: null=
  [[nodiscard]] const std::string& port() const noexcept { return port_.name; }    ///< bridge=: the bridge's end
  /// Whether busy_poll was asked for and took effect: on all queues alike.
  [[nodiscard]] bool is_polled_by_owner() const noexcept {
    return !queues_.empty() && (queues_.front().description().flags & XskDescription::kBusyPoll) != 0;
  }
  /// Things the operator should know though they are no errors; for the log.
  [[nodiscard]] const std::vector<std::string>& notes() const noexcept { return notes_; }

  Result<std::vector<XskStatistics>> statistics() const;

  /// Readable when some link of the namespace changed: then call check().
  [[nodiscard]] int monitor_fd() const noexcept { return monitor_.fd(); }
  /// kGone, with what to do, if the uplink does not work any more: netdev or bridge deleted, taken down, port moved.
  Status check();

  /// Undoes everything open() did. The first failure is reported, after all was tried.
  Status close();
  /// From here on close() and the end of this object remove nothing: another process takes over.
  void leave_in_place() noexcept { (void)owned_.take(); }

 private:
  explicit Uplink(UplinkConfig config, Rtnetlink rtnetlink)
      : config_(std::move(config)), rtnetlink_(std::move(rtnetlink)) {}
  Status open_bridge();
  Status add_veth();
  Status prepare_veth_ends();
  void keep_order();
  Status set_up_ends();
  Status open_dev();
  Status open_null();
  Status match_channels();
  Status receive_everything();
  Status open_queues(bool pass_host_traffic);
  Status set_up_dev();
  void defer_interrupts();
  Status set_mtu(std::uint32_t available);

  UplinkConfig config_;
  Rtnetlink rtnetlink_;
  LinkMonitor monitor_;
  LinkState above_;  ///< the bridge (bridge=)
  LinkState ours_;   ///< where the sockets are
  LinkState port_;   ///< the bridge's end (bridge=)
  std::uint32_t mtu_ = 0;
  XdpRedirect redirect_;
  std::vector<XskQueue> queues_;
  UniqueFd membership_;                       ///< dev=: packet socket that holds promiscuous mode or the MAC filter
  Channels channels_before_;                  ///< dev=
  bool channels_changed_ = false;             ///< dev=
  bool was_down_ = false;                     ///< dev=
  std::vector<std::string> features_before_;  ///< dev=: switched off by us
  std::optional<InterruptDeferral> deferral_before_;
  std::vector<std::string> notes_;
  bool connected_ = false;
  OwnedFlag owned_;  ///< there is something to undo
};

}  // namespace tandem
