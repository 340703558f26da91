// SPDX-License-Identifier: Apache-2.0
// tandemd is killed at each step of each vhost-user message, of a start and an end, of a failover and of its own
// adoption: each answer comes once and is the right one, traffic goes on, and a new tandemd finds what there is.
#include <signal.h>

#include <thread>

#include "tests/pair/fixture.hpp"
#include "tests/pair/probe_file.hpp"

using namespace tandem;
using namespace tandem::test;
using nlohmann::json;
using R = VhostUserRequest;
using P = SupervisorProbe;

namespace {

struct Scene {
  SupervisorProbes probes;
  PairHost host{{.backend = {}, .tandemd = TANDEM_PROBED_TANDEMD_BINARY, .supervised = false}};

  Scene() {
    host.environment["TANDEM_SUPERVISOR_PROBE_FILE"] = probes.path();
    host.start();
  }
  void revive() {
    REQUIRE(eventually([&] { return probes->killed.load() != 0; }));
    host.start_tandemd();
  }
  /// Nothing is served, and nothing is left of what was.
  void require_empty() const {
    REQUIRE(eventually([&] {
      const json status = host.status();
      return status.value("ok", false) && status["nics"].empty() && status["pairs"].empty();
    }));
    for (const std::string& link : entries("/sys/class/net")) CHECK_FALSE(link.starts_with("tdm"));
    CHECK(host.processes("tandem-backend").empty());
    CHECK(entries(host.run_dir() + "/nic").empty());
  }
};

/// A connection's whole life; tandemd dies at `point` of each message.
class Walk {
 public:
  explicit Walk(P point) : point_(point) {
    // Only tandemd is to die here, whoever takes CPUs away from the owner: hang_test has the short limits.
    require_domain(scene_.host, "one", {{.watchdog = R"(spin="1s" blocked="1s")"}});
    features_ = ScriptedFrontEnd(scene_.host.nic_socket(kMac)).ask(R::kGetFeatures);
    guest_.emplace(scene_.host.nic_socket(kMac));
  }

  void negotiate() {
    ask(R::kGetFeatures, features_);
    ask(R::kGetProtocolFeatures, default_protocol_features());
    tell(R::kSetProtocolFeatures, default_protocol_features());
    ask(R::kGetQueueNum, 1);
    ask(R::kGetMaxMemSlots, kMaxMemoryRegions);
    killed("SET_OWNER", [&] { guest_->send(R::kSetOwner); });
    for (const std::uint32_t vring : {0u, 1u})
      tell(R::kSetVringCall, std::uint64_t{vring}, guest_->queue(vring).call_fd);
    tell_and_hear(R::kNetSetMtu, std::uint64_t{1500});
  }

  void start() {
    for (const std::uint32_t vring : {0u, 1u}) tell(R::kSetVringEnable, VhostUserVringState{vring, 1});
    tell(R::kSetFeatures, guest_->options().features);
    ask(R::kGetStatus, 0);
    tell(R::kSetStatus, std::uint64_t{8});
    killed(
        "SET_MEM_TABLE", [&] { guest_->send_mem_table(true); },
        [&] { CHECK(guest_->reply_u64(R::kSetMemTable) == 0); });
    for (const std::uint32_t vring : {0u, 1u}) {
      const std::uint64_t area = ScriptedFrontEnd::kUser + vring * DriverQueue::kAreaSize;
      tell(R::kSetVringNum, VhostUserVringState{vring, guest_->queue(vring).size});
      tell(R::kSetVringBase, VhostUserVringState{vring, 0});
      tell(R::kSetVringAddr,
           VhostUserVringAddress{vring, 0, area, area + DriverQueue::kUsedAt, area + DriverQueue::kAvailAt, 0});
      tell(R::kSetVringKick, std::uint64_t{vring}, guest_->queue(vring).kick_fd);
      tell(R::kSetVringCall, std::uint64_t{vring}, guest_->queue(vring).call_fd);
    }
    tell(R::kSetStatus, std::uint64_t{15});
    guest_->post_receive_buffers(0);
  }

  /// Traffic, and messages in mid-traffic.
  void work() {
    Traffic traffic(*guest_, kMac);
    REQUIRE(traffic.pump_frames(50));
    for (const std::uint32_t vring : {0u, 1u}) {
      tell_and_hear(R::kSetVringEnable, VhostUserVringState{vring, 0});
      tell_and_hear(R::kSetVringEnable, VhostUserVringState{vring, 1});
      REQUIRE(traffic.pump_frames(20));
    }
    tell(R::kSetVringCall, std::uint64_t{0}, guest_->queue(0).call_fd);
    REQUIRE(traffic.pump_frames(20));
    require_clean(traffic);
  }

  void stop() {
    const std::uint16_t bases[] = {guest_->queue(0).used_index(), guest_->queue(1).avail_index};
    tell_and_hear(R::kSetStatus, std::uint64_t{0});
    for (const std::uint32_t vring : {0u, 1u})
      killed(
          "GET_VRING_BASE", [&] { guest_->send_state(R::kGetVringBase, vring, 0); },
          [&] {
            const auto state = load_wire<VhostUserVringState>(guest_->reply(R::kGetVringBase));
            CHECK(state.index == vring);
            CHECK(state.num == bases[vring]);
          });
    guest_->reset_rings();
  }

