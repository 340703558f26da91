// SPDX-License-Identifier: Apache-2.0
// vhost-user messages that the vault hands over: handle, save, describe, wait for the owners, answer.
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <spdlog/spdlog.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/monotonic_clock.hpp"
#include "recovery/supervisor/probe.hpp"
#include "recovery/supervisor/supervisor.hpp"

namespace tandem {

namespace {

// A thread that waits for a CPU is starved, not hung; nobody waits longer than this without an alarm.
constexpr std::uint64_t kAlarmNs = 1'000'000'000;

}  // namespace

std::string Supervisor::device_key(const std::string& mac, std::uint32_t item) {
  return "device/" + mac + "/" + std::to_string(item);
}

void Supervisor::on_listening(const std::string& nic) {
  not_listening_.erase(nic);
  // One that a dead predecessor had begun to provide or to release.
  const auto found = nics_.find(nic);
  if (found == nics_.end() || found->second.disabled) static_cast<void>(vault_->unlisten(nic));
}

// A predecessor died while it provided or released these: nobody can connect, and whoever asked for the NIC was told
// that it failed, or will ask again.
void Supervisor::on_announced() {
  for (const std::string& mac : std::exchange(not_listening_, {})) {
    spdlog::warn("NIC {}: its start or end was interrupted; releasing it", mac);
    release(mac, [] {});
  }
}

void Supervisor::on_connected(const std::string& mac, std::uint64_t connection, UniqueFd held) {
  const auto found = nics_.find(mac);
  if (found == nics_.end() || found->second.disabled) return;
  found->second.connected = true;
  found->second.connection = connection;
  const bool early = found->second.pending && found->second.pending->vault_lost;
  (early ? found->second.held_next : found->second.held) = std::move(held);
  spdlog::info("NIC {}: QEMU connected", mac);
}

void Supervisor::on_error(const std::string& text) { spdlog::error("tandem-vault refused a request: {}", text); }

void Supervisor::on_message(RelayedMessage message) {
  const auto found = nics_.find(message.nic);
  if (found == nics_.end() || found->second.releasing || found->second.disabled) return;
  Nic& nic = found->second;
  if (nic.pending && nic.pending->vault_lost) {
    nic.waiting = std::move(message);
    return;
  }
  if (nic.pending) {
    // The vault hands out one at a time; what comes again after its own restart is the one that waits already.
    nic.pending->sequence = message.sequence;
    return;
  }
  TANDEM_SUPERVISOR_PROBE(kMessage);
  auto outcome = nic.device->handle(message.frame, std::move(message.fds));
  if (!outcome) return drop_connection(nic, outcome.error().text);
  if (!outcome->refusal.empty()) spdlog::warn("NIC {}: refused a request: {}", nic.option.mac, outcome->refusal);
  PendingRequest pending;
  pending.sequence = message.sequence;
  pending.outcome = std::move(*outcome);
  pending.since_ns = monotonic_ns();
  const bool changed = pending.outcome.description_changed;
  const bool wait = pending.outcome.wait_for_owners;
  nic.pending = std::move(pending);
  TANDEM_SUPERVISOR_PROBE(kHandled);
  save(nic);
  TANDEM_SUPERVISOR_PROBE(kSaved);
  if (changed) describe(nic);
  TANDEM_SUPERVISOR_PROBE(kDescribed);
  if (wait)
    wait_for_owners(nic);
  else
    finish_request(nic);
}

void Supervisor::on_disconnected(const std::string& mac, std::uint64_t, std::uint64_t sequence) {
  const auto found = nics_.find(mac);
  if (found == nics_.end()) {
    static_cast<void>(vault_->applied(mac, sequence));
    return;
  }
  Nic& nic = found->second;
  if (nic.releasing || nic.disabled) return;
  spdlog::info("NIC {}: QEMU disconnected", mac);
  nic.connected = false;
  nic.waiting.reset();
  TANDEM_SUPERVISOR_PROBE(kMessage);
  nic.device->disconnect();
  TANDEM_SUPERVISOR_PROBE(kHandled);
  PendingRequest pending;
  pending.sequence = sequence;
  pending.disconnect = true;
  pending.since_ns = monotonic_ns();
  nic.pending = std::move(pending);
  save(nic);
  TANDEM_SUPERVISOR_PROBE(kSaved);
  describe(nic);
  TANDEM_SUPERVISOR_PROBE(kDescribed);
  wait_for_owners(nic);
}

void Supervisor::save(Nic& nic) {
  for (const SavedItem& item : nic.device->save_changed())
    if (auto put = vault_->put(device_key(nic.option.mac, item.item), item.bytes, item.fds); !put)
      spdlog::error("NIC {}: keep its state in the vault: {}", nic.option.mac, put.error().text);
}

void Supervisor::describe(Nic& nic) {
  if (auto told = nic.pair->describe(nic.device->description(), nic.device->description_fds()); !told)
    spdlog::error("NIC {}: {}", nic.option.mac, told.error().text);
}

std::chrono::nanoseconds Supervisor::hang_limit(const Nic& nic) const {
  return std::min(nic.option.watchdog.spin, nic.option.watchdog.blocked);
}

void Supervisor::wait_for_owners(Nic& nic) {
  nic.pending->generation = nic.device->description().generation;
  if (nic.pair->in_force(nic.device_index) >= nic.pending->generation) return finish_request(nic);
  const std::string mac = nic.option.mac;
  nic.pending->limit = loop_.after(hang_limit(nic), [this, mac] { on_wait_limit(mac); });
}

void Supervisor::on_wait_limit(const std::string& mac) {
  const auto found = nics_.find(mac);
  if (found == nics_.end() || !found->second.pending) return;
  Nic& nic = found->second;
  if (nic.pair->in_force(nic.device_index) >= nic.pending->generation) return finish_request(nic);
  nic.pair->kill_if_hung("it did not let go of NIC " + mac + " within its limit");
  if (!nic.pending->alarmed && monotonic_ns() - nic.pending->since_ns > kAlarmNs) {
    nic.pending->alarmed = true;
    spdlog::critical(
        "NIC {}: QEMU has been waiting for 1 s for backends that neither let go nor die; look at their "
        "state with virt-tandem status and in /proc",
        mac);
  }
  nic.pending->limit = loop_.after(hang_limit(nic), [this, mac] { on_wait_limit(mac); });
}

void Supervisor::finish_request(Nic& nic) {
  TANDEM_SUPERVISOR_PROBE(kLetGo);
  PendingRequest pending = std::move(*nic.pending);
  nic.pending.reset();
  if (pending.disable) return finish_disable(nic);
  if (pending.disconnect) nic.held = std::move(nic.held_next);
  if (pending.vault_lost) {
    if (auto waiting = std::exchange(nic.waiting, std::nullopt)) on_message(std::move(*waiting));
    return;
  }
  std::vector<std::byte> reply;
  if (pending.outcome.reply) reply = std::move(*pending.outcome.reply);
  if (pending.outcome.vring_base_index) {
    const std::uint32_t vring = *pending.outcome.vring_base_index;
    const QueuePairState& state = nic.pair->segment().queue_pairs[nic.first_queue_pair + vring / 2];
    const bool packed = (nic.device->description().features & kFeatureRingPacked) != 0;
    reply = nic.device->vring_base_reply(vring, vring_base(vring % 2 == 0 ? state.receive : state.transmit, packed));
    save(nic);
  }
  if (pending.outcome.rarp_mac) announce(nic, *pending.outcome.rarp_mac);
  TANDEM_SUPERVISOR_PROBE(kAnswered);
  if (auto applied = vault_->applied(nic.option.mac, pending.sequence, reply); !applied)
    spdlog::error("NIC {}: answer QEMU: {}", nic.option.mac, applied.error().text);
  TANDEM_SUPERVISOR_PROBE(kApplied);
}

void Supervisor::drop_connection(Nic& nic, const std::string& why) {
  spdlog::error("NIC {} of domain {}: closing QEMU's connection: {}", nic.option.mac, nic.domain, why);
  static_cast<void>(vault_->close(nic.option.mac, nic.connection));
}

// RARP (RFC 903) request for the guest's own address, as QEMU's announcement does: bridges learn where the MAC is now.
void Supervisor::announce(const Nic& nic, const std::array<std::uint8_t, 6>& mac) {
  if (nic.uplink->netdev().empty()) return;  // nobody is there to hear it
  std::array<std::uint8_t, 60> frame{};
  std::fill_n(frame.begin(), 6, std::uint8_t{0xff});
  std::copy(mac.begin(), mac.end(), frame.begin() + 6);
  constexpr std::uint8_t kRest[] = {0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3};
  std::copy(std::begin(kRest), std::end(kRest), frame.begin() + 12);
  std::copy(mac.begin(), mac.end(), frame.begin() + 22);
  std::copy(mac.begin(), mac.end(), frame.begin() + 32);
  const UniqueFd socket{::socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0)};
  sockaddr_ll address{};
  address.sll_family = AF_PACKET;
  address.sll_ifindex = static_cast<int>(::if_nametoindex(nic.uplink->netdev().c_str()));
  if (!socket || ::sendto(socket.get(), frame.data(), frame.size(), 0, reinterpret_cast<const sockaddr*>(&address),
                          sizeof address) < 0)
    spdlog::warn("NIC {}: announce its address on {}: {}", nic.option.mac, nic.uplink->netdev(), std::strerror(errno));
}

}  // namespace tandem
