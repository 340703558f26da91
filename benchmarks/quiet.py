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
# As many undisturbed windows make a sample; what is looked at for one at the most.
ENOUGH, AT_MOST = 12, 40
LEAST = 3  # with fewer, a start of both sides gives no sample


class Quiet:
    """Looks at the two CPUs of a world. `quick`: one window a sample, whatever it was like."""

    def __init__(self, world, quick=False):
        self._quick = quick
        self._child = world.start((world.program("tandem-quiet"), str(BACKEND_CORE), str(GUEST_CORE)), stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)
        self._fastest = float("inf")
        for _ in range(20):
            self._look()

    def _look(self):
        """What additions take on either CPU, just now."""
        try:
            self._child.stdin.write("?")
            self._child.stdin.flush()
            _trip, backend, guest = map(float, self._child.stdout.readline().split())
        except (OSError, ValueError) as error:
            raise Failed(f"ask tandem-quiet how busy the host is: {error or 'no answer'}") from error
        self._fastest = min(backend, guest, self._fastest)
        return backend, guest

    def sample(self, rate):
        """A Sample of `rate(seconds)`, which measures for so long and returns a number."""
        windows = []
        before = self._look()
        for _ in range(1 if self._quick else AT_MOST):
            value = rate(WINDOW)
            after = self._look()
            windows.append((value, max(*before, *after)))
            before = after
            if len(self._undisturbed(windows)) >= ENOUGH:
                break
        good = self._undisturbed(windows)
        everything = [value for value, _ in windows]
        if len(good) < LEAST:
            good = []
        return Sample(statistics.median(good or everything), bool(good), len(good), statistics.median(everything), len(windows))

    def _undisturbed(self, windows):
        return [value for value, slowest in windows if slowest <= DISTURBED * self._fastest]


class Sample:
    """`rate`: median of the undisturbed windows; of all, if there were too few (`undisturbed` false)."""

    def __init__(self, rate, undisturbed, quiet_windows, whole_rate, windows):
        self.rate = rate
        self.undisturbed = undisturbed
        self.quiet_windows = quiet_windows
        self.whole_rate = whole_rate
        self.windows = windows


def take_turns(systems, rounds, measure, progress, again=True):
    """{system: [Sample]}: `rounds` rounds in turns, and up to as many again for systems with too few undisturbed ones.

    `measure(system)` starts both sides anew and returns a Sample, or None if it could not. Disturbed ones are kept only where there is no other.
    Without `again`, no more than `rounds`.
    """
    found = {system: [] for system in systems}

    def lacks(system):
        return sum(sample.undisturbed for sample in found[system]) < rounds

    for number in range(2 * rounds if again else rounds):
        for system in systems:
            if number < rounds or lacks(system):
                progress(f"{system}, round {number + 1} of {rounds}")
                sample = measure(system)
                if sample is not None:
                    found[system].append(sample)
    return {system: [sample for sample in samples if sample.undisturbed] or samples for system, samples in found.items()}


def told(samples):
    """What a row says of its samples besides their rates."""
    return {"undisturbed": f"{sum(sample.quiet_windows for sample in samples)} of {sum(sample.windows for sample in samples)}"
                           if any(sample.undisturbed for sample in samples) else "none",
            "whole": statistics.median(sample.whole_rate for sample in samples)}