  void disconnect() {
    killed(
        "disconnect", [&] { guest_->disconnect(); }, {}, false);
    guest_.emplace(scene_.host.nic_socket(kMac));
    guest_->settle();
  }

  void undisturbed() {
    guest_->negotiate();
    guest_->start();
    Traffic traffic(*guest_, kMac);
    REQUIRE(traffic.pump_frames(100));
    const pid_t victim = scene_.host.active();
    ::kill(victim, SIGKILL);
    REQUIRE(traffic.pump_until([&] { return scene_.host.pair()["state"] == "paired"; }));
    REQUIRE(traffic.pump_frames(100));
    require_clean(traffic);
    CHECK_FALSE(guest_->readable(std::chrono::milliseconds{50}));
    guest_.reset();
    require_clean_end(scene_.host, {"one"});
  }

 private:
  void require_clean(Traffic& traffic) {
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }

  /// Sends, dies, lives again; then the answer, and nothing but the answer.
  void killed(const std::string& name, const std::function<void()>& send, const std::function<void()>& answer = {},
              bool settle = true) {
    INFO("tandemd was killed with " << name << " in hand");
    const std::vector<pid_t> backends = scene_.host.processes("tandem-backend");
    // Answered in a later turn of tandemd's loop: the one that served the last message is over, and does not read this
    // one.
    static_cast<void>(scene_.host.status());
    scene_.probes.arm(point_);
    send();
    scene_.revive();
    if (answer) answer();
    if (settle) guest_->settle();
    CHECK(scene_.host.processes("tandem-backend") == backends);
  }
  template <class Body>
  void tell(R request, const Body& body, int fd = -1) {
    killed(vhost_user_message_name(static_cast<std::uint32_t>(request)),
           [&] { guest_->send_body(request, body, std::span(&fd, fd < 0 ? 0 : 1)); });
  }
  template <class Body>
  void tell_and_hear(R request, const Body& body) {
    killed(
        vhost_user_message_name(static_cast<std::uint32_t>(request)),
        [&] { guest_->send_body(request, body, {}, true); }, [&] { CHECK(guest_->reply_u64(request) == 0); });
  }
  void ask(R request, std::uint64_t expected) {
    killed(
        vhost_user_message_name(static_cast<std::uint32_t>(request)), [&] { guest_->send(request); },
        [&] { CHECK(guest_->reply_u64(request) == expected); });
  }

  P point_;
  Scene scene_;
  std::optional<ScriptedFrontEnd> guest_;
  std::uint64_t features_ = 0;
};

void walk(P point) {
  Walk walk(point);
  walk.negotiate();
  walk.start();
  walk.work();
  walk.stop();
  walk.disconnect();
  walk.undisturbed();
}

}  // namespace

TEST_CASE("tandemd killed before it reads a message: each message") {
  SKIP_UNLESS_PAIR();
  walk(P::kReading);
}
TEST_CASE("tandemd killed when it has read a message: each message") {
  SKIP_UNLESS_PAIR();
  walk(P::kMessage);
}
TEST_CASE("tandemd killed when it has handled a message: each message") {
  SKIP_UNLESS_PAIR();
  walk(P::kHandled);
}
TEST_CASE("tandemd killed when it has saved a message's effect: each message") {
  SKIP_UNLESS_PAIR();
  walk(P::kSaved);
}
TEST_CASE("tandemd killed when it has told the backends: each message") {
  SKIP_UNLESS_PAIR();
  walk(P::kDescribed);
}
TEST_CASE("tandemd killed when the owners let go: each message") {
  SKIP_UNLESS_PAIR();
  walk(P::kLetGo);
}
TEST_CASE("tandemd killed before it answers: each message") {
  SKIP_UNLESS_PAIR();
  walk(P::kAnswered);
}
TEST_CASE("tandemd killed when it has answered: each message") {
  SKIP_UNLESS_PAIR();
  walk(P::kApplied);
}

TEST_CASE("tandemd killed in a domain's start: the next try succeeds, or a release leaves nothing") {
  SKIP_UNLESS_PAIR();
  Scene scene;
  // A member is kept twice: when it is spawned and when it has tags; the second member likewise.
  const std::pair<P, std::uint32_t> moments[] = {
      {P::kPairMade, 1},     {P::kUplinkOpened, 1}, {P::kNicAttached, 1}, {P::kNicKept, 1},    {P::kListening, 1},
      {P::kNicDescribed, 1}, {P::kMemberKept, 1},   {P::kMemberKept, 2},  {P::kMemberKept, 3}, {P::kMemberKept, 4}};
  for (const auto& [point, countdown] : moments) {
    for (const bool again : {true, false}) {
      INFO("point " << static_cast<int>(point) << ", pass " << countdown << (again ? ", started again" : ", given up"));
      scene.probes.arm(point, countdown);
      CHECK_FALSE(scene.host.prepare_domain("one", {{}}).value("ok", true));
      scene.revive();
      REQUIRE(eventually([&] { return scene.host.status().value("ok", false); }));
      if (again) {
        require_domain(scene.host, "one", {{}});
        ScriptedFrontEnd guest = start_guest(scene.host, kMac);
        Traffic traffic(guest, kMac);
        REQUIRE(traffic.pump_frames(50));
        CHECK(traffic.finish().clean());
      }
      CHECK(scene.host.release_domain("one").value("ok", false));
      scene.require_empty();
    }
  }
  CHECK(scene.host.stop() == "");
}

