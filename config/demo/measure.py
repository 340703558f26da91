# SPDX-License-Identifier: Apache-2.0
"""What the traffic saw: arrival times, the gap around a kill, control gaps, the table and the verdict."""
import array
import bisect
import json
import os
import statistics
import subprocess
import threading

from host import FILES, GUEST_ADDRESS, NAME, DemoError, end_process, start_time, wait_for

MILLISECOND = 1_000_000
DIRECTIONS = ("to_guest", "from_guest")


class Traffic:
    """tandem-traffic in the outside namespace. Several at once need names and UDP ports of their own."""

    def __init__(self, journal, program, rate, guest=GUEST_ADDRESS, name="traffic", port=7110):
        self.report_path = os.path.join(FILES, f"{name}.json")
        self.errors_path = os.path.join(FILES, f"{name}.errors")
        if os.path.exists(self.report_path):
            os.unlink(self.report_path)
        self.rate = rate
        self.latest = {"sent": 0, "received": 0, "stream_returned": 0}
        self.running = threading.Event()
        words = ("ip", "netns", "exec", NAME, program, "outside", "--guest", guest, "--port", str(port), "--rate", str(rate), "--json",
                 self.report_path, "--arrivals", os.path.join(FILES, f"{name}.arrivals"), "--connect-limit", "90")
        with open(self.errors_path, "wb") as errors:
            self.child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        journal.note("process", pid=self.child.pid, started=start_time(self.child.pid))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.child.stdout:
            if line == "running\n":
                self.running.set()
            else:
                self.latest = json.loads(line)

    def check(self):
        if self.child.poll() is not None:
            with open(self.errors_path, encoding="utf-8", errors="replace") as file:
                raise DemoError(f"the traffic ended by itself: {file.read().strip()}")
        return True

    def wait_running(self):
        wait_for(lambda: self.check() and self.running.is_set(), 95, "waiting for the guest's traffic agent")

    def wait_flow(self, seconds):
        """Until about `seconds` worth of traffic came back, UDP and TCP; at most ten times as long."""
        before = self.latest
        enough = before["received"] + self.rate * seconds * 0.8
        wait_for(lambda: self.check() and self.latest["received"] >= enough and
                 self.latest["stream_returned"] > before["stream_returned"], 10 * seconds + 10,
                 "waiting for traffic to go on (it stands still)")

    def finish(self):
        """Ends the traffic in order and returns its report."""
        self.check()
        self.child.terminate()
        try:
            self.child.wait(timeout=120)
        except subprocess.TimeoutExpired:
            end_process(self.child.pid, start_time(self.child.pid), patience=1)
            raise DemoError("the traffic did not end within 120 s") from None
        if not os.path.exists(self.report_path):
            with open(self.errors_path, encoding="utf-8", errors="replace") as file:
                raise DemoError(f"the traffic gave no report: {file.read().strip()}")
        with open(self.report_path, encoding="utf-8") as file:
            return json.load(file)


class Arrivals:
    """Arrival times of one direction, in ns of this host's CLOCK_MONOTONIC, ascending."""

    def __init__(self, path):
        records = array.array("q")
        with open(path, "rb") as file:
            records.frombytes(file.read())
        self.times = sorted(records[0::2])

    def largest_gap(self, begin, end):
        """The longest time between two arrivals in a row that touches [begin, end]; None outside what was recorded."""
        first = bisect.bisect_left(self.times, begin) - 1
        last = bisect.bisect_right(self.times, end)
        if first < 0 or last >= len(self.times):
            return None
        return max(b - a for a, b in zip(self.times[first:last], self.times[first + 1:last + 1]))


def late(path):
    """What arrived after a later datagram of its flow, one direction: when (ns of this host's CLOCK_MONOTONIC), and whether after a
    later one that was late itself: no two rings explain that. Duplicates are none of them.
    """
    records = array.array("Q")
    with open(path, "rb") as file:
        records.frombytes(file.read())
    found, highest, highest_late, seen = [], {}, {}, set()
    for time_ns, number in zip(records[0::2], records[1::2]):
        flow, sequence = number >> 48, number & (1 << 48) - 1
        if number in seen:
            continue
        seen.add(number)
        if sequence < highest.get(flow, 0):
            found.append((time_ns, sequence < highest_late.get(flow, 0)))
            highest_late[flow] = max(sequence, highest_late.get(flow, 0))
        highest[flow] = max(sequence, highest.get(flow, 0))
    return found


def gap(arrivals, begin, end):
    gaps = [arrivals[direction].largest_gap(begin, end) for direction in DIRECTIONS]
    return None if None in gaps else max(gaps)


def window(incident):
    """Where a gap caused by this incident must show: from before the mark to a little after the heir's first transaction."""
    timeline = incident["timeline_ns"]
    mark = incident["fence_time_ns"]
    resumed = timeline.get("first_transaction") or timeline.get("heir_awake") or 0
    return mark - MILLISECOND, mark + max(resumed, 0) + 2 * MILLISECOND


def control_gaps(arrivals, windows, begun, ended):
    """Largest gaps in stretches as long as the kills' windows, with no kill within a quarter of a second."""
    if not windows:
        windows = [(0, 4 * MILLISECOND)]
    length = int(statistics.median(end - begin for begin, end in windows))
    gaps = []
    at = begun + 500 * MILLISECOND
    while at + length < ended - 100 * MILLISECOND:
        if all(abs(at - begin) > 250 * MILLISECOND for begin, _ in windows):
            found = gap(arrivals, at, at + length)
            if found is not None:
                gaps.append(found)
        at += 20 * MILLISECOND
    return gaps


