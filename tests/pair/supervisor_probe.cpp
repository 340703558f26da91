// SPDX-License-Identifier: Apache-2.0
// tandem_supervisor_probe() of the probed tandemd: kills its own process with SIGKILL at the armed point, once.
#include "tests/pair/supervisor_probe.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

using tandem::test::SupervisorProbeControl;

namespace {

SupervisorProbeControl* open_control() {
  const char* path = std::getenv("TANDEM_SUPERVISOR_PROBE_FILE");
  const int fd = path == nullptr ? -1 : ::open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return nullptr;
  void* mapped = ::mmap(nullptr, sizeof(SupervisorProbeControl), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  return mapped == MAP_FAILED ? nullptr : static_cast<SupervisorProbeControl*>(mapped);
}

}  // namespace

extern "C" void tandem_supervisor_probe(tandem::SupervisorProbe point) noexcept {
  static SupervisorProbeControl* const control = open_control();
  if (control == nullptr || control->armed.load() != static_cast<std::uint32_t>(point) + 1) return;
  if (control->countdown.fetch_sub(1) != 1) return;
  control->armed.store(0);
  control->killed.store(static_cast<std::uint32_t>(::getpid()));
  ::kill(::getpid(), SIGKILL);
  for (;;) ::pause();
}
