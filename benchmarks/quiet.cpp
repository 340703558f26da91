// SPDX-License-Identifier: Apache-2.0
// tandem-quiet: how undisturbed two CPUs are just now, in a fifth of a millisecond.
//
// A virtual machine is not told when a hyperthread beside one of its CPUs begins to work for somebody else, nor when
// the host moves two of them onto one core; the first halves what a CPU does in a time, the second makes what one
// writes reach the other three times as fast. Neither is stolen time, so the kernel does not know either. For each byte
// on standard input this program prints one line: nanoseconds of a cache line's way from one CPU to the other and back,
// of the time one round of independent additions takes on the first CPU, and on the second, all measured at the same
// time and at real-time priority. Additions fill the core's units, of which two busy hyperthreads get half each;
// waiting for memory would not show it.
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

constexpr unsigned kTrips = 500;
constexpr unsigned kRounds = 20000;

// Written by both: the first CPU answers each odd number with the next one. 0: nothing under way.
struct alignas(128) Ball {
  std::atomic<unsigned> number{0};
};

double additions() {
  const std::uint64_t begin = monotonic_ns();
  std::uint64_t a = 1, b = 2, c = 3, d = 4;
  for (unsigned i = 0; i < kRounds; ++i)
    asm volatile(
        "add $1, %0\n add $3, %1\n add $5, %2\n add $7, %3\n"
        "add $1, %0\n add $3, %1\n add $5, %2\n add $7, %3\n"
        "add $1, %0\n add $3, %1\n add $5, %2\n add $7, %3\n"
        : "+r"(a), "+r"(b), "+r"(c), "+r"(d));
  return static_cast<double>(monotonic_ns() - begin) / kRounds;
}

void wait_for(const Ball& ball, unsigned number) {
  while (ball.number.load(std::memory_order_acquire) != number) {
  }
}

// Aborts with the reason if this machine does not let us.
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

  Ball ball;
  std::atomic<double> first_took{0};
  const int bell = ::eventfd(0, EFD_CLOEXEC);
  std::thread partner([&] {
    take(first);
    for (eventfd_t count = 0; ::eventfd_read(bell, &count) == 0;) {
      for (unsigned trip = 0; trip <= kTrips; ++trip) {
        wait_for(ball, 2 * trip + 1);
        ball.number.store(2 * trip + 2, std::memory_order_release);
      }
      first_took.store(additions(), std::memory_order_relaxed);
      ball.number.store(0, std::memory_order_release);
    }
  });
  take(second);
  for (char byte = 0; ::read(STDIN_FILENO, &byte, 1) == 1;) {
    ::eventfd_write(bell, 1);
    std::uint64_t begin = 0;
    for (unsigned trip = 0; trip <= kTrips; ++trip) {
      if (trip == 1) begin = monotonic_ns();  // the partner is there
      ball.number.store(2 * trip + 1, std::memory_order_release);
      wait_for(ball, 2 * trip + 2);
    }
    const double trip_took = static_cast<double>(monotonic_ns() - begin) / kTrips;
    const double second_took = additions();
    wait_for(ball, 0);
    std::printf("%.1f %.3f %.3f\n", trip_took, first_took.load(std::memory_order_relaxed), second_took);
    std::fflush(stdout);
  }
  std::_Exit(0);  // the partner waits for ever
}
