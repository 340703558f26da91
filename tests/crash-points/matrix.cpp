// SPDX-License-Identifier: Apache-2.0
// Rows: directions, chain styles, mergeable buffers, EVENT_IDX, wraps, burst sizes.
#include "tests/crash-points/matrix.hpp"

namespace tandem::test {

namespace {

const char* name(ChainStyle style) {
  return style == ChainStyle::kDirect ? "direct" : style == ChainStyle::kChained ? "chained" : "indirect";
}
const char* name(Wrap wrap, bool packed) {
  if (wrap == Wrap::kNone) return "no wrap";
  if (packed) return wrap == Wrap::kRing ? "wrap to 0" : "wrap to 1";
  return wrap == Wrap::kRing ? "ring wrap" : "index wrap";
}

const char* name(Situation situation) {
  switch (situation) {
    case Situation::kPlain:
      return "";
    case Situation::kStarved:
      return ", starved";
    case Situation::kFull:
      return ", TX ring full";
    case Situation::kBadChain:
      return ", with a bad chain";
    case Situation::kPoison:
      return ", with a poison packet";
    case Situation::kRestart:
      return ", restart of the rings";
    case Situation::kHandover:
      return ", handover";
  }
  return "";
}

// As small as the burst allows: every instruction is followed by a look at all of it.
WorldShape shape_for(std::uint32_t burst, ChainStyle style, bool transmit, bool mergeable, bool event_index,
                     bool packed) {
  WorldShape shape;
  // Without VERSION_1 and MRG_RXBUF a header has 10 bytes: a legacy driver.
  const bool modern = mergeable || !transmit || packed;
  shape.nic.features = feature::kIndirect | (modern ? feature::kVersion1 : 0) | (mergeable ? feature::kMergeable : 0) |
                       (event_index ? feature::kEventIndex : 0) | (packed ? feature::kPacked : 0);
  shape.nic.transmit = shape.nic.receive = style;
  shape.nic.slot_size = 136;
  if (mergeable) shape.nic.receive_slot_size = 56;  // one to three buffers a packet
  shape.nic.queue_size = burst <= 2 ? 32 : style == ChainStyle::kChained && mergeable ? 256 : 128;
  shape.nic.cuts = {7, 30};  // the header over two descriptors, the packet over two
  // A packed ring may have any size. Small ones let the guest come round to the burst's first slot while nobody serves;
  // receive rings are always full of buffers, so there it does so anyway.
  if (packed && transmit)
    shape.nic.queue_size = (burst <= 2 ? 3 : burst) * (style == ChainStyle::kChained ? 3 : 1) + (burst <= 2 ? 0 : 1);
  else if (packed)
    shape.nic.queue_size += 5;
  shape.xsk.frame_size = 256;
  shape.xsk.headroom = 64;
  shape.xsk.rx_frames = burst <= 2 ? 16 : 64;
  return shape;
}

}  // namespace

std::vector<MatrixRow> matrix() {
  std::vector<MatrixRow> rows;
  bool packed = false, in_order = false, forward = false;
  enum class Offload { kNone, kCut, kWhole } offload = Offload::kNone;
  const auto add = [&](bool transmit, bool receive, ChainStyle style, bool mergeable, bool event_index, Wrap wrap,
                       std::uint32_t burst, Situation situation = Situation::kPlain) {
    MatrixRow row;
    row.situation = situation;
    row.transmit = transmit;
    row.forward = forward;
    row.receive = receive;
    row.burst = burst;
    row.wrap = wrap;
    row.nested = burst <= 2;
    row.shape = shape_for(burst, style, transmit && !receive, mergeable, event_index, packed);
    if (in_order) row.shape.nic.features |= feature::kInOrder;
    if (forward) row.shape.devices = row.shape.queue_pairs = 2;
    if (offload != Offload::kNone) {
      row.flow = PacketFlow::to_cut(3, offload == Offload::kWhole);
      row.shape.nic.features |= feature::kAsksOffloads;
      if (offload == Offload::kWhole) row.shape.nic.features |= feature::kTakesOffloads;
      row.shape.nic.slot_size = 192;  // a virtio header of 12 bytes, and the longest of these packets has 174
      if (forward && !packed) row.shape.nic.queue_size = 128;
      if (forward && packed) row.shape.nic.queue_size = burst <= 2 ? 64 + 5 : 400 + 5;
    }
    if (forward && packed && mergeable) row.shape.nic.queue_size = (burst <= 2 ? 32 : 288) + 5;
    if (situation == Situation::kFull) row.shape.xsk.tx_entries = burst / 2;
    if (situation == Situation::kFull && packed) row.shape.nic.queue_size = 2 * burst + 7;  // the warm-up jams it too
    row.name = std::string(forward     ? "guest->guest"
                           : !receive  ? "guest->uplink"
                           : !transmit ? "uplink->guest"
                                       : "both ways") +
               (packed ? ", packed" : "") + (in_order ? ", IN_ORDER" : "") +
               (offload == Offload::kNone    ? ", "
                : offload == Offload::kWhole ? ", to be segmented but taken whole, "
                                             : ", to be segmented, ") +
               name(style) + (mergeable ? ", mergeable" : "") + (event_index ? ", EVENT_IDX" : "") + name(situation) +
               ", " + name(wrap, packed) + ", burst " + std::to_string(burst);
    // One of each kind, so that every option occurs.
    row.quick = situation == Situation::kHandover ? burst == 1 && mergeable
                : situation == Situation::kPoison ? burst == 2 && style == ChainStyle::kDirect && mergeable == receive
                : offload != Offload::kNone
                    ? burst == 1 && style == ChainStyle::kDirect
                    : situation == Situation::kPlain && event_index &&
                          (burst == 32 ? style == ChainStyle::kIndirect && wrap == Wrap::kIndex && mergeable
                                       : style == ChainStyle::kChained && wrap == Wrap::kIndex && burst == 2 &&
                                             mergeable == (receive || forward));
    rows.push_back(row);
  };
  for (const bool layout : {false, true}) {
    packed = layout;
    for (const bool receive : {false, true})
      for (const std::uint32_t burst : {1u, 2u, 32u})
        for (const ChainStyle style : {ChainStyle::kDirect, ChainStyle::kChained, ChainStyle::kIndirect})
          for (const bool mergeable : {false, true})
            for (const bool event_index : {false, true})
              for (const Wrap wrap : {Wrap::kNone, Wrap::kRing, Wrap::kIndex})
                add(!receive, receive, style, mergeable, event_index, wrap, burst);
    forward = true;
    for (const std::uint32_t burst : {1u, 2u, 32u})
      for (const ChainStyle style : {ChainStyle::kDirect, ChainStyle::kChained, ChainStyle::kIndirect})
        for (const bool mergeable : {false, true})
          for (const bool event_index : {false, true})
            for (const Wrap wrap : {Wrap::kNone, Wrap::kRing, Wrap::kIndex})
              // Where the indices stand and whether the driver wants an interrupt do not meet in the code: not each
              // with each.
              if (event_index || wrap == Wrap::kIndex) add(true, false, style, mergeable, event_index, wrap, burst);
    for (const std::uint32_t burst : {2u, 32u})
      for (const bool mergeable : {false, true})
        for (const Situation situation : {Situation::kStarved, Situation::kBadChain, Situation::kPoison})
          add(true, false, ChainStyle::kDirect, mergeable, true, Wrap::kIndex, burst, situation);
    // One packet in, several out, in one transaction: to another guest, which takes them as they are or does not.
    for (const Offload how : {Offload::kCut, Offload::kWhole})
      for (const std::uint32_t burst : {1u, 2u, 32u})
        for (const bool mergeable : {false, true}) {
          offload = how;
          add(true, false, mergeable ? ChainStyle::kChained : ChainStyle::kDirect, mergeable, true, Wrap::kIndex,
              burst);
          if (burst == 2)
            add(true, false, ChainStyle::kDirect, mergeable, true, Wrap::kIndex, burst, Situation::kStarved);
        }
    forward = false;
    // To the uplink, of which the burst of 32 finds the TX ring too short: it takes what fits as a whole.
    offload = Offload::kCut;
    for (const std::uint32_t burst : {1u, 2u, 32u})
      for (const ChainStyle style : {ChainStyle::kDirect, ChainStyle::kChained, ChainStyle::kIndirect})
        add(true, false, style, false, true, Wrap::kIndex, burst);
    for (const Situation situation : {Situation::kFull, Situation::kBadChain, Situation::kPoison})
      add(true, false, ChainStyle::kDirect, false, true, Wrap::kIndex, 8, situation);
    offload = Offload::kNone;
    // A round of the poll loop that has work in both directions: two transactions, one record.
    for (const std::uint32_t burst : {1u, 2u, 32u})
      for (const bool mergeable : {false, true})
        add(true, true, ChainStyle::kDirect, mergeable, true, Wrap::kIndex, burst);
    for (const std::uint32_t burst : {1u, 2u, 32u})
      for (const bool mergeable : {false, true})
        add(true, true, ChainStyle::kDirect, mergeable, mergeable, Wrap::kNone, burst, Situation::kHandover);
    for (const std::uint32_t burst : {2u, 32u})
      for (const bool mergeable : {false, true})
        for (const ChainStyle style : {ChainStyle::kDirect, ChainStyle::kIndirect}) {
          add(false, true, style, mergeable, true, Wrap::kIndex, burst, Situation::kStarved);
          add(true, false, style, mergeable, true, Wrap::kIndex, burst, Situation::kFull);
          add(true, false, style, mergeable, true, Wrap::kIndex, burst, Situation::kBadChain);
          add(true, true, style, mergeable, true, Wrap::kNone, burst, Situation::kRestart);
          add(true, false, style, mergeable, true, Wrap::kIndex, burst, Situation::kPoison);
          add(false, true, style, mergeable, true, Wrap::kIndex, burst, Situation::kPoison);
        }
    if (!packed) continue;
    // Bursts that a guest gets back as one.
    in_order = true;
    for (const std::uint32_t burst : {2u, 32u}) {
      for (const ChainStyle style : {ChainStyle::kDirect, ChainStyle::kChained, ChainStyle::kIndirect})
        for (const Wrap wrap : {Wrap::kNone, Wrap::kRing, Wrap::kIndex})
          add(true, false, style, burst == 32, true, wrap, burst);
      for (const Situation situation : {Situation::kFull, Situation::kBadChain, Situation::kPoison})
        add(true, false, ChainStyle::kDirect, false, true, Wrap::kIndex, burst, situation);
      add(true, true, ChainStyle::kDirect, true, true, Wrap::kNone, burst, Situation::kRestart);
    }
    in_order = false;
  }
  return rows;
}

}  // namespace tandem::test
