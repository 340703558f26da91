// SPDX-License-Identifier: Apache-2.0
// crash_points: kills the poll thread at every instruction of a burst, and its heir at every instruction of the
// takeover.
//
// Nobody is really killed: after each instruction the shared memory is what a thread dead at that instruction would
// have left. An heir with the shipping takeover code is tried on every distinct state. Exit status 0 only if nothing
// was lost, repeated, reordered, corrupted or leaked (with --must-fail: only if something was, which is how broken
// engines prove that this program can see).
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <new>
#include <nlohmann/json.hpp>

#include "tests/crash-points/crash_trial.hpp"

using namespace tandem::test;

namespace {

struct Board {
  std::atomic<std::size_t> next{0};
  RowResult results[1];  // one per row
};

nlohmann::json to_json(const RowResult& result) {
  const Verdict& verdict = result.verdict;
  return {{"points", result.points + result.nested_points},
          {"owner_points", result.points},
          {"owner_distinct", result.distinct},
          {"owner_changes", result.changes},
          {"heir_points", result.nested_points},
          {"heir_changes", result.nested_changes},
          {"heir_distinct", result.nested_distinct},
          {"takeovers", result.takeovers},
          {"unforeseen", result.unforeseen},
          {"lost", verdict.tally.lost},
          {"duplicated", verdict.tally.duplicated},
          {"reordered", verdict.tally.reordered},
          {"corrupt", verdict.tally.corrupt},
          {"leaked_frames", verdict.leaked_frames},
          {"descriptor_errors", verdict.descriptor_errors},
          {"record_left", verdict.record_left},
          {"not_notified", verdict.not_notified},
          {"miscounted", verdict.miscounted},
          {"trespasses", verdict.trespasses},
          {"stopped", verdict.stopped},
          {"seconds", result.seconds}};
}

void add(RowResult& total, const RowResult& row) {
  total.points += row.points;
  total.distinct += row.distinct;
  total.changes += row.changes;
  total.nested_points += row.nested_points;
  total.nested_changes += row.nested_changes;
  total.unforeseen += row.unforeseen;
  total.nested_distinct += row.nested_distinct;
  total.takeovers += row.takeovers;
  total.verdict += row.verdict;
}

void print(const char* name, const RowResult& result) {
  const Verdict& verdict = result.verdict;
  std::printf("%-78s %9llu %7llu %10llu %7llu  %s\n", name, static_cast<unsigned long long>(result.points),
              static_cast<unsigned long long>(result.distinct), static_cast<unsigned long long>(result.nested_points),
              static_cast<unsigned long long>(result.nested_distinct),
              verdict.clean() && result.unforeseen == 0 ? "ok" : "FAILED");
  std::fflush(stdout);
}

// A worker and the process that it steps take turns: on one CPU that is a context switch, on two it is an interrupt to
// an idle one, for each instruction.
void stay_on_one_cpu(unsigned job) {
  cpu_set_t allowed, one;
  if (::sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  unsigned left = job % static_cast<unsigned>(CPU_COUNT(&allowed));
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || left-- != 0) continue;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    ::sched_setaffinity(0, sizeof one, &one);  // refused: it is only slower
    return;
  }
}

// A row, once with heirs stopped after each store and once after each instruction: both have to see the same changes.
RowResult run_both_ways(const MatrixRow& row, TrialOptions options) {
  options.every_instruction = false;
  RowResult result = CrashTrial(row).run(options);
  options.every_instruction = true;
  const RowResult whole = CrashTrial(row).run(options);
  if (result.changes != whole.changes || result.nested_changes != whole.nested_changes ||
      result.distinct != whole.distinct || result.nested_distinct != whole.nested_distinct)
    ++result.unforeseen;
  result.unforeseen += whole.unforeseen;
  result.seconds += whole.seconds;
  return result;
}

