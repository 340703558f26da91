// SPDX-License-Identifier: Apache-2.0
// What tandemd reads from its configuration file (config/tandemd.toml explains each key).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/layout/control_message.hpp"
#include "common/result.hpp"

namespace tandem {

/// How a standby's poll threads wait to take over (common/thread_priority.hpp).
enum class Heirs {
  kOrdinary,  ///< asleep, scheduled as others are
  kRealTime,  ///< asleep, and given a busy CPU in the moment they are woken
  kPolling,   ///< never asleep; scheduled as others are
};
enum class Hugepages { kAuto, kAlways, kNever };

struct Config {
  std::string instance = "default";     ///< separates several tandemd on one host: pins and network devices carry it
  std::string run_dir = "/run/tandem";  ///< sockets
  std::string incident_dir = "/var/lib/tandem/incidents";
  std::string pin_dir = "/sys/fs/bpf/tandem/default";
  std::string log_level = "info";
  std::string backend_path;                  ///< the tandem-backend program; empty: beside tandemd or in libexec
  std::string backend_user = "tandem";       ///< account that backends run as
  std::string socket_user = "libvirt-qemu";  ///< owner of the sockets that QEMU connects to; empty: root
  std::string socket_group = "libvirt-qemu";
  std::uint32_t shards = 1;  ///< poll threads per backend
  Polling polling = Polling::kAdaptive;
  Hugepages hugepages = Hugepages::kAuto;
  std::int32_t nice = -10;  ///< of poll threads, -20 to 19
  /// Where poll threads run: nowhere in particular if empty; else shard i on cpus[i], and if heirs poll, in one of the
  /// two backends on cpus[shards + i].
  std::vector<std::uint32_t> cpus;
  Heirs heirs = Heirs::kRealTime;
  /// Frames that an owner takes from a netdev's queue in one poll of its own (XskMode); 0: interrupts bring them.
  std::uint16_t busy_poll = 0;

  std::uint32_t parking_kills =
      5;  ///< backends that a NIC may kill within the window before it is parked; 0: any number
  std::uint32_t parking_window_s = 60;

  [[nodiscard]] std::string nic_socket_dir() const { return run_dir + "/nic"; }
  [[nodiscard]] std::string dpdk_dir() const { return run_dir + "/dpdk"; }
  [[nodiscard]] std::string control_socket() const { return run_dir + "/control.sock"; }
  [[nodiscard]] std::string vault_socket() const { return run_dir + "/vault.sock"; }
};

/// Reads `path`. An unknown key, a wrong type or a value out of range is an error that names the key. A missing file is
/// one too.
Result<Config> read_config(const std::string& path);
/// The same from text; `origin` names it in errors.
Result<Config> parse_config(const std::string& text, const std::string& origin);

}  // namespace tandem
