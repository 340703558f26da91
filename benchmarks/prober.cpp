// SPDX-License-Identifier: Apache-2.0
// tandem-prober: a guest that sends numbered, time-stamped frames at a steady rate and notes when they come back.
//
// One or more NICs (--socket), each with some queue pairs; a flow per queue pair. Says "running" when every flow has
// come back once, and on SIGTERM writes what it saw as one JSON object: per flow what was sent, came, was lost, came
// twice or late; all gaps between arrivals above --gap-us, with CLOCK_MONOTONIC times; round trips; when sockets closed
// and opened; whom it killed when (--victim). A gap may be the prober's own: each carries the longest stretch within it
// in which the prober itself did not run.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "benchmarks/front_end.hpp"
#include "common/monotonic_clock.hpp"
#include "common/thread_priority.hpp"

namespace {

using namespace tandem;
using namespace tandem::benchmark;
using nlohmann::json;

volatile std::sig_atomic_t stop_asked = 0, kill_asked = 0;

struct Options {
  std::vector<std::string> sockets;
  std::uint32_t queue_pairs = 1, senders = ~0u, queue_size = 1024, length = 64;
  double rate = 100'000;
  double gap_us = 50;
  double nap_us = 0;
  std::string output, victim;
  bool listen = false;
};

// What a frame carries behind its Ethernet header.
struct Stamp {
  std::uint32_t magic = kMagic;
  std::uint32_t flow = 0;
  std::uint64_t number = 0;
  std::uint64_t sent_ns = 0;
  static constexpr std::uint32_t kMagic = 0x54504e44;
};

constexpr std::uint64_t kConnectLimitNs = 30'000'000'000;
constexpr std::uint64_t kDrainNs = 1'000'000'000;
// From being asked to a kill: until then, whoever asked is asleep again.
constexpr std::uint64_t kKillDelayNs = 20'000'000;
constexpr std::size_t kEthernet = 14;
constexpr std::size_t kMostSamples = 1u << 20;  // of gaps and of round trips; more are counted, not kept

struct Gap {
  std::uint32_t flow;
  std::uint64_t begin_ns, end_ns, own_ns;
};

struct Flow {
  std::uint64_t sent = 0, came = 0, twice = 0, late = 0, highest = 0;
  std::uint64_t last_ns = 0;
  std::vector<bool> seen;

  void note(std::uint64_t number) {
    if (number >= seen.size()) seen.resize(std::max<std::size_t>(2 * seen.size(), number + 1024), false);
    if (seen[number]) {
      ++twice;
      return;
    }
    seen[number] = true;
    if (came > 0 && number < highest) ++late;
    highest = std::max(highest, number);
    ++came;
  }
};

class Prober {
 public:
  explicit Prober(const Options& options) : options_(options) {}
  Status start();
  void run();
  [[nodiscard]] json result() const;

 private:
  void send_due(std::uint64_t now);
  bool send_one(std::uint32_t flow, std::uint64_t now);
  void receive(std::uint64_t began);
  void arrived(const std::vector<std::byte>& frame, std::uint64_t now);
  void keep_connections(std::uint64_t now);
  void nap() const;
  void kill_when_due(std::uint64_t now);
  [[nodiscard]] bool all_came() const {
    return std::all_of(flows_.begin(), flows_.end(), [](const Flow& flow) { return flow.came == flow.sent; });
  }
  std::uint32_t flows() const { return static_cast<std::uint32_t>(flows_.size()); }

