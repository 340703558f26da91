# SPDX-License-Identifier: Apache-2.0
"""Round trips at low load. First those of a prober that polls, through a backend that loops frames back: what the backend itself
takes. Then `ping` from the host to a Linux guest, through a bridge: what its user sees; there a plain tap is one of the peers.
"""
import contextlib
import os
import time

import ovs
import tandem
import testpmd
from prober import Prober, percentile
from real_guest import HOST_ADDRESS, PREFIX, RealGuest
from results import wanted
from world import CannotRun, ip

RATES = (1_000, 20_000)
PARTS = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
BRIDGE = "br-latency"
PING_INTERVAL_S = 0.005


# --- a prober through a backend that loops ---------------------------------------------------------------------------------


def _seen(prober, seconds, rate):
    """Round trips after the first second: until then the processes of some systems still start, on the same cores."""
    prober.wait_running()
    time.sleep(1 + seconds)
    return prober.finish().round_trips_us()[rate:]


def _tandem_loop(world, polling, rate, seconds, backend=None):
    host = tandem.Tandem(world, polling=polling, backend=backend)
    try:
        host.provide({tandem.MAC: "null='loopback'"})
        return _seen(Prober(world, [host.socket()], rate), seconds, rate)
    finally:
        host.close()


def _unprotected_loop(world, polling, rate, seconds):
    """What of it is protection (docs/benchmarks.md, overhead)."""
    return _tandem_loop(world, polling, rate, seconds, world.program("tandem-backend-unprotected"))


def _testpmd_loop(world, _polling, rate, seconds):
    path = world.path("latency.sock")
    backend = testpmd.vhost(world, path, [])
    try:
        return _seen(Prober(world, [path], rate), seconds, rate)
    finally:
        backend.close()
        if os.path.exists(path):
            os.unlink(path)


def _ovs_loop(world, _polling, rate, seconds):
    # Two ports: a switch does not send a frame back to where it came from. The same rings are crossed.
    switch = ovs.Switch(world, ["left", "right"])
    try:
        return _seen(Prober(world, [switch.socket("left"), switch.socket("right")], rate, senders=1, listen=True, limit=90), seconds, rate)
    finally:
        switch.close()


LOOPS = {("tandem", "adaptive"): _tandem_loop, ("tandem", "always"): _tandem_loop,
         ("unprotected", "always"): _unprotected_loop, ("testpmd", "always"): _testpmd_loop, ("ovs-dpdk", "always"): _ovs_loop}


# --- ping through a bridge to a guest -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bridge():
    """A bridge of the kernel's with the host's address."""
    ip("link", "add", BRIDGE, "type", "bridge", "mcast_snooping", "0")
    try:
        with open(f"/proc/sys/net/ipv6/conf/{BRIDGE}/disable_ipv6", "w", encoding="ascii") as file:
            file.write("1")
        ip("address", "add", f"{HOST_ADDRESS}/{PREFIX}", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        yield
    finally:
        ip("link", "del", BRIDGE)


def _pinged(world, netdev, count):
    guest = RealGuest(world, tandem.MAC, netdev)
    try:
        return guest.round_trips_us(count, PING_INTERVAL_S)
    finally:
        guest.close()


def _vhost_user(path, listen=False):
    return ("-chardev", f"socket,id=chardev0,path={path}{',server=on,wait=off' if listen else ''}", "-netdev",
            "vhost-user,id=net0,chardev=chardev0")


def _tandem_ping(world, polling, count):
    with _bridge():
        host = tandem.Tandem(world, polling=polling)
        try:
            host.provide({tandem.MAC: f"bridge='{BRIDGE}'"})
            found = _pinged(world, _vhost_user(host.socket()), count)
            host.release()
            return found
        finally:
            host.close()


def _testpmd_ping(world, _polling, count):
    path = world.path("ping.sock")
    with _bridge():
        ip("link", "add", "ping0", "type", "veth", "peer", "name", "ping1")
        try:
            ip("link", "set", "ping1", "master", BRIDGE)
            for end in ("ping0", "ping1"):
                ip("link", "set", end, "up")
            backend = testpmd.vhost(world, path, ["net_af_xdp0,iface=ping0"])
            try:
                return _pinged(world, _vhost_user(path), count)
            finally:
                backend.close()
                if os.path.exists(path):
                    os.unlink(path)
        finally:
            ip("link", "del", "ping0")


def _ovs_ping(world, _polling, count):
    switch = ovs.Switch(world, ["guest"])
    try:
        switch.give_address(f"{HOST_ADDRESS}/{PREFIX}")
        return _pinged(world, _vhost_user(switch.socket("guest"), listen=True), count)
    finally:
        switch.close()


def _tap_ping(world, _polling, count):
    with _bridge():
        ip("tuntap", "add", "ping0", "mode", "tap")
        try:
            ip("link", "set", "ping0", "master", BRIDGE, "up")
            in_kernel = os.access("/dev/vhost-net", os.R_OK | os.W_OK)
            netdev = f"tap,id=net0,ifname=ping0,script=no,downscript=no,vhost={'on' if in_kernel else 'off'}"
            return _pinged(world, ("-netdev", netdev), count)
        finally:
            ip("link", "del", "ping0")


PINGS = {("tandem", "adaptive"): _tandem_ping, ("tandem", "always"): _tandem_ping, ("testpmd", "always"): _testpmd_ping,
         ("ovs-dpdk", "always"): _ovs_ping, ("tap", "never"): _tap_ping}


# --- both --------------------------------------------------------------------------------------------------------------------------


def _in_turns(report, rounds, ways, dimensions, only, measure):
    """`measure(how, polling)` gives one round's round trips. A row for each system; a system that cannot run is named once."""
    taken = {key: [] for key in ways if wanted(only, system=key[0], polling=key[1])}
    gone = set()
    for number in range(rounds):
        for (system, polling), trips in taken.items():
            if (system, polling) in gone:
                continue
            report.progress(f"{dimensions}, {system} {polling}, round {number + 1} of {rounds}")
            try:
                trips.append(measure(ways[system, polling], polling))
            except CannotRun as error:
                report.could_not(f"{system} {polling}, {dimensions}", error)
                gone.add((system, polling))
    for (system, polling), found in taken.items():
        trips = [trip for one in found for trip in one]
        if trips:
            # The samples are medians of rounds; the percentiles are of all round trips together.
            report.row({**dimensions, "polling": polling}, system, "us", [percentile(one, 0.5) for one in found],
                       round_trips=len(trips), **{name: percentile(trips, part) for name, part in PARTS.items()})


def run(world, report, quick, only=None):
    rounds, seconds, pings = (1, 0.5, 50) if quick else (5, 4.0, 600)
    for rate in RATES:
        if wanted(only, guest="prober", frames_s=rate):
            _in_turns(report, rounds, LOOPS, {"guest": "prober", "frames_s": rate}, only,
                      lambda how, polling, rate=rate: how(world, polling, rate, seconds))
    rate = round(1 / PING_INTERVAL_S)
    if wanted(only, guest="Linux", frames_s=rate):
        _in_turns(report, rounds, PINGS, {"guest": "Linux", "frames_s": rate}, only,
                  lambda how, polling: how(world, polling, pings))
    report.note("the prober polls for its frames; the Linux guest answers pings, and its own interrupt and wake-up are in each number")
    if not os.access("/dev/vhost-net", os.R_OK | os.W_OK):
        report.note("tap: this host has no vhost-net, so QEMU's own thread moves the packets")
