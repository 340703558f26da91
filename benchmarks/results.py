# SPDX-License-Identifier: Apache-2.0
"""Samples to numbers, numbers to JSON and a table; what machine and which source they were taken with."""
import json
import os
import platform
import statistics
import subprocess
import sys
import time

from world import Failed

HERE = os.path.dirname(os.path.abspath(__file__))


def summarize(samples):
    """Median, median absolute deviation, min, max and the samples themselves; None where there are none."""
    if not samples:
        return {"median": None, "mad": None, "min": None, "max": None, "samples": []}
    middle = statistics.median(samples)
    return {"median": middle, "mad": statistics.median(abs(sample - middle) for sample in samples), "min": min(samples),
            "max": max(samples), "samples": list(samples)}


def wanted(only, **case):
    """Whether --only asks for this case: nothing that it names differs. What the case does not name is not compared."""
    return all(case[key] == value for key, value in (only or {}).items() if key in case)


def _git(*words):
    done = subprocess.run(("git", "-C", HERE, *words), capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu():
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def environment():
    """Taken before the first measurement: the load average tells whether the machine was quiet."""
    status = _git("status", "--porcelain")
    return {"git_revision": _git("rev-parse", "HEAD"), "dirty": None if status is None else status != "",
            "kernel": platform.release(), "cpu": _cpu(), "cpus": os.cpu_count(), "load_average": os.getloadavg(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


class Report:
    """What one benchmark found. A row is dimensions (any keys), a system, a unit and a summary of samples."""

    def __init__(self, name, quick, path=None):
        """`path`: a JSON file that is written anew with each row, so that a run cut short leaves what it has found."""
        self.path = path
        self.data = {"benchmark": name, "quick": quick, "environment": environment(), "rows": [], "skipped": [],
                     "failed": [], "notes": []}

    def row(self, dimensions, system, unit, samples, **more):
        self.data["rows"].append({**dimensions, "system": system, "unit": unit, **summarize(samples), **more})
        words = " ".join(f"{key}={_cell(value)}" for key, value in dimensions.items())
        self.progress(f"{words}, {system}: {_cell(self.data['rows'][-1]['median'])} {unit}")
        if self.path:
            self.write(self.path)

    def progress(self, text):
        """What is being measured now, or was found, on standard error: a benchmark takes minutes, and its table comes at the end."""
        print(f"{self.data['benchmark']}: {text}", file=sys.stderr, flush=True)

    def skip(self, what, why):
        """A measurement that could not be made: said, never silently missing."""
        self.data["skipped"].append({"what": what, "why": why})

    def could_not(self, what, error):
        """The same for an error that came up."""
        self.data["failed" if isinstance(error, Failed) else "skipped"].append({"what": what, "why": str(error)})

    def note(self, text):
        if text not in self.data["notes"]:
            self.data["notes"].append(text)

    def write(self, path):
        beside = f"{path}.new"
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(self.data, file, indent=1)
            file.write("\n")
        os.replace(beside, path)


# Keys of a row that are not dimensions; what else a row has is printed as a column if it is a plain value.
_SUMMARY = ("median", "mad", "min", "max")


def _cell(value):
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def columns(rows):
    """Plain keys of all rows in order of appearance, the summary last."""
    keys = []
    for row in rows:
        for key, value in row.items():
            if key not in keys and key not in _SUMMARY and not isinstance(value, (list, dict)):
                keys.append(key)
    return keys + list(_SUMMARY)


def cells(data):
    """Header and rows as text."""
    keys = columns(data["rows"])
    return [keys] + [[_cell(row.get(key)) if key != "samples" else "" for key in keys] for row in data["rows"]]


def table(data):
    rows = cells(data)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    machine = data["environment"]
    lines.insert(0, f"{data['benchmark']}{' (quick)' if data['quick'] else ''}: {str(machine['git_revision'])[:12]}"
                    f"{' with changes' if machine['dirty'] else ''}, Linux {machine['kernel']}, {machine['cpus']} x "
                    f"{machine['cpu']}, load {machine['load_average'][0]:.1f}")
    for kind in ("failed", "skipped"):
        lines += [f"{kind}: {entry['what']}: {entry['why']}" for entry in data[kind]]
    lines += [f"note: {text}" for text in data["notes"]]
    return "\n".join(lines)