// Workers take rows from the board until there are none left.
bool work(const std::vector<MatrixRow>& rows, Board& board, unsigned jobs, const TrialOptions& options, bool compare) {
  std::vector<pid_t> workers;
  for (unsigned job = 0; job < jobs; ++job) {
    const pid_t worker = ::fork();
    if (worker == 0) {
      stay_on_one_cpu(job);
      for (std::size_t i; (i = board.next.fetch_add(1)) < rows.size();) {
        board.results[i] = compare ? run_both_ways(rows[i], options) : CrashTrial(rows[i]).run(options);
        print(rows[i].name.c_str(), board.results[i]);
      }
      ::_exit(0);
    }
    workers.push_back(worker);
  }
  bool all_well = true;
  for (const pid_t worker : workers) {
    int status = 0;
    all_well = ::waitpid(worker, &status, 0) == worker && WIFEXITED(status) && WEXITSTATUS(status) == 0 && all_well;
  }
  return all_well;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Crashes at every instruction of a burst and of the takeover after it"};
  std::string json_file, filter;
  bool quick = false, deep = false, every_instruction = false, compare = false, must_fail = false, list = false;
  unsigned jobs = 2;
  app.add_option("--json", json_file, "Write the figures to this file");
  app.add_option("--rows", filter, "Only rows whose name contains this");
  app.add_option("--jobs", jobs, "Worker processes")->check(CLI::Range(1u, 64u));
  app.add_flag("--quick", quick, "A few rows only: about a minute");
  app.add_flag("--deep", deep, "Second crashes after bursts of 32 too, and in every row: several times as long");
  app.add_flag("--every-instruction", every_instruction,
               "Stop heirs after every instruction, not only after those that can store: ten times as long");
  app.add_flag("--compare", compare,
               "Run each row both ways, and fail unless both see the same changes of shared memory");
  app.add_flag("--must-fail", must_fail, "Succeed only if harm was found: for engines broken on purpose");
  app.add_flag("--list", list, "Name the rows and leave");
  CLI11_PARSE(app, argc, argv);

  std::vector<MatrixRow> rows = matrix();
  std::erase_if(rows, [&](const MatrixRow& row) {
    return (quick && !row.quick) || (!filter.empty() && row.name.find(filter) == std::string::npos);
  });
  for (MatrixRow& row : rows) row.nested = row.nested || deep;
  if (list) {
    for (const MatrixRow& row : rows) std::printf("%s\n", row.name.c_str());
    return 0;
  }
  const std::size_t bytes = sizeof(Board) + rows.size() * sizeof(RowResult);
  void* shared = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return 2;
  auto* board = new (shared) Board;

  std::printf("%-78s %9s %7s %10s %7s\n", "row", "points", "states", "in heirs", "states");
  std::fflush(stdout);
  const auto begin = std::chrono::steady_clock::now();
  const TrialOptions options{.until_harm = must_fail, .every_instruction = every_instruction};
  const bool all_well = work(rows, *board, jobs, options, compare);
  RowResult total;
  nlohmann::json detail = nlohmann::json::array();
  bool complete = all_well && !rows.empty();
  for (std::size_t i = 0; i < rows.size(); ++i) {
    add(total, board->results[i]);
    complete = complete && board->results[i].done;
    detail.push_back(to_json(board->results[i]));
    detail.back()["row"] = rows[i].name;
  }
  total.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  print("total", total);
  nlohmann::json report = to_json(total);
  std::printf("%s\n", report.dump(2).c_str());
  report["rows"] = std::move(detail);
  report["complete"] = complete;
  if (!json_file.empty()) {
    std::ofstream file(json_file);
    file << report.dump(2) << '\n';
    if (!file) {
      std::fprintf(stderr, "write %s: failed; is its folder there and writable?\n", json_file.c_str());
      return 2;
    }
  }
  if (!complete) {
    std::fprintf(stderr, "some rows did not come to their end: the figures above are not the whole\n");
    return 2;
  }
  if (total.unforeseen != 0) {
    std::fprintf(stderr,
                 "an instruction changed shared bytes that was thought harmless: states may have been missed\n");
    return 2;
  }
  return total.verdict.clean() != must_fail ? 0 : 1;
}
