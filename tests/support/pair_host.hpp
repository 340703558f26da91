// SPDX-License-Identifier: Apache-2.0
// PairHost: a host in miniature for one test: network namespace, bpffs, bridge, and a real vault, supervisor and
// backends.
//
// The test process itself moves into new network and mount namespaces and becomes the reaper of whatever its processes
// leave behind, so that everything started here can be found, ended by pid and accounted for. One PairHost at a time;
// single-threaded.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/unique_fd.hpp"

namespace tandem::test {

/// Bound of every wait. A failsafe: what is waited for comes at once or never.
inline constexpr std::chrono::seconds kFailsafe{30};

/// Polls `event` (with a short nap between) until it is true. False after kFailsafe.
bool eventually(const std::function<bool()>& event, std::chrono::milliseconds limit = kFailsafe);

struct PairHostOptions {
  std::string backend = {};  ///< program; empty: tandem-backend of this build
  std::string tandemd = {};  ///< program; empty: tandemd of this build
  /// Vault and tandemd under `tandem-vault --supervise`, as on a host without systemd. Else each by itself, restarted
  /// by start_tandemd() and start_vault() only, so that a test decides when.
  bool supervised = true;
  unsigned shards = 1;
  std::string polling = "adaptive";
  std::string heirs = "real-time";
  std::string configuration = {};  ///< more tables for tandemd.toml
  unsigned outside_queues = 1;     ///< of the outside's cable: more spread its flows over the queues of a NIC
};

/// A NIC as a domain's XML would name it.
struct TestNic {
  std::string mac = "52:54:00:12:34:56";
  unsigned queues = 1;
  std::string uplink = "bridge=\"br0\"";
  std::string pair = "default";
  std::string watchdog = {};  ///< attributes of <watchdog>; empty: its defaults
};

class PairHost {
 public:
  using json = nlohmann::json;

  /// Why there can be no pair here; empty if there can. Moves the process into namespaces of its own.
  static std::string prepare();

  explicit PairHost(PairHostOptions options = {});
  ~PairHost();
  PairHost(const PairHost&) = delete;
  PairHost& operator=(const PairHost&) = delete;

  /// Starts vault and tandemd and waits until tandemd answers.
  void start();
  /// Without supervision: starts one that has died; does not wait.
  void start_vault();
  void start_tandemd();
  /// SIGTERM, and waits for the end of all. Returns what is left behind in words, empty if nothing: processes, sockets,
  /// links, pins.
  std::string stop();
  /// SIGKILL to all at once: vault, tandemd, backends. Everything else stays as it was.
  void kill_everything();

  /// One request, one answer; the answer of a dead tandemd is {"ok": false}.
  json ask(const json& request) const;
  /// Asks without waiting: the connection on which the answer will come; empty if tandemd is not there.
  UniqueFd tell(const json& request) const;
  json status() const { return ask({{"command", "status"}}); }
  json hook(const std::string& domain, const std::string& operation, const std::string& sub_operation,
            const std::string& xml) const;
  /// `prepare` and `release` of a domain with these NICs; the answer.
  json prepare_domain(const std::string& name, const std::vector<TestNic>& nics) const;
  json release_domain(const std::string& name) const;
  [[nodiscard]] std::string domain_xml(const std::string& name, const std::vector<TestNic>& nics) const;
  [[nodiscard]] std::string nic_socket(const std::string& mac) const;
  [[nodiscard]] std::string control_socket() const { return run_dir() + "/control.sock"; }
  [[nodiscard]] std::string run_dir() const { return directory_ + "/run"; }
  [[nodiscard]] std::string incident_dir() const { return directory_ + "/incidents"; }

  json nic(const std::string& mac) const;  ///< entry of status; null if none
  json pair(const std::string& name = "default") const;
  json incidents() const { return ask({{"command", "incidents"}})["incidents"]; }
  pid_t active() const;   ///< 0: none
  pid_t standby() const;  ///< armed; 0: none
  /// Waits until the pair has an owner other than `not_this` and an armed heir.
  bool wait_paired(pid_t not_this = 0) const;

  /// Processes of this host by name: "tandem-vault" (two: the parent and the vault), "tandemd", "tandem-backend".
  [[nodiscard]] std::vector<pid_t> processes(const std::string& name) const;
  [[nodiscard]] std::vector<pid_t> processes() const;
  /// All that was logged so far.
  [[nodiscard]] std::string log() const;
  [[nodiscard]] bool logged(const std::string& text) const { return log().find(text) != std::string::npos; }

  /// More lines of NAME=VALUE for the environment of what is started.
  std::map<std::string, std::string> environment;

 private:
  void make_network(unsigned outside_queues);
  void write_config() const;
  pid_t launch(const std::vector<std::string>& words) const;

  PairHostOptions options_;
  std::string directory_;
  std::string instance_;
  std::vector<pid_t> leaders_;  // what stop() sends SIGTERM to, in turn
};

/// Runs a shell command, output discarded; true on exit status 0.
bool shell(const std::string& command);
/// Files directly below `directory`.
std::vector<std::string> entries(const std::string& directory);
/// Number of open descriptors of a process; 0 if it is gone.
std::size_t descriptor_count(pid_t pid);
/// A field of /proc/PID/status ("CapEff"); empty if there is none.
std::string proc_status(pid_t pid, const std::string& field);
/// CPUs of received frames of all ports: one, so that the host keeps the order in which frames were sent.
void keep_order_in_host_queues();

}  // namespace tandem::test