def describe_kill(cause, incident, problem, arrivals):
    timeline = incident["timeline_ns"]
    asleep = incident.get("owner_state") == "asleep"
    first = timeline.get("first_transaction")
    found = gap(arrivals, *window(incident))
    return {
        "cause": cause,
        # A sleeping owner has no heartbeat: how long ago the last one was says nothing about the fence.
        "fenced_us": 0 if asleep else round(-(timeline.get("last_heartbeat") or 0) / 1000, 1),
        "takeover_us": None if first is None else round(first / 1000, 1),
        "gap_us": None if found is None else round(found / 1000, 1),
        "owner_asleep": asleep,
        "incident": incident["id"],
        "problem": problem,
    }


def summarize(kills_wanted, kills, windows, traffic, arrivals):
    totals = {name: sum(traffic["udp"][direction][name] for direction in DIRECTIONS)
              for name in ("sent", "received", "lost", "duplicated", "reordered", "corrupt", "refused", "socket_drops")}
    control = control_gaps(arrivals, windows, traffic["begun_ns"], traffic["ended_ns"])
    problems = [f"kill {number}: {kill['problem']}" for number, kill in enumerate(kills, 1) if kill["problem"]]
    if len({kill["incident"] for kill in kills}) != kills_wanted:
        problems.append(f"{kills_wanted} kills were asked for, {len({kill['incident'] for kill in kills})} incidents came of them")
    for name in ("lost", "duplicated", "reordered", "corrupt"):
        if totals[name]:
            problems.append(f"{totals[name]} datagrams {name}")
    if not traffic["tcp"]["ok"]:
        problems.append(f"TCP stream: {traffic['tcp']['why']}")
    if traffic["guest_link_changes"]:
        problems.append(f"the guest's link changed {traffic['guest_link_changes']} times")
    if totals["socket_drops"]:
        problems.append(f"{totals['socket_drops']} datagrams were dropped by a measuring socket: slower traffic (--rate) may help")
    return {
        "kills": kills,
        **{name: totals[name] for name in ("lost", "duplicated", "reordered", "corrupt", "sent", "received")},
        "tcp_ok": traffic["tcp"]["ok"],
        "tcp_bytes": traffic["tcp"]["bytes"],
        "tcp_retransmitted_segments": traffic["tcp"]["retransmitted_segments"],
        "guest_link_changes": traffic["guest_link_changes"],
        "medians_us": medians(kills),
        "control_gap_us": quantiles(control),
        "traffic": traffic,
        "problems": problems,
        "verdict": "fail" if problems else "pass",
    }


def medians(kills):
    """Medians over the kills; the timeline is last heartbeat to first transaction, where the owner was awake."""
    def median(values):
        values = [value for value in values if value is not None]
        return round(statistics.median(values), 1) if values else None

    return {
        "fenced": median(k["fenced_us"] for k in kills if not k["owner_asleep"]),
        "takeover": median(k["takeover_us"] for k in kills),
        "heartbeat_to_first_transaction": median(
            k["fenced_us"] + k["takeover_us"] for k in kills if not k["owner_asleep"] and k["takeover_us"] is not None),
        "gap": median(k["gap_us"] for k in kills),
    }


def quantiles(gaps):
    if not gaps:
        return None
    ordered = sorted(gaps)
    return {"median": round(statistics.median(ordered) / 1000, 1), "p99": round(ordered[int(0.99 * (len(ordered) - 1))] / 1000, 1),
            "max": round(ordered[-1] / 1000, 1), "stretches": len(ordered)}


def table(summary):
    def cell(value):
        return "-" if value is None else f"{value:.1f}"

    rows = [("#", "cause", "fence us", "takeover us", "gap us")]
    for number, kill in enumerate(summary["kills"], 1):
        fence = "asleep" if kill["owner_asleep"] else cell(kill["fenced_us"])
        rows.append((str(number), kill["cause"], fence, cell(kill["takeover_us"]), cell(kill["gap_us"])))
    middle = summary["medians_us"]
    rows.append(("", "median", cell(middle["fenced"]), cell(middle["takeover"]), cell(middle["gap"])))
    control = summary["control_gap_us"]
    lines = align(rows)
    lines.insert(-1, "-" * len(lines[0]))
    if control:
        lines.append(f"control: gaps in {control['stretches']} stretches as long, without a kill: median {control['median']} us, "
                     f"99 % {control['p99']} us, largest {control['max']} us")
    together = middle["heartbeat_to_first_transaction"]
    if together is not None:
        lines.append(f"last heartbeat to first transaction of the heir: median {together} us")
    return lines


def totals(summary):
    lines = [f"UDP: {summary['sent']} sent, {summary['received']} received, {summary['lost']} lost, {summary['duplicated']} "
             f"duplicated, {summary['reordered']} reordered, {summary['corrupt']} corrupt",
             f"TCP: {summary['tcp_bytes']} bytes echoed and compared: {'ok' if summary['tcp_ok'] else 'NOT OK'}, "
             f"{summary['tcp_retransmitted_segments']} segments retransmitted",
             f"guest's link changes: {summary['guest_link_changes']}"]
    return lines + [f"problem: {problem}" for problem in summary["problems"]] + [f"verdict: {summary['verdict']}"]


def align(rows):
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) if column == 1 else text.rjust(width)
                      for column, (text, width) in enumerate(zip(row, widths))) for row in rows]
