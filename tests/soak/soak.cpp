// SPDX-License-Identifier: Apache-2.0
// One kill after another.
#include "tests/soak/soak.hpp"

#include <poll.h>
#include <signal.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <fstream>
#include <future>
#include <sstream>

namespace tandem::test {

namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

constexpr const char* kTooLate = "hang verdict before the kill";
constexpr std::chrono::milliseconds kShortestStretch{20};
constexpr std::chrono::microseconds kLongestDelay{10'000};
// Pages that an owner may touch before the OOM killer comes: more than its next system call needs, less than a burst or
// two of fresh buffers.
constexpr std::uint64_t kOomLimit = 48 * 4096;

void pass(std::chrono::nanoseconds time) {
  const timespec span{static_cast<time_t>(time.count() / 1'000'000'000),
                      static_cast<long>(time.count() % 1'000'000'000)};
  ::ppoll(nullptr, 0, &span, nullptr);
}

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

PairHostOptions host_options(const SoakOptions& options) {
  PairHostOptions host;
  host.shards = options.shards;
  host.outside_queues = 4;
  // What kills owners here is the soak, whatever packet they had in hand.
  host.configuration = "[parking]\nkills = 0\n";
  return host;
}

}  // namespace

Soak::Soak(const SoakOptions& options) : options_(options), random_(options.seed), host_(host_options(options)) {
  for (unsigned i = 0; i < options.devices; ++i) {
    char mac[18];
    std::snprintf(mac, sizeof mac, "52:54:00:50:00:%02x", i & 0xff);
    macs_.emplace_back(mac);
  }
}

bool Soak::packed(unsigned device) const {
  return options_.rings == "packed" || (options_.rings == "mixed" && device % 2 == 1);
}

void Soak::begin() {
  host_.start();
  for (unsigned i = 0; i < options_.devices; ++i) {
    TestNic nic;
    nic.mac = macs_[i];
    nic.queues = options_.queue_pairs;
    const json answer = host_.prepare_domain("guest" + std::to_string(i), {nic});
    INFO(answer.dump());
    REQUIRE(answer.value("ok", false));
  }
  std::vector<LoadGuest*> guests;
  for (unsigned i = 0; i < options_.devices; ++i) {
    guests_.push_back(std::make_unique<LoadGuest>(host_.nic_socket(macs_[i]), options_.queue_pairs, packed(i)));
    guests.push_back(guests_.back().get());
  }
  Load::Options load;
  load.flows_in = 2 * options_.queue_pairs;
  load.between_guests = options_.between_guests;
  load.rate = options_.rate;
  load.patience = 20s;  // a failsafe: on a busy machine everybody may stand still for seconds
  load_ = std::make_unique<Load>(guests, macs_, load);
  load_->start();
}

// As many of each cause as of any other, in random order.
std::vector<Cause> Soak::deck(SoakReport& report) {
  std::string reason;
  if (auto mounted = MemoryController::mount(host_.run_dir() + "/../memory", reason))
    memory_.emplace(std::move(*mounted));
  std::vector<Cause> possible;
  for (const Cause& cause : causes()) {
    if (!options_.only.empty() && options_.only != cause.name) continue;
    if (cause.means == Means::kMemory && !memory_)
      report.skip(cause.name, reason);
    else
      possible.push_back(cause);
  }
  REQUIRE_FALSE(possible.empty());
  std::vector<Cause> cards;
  for (unsigned i = 0; i < options_.kills; ++i) cards.push_back(possible[i % possible.size()]);
  std::shuffle(cards.begin(), cards.end(), random_);
  return cards;
}

// The incident with the next number, once it says everything; null before.
Soak::json Soak::next_incident() {
  std::ifstream file(host_.incident_dir() + "/" + std::to_string(next_incident_) + ".json");
  if (!file) return nullptr;
  json incident = json::parse(file, nullptr, false);
  if (!incident.is_object() || incident["complete"] != true) return nullptr;
  ++next_incident_;
  return incident;
}

// Waits for one incident of each shard in which `victim` died.
std::vector<Soak::json> Soak::incidents_of(pid_t victim) {
  std::vector<json> found;
  const bool all = eventually([&] {
    for (json incident = next_incident(); !incident.is_null(); incident = next_incident()) {
      if (incident["victim_pid"] == victim)
        found.push_back(std::move(incident));
      else
        ++unasked_;
    }
    return found.size() >= options_.shards;
  });
  if (!all) FAIL("no incident of " << victim << ": " << host_.status().dump(2));
  return found;
}

// Brings it about. What the victim is to die of may be on its way when this returns.
std::string Soak::strike(const Cause& cause, pid_t victim) {
  switch (cause.means) {
    case Means::kSignal:
      return ::kill(victim, cause.signal) == 0 ? "" : "it was gone before it was killed";
    case Means::kDrill: {
      // The answer comes with the incident, which is read from its file.
      const json answer = host_.ask({{"command", "drill"}, {"pair", "default"}, {"fault", cause.fault}});
      return answer.value("ok", false) ? "" : answer.value("error", "no answer");
    }
    case Means::kMemory:
      cgroup_ = std::make_unique<MemoryCgroup>(*memory_, "soak-" + std::to_string(victim), kOomLimit);
      if (!cgroup_->made() || !cgroup_->add(victim)) return "it could not be put into a small memory cgroup";
      for (const auto& guest : guests_) guest->return_pages(true);
      return "";
  }
  return "unknown means";
}

Kill Soak::kill_once(const Cause& cause) {
  Kill kill;
  kill.cause = cause.name;
  // On a busy machine a starved owner may be ended by its heir at any time, also now.
  pid_t victim = 0, heir = 0;
  const bool whole = eventually([&] {
    const json pair = host_.pair();
    if (pair.is_null() || pair["state"] != "paired" || pair["standby"]["state"] != "ready") return false;
    victim = pair["active"]["pid"].get<pid_t>();
    heir = pair["standby"]["pid"].get<pid_t>();
    return true;
  });
  if (!whole) FAIL("no pair to kill: " << host_.status().dump(2));
  const Load::Count before = load_->count();
  pass(std::chrono::microseconds(
      std::uniform_int_distribution<std::int64_t>(0, std::chrono::microseconds(kLongestDelay).count())(random_)));

  load_->begin_stretch();
  const auto struck = Clock::now();
  if (cause.means == Means::kSignal) kill.struck_ns = std::chrono::nanoseconds(struck.time_since_epoch()).count();
  kill.unexpected = strike(cause, victim);
  kill.incidents = incidents_of(victim);
  if (const auto since = Clock::now() - struck; since < kShortestStretch) pass(kShortestStretch - since);
  const Load::Stretch around = load_->end_stretch();
  kill.gap_ns = around.silence.count();
  kill.pause_ns = around.pause.count();
  const auto stretch = Clock::now() - struck;
  if (cgroup_) {
    for (const auto& guest : guests_) guest->return_pages(false);
    if (kill.unexpected.empty() && cgroup_->killed() == 0) kill.unexpected = "not the OOM killer's work";
    cgroup_.reset();
  }
  // On a busy machine a starved owner may be taken for hung just before it is struck, or just as it is: then that was
  // its end. Counted apart.
  const auto verdict = [&](bool in_drilled_shard) {
    return std::any_of(kill.incidents.begin(), kill.incidents.end(), [&](const json& incident) {
      return incident.contains("hang") && incident["hang"].is_string() && (incident["shard"] == 0) == in_drilled_shard;
    });
  };
  const bool first = cause.hang == nullptr || !kill.unexpected.empty();
  const bool too_late =
      (first && verdict(true)) || (verdict(false) && (first || !differs(cause, kill.incidents).empty()));
  if (too_late) {
    ++unasked_;
    kill.cause = kTooLate;
    kill.unexpected.clear();
  }
  if (!too_late && kill.unexpected.empty()) kill.unexpected = differs(cause, kill.incidents);
  for (const json& incident : kill.incidents) {
    // A standby that got no CPU is replaced; where that one is alive, nobody else may have taken over.
    const bool replaced = ::kill(heir, 0) != 0;
    if (!too_late && kill.unexpected.empty() && incident["heir_pid"] != heir && !replaced)
      kill.unexpected = "another than the standby took over: " + incident["heir_pid"].dump();
  }
  if (!host_.wait_paired(victim)) FAIL("no pair again after " << cause.name << ": " << host_.status().dump(2));

  load_->begin_stretch();
  pass(stretch);
  kill.control_ns = load_->end_stretch().silence.count();
  kill.harm = load_->count() - before;
  return kill;
}

// What the kernel's queues between outside and rings could not hold, and the rings themselves.
std::map<std::string, std::uint64_t> Soak::overflow() const {
  std::map<std::string, std::uint64_t> found;
  for (const std::string& mac : macs_)
    if (const json nic = host_.nic(mac); nic.is_object()) found["NIC " + mac] = nic.value("overflow", std::uint64_t{0});
  // Columns of /proc/net/dev (proc(5)): name, then received bytes, packets, errs, drop; drops of transmission are the
  // twelfth number.
  std::ifstream devices("/proc/net/dev");
  for (std::string line; std::getline(devices, line);) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    std::istringstream columns(line.substr(colon + 1));
    std::uint64_t value = 0;
    for (int column = 1; columns >> value; ++column)
      if (column == 4 || column == 12) found[line.substr(0, colon) + (column == 4 ? ", received" : ", sent")] = value;
  }
  return found;
}

// Frames that went out through the NICs' uplinks.
std::uint64_t Soak::sent_to_bridge() const {
  std::uint64_t sum = 0;
  for (const std::string& mac : macs_) {
    std::uint64_t frames = 0;
    std::ifstream("/sys/class/net/" + host_.nic(mac)["uplink"]["device"].get<std::string>() +
                  "/statistics/tx_packets") >>
        frames;
    sum += frames;
  }
  return sum;
}

void Soak::run(SoakReport& report) {
  begin();
  const std::vector<Cause> cards = deck(report);
  REQUIRE(host_.wait_paired());
  const auto begun = Clock::now();
  SoakReport::Totals totals;
  const std::map<std::string, std::uint64_t> overflow_before = overflow();
  auto said = Clock::now();
  unsigned done = 0;
  for (const Cause& cause : cards) {
    const Kill kill = kill_once(cause);
    report.add(kill);
    ++done;
    if (options_.progress && Clock::now() - said > 10s) {
      said = Clock::now();
      const Load::Count count = load_->count();
      std::printf("%u of %zu kills, %.0f a minute; lost %llu, duplicated %llu, reordered %llu, corrupt %llu\n", done,
                  cards.size(), 60 * done / seconds_since(begun), static_cast<unsigned long long>(count.tally.lost),
                  static_cast<unsigned long long>(count.tally.duplicated),
                  static_cast<unsigned long long>(count.tally.reordered),
                  static_cast<unsigned long long>(count.tally.corrupt));
      std::fflush(stdout);
    }
  }
  totals.kill_seconds = seconds_since(begun);
  for (const auto& [place, frames] : overflow()) {
    const auto before = overflow_before.find(place);
    const std::uint64_t more = frames - (before == overflow_before.end() ? 0 : before->second);
    totals.overflow += more;
    if (more != 0) totals.overflows.push_back(place + ": " + std::to_string(more));
  }
  totals.count = load_->stop();
  totals.seconds = seconds_since(begun);
  totals.unasked_failovers = unasked_;
  totals.sent_to_bridge = sent_to_bridge();
  totals.stalls = load_->stall_texts();
  load_.reset();
  guests_.clear();
  memory_.reset();
  for (unsigned i = 0; i < options_.devices; ++i) host_.release_domain("guest" + std::to_string(i));
  totals.left_behind = host_.stop();
  totals.complete = true;
  report.finish(totals);
}

}  // namespace tandem::test
