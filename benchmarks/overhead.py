# SPDX-License-Identifier: Apache-2.0
"""What protection costs: the shipping engine against the same one without journal, guard and heartbeat.

The other engine (tandem-backend-unprotected, vhost-net-backend/protection.hpp) is built for this alone. First both at work, as in
`throughput`; then instructions a packet, counted by callgrind, which two runs on one machine give alike to the last digit.
"""
import os
import re
import subprocess
import time

import quiet
import tandem
import testpmd
from results import wanted
from world import CannotRun, Failed

CASES = (("rxonly", "null='source' frame='{bytes}'", 0), ("txonly", "null='sink'", 1))
PROGRAMS = {"tandem": "tandem-backend", "unprotected": "tandem-backend-unprotected"}
COUNTED = {"tandem": "tandem-engine-cost", "unprotected": "tandem-engine-cost-unprotected"}


def _rate(world, system, mode, uplink, length, counter, looks):
    host = tandem.Tandem(world, polling="always", backend=world.program(PROGRAMS[system]))
    try:
        host.provide({tandem.MAC: uplink.format(bytes=length)})
        guest = testpmd.guest(world, host.socket(), mode, length)
        try:
            time.sleep(0.5)
            return looks.watch(lambda seconds: guest.rates(seconds)[counter] / 1e6)
        finally:
            guest.close()
            host.release()
    finally:
        host.close()


def _instructions(world, program, direction, length, bursts):
    """Instructions inside the engine's burst function, a packet."""
    output = world.path("callgrind.out")
    # The function alone and what it calls; memory of a fixed place keeps runs alike.
    words = (world.tool("setarch", "util-linux"), "-R", world.tool("valgrind", "valgrind"), "--tool=callgrind",
             f"--callgrind-out-file={output}", "--collect-atstart=no",
             f"--toggle-collect=tandem::{direction}_burst(tandem::QueuePair&)", program, "--direction", direction, "--bytes",
             str(length), "--bursts", str(bursts))
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
    name = os.path.basename(program)
    if done.returncode != 0:
        raise Failed(f"{name} under callgrind: exit status {done.returncode}: {done.stderr.strip()[-300:]}")
    packets = int(done.stdout.split()[-1])
    with open(output, encoding="utf-8", errors="replace") as file:
        total = int(re.search(r"^(?:summary|totals): (\d+)", file.read(), re.MULTILINE).group(1))
    os.unlink(output)
    if total == 0:
        raise Failed(f"{name} under callgrind: nothing was counted; the burst function was inlined or renamed")
    return total / packets


def _count(world, report, quick, only):
    bursts = 50 if quick else 1000
    for direction in ("transmit", "receive"):
        for length in (64,) if quick else (64, 512, 1518):
            if not wanted(only, direction=direction, bytes=length):
                continue
            report.progress(f"instructions, {direction}, {length} bytes")
            found = {system: [_instructions(world, world.program(name), direction, length, bursts) for _ in range(2)]
                     for system, name in COUNTED.items()}
            for system, values in found.items():
                ratio = found["tandem"][0] / found["unprotected"][0] if system == "tandem" else None
                report.row({"direction": direction, "bytes": length}, system, "instructions/packet", values,
                           ratio=ratio and round(ratio, 4), repeatable=values[0] == values[1])


def run(world, report, quick, only=None):
    world.tool("valgrind", "valgrind")
    try:
        looks = quiet.Quiet(world, quick) if wanted(only, unit="Mpps/core") else None
        for mode, uplink, counter in CASES:
            for length in (64,) if quick else (64, 512, 1518):
                if not wanted(only, unit="Mpps/core", direction=mode, bytes=length):
                    continue
                found = looks.take_turns(
                    PROGRAMS, lambda system, case=(mode, uplink, length, counter): _rate(world, system, *case, looks),
                    lambda text, mode=mode, length=length: report.progress(f"{mode}, {length} bytes, {text}"))
                for system, windows in found.items():
                    report.row({"direction": mode, "bytes": length}, system, "Mpps/core", windows.rates(), **windows.told(),
                               ratio=windows.ratio(found["unprotected"]) if system == "tandem" else None)
    except CannotRun as error:
        report.could_not("overhead in packets a second", error)
    if wanted(only, unit="instructions/packet"):
        _count(world, report, quick, only)
    report.note("callgrind counts user-space instructions on a CPU without AVX-512 and protection keys: what the guard costs "
                "shows in packets a second only, and only on a CPU that has keys")
