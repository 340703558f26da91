// SPDX-License-Identifier: Apache-2.0
// Supervisor: what tandemd is. Pairs, NICs, the vault's messages, operators' requests, incidents, on one event loop.
#pragma once

#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "recovery/fence/fence.hpp"
#include "recovery/supervisor/config.hpp"
#include "recovery/supervisor/control_server.hpp"
#include "recovery/supervisor/event_loop.hpp"
#include "recovery/supervisor/incident.hpp"
#include "recovery/supervisor/nic.hpp"
#include "recovery/supervisor/pair.hpp"
#include "recovery/vault/vault_client.hpp"

namespace tandem {

/// The group of a NIC (AttachBody): the bridge's index if it may reach its neighbours directly, else 0.
std::uint32_t direct_group(const NicOption& option);
/// "52:54:00:12:34:56" as AttachBody::mac.
std::uint64_t mac_number(const std::string& mac);

class Supervisor final : public VaultHandler, public Pair::Listener {
 public:
  /// Cleans up after a dead predecessor, loads the fence, attaches to the vault, listens. Errors say what the host
  /// lacks.
  static Result<std::unique_ptr<Supervisor>> start(Config config, EventLoop& loop);
  ~Supervisor() override;

  /// SIGTERM: without NICs everything is removed and the loop ends; with NICs the pairs are left to run on.
  void shut_down();

  // VaultHandler
  void on_connected(const std::string& nic, std::uint64_t connection, UniqueFd held) override;
  void on_message(RelayedMessage message) override;
  void on_disconnected(const std::string& nic, std::uint64_t connection, std::uint64_t sequence) override;
  void on_listening(const std::string& nic) override;
  void on_announced() override;
  void on_error(const std::string& text) override;

  // Pair::Listener
  void on_in_force(Pair& pair, std::uint32_t device) override;
  void on_held(Pair& pair, std::uint32_t device) override;
  void on_detached(Pair& pair, std::uint32_t device) override;
  void on_cannot_attach(Pair& pair, std::uint32_t device, const std::string& why) override;
  void on_takeover(Pair& pair, std::uint32_t shard, const TakeoverTimeline& timeline, pid_t victim,
                   pid_t heir) override;
  void on_poison(Pair& pair, const PoisonBody& poison, std::span<const std::byte> bytes) override;
  void on_not_handed_over(Pair& pair, const std::string& why) override;
  void on_first_transaction(Pair& pair, std::uint32_t shard, const TakeoverTimeline& timeline) override;
  void on_member_change(Pair& pair, Member& member) override;
  void on_member_exit(Pair& pair, pid_t pid, ExitStatus status) override;
  void on_state(Pair& pair) override;

 private:
  // A domain's start that waits for its pairs to be ready.
  struct Provisioning {
    std::vector<std::string> macs;
    ControlServer::Answer answer;
    EventLoop::Timer limit;
  };
  // A drill or a switchover that waits for the incidents it leads to.
  struct Awaited {
    std::string pair;
    std::uint64_t after = 0;  ///< the newest incident before it
    bool planned = false;     ///< a switchover
    std::size_t incidents = 1;
    ControlServer::Answer answer;
    EventLoop::Timer limit;
  };

  Supervisor(Config config, EventLoop& loop) : config_(std::move(config)), loop_(loop) {}
  Status prepare_directories();
  // supervisor_adoption.cpp: what a dead predecessor left in the vault
  Status take_over_from_predecessor();
  Status adopt(std::vector<VaultItem>& items);
  Status adopt_pairs(std::vector<VaultItem>& items);
  Status adopt_nic(VaultItem& item, std::vector<VaultItem>& items);
  void sweep(const std::vector<VaultItem>& items);
  Status clean_up(std::vector<VaultItem>& items);
  void save_pair(const Pair& pair);
  Status keep_nic(Nic& nic);
  void dispatch_vault();
  void let_go_of_front_ends();
  void find_new_vault();

