// SPDX-License-Identifier: Apache-2.0
// The test's side of ProbeControl.
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

namespace tandem::test {

/// The file through which the backends' probes are armed.
class Probes {
 public:
  Probes() {
    std::string pattern = "/tmp/tandem-probe-XXXXXX";
    const UniqueFd file{::mkstemp(pattern.data())};
    REQUIRE(file);
    path_ = pattern;
    REQUIRE(::fchmod(file.get(), 0666) == 0);  // backends have an account of their own
    REQUIRE(::ftruncate(file.get(), sizeof(ProbeControl)) == 0);
    auto mapping = Mapping::map(file.get(), sizeof(ProbeControl), PROT_READ | PROT_WRITE, 0, "probe file");
    REQUIRE(mapping.has_value());
    mapping_ = std::move(*mapping);
  }
  Probes(const Probes&) = delete;
  Probes& operator=(const Probes&) = delete;
  ~Probes() { ::unlink(path_.c_str()); }
  ProbeControl* operator->() const { return reinterpret_cast<ProbeControl*>(mapping_.data()); }
  [[nodiscard]] const std::string& path() const { return path_; }
  /// `then`: where the next one dies, at its first pass.
  void arm(ProbePoint point, std::uint32_t countdown, ProbePoint then = ProbePoint::kCount) const {
    (*this)->killed = 0;
    (*this)->then = then == ProbePoint::kCount ? 0 : static_cast<std::uint32_t>(then) + 1;
    (*this)->countdown = countdown;
    (*this)->armed = static_cast<std::uint32_t>(point) + 1;
  }

 private:
  std::string path_;
  Mapping mapping_;
};

}  // namespace tandem::test
