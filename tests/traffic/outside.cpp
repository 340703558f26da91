// SPDX-License-Identifier: Apache-2.0
// The outside end: one run from the first connection to the report.
#include "tests/traffic/outside.hpp"

#include <signal.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <limits>
#include <memory>
#include <numeric>

#include "tests/traffic/control.hpp"
#include "tests/traffic/net.hpp"
#include "tests/traffic/stream.hpp"
#include "tests/traffic/udp_end.hpp"

namespace tandem::traffic {
namespace {

using Counts = std::vector<std::uint64_t>;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

std::uint64_t sum(const Counts& counts) { return std::accumulate(counts.begin(), counts.end(), std::uint64_t{0}); }

/// The guest's clock against ours at one moment.
struct ClockSample {
  std::int64_t guest_ns = 0;
  std::int64_t ahead_ns = 0;                                             ///< guest minus host
  std::int64_t uncertain_ns = std::numeric_limits<std::int64_t>::max();  ///< half the round trip
};

/// The exchange with the shortest round trip is the one that says most.
Result<ClockSample> compare_clocks(ControlConnection& control) {
  ClockSample best;
  for (int i = 0; i < 32; ++i) {
    const std::int64_t before = now_ns();
    auto answer = control.ask({{"do", "clock"}});
    const std::int64_t after = now_ns();
    if (!answer) return tl::make_unexpected(std::move(answer.error()));
    const std::int64_t uncertain = (after - before) / 2;
    const std::int64_t guest = answer->value("ns", std::int64_t{0});
    if (uncertain < best.uncertain_ns) best = {guest, guest - (before + uncertain), uncertain};
  }
  return best;
}

/// Guest time to host time, the drift between two samples taken as even.
std::int64_t to_host(std::int64_t guest_ns, const ClockSample& first, const ClockSample& last) {
  const double span = static_cast<double>(std::max<std::int64_t>(1, last.guest_ns - first.guest_ns));
  const double position = static_cast<double>(guest_ns - first.guest_ns) / span;
  const double ahead =
      static_cast<double>(first.ahead_ns) + position * static_cast<double>(last.ahead_ns - first.ahead_ns);
  return guest_ns - static_cast<std::int64_t>(ahead);
}

sigset_t stop_signals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  return set;
}

bool told_to_stop(milliseconds limit) {
  const timespec time{limit.count() / 1000, limit.count() % 1000 * 1'000'000};
  const sigset_t set = stop_signals();
  return ::sigtimedwait(&set, nullptr, &time) > 0;
}

Status save_arrivals(const std::string& path, const std::vector<Arrival>& arrivals) {
  std::ofstream file{path, std::ios::binary};
  file.write(reinterpret_cast<const char*>(arrivals.data()),
             static_cast<std::streamsize>(arrivals.size() * sizeof(Arrival)));
  if (!file.flush()) return fail_errno("write arrivals to " + path);
  return {};
}

/// What one direction came to, from what one end sent and the other end counted.
struct Direction {
  std::uint64_t sent = 0, received = 0, lost = 0, duplicated = 0, reordered = 0, corrupt = 0, refused = 0,
                socket_drops = 0;

  [[nodiscard]] bool clean() const { return lost == 0 && duplicated == 0 && reordered == 0 && corrupt == 0; }
  [[nodiscard]] Json json() const {
    return {{"sent", sent},           {"received", received}, {"lost", lost},       {"duplicated", duplicated},
            {"reordered", reordered}, {"corrupt", corrupt},   {"refused", refused}, {"socket_drops", socket_drops}};
  }
};

Direction direction_to_guest(const SenderTotals& ours, const Json& guest) {
  const Counts received = guest.at("received");
  Direction to{sum(ours.sent),
               sum(received),
               0,
               sum(guest.at("duplicated").get<Counts>()),
               sum(guest.at("reordered").get<Counts>()),
               guest.at("corrupt"),
               ours.refused,
               guest.at("socket_drops")};
  for (std::size_t i = 0; i < received.size(); ++i) {
    to.lost += ours.sent.at(i) - std::min(received[i], ours.sent.at(i));
    to.corrupt += received[i] - std::min(received[i], ours.sent.at(i));
  }
  return to;
}

Direction direction_from_guest(const ReceiverTotals& ours, const Json& guest) {
  const Counts sent = guest.at("sent");
  Direction from{sum(sent), 0, 0, 0, 0, ours.corrupt, guest.at("refused"), ours.socket_drops};
  for (std::size_t i = 0; i < sent.size(); ++i) {
    const Ledger& ledger = ours.ledgers.at(i);
    from.received += ledger.received();
    from.duplicated += ledger.duplicated();
    from.reordered += ledger.reordered();
    from.lost += ledger.missing(sent[i]);
    from.corrupt += ledger.surplus(sent[i]);
  }
  return from;
}

class Run {
 public:
  explicit Run(const OutsideOptions& options) : options_(options) {}

