// SPDX-License-Identifier: Apache-2.0
// What every test of a pair begins with.
#pragma once

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <thread>

#include "tests/pair/numbered.hpp"
#include "tests/support/pair_host.hpp"
#include "tests/support/scripted_front_end.hpp"
#include "tests/support/skip.hpp"

namespace tandem::test {

inline const std::string kMac = "52:54:00:12:34:56";
inline const std::string kOtherMac = "52:54:00:12:34:57";

/// Leaves the test as skipped where there can be no pair.
#define SKIP_UNLESS_PAIR()                                         \
  do {                                                             \
    const std::string reason_ = tandem::test::PairHost::prepare(); \
    if (!reason_.empty()) TANDEM_SKIP(reason_);                    \
  } while (false)

/// Prepares a domain and requires success, which comes when the pair is there.
inline void require_domain(const PairHost& host, const std::string& name, const std::vector<TestNic>& nics) {
  const auto answer = host.prepare_domain(name, nics);
  INFO(answer.dump());
  REQUIRE(answer.value("ok", false));
}

/// A guest that is up on a NIC.
inline ScriptedFrontEnd start_guest(const PairHost& host, const std::string& mac, FrontEndOptions options = {}) {
  ScriptedFrontEnd guest(host.nic_socket(mac), options);
  guest.negotiate();
  guest.start();
  return guest;
}

/// Requires that a domain can be released and that nothing stays behind after the end of all.
inline void require_clean_end(PairHost& host, const std::vector<std::string>& domains) {
  for (const std::string& name : domains) {
    const auto answer = host.release_domain(name);
    INFO(answer.dump());
    REQUIRE(answer.value("ok", false));
  }
  CHECK(host.processes("tandem-backend").empty());
  CHECK(host.stop() == "");
}

/// Under traffic until the pair has another owner and an armed heir again.
inline void pump_until_paired(PairHost& host, Traffic& traffic, pid_t not_this) {
  auto asked = std::chrono::steady_clock::now();
  const bool paired = traffic.pump_until([&] {
    if (std::chrono::steady_clock::now() - asked < std::chrono::milliseconds{20}) return false;
    asked = std::chrono::steady_clock::now();
    const nlohmann::json pair = host.pair();
    return pair["state"] == "paired" && pair["active"]["pid"].is_number() && pair["active"]["pid"] != not_this;
  });
  if (!paired) FAIL("no pair again: " << host.status().dump(2));
}

/// The answer to a request that takes traffic to be answered: asked for beside it.
inline nlohmann::json ask_beside(PairHost& host, Traffic& traffic, const nlohmann::json& request) {
  nlohmann::json answer;
  bool answered = false;
  std::thread asking([&] {
    answer = host.ask(request);
    std::atomic_ref(answered).store(true);
  });
  const bool done = traffic.pump_until([&] { return std::atomic_ref(answered).load(); });
  asking.join();
  REQUIRE(done);
  return answer;
}

/// Under traffic until the pair has an owner, and a standby that holds everything.
inline void require_whole(PairHost& host, Traffic& traffic) {
  const bool paired = traffic.pump_until([&] {
    const nlohmann::json pair = host.pair();
    return pair["state"] == "paired" && pair["active"]["pid"].is_number() && pair["standby"]["state"] == "ready";
  });
  if (!paired) FAIL("no pair again: " << host.status().dump(2) << host.log());
}

/// Active and standby change places, under traffic. Until it succeeds: a standby that gets no CPU in time is refused,
/// for the owner takes the shard back, and an owner that gets none may be taken for hung and lose its place. Both cost
/// time and nothing else, and are recorded.
inline nlohmann::json switch_over_for_good(PairHost& host, Traffic& traffic) {
  for (int attempt = 0; attempt < 50; ++attempt) {
    require_whole(host, traffic);
    nlohmann::json answer = ask_beside(host, traffic, {{"command", "switchover"}, {"pair", "default"}});
    if (answer.value("ok", false)) return answer;
    INFO(answer.dump(2));
    REQUIRE(answer["error"].get<std::string>().find("try again") != std::string::npos);
  }
  FAIL("no switchover in 50 attempts");
  return {};
}

}  // namespace tandem::test
