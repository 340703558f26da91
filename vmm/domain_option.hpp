// SPDX-License-Identifier: Apache-2.0
// The domain-XML option: which NICs of a libvirt domain Tandem serves, and how.
//
//   <metadata>
//     <tandem:domain xmlns:tandem="urn:tandem:domain:1">
//       <tandem:nic mac="52:54:00:12:34:56" pair="default">
//         <tandem:uplink bridge="br0"/>                      <!-- or dev="eth1"; null="..." to measure; with bridge:
//         direct="no" --> <tandem:watchdog spin="5ms" blocked="5ms"/>        <!-- may be left out -->
//       </tandem:nic>
//     </tandem:domain>
//   </metadata>
//
// Everything in our namespace is checked, and so is what the rest of the domain must look like for it to work; an error
// text says what to change in the XML. Prefixes are resolved, entities are not expanded, size and depth are bounded.
// Pure, any thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/result.hpp"

namespace tandem {

inline constexpr std::string_view kDomainNamespace = "urn:tandem:domain:1";
inline constexpr std::string_view kDefaultRunDirectory = "/run/tandem";
inline constexpr std::chrono::nanoseconds kDefaultHangLimit = std::chrono::milliseconds{5};

struct UplinkOption {
  /// The last three lead nowhere and are for measurement only: null='sink', 'source' and 'loopback'.
  enum class Kind { kBridge, kDevice, kSink, kSource, kLoopback };
  Kind kind = Kind::kSink;
  std::string name;                ///< network interface name; of the last three the word itself
  std::uint32_t frame_length = 0;  ///< kSource: bytes of each frame without its checksum, from frame='N'
  bool direct = true;              ///< kBridge: packets to NICs of the same pair and bridge do not pass the bridge

  [[nodiscard]] bool is_null() const { return kind != Kind::kBridge && kind != Kind::kDevice; }
};

struct WatchdogOption {
  std::chrono::nanoseconds spin = kDefaultHangLimit;
  std::chrono::nanoseconds blocked = kDefaultHangLimit;
};

struct NicOption {
  std::string mac;  ///< lower case, colons
  std::string pair = "default";
  UplinkOption uplink;
  WatchdogOption watchdog;
  std::uint32_t queues = 1;  ///< queue pairs, from <driver queues='N'/>
  std::string socket_path;
};

struct DomainOption {
  std::string name;
  std::string uuid;
  std::vector<NicOption> nics;  ///< empty: a domain that is none of our business
};

/// Whether the XML mentions our namespace at all. Cheap; a domain for which it says no needs no parser.
bool names_tandem(std::string_view domain_xml) noexcept;

/// kInvalid with a sentence for the operator if the option is wrong or the domain does not fit it.
Result<DomainOption> parse_domain_option(std::string_view domain_xml,
                                         std::string_view run_directory = kDefaultRunDirectory);

}  // namespace tandem
