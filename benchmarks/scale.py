# SPDX-License-Identifier: Apache-2.0
"""One pair with more and more NICs and queue pairs: failover gap, memory per NIC, the standby's CPU, time to a new standby."""
import os
import signal
import time

import tandem
from prober import Prober, median
from results import wanted
from world import GUEST_CORE, wait_for

# (NICs, queue pairs of each)
STEPS = ((1, 1), (1, 4), (1, 16), (4, 8), (8, 32), (16, 1), (64, 1), (64, 4))
QUICK_STEPS = ((1, 1), (4, 2))
STANDBY_SECONDS = 61  # it enters all its guests' buffers in its page tables anew once in that time
_TICKS = os.sysconf("SC_CLK_TCK")


def _mac(number):
    return f"52:54:00:12:35:{number:02x}"


def _memory_kib(pid):
    """The process's proportional share (Pss) by what is mapped: "own" is nobody else's by nature (heap, stacks, programs' data and
    page tables), the rest are files that others map too: frames and rings of uplinks, guests' memory, the segment."""
    found = {"own": 0}
    name = ""
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.split()
            if not words[0].endswith(":"):
                name = words[5] if len(words) > 5 and words[5].startswith("/memfd:") else "own"
            elif words[0] == "Pss:":
                found[name] = found.get(name, 0) + int(words[1])
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        found["own"] += next(int(line.split()[1]) for line in file if line.startswith("VmPTE:"))
    return found


def _cpu_seconds(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _step(world, nics, queue_pairs, kills, rate, asleep):
    host = tandem.Tandem(world, polling="adaptive", others_apart=True)
    try:
        began = time.monotonic()
        host.provide({_mac(number): "null='loopback'" for number in range(nics)}, queues=queue_pairs)
        provided = time.monotonic() - began
        flows = nics * queue_pairs
        prober = Prober(world, [host.socket(_mac(number)) for number in range(nics)], rate, queue_pairs=queue_pairs,
                        gap_us=max(25, 2.5e6 * flows / rate)).wait_running()
        found = {"resume_us": [], "all_flows_us": [], "standby_s": [], "awake_us": [], "takeover_us": [], "round_us": []}
        known = {incident["id"] for incident in host.incidents()}
        victim, resumed, complete = None, [], []
        for _ in range(kills):
            pair = host.wait_whole(not_pid=victim)
            time.sleep(2)  # a standby that has had the time to warm its page tables, with two busy cores
            victim = pair["active"]["pid"]
            prober.kill(signal.SIGKILL, victim)
            incident = wait_for(lambda: next((one for one in host.incidents() if one["id"] not in known and
                                              one["timeline_ns"]["first_transaction"] is not None), None), 30, "the incident", 0.02)
            known.add(incident["id"])
            host.wait_whole(not_pid=victim)
            complete.append(time.monotonic_ns())
            found["awake_us"].append(incident["timeline_ns"]["heir_awake"] / 1000)
            found["takeover_us"].append(incident["timeline_ns"]["replayed"] / 1000)
            found["round_us"].append(incident["timeline_ns"]["first_transaction"] / 1000)
            resumed.append(incident["fence_time_ns"] + incident["timeline_ns"]["first_transaction"])
        cpu = None
        for _ in range(3):  # a host that takes a CPU away may cost an owner in between
            host.wait_whole()
            time.sleep(3)  # its start is not its sleep
            pair = host.wait_whole()
            standby = pair["standby"]["pid"]
            before, since = _cpu_seconds(standby), time.monotonic()
            time.sleep(asleep)
            if host.pair()["standby"]["pid"] == standby:
                cpu = 100 * (_cpu_seconds(standby) - before) / (time.monotonic() - since)
                break
        pair = host.wait_whole()
        memory = {member: _memory_kib(pair[member]["pid"]) for member in ("active", "standby")}
        seen = prober.finish()
        for (at, _), first, whole in zip(seen.kills(), resumed, complete):
            found["standby_s"].append((whole - at) / 1e9)
            # From the kill to the first arrival of any flow, and to that of the last one: where the gap ends that it fell into.
            ends = {}
            for flow, begin, end, _ in seen.gaps:
                if end > at and begin < first:
                    ends[flow] = min(end, ends.get(flow, end))
            if ends:
                found["resume_us"].append((min(ends.values()) - at) / 1000)
                found["all_flows_us"].append((max(ends.values()) - at) / 1000)
        host.release()
        return found, memory, cpu, provided, seen.account()
    finally:
        host.close()


def run(world, report, quick, only=None):
    kills, rate, asleep = (1, 50_000, 2) if quick else (7, 200_000, STANDBY_SECONDS)
    base = None
    for nics, queue_pairs in QUICK_STEPS if quick else STEPS:
        if not wanted(only, nics=nics, queue_pairs=nics * queue_pairs):
            continue
        report.progress(f"{nics} NICs of {queue_pairs} queue pairs")
        found, memory, cpu, provided, account = _step(world, nics, queue_pairs, kills, rate, asleep)
        base = base or (nics, memory)
        more = {}
        for member in ("active", "standby"):
            more[f"{member}_own_kib"] = memory[member]["own"]
            if nics > base[0]:
                more[f"{member}_kib_per_nic"] = round((memory[member]["own"] - base[1][member]["own"]) / (nics - base[0]))
        report.row({"nics": nics, "queue_pairs": nics * queue_pairs}, "tandem", "us", found["all_flows_us"],
                   first_flow_us=median(found["resume_us"]), awake_us=median(found["awake_us"]),
                   takeover_us=median(found["takeover_us"]), round_us=median(found["round_us"]),
                   new_standby_s=median(found["standby_s"]), provide_s=provided, standby_cpu_percent=cpu, pss_kib=memory, **more,
                   **account)
    report.note(f"the members' threads besides the poll threads are on CPU {GUEST_CORE}, as with pair.cpus; standby_cpu_percent is over "
                f"{asleep} s")
    report.note("us: from the kill until every flow came again; the load stays the same, so more flows are each slower and the "
                "last one's turn comes later. From the fence's mark: awake_us, takeover_us to polling, round_us to the end of the first round in which a packet moved. own_kib: proportional share of all but memfds, with page tables; per NIC against the "
                "first row. The JSON has the shares of frames, rings and guests' memory as pss_kib")
