// SPDX-License-Identifier: Apache-2.0
// VhostUserDevice: protocol state of one vhost-user net device, back-end side, and the device description made from it.
//
// Bytes and descriptors of one front-end message go in, an Outcome comes out; no socket, no thread, no clock inside.
// The caller (the supervisor) does for each message, in this order:
//   1. outcome = handle(message)          an Error: nothing changed; close the connection, call disconnect()
//   2. put save_changed() into the vault  before anyone sees the new description
//   3. if description_changed: send description() with description_fds() to every owner
//   4. if wait_for_owners: wait until each owner acknowledged description().generation, or is fenced and replayed
//      (without reply and vring_base_index there is nothing to hold back: the next message that has one waits for both)
//   5. if vring_base_index: reply = vring_base_reply(index, vring_base() of the owner's cursors); save_changed() again
//   6. send the reply if there is one; tell the vault "applied"
//
// Handlers are idempotent: a supervisor that dies between 1 and 6 leaves a successor that restores the device and
// handles the same message again; the description has the same content and the reply is the same. Only the generation
// may be higher.
//
// What a description shows: memory regions, and those vrings that run (kRunning); of a vring that does not run only its
// start_count. A running vring without kHasKick wants to be polled. An owner that sees a new call fd on a running vring
// writes to it once: QEMU may have looked at the old one for the last time already.
//
// Ring rules (vhost-user.rst "Ring states" and what QEMU 7.2 and DPDK 22.11 do, see docs/vhost-user.md): SET_VRING_KICK
// starts, GET_VRING_BASE, SET_STATUS 0 and RESET_OWNER stop. SET_VRING_ENABLE may come at any time and survives a stop.
// start_count rises when a start first makes the vring run; a pause (ENABLE 0 and 1, memory swapped below it) keeps the
// cursors.
//
// Not thread-safe. Owns its descriptors.
#pragma once

#include <array>
#include <bitset>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "common/layout/device_description.hpp"
#include "common/result.hpp"
#include "common/unique_fd.hpp"
#include "vmm/memory_table.hpp"
#include "vmm/vhost_user_message.hpp"
#include "vmm/vring_state.hpp"

namespace tandem {

inline constexpr std::uint32_t kMinMtu = 68;
inline constexpr std::uint32_t kMaxMtu = 9216;

/// Virtio feature bits of Virtio 1.2, 5.1.3 and 6, as masks (linux/virtio_net.h cannot be included from C++).
namespace virtio_feature {
inline constexpr std::uint64_t kCsum = 1ull << 0;
inline constexpr std::uint64_t kGuestCsum = 1ull << 1;
inline constexpr std::uint64_t kMtu = 1ull << 3;
inline constexpr std::uint64_t kGuestTso4 = 1ull << 7;
inline constexpr std::uint64_t kGuestTso6 = 1ull << 8;
inline constexpr std::uint64_t kGuestEcn = 1ull << 9;
inline constexpr std::uint64_t kHostTso4 = 1ull << 11;
inline constexpr std::uint64_t kHostTso6 = 1ull << 12;
inline constexpr std::uint64_t kHostEcn = 1ull << 13;
inline constexpr std::uint64_t kMrgRxbuf = 1ull << 15;
inline constexpr std::uint64_t kStatus = 1ull << 16;
inline constexpr std::uint64_t kCtrlVq = 1ull << 17;
inline constexpr std::uint64_t kGuestAnnounce = 1ull << 21;
inline constexpr std::uint64_t kMq = 1ull << 22;
inline constexpr std::uint64_t kIndirectDesc = 1ull << 28;
inline constexpr std::uint64_t kEventIdx = 1ull << 29;
inline constexpr std::uint64_t kVersion1 = 1ull << 32;
inline constexpr std::uint64_t kRingPacked = kFeatureRingPacked;
inline constexpr std::uint64_t kInOrder = 1ull << 35;  ///< 2.7.9: chains come back in the order they were offered in
}  // namespace virtio_feature

struct VhostUserDeviceConfig {
  std::uint32_t device = 0;           ///< index in the pair
  std::uint32_t max_queue_pairs = 1;  ///< 1 to kMaxQueuePairsPerDevice
  std::uint64_t virtio_features = 0;  ///< offered, with VHOST_USER_F_PROTOCOL_FEATURES
  std::uint64_t protocol_features = 0;
  std::uint16_t mtu = 0;  ///< largest MTU of the uplink; 0: unknown, front ends may ask for up to kMaxMtu
  std::uint64_t first_generation = 1;
  std::uint32_t first_start_count = 0;
};

/// Everything the datapath can do and nothing else: no MAC (QEMU owns it), no UDP segmentation, no migration log.
std::uint64_t default_virtio_features() noexcept;
std::uint64_t default_protocol_features() noexcept;

struct Outcome {
  std::optional<std::vector<std::byte>> reply;
  bool description_changed = false;  ///< description() has a new generation
  bool wait_for_owners = false;      ///< something was taken away: see step 4 above
  /// GET_VRING_BASE of a vring that an owner served: the reply needs the owner's cursors, see step 5.
  std::optional<std::uint32_t> vring_base_index;
  std::optional<std::array<std::uint8_t, 6>> rarp_mac;  ///< announce this address on the uplink, once
  std::string refusal;  ///< not empty: the request was refused in the reply; for the log
};

/// A piece of saved state: plain bytes and at most kMaxMemoryRegions descriptors. Descriptors stay the device's.
struct SavedItem {
  std::uint32_t item = 0;  ///< 0: device and memory, n + 1: vring n
  std::vector<std::byte> bytes;
  std::vector<int> fds;
};

/// The same, coming back from the vault.
struct RestoredItem {
  std::uint32_t item = 0;
  std::vector<std::byte> bytes;
  std::vector<UniqueFd> fds;
};

class VhostUserDevice {
 public:
  /// kInvalid if the configuration offers what this code cannot do or has limits out of range.
  static Result<VhostUserDevice> create(const VhostUserDeviceConfig& config);

