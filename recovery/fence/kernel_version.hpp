// SPDX-License-Identifier: Apache-2.0
// Which kernels Tandem runs on: a pure check of uname's release string, so that the refusal can be tested.
#pragma once

#include <string>
#include <string_view>

#include "common/result.hpp"

namespace tandem {

/// Linux 6.4 is the first whose AF_XDP fill and completion rings a second process can map after bind (net/xdp/xsk.c,
/// xsk_mmap). kUnsupported names the remedy; a release that does not begin with "major.minor" is kInvalid.
Status kernel_is_supported(std::string_view release);

/// Whether AF_XDP sockets learn which NAPI serves their queue from the first frame that arrives in native mode (Linux
/// 5.11 to 6.12; net/xdp/xsk.c, xsk_rcv_check()). Later kernels ask the driver when the socket is bound. False for a
/// release that is no version number.
bool frames_tell_napi(std::string_view release);

/// uname's release of the running kernel, the argument for kernel_is_supported().
std::string running_kernel_release();

}  // namespace tandem
