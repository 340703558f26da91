// SPDX-License-Identifier: Apache-2.0
// Two pairs, three guests.
#include "tests/inject/world.hpp"

#include <poll.h>
#include <sys/socket.h>

#include <catch2/catch.hpp>
#include <fstream>

namespace tandem::test {

namespace {

struct Place {
  const char* mac;
  unsigned queues;
  const char* pair;
};
constexpr Place kPlaces[] = {
    {"52:54:00:51:00:00", 2, "default"}, {"52:54:00:51:00:01", 1, "default"}, {"52:54:00:51:00:02", 1, "other"}};

// The faults are ours, not the packets': no NIC is to be parked for them.
PairHostOptions never_park() {
  PairHostOptions options;
  options.configuration = "[parking]\nkills = 0\n";
  return options;
}

}  // namespace

World::World(std::uint64_t rate) : host_(never_park()) {
  host_.start();
  std::vector<LoadGuest*> guests;
  std::vector<std::string> macs;
  for (const Place& place : kPlaces) {
    TestNic nic;
    nic.mac = place.mac;
    nic.queues = place.queues;
    nic.pair = place.pair;
    const json answer = host_.prepare_domain("guest" + std::to_string(macs.size()), {nic});
    INFO(answer.dump());
    REQUIRE(answer.value("ok", false));
    macs.emplace_back(place.mac);
  }
  for (std::size_t i = 0; i < macs.size(); ++i) {
    guests_.push_back(std::make_unique<LoadGuest>(host_.nic_socket(macs[i]), kPlaces[i].queues));
    guests.push_back(guests_.back().get());
  }
  Load::Options options;
  options.flows_in = 2;
  options.rate = rate;
  options.patience = std::chrono::seconds{20};  // silence is judged by flows_go_on()
  load_ = std::make_unique<Load>(guests, macs, options);
  load_->start();
  REQUIRE(host_.wait_paired());
  REQUIRE(flows_go_on(20, kFailsafe));
}

World::~World() = default;

Tally World::victims_tally() const {
  Tally tally;
  for (std::size_t i = 0; i < kVictims; ++i) tally += load_->tally_of(i);
  return tally;
}

std::uint64_t World::damaged_bytes() const {
  std::uint64_t damaged = 0;
  for (std::size_t i = 0; i < guests_.size(); ++i) damaged += load_->damaged_bytes(i);
  return damaged;
}

World::json World::next_incident() {
  std::ifstream file(host_.incident_dir() + "/" + std::to_string(next_incident_) + ".json");
  if (!file) return nullptr;
  json incident = json::parse(file, nullptr, false);
  if (!incident.is_object() || incident["complete"] != true) return nullptr;
  ++next_incident_;
  return incident;
}

bool World::flows_go_on(std::uint64_t frames, std::chrono::milliseconds limit) const {
  const std::vector<std::uint64_t> before = load_->arrived_by_flow();
  return eventually(
      [&] {
        const std::vector<std::uint64_t> now = load_->arrived_by_flow();
        for (std::size_t i = 0; i < now.size(); ++i)
          if (now[i] < before[i] + frames) return false;
        return true;
      },
      limit);
}

bool World::front_ends_connected() {
  for (const auto& guest : guests_) {
    pollfd wait{guest->front_end().socket(), POLLIN, 0};
    // Nothing is owed: whatever can be read is an end or a message out of turn.
    if (::poll(&wait, 1, 0) != 0) return false;
    if (!guest->front_end().send_raw(make_vhost_user_message(VhostUserRequest::kGetFeatures, 0, {}))) return false;
    if (::poll(&wait, 1, static_cast<int>(std::chrono::milliseconds(kFailsafe).count())) != 1 ||
        (wait.revents & (POLLHUP | POLLERR)) != 0)
      return false;
    std::byte answer[sizeof(VhostUserHeader) + sizeof(std::uint64_t)];
    if (::recv(wait.fd, answer, sizeof answer, MSG_WAITALL) != sizeof answer) return false;
  }
  return true;
}

void World::describe_anew() {
  ScriptedFrontEnd& front_end = guests_[0]->front_end();
  front_end.send_mem_table(/*need_reply=*/true);
  CHECK(front_end.reply_u64(VhostUserRequest::kSetMemTable) == 0);
}

}  // namespace tandem::test
