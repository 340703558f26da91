// SPDX-License-Identifier: Apache-2.0
// Hangs of a real pair: each kind is found by the standby, with tandemd at hand and without; what only waits is left
// alone; a standby that hangs is replaced.
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <thread>

#include "tests/pair/fixture.hpp"

using namespace tandem;
using namespace tandem::test;
using nlohmann::json;

namespace {

// Under traffic until an incident with this victim is complete; the incident.
json await_failover(PairHost& host, Traffic& traffic, pid_t victim) {
  json incident;
  const bool found = traffic.pump_until([&] {
    const json all = host.incidents();
    incident = all.is_array() && !all.empty() ? all.back() : json();
    return incident.is_object() && incident.value("victim_pid", 0) == victim && incident["complete"] == true;
  });
  if (!found) FAIL("no failover from " << victim << ": " << host.status().dump(2) << host.log());
  return incident;
}

void require_paired(PairHost& host, Traffic& traffic, pid_t not_this) {
  const bool paired = traffic.pump_until([&] {
    const json pair = host.pair();
    return pair["state"] == "paired" && pair["active"]["pid"].is_number() && pair["active"]["pid"] != not_this;
  });
  if (!paired) FAIL("no pair again: " << host.status().dump(2) << host.log());
}

void report(const char* what, const json& incident) {
  const json& line = incident["timeline_ns"];
  if (line["hang_verdict"].is_number() && line["last_heartbeat"].is_number() && line["first_transaction"].is_number())
    std::printf("%-28s %-26s verdict %8.2f ms after the last heartbeat, first packet %8.2f ms\n", what,
                incident["hang"].is_string() ? incident["hang"].get<std::string>().c_str() : "-",
                (line["hang_verdict"].get<double>() - line["last_heartbeat"].get<double>()) / 1e6,
                (line["first_transaction"].get<double>() - line["last_heartbeat"].get<double>()) / 1e6);
}

class Cgroup {
 public:
  // `kind`: "cgroup" with the freezer controller, or "cgroup2".
  explicit Cgroup(bool second) : second_(second) {
    std::string pattern = "/tmp/tandem-cgroup-XXXXXX";
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    mount_ = pattern;
    mounted_ = ::mount("none", mount_.c_str(), second ? "cgroup2" : "cgroup", 0, second ? nullptr : "freezer") == 0;
    path_ = mount_ + "/tandem-test-" + std::to_string(::getpid());
    made_ = mounted_ && ::mkdir(path_.c_str(), 0755) == 0;
  }
  Cgroup(const Cgroup&) = delete;
  Cgroup& operator=(const Cgroup&) = delete;
  ~Cgroup() {
    if (made_) {
      freeze(false);
      eventually([this] { return ::rmdir(path_.c_str()) == 0; });
    }
    if (mounted_) ::umount(mount_.c_str());
    ::rmdir(mount_.c_str());
  }
  [[nodiscard]] bool usable() const {
    return made_ && std::filesystem::exists(path_ + (second_ ? "/cgroup.freeze" : "/freezer.state"));
  }
  bool add(pid_t pid) { return write("cgroup.procs", std::to_string(pid)); }
  bool freeze(bool on) {
    return second_ ? write("cgroup.freeze", on ? "1" : "0") : write("freezer.state", on ? "FROZEN" : "THAWED");
  }

 private:
  bool write(const std::string& file, const std::string& text) {
    std::ofstream out(path_ + "/" + file);
    out << text;
    out.close();
    return static_cast<bool>(out);
  }
  bool second_, mounted_ = false, made_ = false;
  std::string mount_, path_;
};

}  // namespace

