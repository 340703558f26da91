// SPDX-License-Identifier: Apache-2.0
// tandem_probe() of the probed backend: kills its own process with SIGKILL at the armed point.
#include "tests/pair/probe.hpp"

#include <fcntl.h>
#include <linux/bpf.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>

using tandem::test::ProbeControl;

namespace {

// Before main(): privileges and system calls are still there.
ProbeControl* open_control() {
  const char* path = std::getenv("TANDEM_PROBE_FILE");
  const int fd = path == nullptr ? -1 : ::open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return nullptr;
  void* mapped = ::mmap(nullptr, sizeof(ProbeControl), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  return mapped == MAP_FAILED ? nullptr : static_cast<ProbeControl*>(mapped);
}

// What the system call filter must refuse.
void try_forbidden(ProbeControl& results) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(0);
  results.fork_error = child < 0 ? errno : 0;
  char program[] = "/bin/true";
  char* const arguments[] = {program, nullptr};
  ::execv(program, arguments);
  results.exec_error = errno;
  bpf_attr attributes{};
  attributes.map_type = BPF_MAP_TYPE_ARRAY;
  attributes.key_size = attributes.value_size = 4;
  attributes.max_entries = 1;
  results.bpf_error = ::syscall(SYS_bpf, BPF_MAP_CREATE, &attributes, sizeof attributes) < 0 ? errno : 0;
  results.attempt.store(2, std::memory_order_release);
}

ProbeControl* const control = open_control();

}  // namespace

extern "C" void tandem_probe(tandem::ProbePoint point) noexcept {
  if (control == nullptr) return;
  const auto number = static_cast<std::uint32_t>(point);
  control->passes[number].fetch_add(1, std::memory_order_relaxed);
  // One shard: one transaction at a time, whoever owns. (After a kill the dead one's pid stays: no test looks then.)
  if (point == tandem::ProbePoint::kStaged) {
    if (control->working.exchange(static_cast<std::uint32_t>(::getpid())) != 0) control->overlaps.fetch_add(1);
    control->transactions.fetch_add(1);
  } else if (point == tandem::ProbePoint::kNotified) {
    control->working.store(0);
  }
  std::uint32_t asked = 1;
  if (control->attempt.compare_exchange_strong(asked, 3)) try_forbidden(*control);
  if (control->armed.load(std::memory_order_acquire) != number + 1) return;
  if (control->countdown.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  control->countdown.store(1, std::memory_order_relaxed);
  control->armed.store(control->then.exchange(0), std::memory_order_release);
  control->killed.store(static_cast<std::uint32_t>(::getpid()), std::memory_order_release);
  ::kill(::getpid(), SIGKILL);
  for (;;) ::pause();
}
