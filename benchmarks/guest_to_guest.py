# SPDX-License-Identifier: Apache-2.0
"""Packets a second that one core moves from guest to guest: two NICs of one pair on one bridge; testpmd or OVS between the same two.

Both guests are ports of one testpmd on the other core, which sends back to the other port what comes in at one: as many packets as it
began with go round for ever, fewer than a ring holds, so that none is dropped for want of room.
"""
import os
import statistics
import time

import ovs
import tandem
import testpmd
from results import wanted
from world import CannotRun, Failed, ip

BRIDGE = "br-guests"
MACS = ("52:54:00:12:34:61", "52:54:00:12:34:62")
# testpmd's bursts of 32 that begin the round trip, each way.
BURSTS = 12


def _rate(world, sockets, length, seconds, listen=False):
    guests = testpmd.two_guests(world, sockets, MACS, length, BURSTS, listen)
    try:
        time.sleep(min(0.5, seconds))
        found = sum(guests.rates(seconds, port)[0] for port in (0, 1))
        if found == 0:
            raise Failed("no packet goes round: those that began it were lost")
        return found
    finally:
        guests.close()


def _tandem(world, length, seconds):
    ip("link", "add", BRIDGE, "type", "bridge", "mcast_snooping", "0")
    try:
        ip("link", "set", BRIDGE, "up")
        host = tandem.Tandem(world, polling="always")
        try:
            host.provide({mac: f"bridge='{BRIDGE}'" for mac in MACS})
            found = _rate(world, [host.socket(mac) for mac in MACS], length, seconds)
            host.release()
            return found
        finally:
            host.close()
    finally:
        ip("link", "del", BRIDGE)


def _testpmd(world, length, seconds):
    paths = [world.path(f"guest{number}.sock") for number in range(2)]
    backend = testpmd.vhost(world, paths[0], [f"net_vhost1,iface={paths[1]},queues=1"])
    try:
        return _rate(world, paths, length, seconds)
    finally:
        backend.close()
        for path in paths:
            if os.path.exists(path):
                os.unlink(path)


def _ovs(world, length, seconds):
    switch = ovs.Switch(world, ["left", "right"], crossed=True)
    try:
        return _rate(world, [switch.socket("left"), switch.socket("right")], length, seconds, listen=True)
    finally:
        switch.close()


SYSTEMS = {"tandem": _tandem, "testpmd": _testpmd, "ovs-dpdk": _ovs}


def run(world, report, quick, only=None):
    rounds, seconds = (1, 0.3) if quick else (5, 2.0)
    for length in (64,) if quick else (64, 512, 1514):
        samples = {system: [] for system in SYSTEMS if wanted(only, bytes=length, system=system)}
        missing = set()
        for number in range(rounds):
            for system in [system for system in samples if system not in missing]:
                report.progress(f"{length} bytes, {system}, round {number + 1} of {rounds}")
                try:
                    samples[system].append(SYSTEMS[system](world, length, seconds) / 1e6)
                except CannotRun as error:
                    report.could_not(f"{system}, {length} bytes", error)
                    missing.add(system)
        middle = {system: statistics.median(values) for system, values in samples.items() if values}
        for system, value in middle.items():
            report.row({"bytes": length}, system, "Mpps/core", samples[system], gbit_s=round(value * length * 8 / 1000, 2),
                       tandem_ratio=round(middle["tandem"] / value, 3) if "tandem" in middle and value else None)
    report.note("both ways together, counted where they arrive; testpmd does not look at addresses, OVS has a rule for each direction")
