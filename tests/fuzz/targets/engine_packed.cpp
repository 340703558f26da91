// SPDX-License-Identifier: Apache-2.0
// Packed virtqueues of a hostile guest.
#include "tests/fuzz/targets/engine_rings.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return tandem::fuzz::run_engine({data, size}, tandem::test::feature::kPacked | tandem::test::feature::kVersion1);
}
