// SPDX-License-Identifier: Apache-2.0
// Probe points: names for the moments of a transaction, so that a test can kill a process exactly there.
//
// In shipping builds a probe is nothing. Test builds of this library define TANDEM_PROBES and call tandem_probe(),
// which the test provides; and they die on packets that ask for it (poison_probe.hpp).
#pragma once

namespace tandem {

enum class ProbePoint {
  kStaged,              ///< payload copied, record filled, not armed
  kArmed,               ///< past the commit point
  kFramesMarked,        ///< transmit: busy bits set
  kDestinationWritten,  ///< entries written, producer not moved
  kDestinationPublished,
  kSourceWritten,
  kSourcePublished,
  kCursorsAdvanced,
  kDisarmed,
  kNotified,
  kCompletionCleared,  ///< busy bits of completed frames cleared, completion ring's consumer not moved
  kTakeoverEpoch,      ///< heir holds the epoch, nothing replayed
  kTakeoverReplayed,
  kHandoverAsked,    ///< heir: the request stands, the owner may not have seen it
  kHandoverGranted,  ///< owner: the grant is echoed, the owner word still names it
  kHandoverLetGo,    ///< former owner: the owner word names nobody
  kCount,
};

}  // namespace tandem

#ifdef TANDEM_PROBES
#include "vhost-net-backend/poison_probe.hpp"
extern "C" void tandem_probe(tandem::ProbePoint point) noexcept;
#define TANDEM_PROBE(point) tandem_probe(::tandem::ProbePoint::point)
#define TANDEM_PROBE_PACKET(bytes, length) ::tandem::fail_on_poison(bytes, length)
#else
#define TANDEM_PROBE(point) static_cast<void>(0)
#define TANDEM_PROBE_PACKET(bytes, length) static_cast<void>(0)
#endif