  // supervisor_requests.cpp: what operators and the hook ask for
  void on_request(const nlohmann::json& request, const ControlServer::Answer& answer);
  void on_hook(const nlohmann::json& request, const ControlServer::Answer& answer);
  void prepare_domain(const DomainOption& domain, const ControlServer::Answer& answer);
  void release_domain(const std::string& name, const ControlServer::Answer& answer);
  void drill(const nlohmann::json& request, const ControlServer::Answer& answer);
  void switchover(const nlohmann::json& request, const ControlServer::Answer& answer);
  void await_incidents(Awaited awaited, const std::string& when_late);
  nlohmann::json status() const;
  nlohmann::json nic_status(const Nic& nic) const;
  nlohmann::json incident_list() const;
  void check_provisioning();
  void refuse_start(const Provisioning* provisioning, const std::string& why);
  void check_awaited();

  // parking.cpp: what killed backends, and NICs that are disabled for it
  Nic* find_nic_of_queue_pair(const Pair& pair, std::uint32_t queue_pair);
  void blame(const Pair& pair, Incident& incident);
  static std::uint64_t kills_of(const Nic& nic);
  void count_kills(const Pair& pair);
  void park(const std::string& mac, const std::string& reason);
  void disable(Nic& nic, Disabled how, ControlServer::Answer done);
  void begin_disable(Nic& nic);
  void finish_disable(Nic& nic);
  Status enable(Nic& nic);
  void on_nic_request(const nlohmann::json& request, const ControlServer::Answer& answer);
  static nlohmann::json disabled_status(const Nic& nic);

  // NICs
  Status provision(const DomainOption& domain, const NicOption& option);
  Status try_provision(const DomainOption& domain, const NicOption& option);
  Result<Pair*> pair_for(const std::string& name);
  Result<std::string> find_backend() const;
  [[nodiscard]] static std::string socket_name(const std::string& mac);
  [[nodiscard]] std::string nic_socket_path(const std::string& mac) const;
  Result<UniqueFd> open_nic_socket(const std::string& mac) const;
  UplinkConfig uplink_config(const NicOption& option) const;
  void watch_uplink(Nic& nic);
  void connect_uplink(Nic& nic, bool late);
  void check_uplink(Nic& nic);
  void set_hang_limits(Pair& pair);
  void release(const std::string& mac, std::function<void()> done);
  void finish_release(std::string mac);
  void stop_pair_if_unused(const std::string& name);
  void on_pair_empty(const std::string& name);
  Nic* find_nic(const Pair& pair, std::uint32_t device);

  // vhost-user requests
  [[nodiscard]] static std::string device_key(const std::string& mac, std::uint32_t item);
  void save(Nic& nic);
  void describe(Nic& nic);
  void wait_for_owners(Nic& nic);
  void on_wait_limit(const std::string& mac);
  void finish_request(Nic& nic);
  void drop_connection(Nic& nic, const std::string& why);
  void announce(const Nic& nic, const std::array<std::uint8_t, 6>& mac);

  void close_incident(std::uint64_t id);
  void save_incident(const Incident& incident);
  std::chrono::nanoseconds hang_limit(const Nic& nic) const;

  Config config_;
  EventLoop& loop_;
  UniqueFd lock_;
  std::optional<Fence> fence_;
  std::optional<VaultClient> vault_;
  EventLoop::Source vault_watch_;
  std::optional<IncidentLog> incidents_;
  TagSource tags_;
  std::map<std::string, std::unique_ptr<Pair>> pairs_;
  std::map<std::string, Nic> nics_;      // by MAC
  std::set<std::string> not_listening_;  // adopted NICs of whose socket the vault has not spoken yet
  std::list<Provisioning> provisioning_;
  std::list<Awaited> awaited_;
  std::map<std::uint64_t, EventLoop::Timer> incident_limits_;  // by incident
  std::deque<std::pair<pid_t, ExitStatus>> exits_;  // of members whose takeover report may still come; newest first
  std::map<std::string, EventLoop::Timer> soon_;
  std::map<std::string, std::vector<std::function<void()>>> when_stopped_;  // by pair
  std::unique_ptr<ControlServer> server_;
  std::uint64_t vault_lost_ns_ = 0;
  bool stopping_ = false;
};

}  // namespace tandem
