# SPDX-License-Identifier: Apache-2.0
"""A guest that sends through AF_XDP over a veth: Tandem's dev= uplink, and testpmd's net_vhost with net_af_xdp.

Frames are counted where they arrive, at the other end of the veth, whose kernel drops them. Sending only: a generator for
the other direction would need a third CPU.
"""
import os
import statistics
import time

import tandem
import testpmd
from results import wanted
from world import CannotRun, ip

OURS, THEIRS = "up0", "up1"


def _arrived():
    with open(f"/sys/class/net/{THEIRS}/statistics/rx_packets", encoding="ascii") as file:
        return int(file.read())


def _rate(guest, seconds):
    try:
        time.sleep(0.5)
        before, since = _arrived(), time.monotonic()
        time.sleep(seconds)
        return (_arrived() - before) / (time.monotonic() - since)
    finally:
        guest.close()


def _tandem(world, length, seconds):
    host = tandem.Tandem(world, polling="always")
    try:
        host.provide({tandem.MAC: f"dev='{OURS}'"})
        found = _rate(testpmd.guest(world, host.socket(), "txonly", length), seconds)
        host.release()
        return found
    finally:
        host.close()


def _testpmd(world, length, seconds):
    path = world.path("uplink.sock")
    backend = testpmd.vhost(world, path, [f"net_af_xdp0,iface={OURS}"])
    try:
        return _rate(testpmd.guest(world, path, "txonly", length), seconds)
    finally:
        backend.close()
        if os.path.exists(path):
            os.unlink(path)


def run(world, report, quick, only=None):
    rounds, seconds = (1, 0.5) if quick else (5, 3.0)
    for length in (64,) if quick else (64, 512, 1514):
        if not wanted(only, bytes=length):
            continue
        samples = {"tandem": [], "testpmd": []}
        for number in range(rounds):
            for system, measure in (("tandem", _tandem), ("testpmd", _testpmd)):
                report.progress(f"{length} bytes, {system}, round {number + 1} of {rounds}")
                ip("link", "add", OURS, "type", "veth", "peer", "name", THEIRS)
                try:
                    for end in (OURS, THEIRS):
                        with open(f"/proc/sys/net/ipv6/conf/{end}/disable_ipv6", "w", encoding="ascii") as file:
                            file.write("1")
                        ip("link", "set", end, "up")
                    samples[system].append(measure(world, length, seconds) / 1e6)
                except CannotRun as error:
                    report.could_not(f"{system}, {length} B", error)
                finally:
                    ip("link", "del", OURS)
        middle = {system: statistics.median(found) for system, found in samples.items() if found}
        for system, value in middle.items():
            report.row({"direction": "txonly", "bytes": length}, system, "Mpps", samples[system],
                       tandem_ratio=round(middle["tandem"] / value, 3) if "tandem" in middle and value else None)
    report.skip("receiving through AF_XDP", "a generator needs a third CPU")
    report.skip("OVS with an afxdp port", "Debian's package is built without it")
