// SPDX-License-Identifier: Apache-2.0
// The test's side of ProbeControl and SupervisorProbeControl.
#pragma once

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstdlib>
#include <string>

#include "common/mapping.hpp"
#include "common/unique_fd.hpp"
#include "tests/pair/probe.hpp"
#include "tests/pair/supervisor_probe.hpp"

namespace tandem::test {

/// A file that holds a `Control`, shared with the programs that its path is told to.
template <class Control>
class SharedFile {
 public:
  SharedFile() {
    std::string pattern = "/tmp/tandem-probe-XXXXXX";
    const UniqueFd file{::mkstemp(pattern.data())};
    REQUIRE(file);
    path_ = pattern;
    REQUIRE(::fchmod(file.get(), 0666) == 0);  // backends have an account of their own
    REQUIRE(::ftruncate(file.get(), sizeof(Control)) == 0);
    auto mapping = Mapping::map(file.get(), sizeof(Control), PROT_READ | PROT_WRITE, 0, "probe file");
    REQUIRE(mapping.has_value());
    mapping_ = std::move(*mapping);
  }
  SharedFile(const SharedFile&) = delete;
  SharedFile& operator=(const SharedFile&) = delete;
  ~SharedFile() { ::unlink(path_.c_str()); }
  Control* operator->() const { return reinterpret_cast<Control*>(mapping_.data()); }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
  Mapping mapping_;
};

/// The file through which the backends' probes are armed.
class Probes : public SharedFile<ProbeControl> {
 public:
  /// `then`: where the next one dies, at its first pass.
  void arm(ProbePoint point, std::uint32_t countdown, ProbePoint then = ProbePoint::kCount) const {
    (*this)->killed = 0;
    (*this)->then = then == ProbePoint::kCount ? 0 : static_cast<std::uint32_t>(then) + 1;
    (*this)->countdown = countdown;
    (*this)->armed = static_cast<std::uint32_t>(point) + 1;
  }
};

/// The file through which tandemd's are.
class SupervisorProbes : public SharedFile<SupervisorProbeControl> {
 public:
  void arm(SupervisorProbe point, std::uint32_t countdown = 1) const {
    (*this)->killed = 0;
    (*this)->countdown = countdown;
    (*this)->armed = static_cast<std::uint32_t>(point) + 1;
  }
  void disarm() const { (*this)->armed = 0; }
};

}  // namespace tandem::test