namespace {

void find_drilled_hangs(const PairHostOptions& options, int rounds) {
  PairHost host(options);
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    const std::pair<const char*, const char*> rows[] = {
        {"spin", "spinning"}, {"block", "blocked"}, {"livelock", "no progress"}};
    for (int round = 0; round < rounds; ++round) {
      for (const auto& [fault, hang] : rows) {
        INFO(fault);
        REQUIRE(traffic.pump_frames(100));
        const pid_t victim = host.active();
        const json answer = ask_beside(host, traffic, {{"command", "drill"}, {"pair", "default"}, {"fault", fault}});
        INFO(answer.dump(2));
        REQUIRE(answer.value("ok", false));
        CHECK(answer["incident"]["detected_by"] == "watchdog");
        CHECK(answer["incident"]["hang"] == hang);
        CHECK(answer["incident"]["cause"] == "SIGKILL");
        report(fault, answer["incident"]);
        require_paired(host, traffic, victim);
      }
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

}  // namespace

TEST_CASE("hangs of the active backend's own making are found by its standby") {
  SKIP_UNLESS_PAIR();
  find_drilled_hangs({}, 3);
}

TEST_CASE("hangs are found by a standby that polls") {
  SKIP_UNLESS_PAIR();
  find_drilled_hangs({.heirs = "polling"}, 1);
}

TEST_CASE("a stopped active backend is found by its standby, with tandemd and without") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    for (int round = 0; round < 4; ++round) {
      const bool without = round % 2 == 1;
      INFO((without ? "without tandemd" : "with tandemd"));
      REQUIRE(traffic.pump_frames(100));
      const pid_t victim = host.active();
      // Stopped, not killed: its parent would start another, which might be in time to help.
      const auto supervisor = host.processes("tandemd");
      REQUIRE(supervisor.size() == 1);
      if (without) ::kill(supervisor[0], SIGSTOP);
      ::kill(victim, SIGSTOP);
      REQUIRE(traffic.pump_frames(100));  // the heir moves them: nobody else can
      if (without) ::kill(supervisor[0], SIGCONT);
      const json incident = await_failover(host, traffic, victim);
      CAPTURE(incident.dump(2));
      CHECK(incident["detected_by"] == "watchdog");
      CHECK((incident["hang"] == "blocked" || incident["hang"] == "asleep with work pending"));
      report(without ? "stopped, tandemd too" : "stopped", incident);
      require_paired(host, traffic, victim);
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("every kind of hang is found with tandemd dead") {
  SKIP_UNLESS_PAIR();
  PairHost host({.supervised = false});  // or its parent would start another, which might be in time to help
  host.start();
  // Time enough to kill tandemd between its message to the backend and the verdict.
  require_domain(host, "one", {{.watchdog = R"(spin="300ms" blocked="300ms")"}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    struct Row {
      std::string how, hang, or_else;
    };
    // A stopped one may have been asleep or not, whatever it was a moment before.
    const Row rows[] = {{"spin", "spinning", ""},
                        {"block", "blocked", ""},
                        {"livelock", "no progress", ""},
                        {"stopped", "blocked", "asleep with work pending"},
                        {"asleep", "asleep with work pending", ""}};
    // Whom others keep from the CPU for a second is starved, however it hangs; and a sleeper may be woken just before
    // it is stopped. Neither says that the watchdog tells hangs apart: once more, then.
    constexpr int kMostTries = 6;
    for (const Row& row : rows) {
      INFO(row.how);
      std::string found;
      for (int attempt = 0; attempt < kMostTries && found != row.hang && (found != row.or_else || found.empty());
           ++attempt) {
        const bool drill = row.how != "stopped" && row.how != "asleep";
        REQUIRE(traffic.pump_frames(100));
        const pid_t victim = host.active();
        const auto supervisor = host.processes("tandemd");
        REQUIRE(supervisor.size() == 1);
        if (row.how == "asleep") REQUIRE(eventually([&] { return host.pair()["active"]["state"] == "asleep"; }));
        std::thread asking;
        if (drill) {
          const std::size_t logged = host.log().size();
          asking = std::thread([&] { host.ask({{"command", "drill"}, {"pair", "default"}, {"fault", row.how}}); });
          REQUIRE(traffic.pump_until([&] { return host.log().find("drill " + row.how, logged) != std::string::npos; }));
        }
        ::kill(supervisor[0], SIGKILL);
        const auto dead = std::chrono::steady_clock::now().time_since_epoch();
        // Its end takes a moment; and packets on their way may be enough for those below to come before it.
        REQUIRE(eventually([&] { return host.processes("tandemd").empty(); }));
        if (!drill) ::kill(victim, SIGSTOP);
        const bool moved = traffic.pump_frames(100);  // the heir moves them: nobody else can
        CHECK(host.processes("tandemd").empty());
        if (asking.joinable()) asking.join();
        REQUIRE(moved);
        host.start_tandemd();
        const json incident = await_failover(host, traffic, victim);
        CAPTURE(incident.dump(2));
        CHECK(incident["detected_by"] == "watchdog");
        CHECK(std::chrono::nanoseconds{incident["fence_time_ns"].get<std::int64_t>()} > dead);
        found = incident["hang"].is_string() ? incident["hang"].get<std::string>() : "";
        report(row.how.c_str(), incident);
        require_paired(host, traffic, victim);
        if (found != "starved" && row.how != "asleep" && found != row.or_else) CHECK(found == row.hang);
      }
      CHECK((found == row.hang || (!found.empty() && found == row.or_else)));
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("asleep and stopped: nobody minds until there is work") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(50));
    REQUIRE(traffic.finish().clean());
    const pid_t victim = host.active();
    REQUIRE(eventually([&] { return host.pair()["active"]["state"] == "asleep"; }));
    ::kill(victim, SIGSTOP);
    // There is no event for "nothing happens": many times the limit, and a few of the standby's own looks.
    std::this_thread::sleep_for(std::chrono::milliseconds{500});
    CHECK(host.incidents().empty());
    REQUIRE(traffic.pump_frames(50));
    const json incident = await_failover(host, traffic, victim);
    CHECK(incident["hang"] == "asleep with work pending");
    require_paired(host, traffic, victim);
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("a standby that is stopped is replaced, and costs nothing") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(50));
    const pid_t owner = host.active(), standby = host.standby();
    ::kill(standby, SIGSTOP);
    REQUIRE(traffic.pump_until([&] {
      const pid_t now = host.standby();
      return now != 0 && now != standby;
    }));
    CHECK(host.active() == owner);
    CHECK(host.incidents().empty());
    CHECK(host.logged("has not looked for its owner"));
    ::kill(owner, SIGKILL);
    require_paired(host, traffic, owner);
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("frozen by a cgroup v2: it can die, so its standby takes over") {
  SKIP_UNLESS_PAIR();
  Cgroup group(true);
  if (!group.usable()) TANDEM_SKIP("needs a cgroup v2 tree that root may extend");
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(50));
    const pid_t victim = host.active();
    if (!group.add(victim)) TANDEM_SKIP("cannot move a process into a cgroup v2");
    REQUIRE(group.freeze(true));
    const json incident = await_failover(host, traffic, victim);
    CHECK(incident["detected_by"] == "watchdog");
    report("frozen, cgroup v2", incident);
    require_paired(host, traffic, victim);
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("frozen by a cgroup v1: it cannot die, so there is an alarm, and no takeover before it is thawed") {
  SKIP_UNLESS_PAIR();
  Cgroup group(false);
  if (!group.usable()) TANDEM_SKIP("needs the freezer controller of cgroup v1");
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(50));
    const pid_t victim = host.active();
    const int epoch = host.pair()["epoch"];
    if (!group.add(victim)) TANDEM_SKIP("cannot move a process into a cgroup v1");
    REQUIRE(group.freeze(true));
    REQUIRE(traffic.pump_until([&] { return host.logged("does not die of SIGKILL"); }));
    CHECK(host.pair()["epoch"] == epoch);
    CHECK(host.incidents().empty());
    REQUIRE(group.freeze(false));
    await_failover(host, traffic, victim);
    require_paired(host, traffic, victim);
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("starved but healthy: no failover while a hog has the CPU") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(50));
    const json pair = host.pair();
    const auto tid = pair["active"]["tid"].get<pid_t>();
    cpu_set_t last;
    CPU_ZERO(&last);
    const long cpus = ::sysconf(_SC_NPROCESSORS_ONLN);
    if (cpus < 2) TANDEM_SKIP("needs a CPU for the hog and one for everybody else");
    CPU_SET(static_cast<std::size_t>(cpus - 1), &last);
    // A real-time hog on the owner's only CPU, with gaps: for up to 300 ms the owner is runnable and does not run.
    REQUIRE(::sched_setaffinity(tid, sizeof last, &last) == 0);
    const pid_t hog = ::fork();
    if (hog == 0) {
      ::sched_setaffinity(0, sizeof last, &last);
      const sched_param urgent{10};
      if (::sched_setscheduler(0, SCHED_FIFO, &urgent) != 0) ::_exit(1);
      for (int burst = 0; burst < 5; ++burst) {
        const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds{300};
        while (std::chrono::steady_clock::now() < until) {
        }
        std::this_thread::sleep_for(std::chrono::milliseconds{30});
      }
      ::_exit(0);
    }
    int status = 0;
    pid_t ended = 0;
    REQUIRE(traffic.pump_until([&] { return (ended = ::waitpid(hog, &status, WNOHANG)) == hog; }));
    if (WIFEXITED(status) && WEXITSTATUS(status) == 1) TANDEM_SKIP("needs real-time scheduling for a hog");
    CHECK(host.incidents().empty());
    CHECK(host.pair()["active"]["pid"] == pair["active"]["pid"]);
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(host, {"one"});
}
