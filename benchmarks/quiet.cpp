// SPDX-License-Identifier: Apache-2.0
// tandem-quiet: how undisturbed two CPUs are just now, in some twenty microseconds.
//
// A virtual machine is not told when a hyperthread beside one of its CPUs begins to work for somebody else, which
// halves what that CPU does in a time. It is not stolen time, so no counter of the kernel shows it. For each byte on
// standard input this program prints a line of two numbers: nanoseconds that a round of independent additions takes on
// the first CPU, and on the second, at the same moment and at real-time priority. Additions fill a core's units, of
// which two busy hyperthreads get half each; waiting for memory would not show it.
#include <sys/eventfd.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <thread>

#include "common/monotonic_clock.hpp"
#include "common/thread_priority.hpp"

namespace {

using namespace tandem;

constexpr unsigned kRounds = 20000;

// How far a look is, in the order of the values.
enum class Stage { kNone, kPartnerIsThere, kBothBegin, kPartnerIsDone };

double additions() {
  const std::uint64_t begin = monotonic_ns();
  std::uint64_t a = 1, b = 2, c = 3, d = 4;
  for (unsigned i = 0; i < kRounds; ++i)
#if defined(__x86_64__)
    asm volatile(
        "add $1, %0\n add $3, %1\n add $5, %2\n add $7, %3\n"
        "add $1, %0\n add $3, %1\n add $5, %2\n add $7, %3\n"
        "add $1, %0\n add $3, %1\n add $5, %2\n add $7, %3\n"
        : "+r"(a), "+r"(b), "+r"(c), "+r"(d));
#else
    for (int twelfth = 0; twelfth < 3; ++twelfth) {
      a += 1, b += 3, c += 5, d += 7;
      asm volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d));
    }
#endif
  return static_cast<double>(monotonic_ns() - begin) / kRounds;
}

void wait_for(const std::atomic<Stage>& stage, Stage awaited) {
  while (stage.load(std::memory_order_acquire) != awaited) {
  }
}

// Ends the program, with the reason, if this machine does not let us.
void take(std::uint32_t cpu) {
  for (const Status& status : {pin_thread(0, cpu), make_real_time(0)}) {
    if (status) continue;
    std::fprintf(stderr, "tandem-quiet: %s\n", status.error().text.c_str());
    std::_Exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::uint32_t first = 0, second = 1;
  CLI::App app{"Says how undisturbed two CPUs are, once for each byte on standard input.", "tandem-quiet"};
  app.add_option("first", first, "CPU")->required();
  app.add_option("second", second, "another CPU")->required();
  CLI11_PARSE(app, argc, argv);

  std::atomic<Stage> stage{Stage::kNone};
  std::atomic<double> first_took{0};
  const int bell = ::eventfd(0, EFD_CLOEXEC);
  if (bell < 0) {
    std::perror("tandem-quiet: make an eventfd");
    return 1;
  }
  std::thread partner([&] {
    take(first);
    for (eventfd_t count = 0; ::eventfd_read(bell, &count) == 0;) {
      stage.store(Stage::kPartnerIsThere, std::memory_order_release);
      wait_for(stage, Stage::kBothBegin);
      first_took.store(additions(), std::memory_order_relaxed);
      stage.store(Stage::kPartnerIsDone, std::memory_order_release);
    }
  });
  take(second);
  for (char byte = 0; ::read(STDIN_FILENO, &byte, 1) == 1;) {
    ::eventfd_write(bell, 1);
    wait_for(stage, Stage::kPartnerIsThere);
    stage.store(Stage::kBothBegin, std::memory_order_release);
    const double second_took = additions();
    wait_for(stage, Stage::kPartnerIsDone);
    std::printf("%.3f %.3f\n", first_took.load(std::memory_order_relaxed), second_took);
    std::fflush(stdout);
  }
  std::_Exit(0);  // the partner waits for ever
}
