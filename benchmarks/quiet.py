# SPDX-License-Identifier: Apache-2.0
"""Rates of moments in which nobody else slowed either CPU down, and how many of those there were.

On a shared host a CPU does half as much whenever the hyperthread beside it works for somebody else, for a tenth of a second
or for minutes, and no counter of the guest's kernel says so (quiet.cpp). Between a backend and a guest that each have a CPU,
that decides who waits for whom. So a rate is taken in many short windows, with a look at both CPUs before and after each;
what counts are the windows that were undisturbed at both ends.
"""
import statistics
import subprocess

from world import BACKEND_CORE, GUEST_CORE, Failed

WINDOW = 0.05  # seconds
# A CPU whose additions take so much longer than the fastest ever seen here shares its core with somebody.
DISTURBED = 1.15
# Of one start of both sides: no more windows once so many were undisturbed, or so many there were at all.
ENOUGH, AT_MOST = 12, 30
# Undisturbed windows that a system is to have, in this many starts at least and twice as many at the most.
WANTED = 30
STARTS = 3


class Windows:
    """What a system's starts gave: `undisturbed`, `all`: rates; `starts`."""

    def __init__(self):
        self.undisturbed = []
        self.all = []
        self.starts = 0

    def add(self, other):
        self.undisturbed += other.undisturbed
        self.all += other.all
        self.starts += other.starts

    def rates(self):
        """The undisturbed ones; all, if the host left none."""
        return self.undisturbed or self.all

    def median(self):
        return statistics.median(self.rates())

    def told(self):
        """What a row says of them, besides rates()."""
        return {"undisturbed": f"{len(self.undisturbed)} of {len(self.all)}", "starts": self.starts,
                "median_of_all": statistics.median(self.all)}


class Quiet:
    """Looks at the two CPUs of a world. `quick`: one window, whatever it was like."""

    def __init__(self, world, quick=False):
        self._quick = quick
        self._child = world.start((world.program("tandem-quiet"), str(BACKEND_CORE), str(GUEST_CORE)), stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)
        self._fastest = float("inf")
        for _ in range(20):
            self._slower()

    def _slower(self):
        """What additions take on the slower of the two CPUs, just now."""
        try:
            self._child.stdin.write("?")
            self._child.stdin.flush()
            _trip, backend, guest = map(float, self._child.stdout.readline().split())
        except (OSError, ValueError) as error:
            raise Failed(f"ask tandem-quiet how busy the host is: {error or 'no answer'}") from error
        self._fastest = min(backend, guest, self._fastest)
        return max(backend, guest)

    def watch(self, rate):
        """Windows of one start, of `rate(seconds)`, which measures for so long and returns a number."""
        found = Windows()
        found.starts = 1
        before = self._slower()
        for _ in range(1 if self._quick else AT_MOST):
            value = rate(WINDOW)
            after = self._slower()
            found.all.append(value)
            if max(before, after) <= DISTURBED * self._fastest:
                found.undisturbed.append(value)
            before = after
            if len(found.undisturbed) >= ENOUGH:
                break
        return found

    def take_turns(self, systems, start, progress):
        """{system: Windows}: STARTS rounds in turns, and up to as many again for systems that lack undisturbed windows.

        `start(system)` starts both sides anew and returns what watch() found, or None if it could not.
        """
        found = {system: Windows() for system in systems}
        for number in range(1 if self._quick else 2 * STARTS):
            for system, windows in found.items():
                if number >= STARTS and len(windows.undisturbed) >= WANTED:
                    continue
                progress(f"{system}, start {number + 1}")
                more = start(system)
                if more is not None:
                    windows.add(more)
        return {system: windows for system, windows in found.items() if windows.all}
