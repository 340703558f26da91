// SPDX-License-Identifier: Apache-2.0
// tandem_probe() of the probed backend: kills its own process with SIGKILL at the armed point.
#include "tests/pair/probe.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

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

ProbeControl* const control = open_control();

}  // namespace

extern "C" void tandem_probe(tandem::ProbePoint point) noexcept {
  if (control == nullptr) return;
  const auto number = static_cast<std::uint32_t>(point);
  control->passes[number].fetch_add(1, std::memory_order_relaxed);
  if (control->armed.load(std::memory_order_acquire) != number + 1) return;
  if (control->countdown.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  control->countdown.store(1, std::memory_order_relaxed);
  control->armed.store(control->then.exchange(0), std::memory_order_release);
  control->killed.store(static_cast<std::uint32_t>(::getpid()), std::memory_order_release);
  ::kill(::getpid(), SIGKILL);
  for (;;) ::pause();
}