TEST_CASE("tandemd killed in the start of a second domain: the first one's traffic goes on") {
  SKIP_UNLESS_PAIR();
  Scene scene;
  require_domain(scene.host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(scene.host, kMac);
    Traffic traffic(guest, kMac);
    for (const P point : {P::kUplinkOpened, P::kNicAttached, P::kNicKept, P::kListening, P::kNicDescribed}) {
      INFO("point " << static_cast<int>(point));
      const std::vector<pid_t> backends = scene.host.processes("tandem-backend");
      REQUIRE(traffic.pump_frames(20));
      scene.probes.arm(point);
      CHECK_FALSE(scene.host.prepare_domain("other", {{.mac = kOtherMac}}).value("ok", true));
      REQUIRE(traffic.pump_frames(20));
      scene.revive();
      REQUIRE(traffic.pump_until([&] { return scene.host.nic(kMac).is_object(); }));
      // As libvirt does: the failed start is released, then tried again.
      CHECK(scene.host.release_domain("other").value("ok", false));
      require_domain(scene.host, "other", {{.mac = kOtherMac}});
      CHECK(scene.host.release_domain("other").value("ok", false));
      REQUIRE(traffic.pump_frames(20));
      CHECK(scene.host.processes("tandem-backend") == backends);
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(scene.host, {"one"});
}

TEST_CASE("tandemd killed in a domain's end: asked again it finishes, and by itself it does too") {
  SKIP_UNLESS_PAIR();
  Scene scene;
  for (const P point : {P::kUnlistened, P::kDetached, P::kNicForgotten, P::kMemberGone}) {
    for (const bool again : {true, false}) {
      INFO("point " << static_cast<int>(point) << (again ? ", asked again" : ", not asked again"));
      require_domain(scene.host, "one", {{}});
      { ScriptedFrontEnd guest = start_guest(scene.host, kMac); }
      scene.probes.arm(point);
      CHECK_FALSE(scene.host.release_domain("one").value("ok", true));
      scene.revive();
      REQUIRE(eventually([&] { return scene.host.status().value("ok", false); }));
      if (again) CHECK(scene.host.release_domain("one").value("ok", false));
      scene.require_empty();
    }
  }
  CHECK(scene.host.stop() == "");
}

TEST_CASE("tandemd killed in a failover: traffic goes on, the next one makes the pair whole") {
  SKIP_UNLESS_PAIR();
  Scene scene;
  require_domain(scene.host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(scene.host, kMac);
    Traffic traffic(guest, kMac);
    const auto require_paired = [&] {
      if (!traffic.pump_until([&] { return scene.host.pair()["state"] == "paired" && scene.host.standby() != 0; }))
        FAIL("no pair again: " << scene.host.status().dump(2));
    };
    const std::pair<P, std::uint32_t> moments[] = {
        {P::kTookOver, 1}, {P::kMemberGone, 1}, {P::kMemberKept, 1}, {P::kMemberKept, 2}};
    for (const auto& [point, countdown] : moments) {
      for (const bool both : {false, true}) {
        INFO("point " << static_cast<int>(point) << ", pass " << countdown << (both ? ", then the heir too" : ""));
        require_paired();
        REQUIRE(traffic.pump_frames(50));
        const pid_t victim = scene.host.active(), heir = scene.host.standby();
        scene.probes.arm(point, countdown);
        ::kill(victim, SIGKILL);
        REQUIRE(traffic.pump_until([&] { return scene.probes->killed.load() != 0; }));
        // The front end's connection is open, and the heir serves.
        REQUIRE(traffic.pump_frames(50));
        if (both) ::kill(heir, SIGKILL);
        for (int round = 0; both && round < 50; ++round) traffic.pump();
        scene.revive();
        require_paired();
        guest.settle();
        if (!both) CHECK(scene.host.active() == heir);
        REQUIRE(traffic.pump_frames(50));
      }
    }
    // In its own adoption, with a failover meanwhile.
    for (const P point : {P::kItemsFetched, P::kAdopted}) {
      INFO("point " << static_cast<int>(point) << " of an adoption");
      require_paired();
      const pid_t victim = scene.host.active();
      for (const pid_t pid : scene.host.processes("tandemd")) ::kill(pid, SIGKILL);
      ::kill(victim, SIGKILL);
      scene.probes.arm(point);
      scene.host.start_tandemd();
      REQUIRE(traffic.pump_until([&] { return scene.probes->killed.load() != 0; }));
      REQUIRE(traffic.pump_frames(50));
      scene.host.start_tandemd();
      require_paired();
      guest.settle();
    }
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
  }
  require_clean_end(scene.host, {"one"});
}