  Status begin();
  Status carry_on_until_told();
  Status drain();
  Result<Json> report();

 private:
  Status reach(const sockaddr_in& agent);
  Status fetch_arrivals(const ClockSample& last);
  void print_progress() const;

  const OutsideOptions& options_;
  std::unique_ptr<ControlConnection> control_;
  std::unique_ptr<UdpEnd> flows_;
  std::unique_ptr<StreamClient> stream_;
  ClockSample clock_;
  std::int64_t begun_ns_ = 0;
  std::int64_t ended_ns_ = 0;
  StreamResult stream_result_;
};

// A guest that is booting may answer one SYN and be gone again: the agent is there once it has answered a request. One
// that refuses is there.
Status Run::reach(const sockaddr_in& agent) {
  const auto deadline = steady_clock::now() + options_.connect_limit;
  for (;;) {
    const auto left = std::chrono::ceil<milliseconds>(deadline - steady_clock::now());
    auto socket = connect_tcp(agent, std::max(left, milliseconds{1000}));
    if (!socket) return tl::make_unexpected(std::move(socket.error()));
    const int fd = socket->get();
    set_timeouts(fd, std::chrono::seconds{5});
    control_ = std::make_unique<ControlConnection>(std::move(*socket));
    auto clock = compare_clocks(*control_);
    if (clock) {
      set_timeouts(fd, std::chrono::seconds{30});
      clock_ = *clock;
      return {};
    }
    if (steady_clock::now() >= deadline || clock.error().kind == ErrorKind::kInvalid)
      return tl::make_unexpected(std::move(clock.error()));
    std::fprintf(stderr, "%s; connecting again\n", clock.error().text.c_str());
    std::this_thread::sleep_for(milliseconds{100});
  }
}

Status Run::begin() {
  auto agent = parse_address(options_.guest, kControlPort);
  if (!agent) return tl::make_unexpected(std::move(agent.error()));
  if (Status reached = reach(*agent); !reached) return reached;

  auto echo = parse_address(options_.guest, kStreamPort);
  auto stream = connect_tcp(*echo, milliseconds{5000});
  if (!stream) return tl::make_unexpected(std::move(stream.error()));
  auto flows = UdpEnd::open({*agent, options_.port, options_.flows, options_.rate});
  if (!flows) return tl::make_unexpected(std::move(flows.error()));
  flows_ = std::move(*flows);
  // Our sockets are open before the guest sends, and the guest's before we do: nothing meets a closed port.
  auto started =
      control_->ask({{"do", "start"}, {"flows", options_.flows}, {"rate", options_.rate}, {"port", options_.port}});
  if (!started) return tl::make_unexpected(std::move(started.error()));
  begun_ns_ = now_ns();
  flows_->send();
  stream_ = std::make_unique<StreamClient>(std::move(*stream), options_.stream_rate);
  return {};
}

Status Run::carry_on_until_told() {
  const auto end =
      steady_clock::now() + std::chrono::duration_cast<milliseconds>(std::chrono::duration<double>(options_.seconds));
  std::printf("running\n");
  for (;;) {
    print_progress();
    milliseconds wait{250};
    if (options_.seconds > 0) {
      const auto left = std::chrono::ceil<milliseconds>(end - steady_clock::now());
      if (left <= milliseconds::zero()) return {};
      wait = std::min(wait, left);
    }
    if (told_to_stop(wait)) return {};
  }
}

void Run::print_progress() const {
  const Json progress{{"t_ns", now_ns()},
                      {"sent", sum(flows_->sender_totals().sent)},
                      {"received", flows_->received()},
                      {"stream_returned", stream_->returned()}};
  std::printf("%s\n", progress.dump().c_str());
  std::fflush(stdout);
}

/// Both ends stop sending; what is still under way may take until nothing has moved for the drain limit.
Status Run::drain() {
  ended_ns_ = now_ns();
  flows_->stop_sending();
  if (auto stopped = control_->ask({{"do", "stop"}}); !stopped) return tl::make_unexpected(std::move(stopped.error()));
  stream_result_ = stream_->finish();
  const std::uint64_t sent = sum(flows_->sender_totals().sent);
  std::uint64_t before = 0;
  for (auto deadline = steady_clock::now() + options_.drain_limit; steady_clock::now() < deadline;) {
    auto guest = control_->ask({{"do", "status"}});
    if (!guest) return tl::make_unexpected(std::move(guest.error()));
    const std::uint64_t there = guest->value("received", std::uint64_t{0});
    const std::uint64_t here = flows_->received();
    if (there >= sent && here >= sum(guest->at("sent").get<Counts>())) return {};
    if (there + here != before) deadline = steady_clock::now() + options_.drain_limit;
    before = there + here;
    std::this_thread::sleep_for(milliseconds{50});
  }
  return {};
}

Status Run::fetch_arrivals(const ClockSample& last) {
  if (options_.arrivals.empty()) return {};
  auto answer = control_->ask({{"do", "arrivals"}});
  if (!answer) return tl::make_unexpected(std::move(answer.error()));
  std::vector<Arrival> theirs(answer->value("count", std::size_t{0}));
  if (Status got = control_->receive_raw(std::as_writable_bytes(std::span{theirs})); !got) return got;
  for (Arrival& arrival : theirs) arrival.time_ns = to_host(arrival.time_ns, clock_, last);
  if (Status saved = save_arrivals(options_.arrivals + ".to_guest", theirs); !saved) return saved;
  return save_arrivals(options_.arrivals + ".from_guest", flows_->arrivals());
}

Result<Json> Run::report() {
  flows_->stop();
  auto guest = control_->ask({{"do", "report"}});
  if (!guest) return guest;
  auto clock = compare_clocks(*control_);
  if (!clock) return tl::make_unexpected(std::move(clock.error()));
  if (Status saved = fetch_arrivals(*clock); !saved) return tl::make_unexpected(std::move(saved.error()));

  const Direction to = direction_to_guest(flows_->sender_totals(), *guest);
  const Direction from = direction_from_guest(flows_->receiver_totals(), *guest);
  std::string stream_failure = stream_result_.failure;
  if (stream_failure.empty() &&
      (guest->at("stream_bytes") != stream_result_.sent || guest->at("stream_wrong_bytes") != 0))
    stream_failure = "the guest read " + guest->at("stream_bytes").dump() + " bytes, " +
                     guest->at("stream_wrong_bytes").dump() + " of them wrong";
  const std::int64_t link_changes = guest->at("after").at("carrier_changes").get<std::int64_t>() -
                                    guest->at("before").at("carrier_changes").get<std::int64_t>();
  return Json{{"udp", {{"to_guest", to.json()}, {"from_guest", from.json()}}},
              {"tcp",
               {{"bytes", stream_result_.returned},
                {"ok", stream_failure.empty()},
                {"why", stream_failure},
                {"retransmitted_segments", stream_result_.retransmitted_segments}}},
              {"guest_link_changes", link_changes},
              {"guest_kernel", {{"before", guest->at("before")}, {"after", guest->at("after")}}},
              {"clock_uncertain_ns", std::max(clock_.uncertain_ns, clock->uncertain_ns)},
              {"begun_ns", begun_ns_},
              {"ended_ns", ended_ns_},
              {"arrivals", options_.arrivals.empty() ? Json{}
                                                     : Json{{"to_guest", options_.arrivals + ".to_guest"},
                                                            {"from_guest", options_.arrivals + ".from_guest"}}},
              {"ok", to.clean() && from.clean() && stream_failure.empty() && link_changes == 0}};
}

Status write_report(const OutsideOptions& options, const Json& report) {
  const std::string text = report.dump(2) + "\n";
  if (options.json.empty()) {
    std::fputs(text.c_str(), stdout);
    return {};
  }
  std::ofstream file{options.json};
  if (!(file << text).flush()) return fail_errno("write the report to " + options.json);
  return {};
}

}  // namespace

Result<bool> run_outside(const OutsideOptions& options) {
  const sigset_t set = stop_signals();
  ::pthread_sigmask(SIG_BLOCK, &set, nullptr);  // before the first thread: all of them inherit it
  Run run{options};
  Status done = run.begin();
  if (done) done = run.carry_on_until_told();
  if (done) done = run.drain();
  if (!done) return tl::make_unexpected(std::move(done.error()));
  auto report = run.report();
  if (!report) return tl::make_unexpected(std::move(report.error()));
  if (Status written = write_report(options, *report); !written) return tl::make_unexpected(std::move(written.error()));
  return report->at("ok").get<bool>();
}

}  // namespace tandem::traffic
