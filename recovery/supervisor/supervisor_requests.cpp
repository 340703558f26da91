// SPDX-License-Identifier: Apache-2.0
// What the libvirt hook and virt-tandem ask tandemd for.
#include <spdlog/spdlog.h>

#include "recovery/supervisor/supervisor.hpp"

namespace tandem {

namespace {

using namespace std::chrono_literals;

constexpr auto kProvisionLimit = 20s;
constexpr auto kDrillLimit = 20s;
constexpr std::uint64_t kMostDrillDelayMs = 10'000;

std::string text_of(const nlohmann::json& request, const char* key) {
  const auto found = request.find(key);
  return found != request.end() && found->is_string() ? found->get<std::string>() : std::string{};
}

nlohmann::json member_status(const Pair& pair, const Member* member, bool owner) {
  if (member == nullptr) return {{"pid", nullptr}, {"tid", nullptr}, {"state", "none"}};
  std::string state = member->stage == Member::Stage::kArmed && member->caught_up ? "ready" : "starting";
  if (owner) state = pair.segment().shards[0].asleep.load(std::memory_order_relaxed) != 0 ? "asleep" : "polling";
  return {{"pid", member->pid()},
          {"tid", member->threads.empty() ? nlohmann::json(nullptr) : nlohmann::json(member->threads[0])},
          {"state", state}};
}

const char* fault_name(QueueFault fault) {
  switch (fault) {
    case QueueFault::kNone:
      return "";
    case QueueFault::kAvailJump:
      return "the guest's avail index ran ahead of its ring";
    case QueueFault::kMemoryFault:
      return "guest memory disappeared";
    case QueueFault::kRecordInvalid:
      return "a dead backend had damaged its record";
    case QueueFault::kEndlessChain:
      return "the guest made a chain of descriptors without an end";
  }
  return "unknown";
}

}  // namespace

void Supervisor::on_request(const nlohmann::json& request, const ControlServer::Answer& answer) {
  const std::string command = text_of(request, "command");
  if (command == "status") return answer(status());
  if (command == "incidents") return answer(incident_list());
  if (command == "hook") return on_hook(request, answer);
  if (command == "drill") return drill(request, answer);
  if (command == "switchover") return switchover(request, answer);
  if (command == "nic") return on_nic_request(request, answer);
  answer(refusal("unknown command \"" + command +
                 "\"; this tandemd knows status, incidents, hook, drill, switchover and nic"));
}

void Supervisor::on_hook(const nlohmann::json& request, const ControlServer::Answer& answer) {
  const std::string operation = text_of(request, "operation");
  const std::string phase = text_of(request, "sub_operation");
  if (operation == "prepare" && phase == "begin") {
    auto domain = parse_domain_option(text_of(request, "xml"), config_.run_dir);
    if (!domain) return answer(refusal(domain.error().text));
    return prepare_domain(*domain, answer);
  }
  if (operation == "release" && phase == "end") return release_domain(text_of(request, "name"), answer);
  answer({{"ok", true}});
}

void Supervisor::prepare_domain(const DomainOption& domain, const ControlServer::Answer& answer) {
  if (domain.nics.empty()) return answer({{"ok", true}});
  // libvirt starts this domain, so it does not run: a NIC that is still served for it is one whose release got lost.
  std::vector<std::string> stale;
  for (const auto& [mac, nic] : nics_)
    if (nic.domain == domain.name && nic.domain_uuid == domain.uuid) stale.push_back(mac);
  if (!stale.empty()) {
    const auto left = std::make_shared<std::size_t>(stale.size());
    for (const std::string& mac : stale)
      release(mac, [this, left, domain, answer] {
        if (--*left == 0) prepare_domain(domain, answer);
      });
    return;
  }
  Provisioning provisioning;
  for (const NicOption& option : domain.nics) {
    if (auto provided = provision(domain, option); !provided) {
      // All or nothing: what this domain got so far is taken back.
      const std::string text = provided.error().text;
      spdlog::error("{}", text);
      const auto left = std::make_shared<std::size_t>(provisioning.macs.size() + 1);
      const auto done = [left, answer, text] {
        if (--*left == 0) answer(refusal(text));
      };
      for (const std::string& mac : provisioning.macs) release(mac, done);
      return done();
    }
    provisioning.macs.push_back(option.mac);
  }
  provisioning.answer = answer;
  provisioning_.push_back(std::move(provisioning));
  Provisioning* stored = &provisioning_.back();
  stored->limit = loop_.after(kProvisionLimit, [this, stored] {
    refuse_start(stored, "its backends did not become ready within 20 s; tandemd's log says why they do not start");
  });
  check_provisioning();
}

// Takes back what the domain has got, then says why.
void Supervisor::refuse_start(const Provisioning* provisioning, const std::string& why) {
  const ControlServer::Answer answer = provisioning->answer;
  const std::vector<std::string> macs = provisioning->macs;
  provisioning_.remove_if([provisioning](const Provisioning& other) { return &other == provisioning; });
  const auto left = std::make_shared<std::size_t>(macs.size());
  for (const std::string& mac : macs)
    release(mac, [left, answer, why] {
      if (--*left == 0) answer(refusal(why));
    });
}

void Supervisor::check_provisioning() {
  for (auto entry = provisioning_.begin(); entry != provisioning_.end();) {
    const auto current = entry++;
    bool ready = true;
    std::string failure;
    for (const std::string& mac : current->macs) {
      const auto nic = nics_.find(mac);
      ready = ready && nic != nics_.end() && nic->second.pair->serves(nic->second.device_index) &&
              nic->second.uplink->connected();
      if (nic != nics_.end() && !nic->second.start_failure.empty()) failure = nic->second.start_failure;
    }
    if (!failure.empty()) {
      refuse_start(&*current, failure);
    } else if (ready) {
      current->answer({{"ok", true}});
      provisioning_.erase(current);
    }
  }
}

void Supervisor::release_domain(const std::string& name, const ControlServer::Answer& answer) {
  std::vector<std::string> macs;
  for (const auto& [mac, nic] : nics_)
    if (nic.domain == name) macs.push_back(mac);
  const auto left = std::make_shared<std::size_t>(macs.size() + 1);
  const auto done = [left, answer] {
    if (--*left == 0) answer({{"ok", true}});
  };
  for (const std::string& mac : macs) release(mac, done);
  done();
}

void Supervisor::drill(const nlohmann::json& request, const ControlServer::Answer& answer) {
  static const std::map<std::string, DrillFault> kFaults{
      {"segv", DrillFault::kBadStore},    {"abort", DrillFault::kAbort}, {"bus", DrillFault::kBusError},
      {"spin", DrillFault::kSpin},        {"block", DrillFault::kBlock}, {"exit", DrillFault::kExit},
      {"livelock", DrillFault::kLivelock}};
  const auto pair = pairs_.find(text_of(request, "pair"));
  if (pair == pairs_.end())
    return answer(
        refusal("drill: there is no pair \"" + text_of(request, "pair") + "\"; virt-tandem status lists them"));
  const auto fault = kFaults.find(text_of(request, "fault"));
  if (fault == kFaults.end())
    return answer(refusal("drill: the fault must be segv, abort, bus, spin, block, exit or livelock"));
  const auto after = request.find("after_ms");
  if (after != request.end() && (!after->is_number_unsigned() || after->get<std::uint64_t>() > kMostDrillDelayMs))
    return answer(refusal("drill: after_ms must be a number from 0 to " + std::to_string(kMostDrillDelayMs)));
  const std::uint64_t before = incidents_->recent().empty() ? 0 : incidents_->recent().back().id;
  if (auto sent = pair->second->drill(fault->second, request.value("after_ms", 0u)); !sent)
    return answer(refusal(sent.error().text));
  spdlog::warn("pair {}: its active backend was told to fail in {} ms: drill {}", pair->first,
               request.value("after_ms", 0u), fault->first);
  await_incidents(
      {pair->first, before, false, 1, answer, {}},
      "drill: the backend was told to fail, and no failover was recorded within 20 s; a switchover calls a drill off, "
      "and a livelock is found only where there is work");
}

void Supervisor::switchover(const nlohmann::json& request, const ControlServer::Answer& answer) {
  const auto pair = pairs_.find(text_of(request, "pair"));
  if (pair == pairs_.end())
    return answer(
        refusal("switch over: there is no pair \"" + text_of(request, "pair") + "\"; virt-tandem status lists them"));
  const std::uint64_t before = incidents_->recent().empty() ? 0 : incidents_->recent().back().id;
  if (auto started = pair->second->switchover(); !started) return answer(refusal(started.error().text));
  await_incidents({pair->first, before, true, config_.shards, answer, {}},
                  "switch over: the standby was told to ask for the shards, and did not get all of them within 20 s");
}

void Supervisor::await_incidents(Awaited awaited, const std::string& when_late) {
  awaited_.push_back(std::move(awaited));
  Awaited* stored = &awaited_.back();
  stored->limit = loop_.after(kDrillLimit, [this, stored, when_late] {
    const ControlServer::Answer answer = stored->answer;
    awaited_.remove_if([stored](const Awaited& other) { return &other == stored; });
    answer(refusal(when_late));
  });
}

void Supervisor::check_awaited() {
  for (auto entry = awaited_.begin(); entry != awaited_.end();) {
    nlohmann::json found = nlohmann::json::array();
    for (const Incident& incident : incidents_->recent())
      if (incident.id > entry->after && incident.pair == entry->pair && incident.planned() == entry->planned &&
          incident.closed)
        found.push_back(incident.to_json());
    if (found.size() < entry->incidents) {
      ++entry;
      continue;
    }
    entry->answer({{"ok", true}, {"incident", found.back()}, {"incidents", found}});
    entry = awaited_.erase(entry);
  }
}

void Supervisor::on_not_handed_over(Pair& pair, const std::string& why) {
  for (auto entry = awaited_.begin(); entry != awaited_.end();) {
    if (!entry->planned || entry->pair != pair.name()) {
      ++entry;
      continue;
    }
    entry->answer(refusal("switch over pair " + pair.name() + ": " + why));
    entry = awaited_.erase(entry);
  }
}

nlohmann::json Supervisor::status() const {
  nlohmann::json pairs = nlohmann::json::array();
  for (const auto& [name, pair] : pairs_) {
    nlohmann::json macs = nlohmann::json::array();
    for (const auto& [mac, nic] : nics_)
      if (nic.pair == pair.get()) macs.push_back(mac);
    const std::uint64_t word = pair->segment().shards[0].owner.load(std::memory_order_relaxed);
    // To an operator there are two only once the second has mapped what it would have to serve.
    const Member* heir = pair->heir();
    const bool alone = pair->state() == PairState::kPaired && heir != nullptr && !heir->caught_up;
    pairs.push_back({{"name", name},
                     {"state", pair_state_name(alone ? PairState::kSolo : pair->state())},
                     {"active", member_status(*pair, pair->owner(), true)},
                     {"standby", member_status(*pair, heir, false)},
                     {"epoch", owner_epoch(word)},
                     {"shards", config_.shards},
                     {"nics", std::move(macs)}});
  }
  nlohmann::json nics = nlohmann::json::array();
  for (const auto& [mac, nic] : nics_) nics.push_back(nic_status(nic));
  return {{"ok", true}, {"pairs", std::move(pairs)}, {"nics", std::move(nics)}};
}

namespace {

// Offloads that the guest's driver has agreed to, in the words of libvirt's <host> and <guest>.
nlohmann::json offload_status(std::uint64_t features) {
  namespace vf = virtio_feature;
  const auto names = [features](std::uint64_t csum, std::uint64_t tso4, std::uint64_t tso6, std::uint64_t ecn) {
    nlohmann::json list = nlohmann::json::array();
    for (const auto& [bit, name] :
         {std::pair{csum, "csum"}, std::pair{tso4, "tso4"}, std::pair{tso6, "tso6"}, std::pair{ecn, "ecn"}})
      if ((features & bit) != 0) list.push_back(name);
    return list;
  };
  return {{"host", names(vf::kCsum, vf::kHostTso4, vf::kHostTso6, vf::kHostEcn)},
          {"guest", names(vf::kGuestCsum, vf::kGuestTso4, vf::kGuestTso6, vf::kGuestEcn)}};
}

}  // namespace

nlohmann::json Supervisor::nic_status(const Nic& nic) const {
  struct Sum {
    std::uint64_t packets = 0, bytes = 0, dropped = 0, poisoned = 0;
    void add(const VringCursors& cursors, const Suspicion& suspicion) {
      packets += cursors.packets;
      bytes += cursors.bytes;
      dropped += cursors.dropped;
      poisoned += suspicion.poisoned;
    }
    [[nodiscard]] nlohmann::json json() const {
      return {{"packets", packets}, {"bytes", bytes}, {"dropped", dropped}, {"poisoned", poisoned}};
    }
  } receive, transmit;
  std::string fault;
  std::uint64_t overflow = 0;
  for (std::uint32_t i = 0; i < nic.option.queues; ++i) {
    const QueuePairState& state = nic.pair->segment().queue_pairs[nic.first_queue_pair + i];
    receive.add(state.receive, state.receive_suspicion);
    overflow += state.receive.overflow;
    transmit.add(state.transmit, state.transmit_suspicion);
    for (const VringCursors* cursors : {&state.receive, &state.transmit})
      if (const QueueFault found = cursors->fault.load(std::memory_order_relaxed); found != QueueFault::kNone)
        fault = fault_name(found);
  }
  if (auto statistics = nic.uplink->statistics())
    for (const XskStatistics& queue : *statistics) overflow += queue.rx_dropped + queue.rx_ring_full;
  const UplinkOption& option = nic.option.uplink;
  const char* kind = option.is_null() ? "null" : option.kind == UplinkOption::Kind::kBridge ? "bridge" : "dev";
  std::uint32_t running = 0;
  for (std::uint32_t i = 0; i < 2 * nic.option.queues; ++i)
    running += (nic.device->description().vrings[i].flags & VringDescription::kRunning) != 0;
  return {{"mac", nic.option.mac},
          {"domain", nic.domain},
          {"pair", nic.pair->name()},
          {"uplink",
           {{kind, option.name}, {"device", nic.uplink->netdev()}, {"busy_poll", nic.uplink->is_polled_by_owner()}}},
          {"uplink_problem", nic.uplink_problem},
          {"connected", nic.connected},
          {"disabled", disabled_status(nic)},
          {"generation", nic.device->description().generation},
          {"queue_pairs", nic.option.queues},
          {"running_queues", running},
          {"packed", (nic.device->description().features & kFeatureRingPacked) != 0},
          {"offloads", offload_status(nic.device->description().features)},
          {"fault", fault},
          {"rx", receive.json()},
          {"tx", transmit.json()},
          {"overflow", overflow}};
}

nlohmann::json Supervisor::incident_list() const { return {{"ok", true}, {"incidents", incidents_->all()}}; }

}  // namespace tandem
