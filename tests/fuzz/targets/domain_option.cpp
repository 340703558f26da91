// SPDX-License-Identifier: Apache-2.0
// The domain-XML option. Input: the XML.
#include "vmm/domain_option.hpp"

#include <set>

#include "tests/fuzz/targets/input.hpp"

using namespace tandem;
using namespace tandem::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view xml{reinterpret_cast<const char*>(data), size};
  const auto option = parse_domain_option(xml, "/run/tandem");
  if (!option) {
    must_hold(!option.error().text.empty(), "a refusal says why");
    must_hold(option.error().text.size() < 16384, "a refusal is a sentence, not a copy of its input");
    return 0;
  }
  must_hold(option->nics.empty() || names_tandem(xml), "a NIC comes from our namespace only");
  std::set<std::string> macs;
  for (const NicOption& nic : option->nics) {
    must_hold(nic.mac.size() == 17, "a MAC address is normalized");
    must_hold(macs.insert(nic.mac).second, "no MAC address occurs twice");
    must_hold(nic.queues >= 1 && nic.queues <= 32, "queue pairs are within limits");
    must_hold(nic.socket_path.find("/../") == std::string::npos && nic.socket_path.starts_with("/run/tandem/nic/"),
              "the socket lies in its folder");
    must_hold(nic.pair.find('/') == std::string::npos && !nic.pair.empty(), "a pair's name is no path");
    must_hold(nic.uplink.name.find('/') == std::string::npos && nic.uplink.name.size() < 16,
              "an uplink's name is that of an interface");
    must_hold(nic.watchdog.spin.count() > 0 && nic.watchdog.blocked.count() > 0, "hang limits are positive");
  }
  return 0;
}
