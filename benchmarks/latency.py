# SPDX-License-Identifier: Apache-2.0
"""Round trips at low load: a prober that polls, through a backend that loops frames back. Tandem and testpmd's net_vhost."""
import os
import time

import tandem
import testpmd
from prober import Prober, percentile
from results import wanted
from world import CannotRun

RATES = (1_000, 20_000)
PARTS = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


def _through(world, socket, rate, seconds):
    prober = Prober(world, [socket], rate).wait_running()
    time.sleep(seconds)
    return prober.finish().round_trips_us()


def _tandem(world, polling, rate, seconds):
    host = tandem.Tandem(world, polling=polling)
    try:
        host.provide({tandem.MAC: "null='loopback'"})
        return _through(world, host.socket(), rate, seconds)
    finally:
        host.close()


def _testpmd(world, _polling, rate, seconds):
    path = world.path("latency.sock")
    backend = testpmd.vhost(world, path, [])
    try:
        return _through(world, path, rate, seconds)
    finally:
        backend.close()
        if os.path.exists(path):
            os.unlink(path)


def run(world, report, quick, only=None):
    rounds, seconds = (1, 0.5) if quick else (5, 4.0)
    for rate in (rate for rate in RATES if wanted(only, frames_s=rate)):
        taken = {("tandem", "adaptive"): [], ("tandem", "always"): [], ("testpmd", "always"): []}
        for _ in range(rounds):
            for (system, polling), trips in taken.items():
                try:
                    trips.append((_tandem if system == "tandem" else _testpmd)(world, polling, rate, seconds))
                except CannotRun as error:
                    report.could_not(f"{system} {polling}, {rate} frames/s", error)
        for (system, polling), rounds_found in taken.items():
            trips = [trip for found in rounds_found for trip in found]
            if not trips:
                continue
            # The samples are medians of rounds; the percentiles are of all round trips together.
            report.row({"polling": polling, "frames_s": rate}, system, "us", [percentile(found, 0.5) for found in rounds_found],
                       round_trips=len(trips), **{name: percentile(trips, part) for name, part in PARTS.items()})
    report.note("the prober polls for its frames; a guest that sleeps adds its own interrupt and wake-up to each number")
