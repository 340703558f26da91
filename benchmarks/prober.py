# SPDX-License-Identifier: Apache-2.0
"""tandem-prober from Python: starting it on the guest's core, ending it, and what it saw."""
import json
import os
import signal
import statistics
import time

from world import GUEST_CORE, NICE, Failed, wait_for


class Prober:
    _number = 0

    def __init__(self, world, sockets, rate, queue_pairs=1, gap_us=25, senders=None, length=64, listen=False, limit=60, nap_us=None):
        Prober._number += 1
        self._world = world
        self._output = world.path(f"prober{Prober._number}.json")
        self._log = f"prober{Prober._number}.log"
        self._victim = world.path(f"victim{Prober._number}")
        words = ["nice", "-n", str(NICE), "taskset", "-c", str(GUEST_CORE), world.program("tandem-prober"), "--rate", str(rate),
                 "--queue-pairs", str(queue_pairs), "--gap-us", str(gap_us), "--length", str(length), "--output", self._output,
                 "--victim", self._victim]
        for path in sockets:
            words += ["--socket", path]
        if senders is not None:
            words += ["--senders", str(senders)]
        if nap_us is not None:
            words += ["--nap-us", str(nap_us)]
        if listen:
            words += ["--listen"]
        self._limit = limit
        self.child = world.start(words, self._log)

    def _said(self):
        if self.child.poll() is not None:
            with open(self._world.path(self._log), encoding="utf-8", errors="replace") as file:
                raise Failed(f"the prober ended: {file.read().strip()}")
        with open(self._world.path(self._log), encoding="utf-8", errors="replace") as file:
            return "running" in file.read()

    def wait_running(self):
        """Until every flow has come back once."""
        wait_for(self._said, self._limit, "every flow of the prober to come back once", 0.02)
        return self

    def kill(self, number, pid, tid=0):
        """Has the prober send a signal, in a moment when this program sleeps and takes no CPU from anybody. `tid`: to that thread."""
        with open(self._victim, "w", encoding="ascii") as file:
            file.write(f"{pid} {tid} {int(number)}\n")
        self.child.send_signal(signal.SIGUSR1)
        time.sleep(0.1)

    def finish(self):
        self._said()
        self._world.forget(self.child)
        if not os.path.exists(self._output):
            raise Failed("the prober left no result")
        with open(self._output, encoding="utf-8") as file:
            return Seen(json.load(file))


class Seen:
    """What a prober saw. Times are CLOCK_MONOTONIC ns, as incidents' are."""

    def __init__(self, data):
        self.data = data
        # (flow, begin, end, longest stretch in which the prober itself did not run)
        self.gaps = [tuple(gap) for gap in data["gaps"]]

    def kills(self):
        """(when, whether there was somebody to kill) of each, in order."""
        return [(kill["at_ns"], kill["done"]) for kill in self.data["kills"]]

    def total(self, key):
        return sum(flow[key] for flow in self.data["flows"])

    def account(self):
        return {key: self.total(key) for key in ("lost", "duplicated", "reordered")}

    def longest(self, begin, end):
        """The longest gap of any flow that touches [begin, end]: (length, the prober's own part) in us; None: none."""
        found = [gap for gap in self.gaps if gap[2] > begin and gap[1] < end]
        if not found:
            return None
        gap = max(found, key=lambda entry: entry[2] - entry[1])
        return (gap[2] - gap[1]) / 1000, gap[3] / 1000

    def control(self, length_ns, kills, floor_us):
        """Longest gaps (us) in stretches of that length with no kill within half a second; `floor_us` where none was noted."""
        found = []
        at = self.data["begun_ns"] + 500_000_000
        while at + length_ns < self.data["ended_ns"] - 200_000_000:
            if all(not -500_000_000 < at - kill < 500_000_000 for kill in kills):
                longest = self.longest(at, at + length_ns)
                found.append(longest[0] if longest else floor_us)
            at += max(length_ns, 5_000_000)
        return found

    def round_trips_us(self):
        return [value / 1000 for value in self.data["round_trips_ns"]]


def percentile(values, part):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def median(values):
    values = [value for value in values if value is not None]
    return statistics.median(values) if values else None
