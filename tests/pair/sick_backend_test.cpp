// SPDX-License-Identifier: Apache-2.0
// Backends that die at their start, cannot map a new NIC, or are all dead: no storm, an alarm, nobody else pays, and
// packets wait.
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "tests/pair/fixture.hpp"
#include "tests/support/process_limit.hpp"

using namespace tandem;
using namespace tandem::test;
using namespace std::chrono_literals;

namespace {

/// A backend program that is well or dies at once, as a file says.
class Sickness {
 public:
  Sickness() {
    REQUIRE(::mkdtemp(folder_.data()) != nullptr);
    ::chmod(folder_.c_str(), 0755);
    std::ofstream(program()) << "#!/bin/sh\n[ -e " << folder_ << "/dead ] && exit 3\nexec " << TANDEM_BACKEND_BINARY
                             << " \"$@\"\n";
    ::chmod(program().c_str(), 0755);
  }
  Sickness(const Sickness&) = delete;
  Sickness& operator=(const Sickness&) = delete;
  ~Sickness() { std::filesystem::remove_all(folder_); }
  [[nodiscard]] std::string program() const { return folder_ + "/backend"; }
  void dead() const { std::ofstream(folder_ + "/dead") << 1; }
  void cured() const { std::filesystem::remove(folder_ + "/dead"); }

 private:
  std::string folder_ = "/tmp/tandem-sick-XXXXXX";
};

std::size_t count(const std::string& text, const std::string& word) {
  std::size_t found = 0;
  for (std::size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) ++found;
  return found;
}

std::uint64_t kilobytes(pid_t pid, const char* field) { return std::stoull(proc_status(pid, field)); }

void pump_for(Traffic& traffic, std::chrono::milliseconds time) {
  const auto until = std::chrono::steady_clock::now() + time;
  REQUIRE(traffic.pump_until([&] { return std::chrono::steady_clock::now() > until; }));
}

void require_paired(PairHost& host, Traffic& traffic) {
  if (!traffic.pump_until([&] { return host.pair()["state"] == "paired" && host.standby() != 0; }))
    FAIL("no pair again: " << host.status().dump(2));
}

}  // namespace

TEST_CASE("backends that die at their start are started ever more slowly, with an alarm, until one lives") {
  SKIP_UNLESS_PAIR();
  const Sickness sickness;
  PairHost host({.backend = sickness.program()});
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    for (const bool owner_too : {false, true}) {
      INFO((owner_too ? "owner and standby" : "standby"));
      // Both have lived long enough: what was before does not count any more.
      pump_for(traffic, 2100ms);
      const std::string before = host.log();
      const pid_t owner = host.active(), standby = host.standby();
      sickness.dead();
      ::kill(standby, SIGKILL);
      if (owner_too) ::kill(owner, SIGKILL);
      const auto begin = std::chrono::steady_clock::now();
      // 0, 100, 200, 400, 800, 1600 ms: the seventh would come after 3.1 s.
      traffic.pump_until([&] { return std::chrono::steady_clock::now() - begin > 3s; });
      const std::size_t starts = count(host.log(), "started backend") - count(before, "started backend");
      CAPTURE(starts);
      CHECK(starts >= 3);
      CHECK(starts <= 7);
      CHECK(count(host.log(), "it has no standby until one lives") >
            count(before, "it has no standby until one lives"));
      if (!owner_too) {
        CHECK(host.active() == owner);
        REQUIRE(traffic.pump_frames(100));
      }
      sickness.cured();
      require_paired(host, traffic);
    }
    // What one recovered from does not count for ever: the next death is followed by a start at once.
    const pid_t standby = host.standby();
    REQUIRE(traffic.pump_until(
        [&, until = std::chrono::steady_clock::now() + 2100ms] { return std::chrono::steady_clock::now() > until; }));
    const std::string before = host.log();
    ::kill(standby, SIGKILL);
    require_paired(host, traffic);
    CHECK(count(host.log(), "died right after their start; next try") ==
          count(before, "died right after their start; next try"));
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("a running pair that cannot map a new NIC refuses it and serves the others") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    const std::vector<pid_t> backends = host.processes("tandem-backend");
    for (const std::size_t limited : {0u, 1u}) {
      const pid_t pid = limited == 0 ? host.active() : host.standby();
      INFO((limited == 0 ? "the owner" : "the standby"));
      REQUIRE(traffic.pump_frames(100));
      REQUIRE(set_soft_limit(pid, RLIMIT_AS, (kilobytes(pid, "VmSize") + 512) * 1024) == 0);
      const auto answer = host.prepare_domain("other", {{.mac = kOtherMac}});
      INFO(answer.dump());
      CHECK_FALSE(answer.value("ok", true));
      CHECK(answer.value("error", "").find("a backend cannot serve NIC " + kOtherMac) != std::string::npos);
      REQUIRE(set_soft_limit(pid, RLIMIT_AS, RLIM_INFINITY) == 0);
      CHECK(host.nic(kOtherMac).is_null());
      require_domain(host, "other", {{.mac = kOtherMac}});
      CHECK(host.release_domain("other").value("ok", false));
    }
    CHECK(host.processes("tandem-backend") == backends);
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("all backends dead: packets wait in the rings, and a fresh pair goes on from the segment") {
  SKIP_UNLESS_PAIR();
  PairHost host({.backend = {}, .tandemd = {}, .supervised = false});
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    for (int round = 0; round < 3; ++round) {
      REQUIRE(traffic.pump_frames(100));
      const pid_t owner = host.active(), standby = host.standby();
      // Nobody is there to start new ones.
      for (const pid_t pid : host.processes("tandemd")) ::kill(pid, SIGKILL);
      ::kill(round % 2 == 0 ? owner : standby, SIGKILL);
      ::kill(round % 2 == 0 ? standby : owner, SIGKILL);
      REQUIRE(eventually([&] { return host.processes("tandem-backend").empty(); }));
      // As much as the windows allow: it goes into the rings and stays there.
      for (int turn = 0; turn < 100; ++turn) traffic.pump();
      const std::uint64_t arrived = traffic.arrived_in() + traffic.arrived_out();
      CHECK(guest.in_flight(0) > 0);
      for (int turn = 0; turn < 100; ++turn) traffic.pump();
      CHECK(traffic.arrived_in() + traffic.arrived_out() == arrived);
      host.start_tandemd();
      require_paired(host, traffic);
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}
