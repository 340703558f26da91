// SPDX-License-Identifier: Apache-2.0
// A pair at work: packets both ways, several queues and devices, and a clean end.
#include "tests/pair/fixture.hpp"

using namespace tandem;
using namespace tandem::test;

TEST_CASE("packets cross both ways and nothing is left behind") {
  SKIP_UNLESS_PAIR();
  PairHost host;
  host.start();
  require_domain(host, "one", {{}});
  {
    ScriptedFrontEnd guest = start_guest(host, kMac);
    Traffic traffic(guest, kMac);
    REQUIRE(traffic.pump_frames(3000));
    const TrafficResult result = traffic.finish();
    CAPTURE(result);
    CHECK(result.clean());
    const auto nic = host.nic(kMac);
    CAPTURE(nic.dump());
    CHECK(nic["rx"]["packets"] == result.sent_in);
    CHECK(nic["tx"]["packets"] == result.sent_out);
    CHECK(nic["overflow"] == 0);
    CHECK(nic["fault"] == "");
    CHECK(nic["running_queues"] == 2);
    guest.stop();
    CHECK(host.nic(kMac)["running_queues"] == 0);
  }
  require_clean_end(host, {"one"});
}

TEST_CASE("several devices with several queue pairs on one pair of two shards") {
  SKIP_UNLESS_PAIR();
  PairHost host({.backend = {}, .shards = 2, .polling = "adaptive", .outside_queues = 4});
  host.start();
  require_domain(host, "one", {{.mac = kMac, .queues = 3, .uplink = "bridge=\"br0\"", .pair = "default"}});
  require_domain(host, "two", {{.mac = kOtherMac, .queues = 2, .uplink = "bridge=\"br0\"", .pair = "default"}});
  {
    ScriptedFrontEnd first = start_guest(host, kMac, {.queue_pairs = 3});
    ScriptedFrontEnd second = start_guest(host, kOtherMac, {.queue_pairs = 2});
    Traffic one(first, kMac, {.flows_in = 12});
    Traffic two(second, kOtherMac, {.flows_in = 8});
    const auto enough = [](const Traffic& traffic) {
      return traffic.arrived_in() > 2000 && traffic.arrived_out() > 2000;
    };
    REQUIRE(one.pump_until([&] {
      two.pump();
      return enough(one) && enough(two);
    }));
    for (Traffic* traffic : {&one, &two}) {
      const TrafficResult result = traffic->finish();
      CAPTURE(result);
      CHECK(result.clean());
      // The outside spread its flows: more than one queue got some.
      CHECK(std::count_if(traffic->by_pair().begin(), traffic->by_pair().end(), [](auto count) { return count > 0; }) >
            1);
    }
    CHECK(host.status()["pairs"].size() == 1);
  }
  require_clean_end(host, {"one", "two"});
}
