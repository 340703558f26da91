# SPDX-License-Identifier: Apache-2.0
"""Packets a second that one core moves between a virtqueue and an uplink that costs nothing: Tandem, and testpmd's net_vhost.

The guest is the same testpmd over net_virtio_user on the other core. Tandem's uplink is null='source' (null='sink' where
the guest only sends); testpmd forwards (io) between net_vhost and net_null, whose frames likewise come from nowhere (no-rx=1
where the guest only sends). Each sample is a fresh start of both sides; systems take turns.
"""
import os
import time

import tandem
import testpmd
from results import wanted

# What the guest does, and which of its two counters (received, sent) count.
DIRECTIONS = {"rxonly": ("rxonly", (True, False)), "txonly": ("txonly", (False, True)), "both": ("io", (True, True))}
LENGTHS = (64, 512, 1518)


def _measure(guest, counts, seconds):
    """Packets a second, both directions together where both count."""
    time.sleep(min(0.5, seconds))
    rates = guest.rates(seconds)
    return sum(rate for rate, count in zip(rates, counts) if count)


def _tandem(world, direction, length, mergeable, packed, seconds):
    mode, counts = DIRECTIONS[direction]
    host = tandem.Tandem(world, polling="always")
    try:
        host.provide({tandem.MAC: "null='sink'" if direction == "txonly" else f"null='source' frame='{length}'"})
        guest = testpmd.guest(world, host.socket(), mode, length, mergeable, packed)
        try:
            return _measure(guest, counts, seconds)
        finally:
            guest.close()
            host.release()
    finally:
        host.close()


def _testpmd(world, direction, length, mergeable, packed, seconds):
    mode, counts = DIRECTIONS[direction]
    path = world.path("peer.sock")
    backend = testpmd.vhost(world, path, [f"net_null0,size={length}{',no-rx=1' if direction == 'txonly' else ''}"])
    try:
        guest = testpmd.guest(world, path, mode, length, mergeable, packed)
        try:
            return _measure(guest, counts, seconds)
        finally:
            guest.close()
    finally:
        backend.close()
        if os.path.exists(path):
            os.unlink(path)


def _offers_packed(world):
    host = tandem.Tandem(world)
    try:
        host.provide({tandem.MAC: "null='sink'"})
        offered = tandem.offered_features(host.socket())
        host.release()
    finally:
        host.close()
    return offered >> tandem.PACKED & 1 == 1


def run(world, report, quick, only=None):
    rounds, seconds = (1, 0.3) if quick else (5, 2.0)
    world.tool("dpdk-testpmd", "dpdk-dev")
    rings = ["split"]
    if _offers_packed(world):
        rings.append("packed")
    else:
        report.skip("packed rings", "tandem-backend does not offer VIRTIO_F_RING_PACKED (bit 34)")
    cases = [{"direction": direction, "bytes": length, "mergeable": mergeable, "ring": ring} for ring in rings
             for direction in DIRECTIONS for length in LENGTHS for mergeable in (True, False)]
    if quick:
        cases = [case for case in cases if case["bytes"] == 64 and case["mergeable"]]
    for case in cases:
        if not wanted(only, **case):
            continue
        words = (case["direction"], case["bytes"], case["mergeable"], case["ring"] == "packed", seconds)
        samples = {"tandem": [], "testpmd": []}
        for _ in range(rounds):
            samples["tandem"].append(_tandem(world, *words) / 1e6)
            samples["testpmd"].append(_testpmd(world, *words) / 1e6)
        middle = {system: sorted(values)[len(values) // 2] for system, values in samples.items()}
        for system, values in samples.items():
            # Ethernet adds 24 bytes a packet on a wire (preamble, checksum, gap); there is no wire here, so they do not count.
            report.row(case, system, "Mpps/core", values, gbit_s=round(middle[system] * case["bytes"] * 8 / 1000, 2),
                       ratio=round(middle["tandem"] / middle["testpmd"], 3) if system == "tandem" and middle["testpmd"] else None)
    report.note("packets are counted by the guest; 'both' counts packets in and out together")
