// SPDX-License-Identifier: Apache-2.0
// inject: faults put into a running owner, and what became of them.
//
// Each run is reproducible: its kind, its moment and what is chosen follow from --seed and its number (--run). Exit
// status 0 only if at least 99 % of what manifested was recovered and no guest and no device of another pair was
// harmed; 77 if there can be no pair on this host.
#define CATCH_CONFIG_RUNNER
#include <CLI/CLI.hpp>
#include <catch2/catch.hpp>
#include <cstdio>
#include <fstream>

#include "tests/inject/trial.hpp"

using namespace tandem::test;

namespace {

struct Options {
  std::uint64_t runs = 20, seed = 1, only_run = ~std::uint64_t{0}, rate = 20'000;
  std::string only_kind;
  bool progress = false, containment_only = false;
} options;
InjectReport report;

bool leaves_the_world_whole(OutcomeClass outcome) {
  return outcome == OutcomeClass::kNoEffect || outcome == OutcomeClass::kCrashRecovered ||
         outcome == OutcomeClass::kHangRecovered || outcome == OutcomeClass::kNotInjected;
}

}  // namespace

TEST_CASE("inject") {
  std::unique_ptr<World> world;
  constexpr auto kKinds = static_cast<std::uint64_t>(FaultKind::kCount);
  for (std::uint64_t number = 0; number < options.runs; ++number) {
    if (options.only_run != ~std::uint64_t{0} && number != options.only_run) continue;
    const auto kind = static_cast<FaultKind>(number % kKinds);
    if (!options.only_kind.empty() && options.only_kind != fault_name(kind)) continue;
    if (!world) world = std::make_unique<World>(options.rate);
    const Run run = run_trial(*world, kind, options.seed, number);
    report.add(run);
    const OutcomeClass outcome = classify(run.seen);
    if (options.progress) {
      std::printf("%llu %s %s: %s\n", static_cast<unsigned long long>(number), run.kind.c_str(),
                  run.fault.dump().c_str(), outcome_name(outcome));
      std::fflush(stdout);
    }
    if (!leaves_the_world_whole(outcome)) world.reset();
  }
  report.set_complete();
}

int main(int argc, char** argv) {
  CLI::App app{"Faults put into a running owner, and what became of them"};
  std::string json_file;
  app.add_option("--runs", options.runs, "How many")->check(CLI::Range(1u, 1'000'000u));
  app.add_option("--seed", options.seed, "Of everything that is chosen");
  app.add_option("--json", json_file, "Write the figures to this file");
  app.add_option("--run", options.only_run, "Only the run with this number");
  app.add_option("--kind", options.only_kind, "Only faults of this kind, by its name in the report");
  app.add_option("--rate", options.rate, "Frames per second; 0: as many as go");
  app.add_flag("--progress", options.progress, "A line for each run");
  app.add_flag("--containment-only", options.containment_only,
               "Exit status 0 if no guest and no other device was harmed, whatever the share of recovered faults: for "
               "numbers of runs that say nothing about a rate");
  CLI11_PARSE(app, argc, argv);
  if (options.only_run != ~std::uint64_t{0}) options.runs = std::max(options.runs, options.only_run + 1);
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
    figures["seed"] = options.seed;
    std::ofstream file(json_file);
    file << figures.dump(2) << '\n';
    if (!file.flush()) {
      std::fprintf(stderr, "write %s: failed; is its folder there and writable?\n", json_file.c_str());
      return 2;
    }
  }
  return failures == 0 && (options.containment_only ? report.contained() : report.good()) ? 0 : 1;
}
