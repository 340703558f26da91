// SPDX-License-Identifier: Apache-2.0
// soak: owners of whole pairs killed in every way, at random moments, under traffic at full speed.
//
// Exit status 0 only if nothing was lost, duplicated, reordered or corrupted, and every death looked as it should; 77
// if there can be no pair on this host.
#define CATCH_CONFIG_RUNNER
#include <CLI/CLI.hpp>
#include <catch2/catch.hpp>
#include <cstdio>
#include <fstream>

#include "tests/soak/soak.hpp"

using namespace tandem::test;

namespace {

SoakOptions options;
SoakReport report;

}  // namespace

TEST_CASE("soak") { Soak(options).run(report); }

int main(int argc, char** argv) {
  CLI::App app{"Owners of whole pairs killed in every way, at random moments, under traffic at full speed"};
  std::string json_file;
  app.add_option("--kills", options.kills, "How many")->check(CLI::Range(1u, 1'000'000u));
  app.add_option("--seed", options.seed, "Of the order of causes and the moments");
  app.add_option("--json", json_file, "Write the figures to this file");
  app.add_option("--devices", options.devices, "NICs, each of a guest of its own")->check(CLI::Range(1u, 16u));
  app.add_option("--queue-pairs", options.queue_pairs, "Of each NIC")->check(CLI::Range(1u, 8u));
  app.add_option("--shards", options.shards, "Poll threads of each backend")->check(CLI::Range(1u, 8u));
  app.add_option("--rings", options.rings, "Of the NICs; mixed: every second one packed")
      ->check(CLI::IsMember({"mixed", "split", "packed"}));
  app.add_option("--between-guests", options.between_guests, "Whether each guest sends to the next one, too");
  app.add_option("--rate", options.rate, "Frames per second, all flows together; 0: as many as go");
  app.add_option("--cause", options.only, "Only this cause, by its name in the report");
  app.add_flag("--progress", options.progress, "Say every 10 s how far it is");
  CLI11_PARSE(app, argc, argv);
  if (options.shards > options.devices * options.queue_pairs) {
    std::fprintf(stderr,
                 "soak: %u shards for %u queue pairs: one without a queue pair never tells of a failover; "
                 "ask for fewer shards or more queue pairs\n",
                 options.shards, options.devices * options.queue_pairs);
    return 2;
  }
  if (const std::string reason = PairHost::prepare(); !reason.empty()) {
    std::printf("SKIPPED: %s\n", reason.c_str());
    return 77;
  }
  // The scenery's checks are Catch2's, which wants to be in charge.
  Catch::Session session;
  const int failures = session.run(1, argv);
  report.print();
  if (!json_file.empty()) {
    auto figures = report.to_json();
    figures["options"] = {{"kills", options.kills},     {"seed", options.seed},
                          {"devices", options.devices}, {"queue_pairs", options.queue_pairs},
                          {"shards", options.shards},   {"rate", options.rate},
                          {"rings", options.rings},     {"between_guests", options.between_guests}};
    std::ofstream file(json_file);
    file << figures.dump(2) << '\n';
    if (!file.flush()) {
      std::fprintf(stderr, "write %s: failed; is its folder there and writable?\n", json_file.c_str());
      return 2;
    }
  }
  return failures == 0 && report.clean() ? 0 : 1;
}
