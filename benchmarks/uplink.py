# SPDX-License-Identifier: Apache-2.0
"""A guest behind AF_XDP over a veth: Tandem's dev= uplink, and testpmd's net_vhost with net_af_xdp.

txonly: frames are counted where they arrive, at the other end of the veth, whose kernel drops them. both: the other end sends
each frame back (reflect.bpf.c) and so does the guest, so that a fixed number goes round; the guest counts them. All of the
kernel's work is done on the backend's core, by whoever sends, or polls.

netdev: interrupts bring received frames, or the backend's thread polls the netdev's queue itself (pair.busy_poll; net_af_xdp's
busy_budget) and interrupts wait.
"""
import os
import time

import quiet
import tandem
import testpmd
from results import wanted
from world import ip

OURS, THEIRS = "up0", "up1"
BUDGET = 64
# On their way in a loop: fewer than the 256 that each direction of a veth holds, so that none is dropped.
BURSTS = 7
# What pair.busy_poll sets; net_af_xdp leaves it to its user.
DEFERRAL = {"napi_defer_hard_irqs": 2, "gro_flush_timeout": 200_000}


def _write(path, value):
    with open(path, "w", encoding="ascii") as file:
        file.write(str(value))


class _Cable:
    def __init__(self, world, direction):
        reflector = world.program("reflect.bpf.o", os.R_OK) if direction == "both" else None
        ip("link", "add", OURS, "type", "veth", "peer", "name", THEIRS)
        for end in (OURS, THEIRS):
            _write(f"/proc/sys/net/ipv6/conf/{end}/disable_ipv6", 1)
        if reflector is not None:
            ip("link", "set", THEIRS, "xdpdrv", "obj", reflector, "sec", "xdp")
        for end in (OURS, THEIRS):
            ip("link", "set", end, "up")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        ip("link", "del", OURS)


def _arriving(seconds):
    """Millions of frames a second at the other end."""
    def arrived():
        with open(f"/sys/class/net/{THEIRS}/statistics/rx_packets", encoding="ascii") as file:
            return int(file.read()), time.monotonic()

    before, since = arrived()
    time.sleep(seconds)
    after, until = arrived()
    return (after - before) / (until - since) / 1e6


def _measure(world, path, direction, length, looks):
    guest = (testpmd.guest(world, path, "txonly", length) if direction == "txonly" else
             testpmd.looping_guest(world, path, length, BURSTS))
    try:
        time.sleep(0.5)
        return looks.watch(_arriving if direction == "txonly" else lambda seconds: guest.rates(seconds)[0] / 1e6)
    finally:
        guest.close()


def _tandem(world, direction, length, polled, looks):
    host = tandem.Tandem(world, polling="always", busy_poll=BUDGET if polled else 0)
    try:
        host.provide({tandem.MAC: f"dev='{OURS}'"})
        found = _measure(world, host.socket(), direction, length, looks)
        host.release()
        return found
    finally:
        host.close()


def _testpmd(world, direction, length, polled, looks):
    path = world.path("uplink.sock")
    if polled:
        for setting, value in DEFERRAL.items():
            _write(f"/sys/class/net/{OURS}/{setting}", value)
    backend = testpmd.vhost(world, path, [f"net_af_xdp0,iface={OURS},busy_budget={BUDGET if polled else 0}"])
    try:
        return _measure(world, path, direction, length, looks)
    finally:
        backend.close()
        if os.path.exists(path):
            os.unlink(path)


SYSTEMS = {"tandem": _tandem, "testpmd": _testpmd}


def _kernel_polls(world):
    """Whether this kernel can poll a veth busily (docs/operations.md, pair.busy_poll)."""
    with _Cable(world, "txonly"):
        host = tandem.Tandem(world, polling="always", busy_poll=BUDGET)
        try:
            host.provide({tandem.MAC: f"dev='{OURS}'"})
            nics = host.ask({"command": "status"})["nics"]
            host.release()
            return nics[0]["uplink"]["busy_poll"]
        finally:
            host.close()


def run(world, report, quick, only=None):
    looks = quiet.Quiet(world, quick)
    world.tool("dpdk-testpmd", "dpdk-dev")
    ways = ["interrupts"]
    if wanted(only, netdev="polled"):
        if _kernel_polls(world):
            ways.append("polled")
        else:
            report.skip("netdevs that are polled", "this kernel does not know which NAPI serves a veth's queue (Linux 6.4 to 6.12 do)")
    cases = [{"direction": direction, "bytes": length, "netdev": netdev} for direction in ("txonly", "both")
             for length in (64, 512, 1514) for netdev in ways]
    if quick:
        cases = [case for case in cases if case["bytes"] == 64]
    for case in cases:
        if not wanted(only, **case):
            continue

        def start(system, case=case):
            with _Cable(world, case["direction"]):
                return SYSTEMS[system](world, case["direction"], case["bytes"], case["netdev"] == "polled", looks)

        found = looks.take_turns([system for system in SYSTEMS if wanted(only, system=system)], start,
                                 lambda text, case=case: report.progress(f"{case}, {text}"))
        for system, windows in found.items():
            report.row(case, system, "Mpps", windows.rates(), **windows.told(),
                       tandem_ratio=found["tandem"].ratio(windows) if "tandem" in found else None)
    report.note("both: each frame that goes round counts once, and was sent and received once")
    report.skip("OVS with an afxdp port", "Debian's package is built without it")