  const Options& options_;
  std::vector<std::unique_ptr<FrontEnd>> ends_;
  std::vector<Flow> flows_;
  std::vector<Gap> gaps_;
  std::vector<std::uint32_t> round_trips_ns_;
  json connections_ = json::array(), kills_ = json::array();
  std::vector<std::byte> out_, in_;
  double interval_ns_ = 0;
  double due_ns_ = 0;
  std::uint64_t gap_ns_ = 0, refused_ = 0, foreign_ = 0, begun_ns_ = 0, ended_ns_ = 0;
  std::uint64_t own_ns_ = 0;  // longest round of the loop since the last arrival
  std::uint64_t round_ns_ = 0, looked_ns_ = 0;
  std::uint64_t kill_ns_ = 0;  // when the next kill is due; 0: none is
  int victim_pid_ = 0, victim_tid_ = 0, victim_signal_ = 0;
  std::uint32_t turn_ = 0, senders_ = 0, silent_ = 0;
};

Status Prober::start() {
  for (const std::string& path : options_.sockets) {
    auto end = FrontEnd::make(path, {options_.queue_pairs, options_.queue_size, 2048, options_.listen});
    if (!end) return tl::make_unexpected(std::move(end.error()));
    // A back end may take its time: DPDK's looks for us once a second.
    const std::uint64_t begun = monotonic_ns();
    for (;;) {
      auto connected = (*end)->connect();
      if (connected) break;
      if (connected.error().kind != ErrorKind::kGone || monotonic_ns() - begun > kConnectLimitNs || stop_asked != 0)
        return connected;
      ::usleep(1000);
    }
    ends_.push_back(std::move(*end));
  }
  flows_.resize(ends_.size() * options_.queue_pairs);
  senders_ = std::min<std::uint32_t>(options_.senders * options_.queue_pairs, flows());
  if (options_.senders >= ends_.size()) senders_ = flows();
  silent_ = senders_;
  interval_ns_ = 1e9 / options_.rate;
  gap_ns_ = static_cast<std::uint64_t>(options_.gap_us * 1000);
  gaps_.reserve(4096);
  round_trips_ns_.reserve(kMostSamples);
  // Broadcast, so that a learning switch floods it; an EtherType for experiments (IEEE Std 802).
  out_.assign(options_.length, std::byte{0});
  std::fill_n(out_.begin(), 6, std::byte{0xff});
  constexpr std::byte kRest[] = {std::byte{2}, {}, {}, {}, {}, std::byte{1}, std::byte{0x88}, std::byte{0xb5}};
  std::copy(std::begin(kRest), std::end(kRest), out_.begin() + 6);
  return {};
}

bool Prober::send_one(std::uint32_t flow, std::uint64_t now) {
  FrontEnd& end = *ends_[flow / options_.queue_pairs];
  const std::uint32_t pair = flow % options_.queue_pairs;
  const Stamp stamp{Stamp::kMagic, flow, flows_[flow].sent, now};
  std::memcpy(out_.data() + kEthernet, &stamp, sizeof stamp);
  if (!end.nic(pair).send(out_)) {
    end.nic(pair).reap();
    if (!end.nic(pair).send(out_)) return false;
  }
  ++flows_[flow].sent;
  end.publish_transmit(pair);
  return true;
}

void Prober::send_due(std::uint64_t now) {
  // Whoever was away for long sends the latest frames only: a ring's worth at once tells nothing.
  due_ns_ = std::max(due_ns_, static_cast<double>(now) - 32 * interval_ns_);
  for (; due_ns_ <= static_cast<double>(now); due_ns_ += interval_ns_) {
    if (!send_one(turn_, now)) ++refused_;
    if (++turn_ == senders_) turn_ = 0;
  }
}

void Prober::arrived(const std::vector<std::byte>& frame, std::uint64_t now) {
  Stamp stamp;
  if (frame.size() >= kEthernet + sizeof stamp) std::memcpy(&stamp, frame.data() + kEthernet, sizeof stamp);
  if (frame.size() < kEthernet + sizeof stamp || stamp.magic != Stamp::kMagic || stamp.flow >= flows() ||
      stamp.number >= flows_[stamp.flow].sent) {
    ++foreign_;
    return;
  }
  Flow& flow = flows_[stamp.flow];
  if (flow.last_ns == 0 && --silent_ == 0) {
    std::puts("running");
    std::fflush(stdout);
  }
  if (flow.last_ns != 0 && now - flow.last_ns > gap_ns_ && gaps_.size() < kMostSamples)
    gaps_.push_back({stamp.flow, flow.last_ns, now, own_ns_});
  flow.last_ns = now;
  flow.note(stamp.number);
  if (round_trips_ns_.size() < kMostSamples)
    round_trips_ns_.push_back(static_cast<std::uint32_t>(std::min<std::uint64_t>(now - stamp.sent_ns, ~0u)));
}

void Prober::receive(std::uint64_t began) {
  if (round_ns_ != 0) own_ns_ = std::max(own_ns_, began - round_ns_);
  round_ns_ = began;
  bool any = false;
  for (auto& end : ends_)
    for (std::uint32_t pair = 0; pair < options_.queue_pairs; ++pair) {
      bool took = false;
      std::uint64_t now = 0;
      while (end->nic(pair).take(in_)) {
        if (!took) now = monotonic_ns();
        took = true;
        arrived(in_, now);
      }
      if (took) end->publish_receive(pair);
      any = any || took;
    }
  if (any) own_ns_ = 0;
}

void Prober::keep_connections(std::uint64_t now) {
  constexpr std::uint64_t kLookNs = 1'000'000;
  if (now - looked_ns_ < kLookNs) return;
  looked_ns_ = now;
  for (std::size_t i = 0; i < ends_.size(); ++i) {
    FrontEnd& end = *ends_[i];
    if (end.connected()) {
      end.look();
      if (!end.connected()) connections_.push_back({{"nic", i}, {"at_ns", now}, {"event", "closed"}});
    } else if (end.connect()) {
      connections_.push_back({{"nic", i}, {"at_ns", monotonic_ns()}, {"event", "connected"}});
      round_ns_ = 0;  // the wait for the back end's answers was not ours
    }
  }
}

void Prober::nap() const {
  const timespec pause{0, static_cast<long>(options_.nap_us * 1000)};
  ::clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, nullptr);
}

