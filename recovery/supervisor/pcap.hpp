// SPDX-License-Identifier: Apache-2.0
// Packet captures for incidents: the classic pcap format with Ethernet frames, which every analyser reads.
#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <string>

#include "common/result.hpp"

namespace tandem {

/// Appends one frame to the capture at `path`, which is made (readable by its owner only) if it is not there. `length`:
/// bytes that the frame had, of which `bytes` are known. Source: draft-ietf-opsawg-pcap.
Status append_to_pcap(const std::string& path, std::span<const std::byte> bytes, std::uint32_t length,
                      std::chrono::system_clock::time_point when);

}  // namespace tandem
