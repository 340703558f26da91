# SPDX-License-Identifier: Apache-2.0
"""Packets a second that one core moves between a virtqueue and an uplink that costs nothing: Tandem, testpmd, OVS-DPDK.

The guest is the same testpmd over net_virtio_user on the other core. Tandem's uplink is null='source' (null='sink' where
the guest only sends); testpmd forwards (io) between net_vhost and net_null, whose frames likewise come from nowhere (no-rx=1
where the guest only sends); OVS has the same two ports and a rule for each direction. Systems take
turns, each with a fresh start of both sides; a sample is a moment in which both CPUs were undisturbed (quiet.py).
"""
import os
import time

import ovs
import quiet
import tandem
import testpmd
from results import wanted
from world import CannotRun

# What the guest does, and which of its two counters (received, sent) count.
DIRECTIONS = {"rxonly": ("rxonly", (True, False)), "txonly": ("txonly", (False, True)), "both": ("io", (True, True))}
LENGTHS = (64, 512, 1518)


def _measure(guest, counts, looks):
    """Millions of packets a second, both directions together where both count."""
    time.sleep(0.5)
    return looks.watch(lambda seconds: sum(rate for rate, count in zip(guest.rates(seconds), counts) if count) / 1e6)


def _tandem(world, direction, length, mergeable, packed, looks):
    mode, counts = DIRECTIONS[direction]
    host = tandem.Tandem(world, polling="always")
    try:
        host.provide({tandem.MAC: "null='sink'" if direction == "txonly" else f"null='source' frame='{length}'"})
        guest = testpmd.guest(world, host.socket(), mode, length, mergeable, packed)
        try:
            return _measure(guest, counts, looks)
        finally:
            guest.close()
            host.release()
    finally:
        host.close()


def _null(direction, length):
    return f"net_null0,size={length}{',no-rx=1' if direction == 'txonly' else ''}"


def _testpmd(world, direction, length, mergeable, packed, looks):
    mode, counts = DIRECTIONS[direction]
    path = world.path("peer.sock")
    backend = testpmd.vhost(world, path, [_null(direction, length)])
    try:
        guest = testpmd.guest(world, path, mode, length, mergeable, packed)
        try:
            return _measure(guest, counts, looks)
        finally:
            guest.close()
    finally:
        backend.close()
        if os.path.exists(path):
            os.unlink(path)


def _ovs(world, direction, length, mergeable, packed, looks):
    mode, counts = DIRECTIONS[direction]
    switch = ovs.Switch(world, ["guest"], _null(direction, length))
    try:
        guest = testpmd.guest(world, switch.socket("guest"), mode, length, mergeable, packed, listen=True)
        try:
            return _measure(guest, counts, looks)
        finally:
            guest.close()
    finally:
        switch.close()


SYSTEMS = {"tandem": _tandem, "testpmd": _testpmd, "ovs-dpdk": _ovs}


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
    looks = quiet.Quiet(world, quick)
    world.tool("dpdk-testpmd", "dpdk-dev")
    rings = ["split"]
    if wanted(only, ring="packed"):
        if _offers_packed(world):
            rings.append("packed")
        else:
            report.skip("packed rings", "tandem-backend does not offer VIRTIO_F_RING_PACKED (bit 34)")
    cases = [{"direction": direction, "bytes": length, "mergeable": mergeable, "ring": ring} for ring in rings
             for direction in DIRECTIONS for length in LENGTHS for mergeable in (True, False)]
    if quick:
        cases = [case for case in cases if case["bytes"] == 64 and case["mergeable"]]
    missing = set()
    for case in cases:
        if not wanted(only, **case):
            continue
        words = (case["direction"], case["bytes"], case["mergeable"], case["ring"] == "packed", looks)

        def start(system, words=words):
            if system in missing:
                return None
            try:
                return SYSTEMS[system](world, *words)
            except CannotRun as error:
                if system != "ovs-dpdk":
                    raise
                report.could_not(system, error)
                missing.add(system)
                return None

        found = looks.take_turns([system for system in SYSTEMS if wanted(only, system=system) and system not in missing], start,
                                 lambda text, case=case: report.progress(f"{case}, {text}"))
        for system, windows in found.items():
            # Ethernet adds 24 bytes a packet on a wire (preamble, checksum, gap); there is no wire here, so they do not count.
            report.row(case, system, "Mpps/core", windows.rates(), gbit_s=round(windows.median() * case["bytes"] * 8 / 1000, 2),
                       **windows.told(), tandem_ratio=found["tandem"].ratio(windows) if "tandem" in found else None)
    report.note("packets are counted by the guest; 'both' counts packets in and out together")
