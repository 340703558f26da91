// SPDX-License-Identifier: Apache-2.0
// The guest's agent: starts and stops flows, echoes the stream, reports what the guest's kernel saw.
#include "tests/traffic/guest_agent.hpp"

#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>

#include "tests/traffic/control.hpp"
#include "tests/traffic/net.hpp"
#include "tests/traffic/stream.hpp"
#include "tests/traffic/udp_end.hpp"

namespace tandem::traffic {
namespace {

std::int64_t read_number(const std::string& path) {
  std::ifstream file{path};
  std::int64_t number = 0;
  return file >> number ? number : -1;
}

/// The "Udp:" rows of /proc/net/snmp: names in one line, values in the next.
std::map<std::string, std::int64_t> udp_counters() {
  std::ifstream file{"/proc/net/snmp"};
  std::map<std::string, std::int64_t> counters;
  for (std::string names, values; std::getline(file, names) && std::getline(file, values);) {
    if (!names.starts_with("Udp: ")) continue;
    std::istringstream name_stream{names.substr(5)};
    std::istringstream value_stream{values.substr(5)};
    std::string name;
    std::int64_t value = 0;
    while (name_stream >> name && value_stream >> value) counters[name] = value;
  }
  return counters;
}

Json per_flow(const std::vector<Ledger>& ledgers, std::uint64_t (Ledger::*what)() const) {
  Json numbers = Json::array();
  for (const Ledger& ledger : ledgers) numbers.push_back((ledger.*what)());
  return numbers;
}

/// Waits until the peer has read the answer and left, for two seconds at most: a guest that is gone repeats nothing.
void restart_machine(ControlConnection& control, int how) {
  ::shutdown(control.fd(), SHUT_WR);
  set_timeouts(control.fd(), std::chrono::seconds{2});
  for (char ignored = 0; receive_all(control.fd(), &ignored, 1);) {
  }
  ::reboot(how);
}

class Agent {
 public:
  Agent(std::string interface, const EchoServer& echo) : interface_(std::move(interface)), echo_(echo) {}

  /// Serves one connection until it ends or another one waits at `listener`.
  void serve(ControlConnection& control, const sockaddr_in& peer, int listener);

 private:
  using Handler = Result<Json> (Agent::*)(const Json& request);

  Result<Json> start(const Json& request);
  Result<Json> stop(const Json& request);
  Result<Json> status(const Json& request);
  Result<Json> report(const Json& request);
  Result<Json> arrivals(const Json& request);
  Result<Json> clock(const Json& request);
  Result<Json> link(const Json& request);
  Result<Json> restart(const Json& request);
  Json kernel_view() const;

  static const std::map<std::string, Handler> kHandlers;

