// SPDX-License-Identifier: Apache-2.0
// Probe points of tandemd: names for the moments of a message, a start and an end, so that a test can kill it exactly
// there.
//
// In shipping builds a probe is nothing. The test build of these files defines TANDEM_SUPERVISOR_PROBES and calls
// tandem_supervisor_probe(), which the test provides (tests/pair/supervisor_probe.hpp).
#pragma once

namespace tandem {

enum class SupervisorProbe {
  // one vhost-user message, or disconnection; every one passes all of these, in this order
  kReading,    ///< the vault has something to say, nothing was read
  kMessage,    ///< read, not handled
  kHandled,    ///< the device's state has changed, here only
  kSaved,      ///< the vault has the new state
  kDescribed,  ///< backends were told, if there was something to tell
  kLetGo,      ///< the owners let go, if they had to
  kAnswered,   ///< the answer is made, the vault does not have it
  kApplied,    ///< the vault has it
  // a NIC's start
  kPairMade,
  kUplinkOpened,
  kNicKept,      ///< the vault has all of the NIC
  kNicAttached,  ///< backends know its uplink
  kListening,    ///< QEMU may connect
  kNicDescribed,
  // a NIC's end
  kUnlistened,
  kDetached,      ///< no backend uses it any more
  kNicForgotten,  ///< the vault has nothing of it, the uplink is still there
  // a pair's life
  kMemberKept,  ///< the vault has what is new about a member
  kTookOver,    ///< an heir reported
  kMemberGone,  ///< an exit was seen
  // a new tandemd
  kItemsFetched,
  kAdopted,
  kCount,
};

}  // namespace tandem

#ifdef TANDEM_SUPERVISOR_PROBES
extern "C" void tandem_supervisor_probe(tandem::SupervisorProbe point) noexcept;
#define TANDEM_SUPERVISOR_PROBE(point) tandem_supervisor_probe(::tandem::SupervisorProbe::point)
#else
#define TANDEM_SUPERVISOR_PROBE(point) static_cast<void>(0)
#endif