// Between two rounds of the loop, so that nobody but us and the victim is at work in that moment.
void Prober::kill_when_due(std::uint64_t now) {
  if (kill_asked != 0 && kill_ns_ == 0) {
    kill_asked = 0;
    std::ifstream file(options_.victim);
    if (file >> victim_pid_ >> victim_tid_ >> victim_signal_) kill_ns_ = now + kKillDelayNs;
  }
  if (kill_ns_ == 0 || now < kill_ns_) return;
  kill_ns_ = 0;
  const std::uint64_t at = monotonic_ns();
  const bool done = (victim_tid_ != 0 ? ::tgkill(victim_pid_, victim_tid_, victim_signal_)
                                      : ::kill(victim_pid_, victim_signal_)) == 0;
  kills_.push_back({{"pid", victim_pid_}, {"at_ns", at}, {"done", done}});
}

void Prober::run() {
  begun_ns_ = monotonic_ns();
  due_ns_ = static_cast<double>(begun_ns_);
  while (stop_asked == 0) {
    const std::uint64_t now = monotonic_ns();
    receive(now);
    keep_connections(now);
    send_due(now);
    kill_when_due(now);
    if (options_.nap_us > 0) nap();
  }
  // What is on its way still counts, as long as something comes.
  ended_ns_ = monotonic_ns();
  for (std::uint64_t quiet_since = ended_ns_, before = 0; monotonic_ns() - quiet_since < kDrainNs && !all_came();) {
    receive(monotonic_ns());
    const std::uint64_t came = std::accumulate(flows_.begin(), flows_.end(), std::uint64_t{0},
                                               [](std::uint64_t sum, const Flow& flow) { return sum + flow.came; });
    if (came != std::exchange(before, came)) quiet_since = monotonic_ns();
  }
}

json Prober::result() const {
  json flows = json::array(), gaps = json::array();
  for (const Flow& flow : flows_)
    flows.push_back({{"sent", flow.sent},
                     {"came", flow.came},
                     {"lost", flow.sent - flow.came},
                     {"duplicated", flow.twice},
                     {"reordered", flow.late}});
  for (const Gap& gap : gaps_) gaps.push_back({gap.flow, gap.begin_ns, gap.end_ns, gap.own_ns});
  return {{"begun_ns", begun_ns_},       {"ended_ns", ended_ns_}, {"flows", std::move(flows)},
          {"gaps", std::move(gaps)},     {"refused", refused_},   {"foreign", foreign_},
          {"connections", connections_}, {"kills", kills_},       {"round_trips_ns", round_trips_ns_}};
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"A guest that sends numbered frames and notes when they come back. For benchmarks/run."};
  app.add_option("--socket", options.sockets, "vhost-user socket of a NIC; may be repeated")->required();
  app.add_option("--queue-pairs", options.queue_pairs, "of each NIC")->check(CLI::Range(1u, 32u));
  app.add_option("--senders", options.senders, "only the first N NICs send")->check(CLI::Range(1u, 64u));
  app.add_option("--queue-size", options.queue_size, "entries of each ring")->check(CLI::Range(64u, 4096u));
  app.add_option("--length", options.length, "bytes of a frame")->check(CLI::Range(60u, 1522u));
  app.add_option("--rate", options.rate, "frames a second, all flows together")->check(CLI::Range(1.0, 1e7));
  app.add_option("--gap-us", options.gap_us, "shorter gaps are not reported");
  app.add_option("--nap-us", options.nap_us,
                 "sleep between two looks, at real-time priority, instead of looking all the time")
      ->check(CLI::Range(0.0, 500'000.0));
  app.add_option("--victim", options.victim,
                 "on SIGUSR1 and 20 ms later, kill what this file names: PID TID SIGNAL (TID 0: the whole process)");
  app.add_flag("--listen", options.listen, "listen on the sockets; the back end connects");
  app.add_option("--output", options.output, "file for the result; standard output without");
  CLI11_PARSE(app, argc, argv);
  struct sigaction action {};
  action.sa_handler = [](int) { stop_asked = 1; };
  ::sigaction(SIGTERM, &action, nullptr);
  ::sigaction(SIGINT, &action, nullptr);
  action.sa_handler = [](int) { kill_asked = 1; };
  ::sigaction(SIGUSR1, &action, nullptr);
  // Whoever polls beside us gives its CPU up in the moment we wake.
  if (options.nap_us > 0)
    if (auto set = make_real_time(0); !set) {
      std::fprintf(stderr, "tandem-prober: %s\n", set.error().text.c_str());
      return 1;
    }
  Prober prober(options);
  if (auto started = prober.start(); !started) {
    std::fprintf(stderr, "tandem-prober: %s\n", started.error().text.c_str());
    return 1;
  }
  prober.run();
  const std::string text = prober.result().dump();
  if (options.output.empty())
    std::puts(text.c_str());
  else
    std::ofstream(options.output) << text << '\n';
  return 0;
}
