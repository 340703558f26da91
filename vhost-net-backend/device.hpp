// SPDX-License-Identifier: Apache-2.0
// Device: one generation of a device description, mapped and ready to serve; UplinkPorts: the ports of its queue pairs.
//
// Both are made by the control thread and handed to poll threads through shared ownership, immutable from then on, so
// that a poll thread changes generation by changing a pointer. Poll threads give them back for destruction (unmapping
// takes time).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/layout/device_description.hpp"
#include "common/unique_fd.hpp"
#include "vhost-net-backend/guest_memory.hpp"
#include "vhost-net-backend/queue_pair.hpp"

namespace tandem {

class Device {
 public:
  /// Maps memory (shared with `previous` if it is the same) and binds every running vring. `fds` in the order of
  /// device_description.hpp; all are consumed. A vring that cannot be bound is left out and named in `problems`.
  static Result<std::shared_ptr<const Device>> make(const DeviceDescription& description, std::vector<UniqueFd> fds,
                                                    const Device* previous, std::vector<std::string>& problems);

  [[nodiscard]] const DeviceDescription& description() const { return description_; }
  [[nodiscard]] const GuestMemory* memory() const { return memory_.get(); }
  /// vring 2n: receive, 2n+1: transmit; unbound if not running.
  [[nodiscard]] const BoundQueue& vring(std::uint32_t index) const { return vrings_[index]; }
  /// Has the page tables filled for the buffers that a running vring names just now: what its driver puts there after
  /// the start, and then mostly goes on with. Otherwise a fresh heir's packets wait for a page fault each. Control
  /// thread; about a millisecond, ten for a hostile guest. `warmed`: a digest of the pages that are named, 0 at first,
  /// and as long as some of them are not in memory; while it stays the same nothing is done. False: the vring does not
  /// run.
  bool warm_buffers(std::uint32_t vring, std::uint64_t& warmed) const;

 private:
  Device() = default;
  DeviceDescription description_{};
  std::vector<UniqueFd> fds_;
  std::vector<std::uint64_t> region_files_;  // (device, inode) of each region, to recognise unchanged memory
  std::shared_ptr<GuestMemory> memory_;
  std::vector<BoundQueue> vrings_;
};

struct UplinkPorts {
  std::uint32_t device = 0;
  std::uint32_t first_queue_pair = 0;
  std::uint32_t group = 0;  ///< devices of one group, not 0, reach one another directly
  std::uint64_t mac = 0;    ///< the device's, as mac_word()
  std::vector<std::unique_ptr<XskPort>> ports;
};

}  // namespace tandem