  /// Handles one whole message. Takes the descriptors: those not kept are closed when it returns, whatever happened.
  Result<Outcome> handle(std::span<const std::byte> frame, std::vector<UniqueFd> fds);

  /// The answer to GET_VRING_BASE once every owner let go: where its cursors stand (vring_base()). Remembers it, so
  /// that a repeated request is answered with it.
  std::vector<std::byte> vring_base_reply(std::uint32_t vring, std::uint32_t base);

  /// The front end is gone: no region, no running vring, everything negotiated forgotten, one new generation. The
  /// device can serve the next connection; generation and start counts go on. Wait for the owners before the next
  /// connection is read.
  void disconnect();

  [[nodiscard]] const DeviceDescription& description() const noexcept { return description_; }
  /// Borrowed, in the order of device_description.hpp: regions, then per vring kick if kHasKick and call if kHasCall.
  [[nodiscard]] std::vector<int> description_fds() const;
  [[nodiscard]] const VhostUserDeviceConfig& config() const noexcept { return config_; }
  /// For a device that replaces this one: its first_start_count.
  [[nodiscard]] std::uint32_t highest_start_count() const noexcept;

  /// Everything; for a vault that holds nothing of this device yet.
  std::vector<SavedItem> save();
  /// Only what changed since the last save() or save_changed(). The device item is last: put the items in this order.
  std::vector<SavedItem> save_changed();
  /// Builds the device again. Missing vring items are vrings nobody spoke of. The generation is one higher than the
  /// saved one: save_changed(), then send the description to every owner, because the predecessor may not have.
  static Result<VhostUserDevice> restore(std::vector<RestoredItem> items);

 private:
  explicit VhostUserDevice(const VhostUserDeviceConfig& config);

  struct Request {
    VhostUserRequest request;
    std::span<const std::byte> payload;
    std::vector<UniqueFd>& fds;
    Outcome& outcome;
  };

  Status check_allowed(const VhostUserFrame& frame, const std::vector<UniqueFd>& fds) const;
  Result<Outcome> refuse(const VhostUserFrame& frame, const std::string& reason) const;
  [[nodiscard]] bool takes_away(const VhostUserFrame& frame) const;
  Status dispatch(Request& request);

  Status set_features(Request& request);
  Status set_protocol_features(Request& request);
  Status set_memory_table(Request& request);
  Status add_memory_region(Request& request);
  Status remove_memory_region(Request& request);
  Status set_vring_num(Request& request);
  Status set_vring_addr(Request& request);
  Status set_vring_base(Request& request);
  Status get_vring_base(Request& request);
  Status set_vring_kick(Request& request);
  Status set_vring_call(Request& request);
  Status set_vring_err(Request& request);
  Status set_vring_enable(Request& request);
  Status set_status(Request& request);
  Status set_mtu(Request& request);
  Status send_rarp(Request& request);
  void reset_owner();

  Result<std::uint32_t> vring_file_index(const Request& request) const;
  Status check_vring_index(std::uint32_t index) const;
  Status require_features(std::string_view what) const;
  [[nodiscard]] bool is_running(std::uint32_t vring) const noexcept;
  [[nodiscard]] bool is_started(std::uint64_t vring) const noexcept;
  [[nodiscard]] bool any_started() const noexcept;
  [[nodiscard]] bool packed() const noexcept { return (features_ & virtio_feature::kRingPacked) != 0; }
  [[nodiscard]] bool acknowledged(std::uint64_t protocol_feature) const noexcept {
    return (protocol_features_ & protocol_feature) != 0;
  }
  void touch(std::uint32_t vring) { vring_dirty_.set(vring); }
  void stop_all();

  /// Derives the description from the state; true (and a new generation) if content or descriptors changed.
  bool publish();
  [[nodiscard]] DeviceDescription derive();
  [[nodiscard]] SavedItem save_device() const;
  [[nodiscard]] SavedItem save_vring(std::uint32_t index) const;
  Status restore_device(RestoredItem& item);
  Status restore_vring(RestoredItem& item);

  VhostUserDeviceConfig config_;
  bool features_set_ = false;
  std::uint64_t features_ = 0;
  std::uint64_t protocol_features_ = 0;
  std::uint32_t mtu_ = 0;  ///< asked for by NET_SET_MTU, 0: nothing asked
  std::uint8_t status_ = 0;
  MemoryTable memory_;
  std::vector<VringState> vrings_;  ///< 2 * max_queue_pairs

  DeviceDescription description_;
  bool fds_replaced_ = false;  ///< a descriptor that the description shows is a different one now
  bool device_dirty_ = false;
  std::bitset<kMaxVringsPerDevice> vring_dirty_;
};

}  // namespace tandem