  std::string interface_;
  const EchoServer& echo_;
  sockaddr_in peer_{};
  std::unique_ptr<UdpEnd> flows_;
  Json before_;  // kernel_view() at start
};

const std::map<std::string, Agent::Handler> Agent::kHandlers = {
    {"start", &Agent::start},   {"stop", &Agent::stop},         {"status", &Agent::status},
    {"report", &Agent::report}, {"arrivals", &Agent::arrivals}, {"clock", &Agent::clock},
    {"link", &Agent::link},     {"reboot", &Agent::restart},    {"poweroff", &Agent::restart},
};

void Agent::serve(ControlConnection& control, const sockaddr_in& peer, int listener) {
  peer_ = peer;
  for (;;) {
    std::array<pollfd, 2> waiting{pollfd{control.fd(), POLLIN, 0}, pollfd{listener, POLLIN, 0}};
    if (::poll(waiting.data(), waiting.size(), -1) < 0) continue;
    if (waiting[0].revents == 0) break;
    auto request = control.receive();
    if (!request) break;
    const std::string what = request->value("do", "");
    const auto handler = kHandlers.find(what);
    Result<Json> answer =
        handler == kHandlers.end() ? fail(ErrorKind::kInvalid, "unknown request") : (this->*handler->second)(*request);
    if (!answer) answer = Json{{"ok", false}, {"error", answer.error().text}};
    (*answer).emplace("ok", true);
    if (!control.send(*answer)) break;
    if (what == "arrivals" && flows_ && !control.send_raw(std::as_bytes(std::span{flows_->arrivals()}))) break;
    if (what == "reboot") restart_machine(control, RB_AUTOBOOT);
    if (what == "poweroff") restart_machine(control, RB_POWER_OFF);
  }
  flows_.reset();
}

Result<Json> Agent::start(const Json& request) {
  FlowSetup setup{peer_, request.value<std::uint16_t>("port", kFlowPort), request.value("flows", 1u),
                  request.value("rate", 1000u)};
  if (setup.flows == 0 || setup.flows > kMaxFlows || setup.rate == 0)
    return fail(ErrorKind::kInvalid, "need 1 to " + std::to_string(kMaxFlows) + " flows and a rate above 0");
  flows_.reset();
  before_ = kernel_view();
  auto flows = UdpEnd::open(setup);
  if (!flows) return tl::make_unexpected(std::move(flows.error()));
  flows_ = std::move(*flows);
  flows_->send();
  return Json::object();
}

Result<Json> Agent::stop(const Json&) {
  if (!flows_) return fail(ErrorKind::kInvalid, "nothing was started");
  flows_->stop_sending();
  return Json::object();
}

Result<Json> Agent::status(const Json&) {
  if (!flows_) return fail(ErrorKind::kInvalid, "nothing was started");
  return Json{{"sent", flows_->sender_totals().sent}, {"received", flows_->received()}};
}

Result<Json> Agent::report(const Json&) {
  if (!flows_) return fail(ErrorKind::kInvalid, "nothing was started");
  flows_->stop();
  const SenderTotals sent = flows_->sender_totals();
  const ReceiverTotals got = flows_->receiver_totals();
  return Json{{"sent", sent.sent},
              {"refused", sent.refused},
              {"received", per_flow(got.ledgers, &Ledger::received)},
              {"duplicated", per_flow(got.ledgers, &Ledger::duplicated)},
              {"reordered", per_flow(got.ledgers, &Ledger::reordered)},
              {"corrupt", got.corrupt},
              {"socket_drops", got.socket_drops},
              {"stream_bytes", echo_.bytes()},
              {"stream_wrong_bytes", echo_.wrong_bytes()},
              {"before", before_},
              {"after", kernel_view()}};
}

Result<Json> Agent::arrivals(const Json&) {
  if (!flows_) return fail(ErrorKind::kInvalid, "nothing was started");
  flows_->stop();
  return Json{{"count", flows_->arrivals().size()}};
}

Result<Json> Agent::clock(const Json&) { return Json{{"ns", now_ns()}}; }

Result<Json> Agent::link(const Json&) {
  const std::string base = "/sys/class/net/" + interface_;
  return Json{{"carrier_changes", read_number(base + "/carrier_changes")}, {"carrier", read_number(base + "/carrier")}};
}

Result<Json> Agent::restart(const Json&) { return Json::object(); }

Json Agent::kernel_view() const {
  const std::string base = "/sys/class/net/" + interface_;
  Json view{{"carrier_changes", read_number(base + "/carrier_changes")}};
  for (const char* name : {"rx_dropped", "tx_dropped", "rx_errors", "tx_errors", "rx_packets", "tx_packets"})
    view[name] = read_number(base + "/statistics/" + name);
  const auto udp = udp_counters();
  for (const char* name : {"InErrors", "RcvbufErrors", "InCsumErrors", "NoPorts"})
    if (const auto found = udp.find(name); found != udp.end()) view[std::string{"udp_"} + name] = found->second;
  return view;
}

}  // namespace

Status run_guest_agent(const std::string& interface) {
  auto echo = EchoServer::open(kStreamPort);
  if (!echo) return tl::make_unexpected(std::move(echo.error()));
  auto listener = listen_tcp(kControlPort);
  if (!listener) return tl::make_unexpected(std::move(listener.error()));
  Agent agent{interface, **echo};
  std::printf("tandem-traffic: agent ready\n");
  std::fflush(stdout);
  for (;;) {
    sockaddr_in peer{};
    socklen_t size = sizeof peer;
    UniqueFd socket{::accept4(listener->get(), reinterpret_cast<sockaddr*>(&peer), &size, SOCK_CLOEXEC)};
    if (!socket) continue;
    set_timeouts(socket.get(), std::chrono::seconds{30});
    ControlConnection control{std::move(socket)};
    agent.serve(control, peer, listener->get());
  }
}

Result<unsigned> set_channels(const std::string& interface, unsigned count) {
  const std::string doing = "set channels of " + interface;
  const UniqueFd socket{::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)};
  ethtool_channels channels{};
  channels.cmd = ETHTOOL_GCHANNELS;
  ifreq request{};
  interface.copy(request.ifr_name, IFNAMSIZ - 1);
  request.ifr_data = reinterpret_cast<char*>(&channels);
  if (::ioctl(socket.get(), SIOCETHTOOL, &request) != 0) return fail_errno(doing + ": ask how many there are");
  channels.cmd = ETHTOOL_SCHANNELS;
  channels.combined_count = std::min(count, channels.max_combined);
  if (::ioctl(socket.get(), SIOCETHTOOL, &request) != 0) return fail_errno(doing);
  return channels.combined_count;
}

}  // namespace tandem::traffic
