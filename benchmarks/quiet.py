# SPDX-License-Identifier: Apache-2.0
"""Rates of windows in which nobody else slowed either CPU down, and how many of those there were.

On a shared host a CPU does half as much whenever the hyperthread beside it works for somebody else, for a tenth of a second
or for minutes, and no counter of a virtual machine says so (quiet.cpp). Between a backend and a guest that each have a CPU,
that decides who waits for whom. So a rate is taken in many short windows, with a look at both CPUs before and after each;
what counts are the windows that were undisturbed at both ends.
"""
import statistics
import subprocess

from world import BACKEND_CORE, GUEST_CORE, CannotRun

WINDOW = 0.05  # seconds
# A CPU whose additions take so much longer than it is able to shares its core with somebody.
DISTURBED = 1.15
# What it is able to: one look in so many is faster.
ABLE = 20
# Of one start of both sides: no more windows once so many were undisturbed, or so many there were at all.
ENOUGH, AT_MOST = 12, 30
# Undisturbed windows that a system is to have, in this many starts at least and twice as many at the most.
WANTED = 30
STARTS = 3
# With fewer, a row has no ratio: it would compare neighbours.
LEAST = 10


class Windows:
    """What one system's starts gave: a list of (start, rate, backend's CPU, guest's CPU), the last two as additions took on it
    at the slower end of the window."""

    def __init__(self, looks):
        self._looks = looks
        self.found = []

    def undisturbed(self):
        """Judged by all looks of the run so far, so at the end alike for all."""
        limits = self._looks.limits()
        return [window for window in self.found if window[2] <= limits[0] and window[3] <= limits[1]]

    def rates(self):
        """Of the undisturbed ones; of all, if they are too few."""
        good = self.undisturbed()
        return [rate for _, rate, _, _ in (good if len(good) >= LEAST else self.found)]

    def median(self):
        return statistics.median(self.rates())

    def ratio(self, other):
        """This system's rate over another's; None if either was hardly ever undisturbed."""
        if min(len(self.undisturbed()), len(other.undisturbed())) < LEAST or not other.median():
            return None
        return round(self.median() / other.median(), 3)

    def told(self):
        """What a row says of them, besides rates(): all windows too, to be judged anew by whoever doubts."""
        good = self.undisturbed()
        return {"undisturbed": f"{len(good)} of {len(self.found)}", "starts": len({start for start, *_ in good}),
                "median_of_all": statistics.median(rate for _, rate, _, _ in self.found), "windows": self.found}


class Quiet:
    """Looks at the two CPUs of a world. `quick`: one window, whatever it was like."""

    def __init__(self, world, quick=False):
        self._quick = quick
        self._seen = ([], [])  # by CPU: what additions took, of all looks
        self._child = world.start((world.program("tandem-quiet"), str(BACKEND_CORE), str(GUEST_CORE)), stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(ABLE):
            self._look()

    def _look(self):
        """What additions take on either CPU, just now."""
        try:
            self._child.stdin.write("?")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except OSError:
            line = ""
        if not line:
            why = self._child.stderr.read().strip() or "it has ended"
            raise CannotRun(f"see whether the CPUs are undisturbed (tandem-quiet): {why}")
        took = tuple(map(float, line.split()))
        for seen, value in zip(self._seen, took):
            seen.append(value)
        return took

    def limits(self):
        """By CPU: what additions take at the most if it is undisturbed."""
        return [DISTURBED * sorted(seen)[len(seen) // ABLE] for seen in self._seen]

    def watch(self, rate):
        """The windows of one start, of `rate(seconds)`, which measures for so long and returns a number."""
        windows = Windows(self)
        before = self._look()
        for _ in range(1 if self._quick else AT_MOST):
            value = rate(WINDOW)
            after = self._look()
            windows.found.append((0, value, *map(max, before, after)))
            before = after
            if len(windows.undisturbed()) >= ENOUGH:
                break
        return windows

    def take_turns(self, systems, start, progress):
        """{system: Windows}: STARTS rounds in turns, and up to as many again for systems that lack undisturbed windows.

        `start(system)` starts both sides anew and returns what watch() found, or None if it could not.
        """
        found = {system: Windows(self) for system in systems}
        for number in range(1 if self._quick else 2 * STARTS):
            for system, windows in found.items():
                if number >= STARTS and len(windows.undisturbed()) >= WANTED:
                    continue
                progress(f"{system}, start {number + 1}")
                more = start(system)
                if more is not None:
                    windows.found += [(number, *window[1:]) for window in more.found]
        return {system: windows for system, windows in found.items() if windows.found}
