# SPDX-License-Identifier: Apache-2.0
"""How long traffic stands still when the backend dies, and where the time goes.

A prober on one core sends numbered frames through a backend on the other that loops them back: Tandem with null='loopback',
testpmd forwarding between its one net_vhost port and itself, OVS-DPDK between two ports of a bridge. The blackout is the
longest gap that touches the time from the death to the first packet after it. Tandem's incidents, on the same clock, say when
these were, and break the time down; beside it stands the longest gap from the kill to 20 ms after that packet, whatever it came
of. A peer's blackout is its longest gap until the next kill: nobody notes when it was back. Who restarts whom:
Tandem's standby takes over; testpmd is restarted by a loop here as soon as it has ended; ovs-vswitchd restarts itself
(--monitor).
"""
import dataclasses
import os
import signal
import subprocess
import threading
import time

import ovs
import tandem
from prober import Prober, median
from results import wanted
from world import BACKEND_CORE, GUEST_CORE, NICE, CannotRun, wait_for

RATE = 100_000
GAP_US = 25  # two and a half intervals
# With an heir that polls on the prober's core, the prober may not keep that core: it naps between two looks.
NAPPING = {"rate": 20_000, "gap_us": 500, "nap_us": 200}
CAUSES = {"SIGSEGV": signal.SIGSEGV, "SIGKILL": signal.SIGKILL, "hang": signal.SIGSTOP}
# The owner's poll thread stores where it may not, as a mistake of its own would: SIGSEGV without a sender. Peers have no such drill.
OWN_FAULT = "bad store"
DRILL_AFTER_MS = 100
OVS_CAUSES = ("SIGSEGV", "SIGKILL")
PEER_LIMIT = 15  # seconds for a peer to come back
LATER_NS = 20_000_000  # what a takeover leaves behind, a new standby above all, shows that long after it
HANG_LIMIT = 3  # seconds after which nobody is expected to notice a hang


@dataclasses.dataclass
class Found:
    """What kills of one kind did to one system, over all rounds."""

    blackouts: list = dataclasses.field(default_factory=list)  # us
    own: list = dataclasses.field(default_factory=list)  # us, the prober's part of each
    longest: list = dataclasses.field(default_factory=list)  # us, the longest gap from the kill to some time later
    longest_own: list = dataclasses.field(default_factory=list)  # us, the prober's part of each
    steps: list = dataclasses.field(default_factory=list)
    account: dict = dataclasses.field(default_factory=lambda: {"lost": 0, "duplicated": 0, "reordered": 0})
    controls: list = dataclasses.field(default_factory=list)  # us, gaps in stretches as long as the blackouts'
    longest_controls: list = dataclasses.field(default_factory=list)  # us, in stretches as long as the longest gaps'
    unasked: int = 0  # owners that were gone before we killed them
    problem: CannotRun | None = None

    def add(self, seen, blackouts, windows=(), floor_us=GAP_US):
        """Of each kill: where its blackout must show, and where gaps that it led to may show, begin and end."""
        for spans, gaps, own in ((blackouts, self.blackouts, self.own), (windows, self.longest, self.longest_own)):
            for begin, end in spans:
                # Without a gap that is noted the traffic went on.
                gap = seen.longest(begin, end) or (floor_us, 0)
                gaps.append(gap[0])
                own.append(gap[1])
        for key, count in seen.account().items():
            self.account[key] += count


def _us(value):
    return None if value is None else value / 1000


def _steps(incident):
    """The parts of one takeover in us, from the incident's time line (relative to the fence's mark)."""
    line = incident["timeline_ns"]
    awake, replayed, first = line["heir_awake"], line["replayed"], line["first_transaction"]
    # A sleeping owner's last heartbeat says nothing.
    heartbeat = None if incident["owner_state"] == "asleep" or line["last_heartbeat"] is None else -line["last_heartbeat"]

    def since_heartbeat(end):
        return None if None in (heartbeat, end) else _us(heartbeat + end)

    return {"heartbeat_to_first_us": since_heartbeat(first), "heartbeat_to_polling_us": since_heartbeat(replayed),
            "heartbeat_to_fence_us": _us(heartbeat), "fence_to_awake_us": _us(awake),
            "awake_to_replayed_us": None if None in (awake, replayed) else _us(replayed - awake),
            "replayed_to_first_us": None if None in (first, replayed) else _us(first - replayed)}


def _tandem(world, cause, number, found):
    _kill_owners(tandem.Tandem(world, polling="adaptive"), world, cause, number, found, {"rate": RATE, "gap_us": GAP_US})


def _tandem_polling(world, cause, number, found):
    _kill_owners(tandem.Tandem(world, polling="always", heirs="polling"), world, cause, number, found, NAPPING)


def _kill_owners(host, world, cause, number, found, load):
    try:
        host.provide({tandem.MAC: "null='loopback'"})
        prober = Prober(world, [host.socket()], **load).wait_running()
        resumed = []  # for each kill: the fence's mark, the heir's first packet after it, and the parts of the takeover
        drilled = []  # for each drill: when, and whether the owner died of that
        known = {incident["id"] for incident in host.incidents()}
        victim = None
        for _ in range(number):
            pair = host.wait_whole(not_pid=victim)
            time.sleep(1.2)  # half a second around each kill is left out of the control
            victim = pair["active"]["pid"]
            asked = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            if cause == OWN_FAULT:
                # By then nobody works because of the drill any more.
                host.ask({"command": "drill", "pair": "default", "fault": "segv", "after_ms": DRILL_AFTER_MS})
            else:
                # To its poll thread, where a bad store would hit it; the process's first thread may be waiting for a CPU.
                prober.kill(CAUSES[cause], victim, pair["active"]["tid"] if cause == "SIGSEGV" else 0)
            incident = wait_for(lambda: next((one for one in host.incidents() if one["id"] not in known and
                                              one["timeline_ns"]["first_transaction"] is not None), None), 20,
                                f"the incident after {cause}", 0.02)
            known |= {one["id"] for one in host.incidents()}
            drilled.append((asked, incident["timeline_ns"]["hang_verdict"] is None))
            resumed.append((incident["fence_time_ns"], incident["timeline_ns"]["first_transaction"], _steps(incident)))
        host.wait_whole(not_pid=victim)
        time.sleep(0.7)
        seen = prober.finish()
        windows, blackouts = [], []
        kills = drilled if cause == OWN_FAULT else seen.kills()
        for (at, done), (fenced, first, steps) in zip(kills, resumed):
            if not done or fenced < at:
                # Its standby had taken it for hung: a host that takes a CPU away for longer than the limit looks like that.
                found.unasked += 1
                continue
            # A drill is asked for long before.
            windows.append(((fenced if cause == OWN_FAULT else at) - 1_000_000, fenced + first + LATER_NS))
            # Between the mark and the heir's first packet only frames that were under way arrive; a prober that naps sees them late.
            blackouts.append((fenced, fenced + first + 1000 * (load.get("nap_us") or 0)))
            found.steps.append(steps)
        found.add(seen, blackouts, windows, load["gap_us"])
        for spans, controls in ((blackouts, found.controls), (windows, found.longest_controls)):
            length = int(median([end - begin for begin, end in spans]) or 1_000_000)
            controls += seen.control(length, [fenced for fenced, _, _ in resumed], load["gap_us"])
        host.release()
    finally:
        host.close()


class _RestartedTestpmd:
    """testpmd with one vhost port that forwards to itself, and the loop that starts it again."""

    def __init__(self, world):
        self.world = world
        self.path = world.path("restarted.sock")
        world.need_huge_pages()
        self._words = ("nice", "-n", str(NICE), world.tool("dpdk-testpmd", "dpdk-dev"), "--no-pci", "-l",
                       f"{BACKEND_CORE},{GUEST_CORE}", "--main-lcore", str(GUEST_CORE), "--in-memory", "--single-file-segments",
                       "-m", "96", "--no-telemetry", f"--file-prefix=restarted{os.getpid()}", "--vdev",
                       f"net_vhost0,iface={self.path},queues=1", "--", "--auto-start", "--forward-mode=io", "--nb-cores=1",
                       "--total-num-mbufs=8192")
        self._stop = threading.Event()
        self.child = None
        self._begin()
        self._loop = threading.Thread(target=self._supervise, daemon=True)
        self._loop.start()

    def _begin(self):
        if os.path.exists(self.path):
            os.unlink(self.path)  # librte_vhost does not bind over the socket of a dead process
        # It ends when its standard input does.
        self.child = self.world.start(self._words, "restarted.log", stdin=subprocess.PIPE)

    def _supervise(self):
        while not self._stop.is_set():
            try:
                self.child.wait(0.005)
            except subprocess.TimeoutExpired:
                continue
            if not self._stop.is_set():
                self._begin()

    def close(self):
        self._stop.set()
        self._loop.join()
        self.child.send_signal(signal.SIGCONT)
        self.child.kill()
        self.world.forget(self.child)


def _peer_windows(seen):
    kills = [at for at, _ in seen.kills()]
    return [(at, min([at + PEER_LIMIT * 1_000_000_000, *(later for later in kills if later > at)])) for at in kills]


def _testpmd(world, cause, number, found):
    backend = _RestartedTestpmd(world)
    try:
        wait_for(lambda: os.path.exists(backend.path), 30, "testpmd to make its vhost socket", 0.02)
        prober = Prober(world, [backend.path], RATE, gap_us=GAP_US).wait_running()
        for _ in range(1 if cause == "hang" else number):
            time.sleep(1.0)
            child = backend.child
            prober.kill(CAUSES[cause], child.pid)
            if cause == "hang":
                time.sleep(HANG_LIMIT)
                child.send_signal(signal.SIGCONT)
                time.sleep(0.5)
                break
            wait_for(lambda child=child: backend.child is not child and os.path.exists(backend.path), PEER_LIMIT,
                     "testpmd to be started again", 0.01)
            time.sleep(3.0)  # its ports, and the prober's new connection
        seen = prober.finish()
        found.add(seen, _peer_windows(seen))
    finally:
        backend.close()


def _ovs(world, cause, number, found):
    switch = ovs.Switch(world, ["left", "right"])
    try:
        prober = Prober(world, [switch.socket("left"), switch.socket("right")], RATE, gap_us=GAP_US, senders=1, listen=True,
                        limit=90).wait_running()
        for _ in range(number):
            time.sleep(1.0)
            victim = switch.pid()
            prober.kill(CAUSES[cause], victim)
            wait_for(lambda victim=victim: switch.given_up() or switch.pid() not in (None, victim), 20,
                     "ovs-vswitchd to restart itself", 0.01)
            if switch.given_up():
                found.problem = CannotRun("its monitor ends too, so nobody starts it again: no traffic any more")
                prober.finish()
                return
            time.sleep(4.0)  # its ports connect again once a second
        seen = prober.finish()
        found.add(seen, _peer_windows(seen))
    finally:
        switch.close()


# (system, who takes over): (how, causes, kills of each kind in a round). OVS's monitor restarts it once in 10 s at the most, so
# each of its kills has a fresh switch.
SYSTEMS = {("tandem", "asleep"): (_tandem, (OWN_FAULT, *CAUSES), 5), ("tandem", "polling"): (_tandem_polling, (OWN_FAULT, *CAUSES), 5),
           ("testpmd", "restart"): (_testpmd, tuple(CAUSES), 2), ("ovs-dpdk", "restart"): (_ovs, OVS_CAUSES, 1)}


def _rows(report, system, heir, cause, found):
    if found.problem:
        report.could_not(f"{system} {cause}", found.problem)
    if not found.blackouts:
        return
    steps = {key: median(step[key] for step in found.steps) for key in found.steps[0]} if found.steps else {}
    # testpmd's hang ends because we end it.
    report.row({"cause": cause, "heir": heir}, system, "us", found.blackouts, noticed=system == "tandem" or cause != "hang",
               prober_us=median(found.own), longest_us=median(found.longest), longest_prober_us=median(found.longest_own), **steps,
               unasked=found.unasked, **found.account)


def run(world, report, quick, only=None):
    rounds = 1 if quick else 6
    results = {(system, heir, cause): Found() for (system, heir), (_, causes, _) in SYSTEMS.items() for cause in causes
               if wanted(only, system=system, heir=heir, cause=cause)}
    for round_number in range(rounds):
        for (system, heir, cause), found in results.items():
            how, _, number = SYSTEMS[system, heir]
            if found.problem:
                continue
            report.progress(f"{system}, heir {heir}, {cause}, round {round_number + 1} of {rounds}")
            try:
                how(world, cause, min(number, 2) if quick else number, found)
            except CannotRun as error:
                found.problem = error
    for (system, heir, cause), found in results.items():
        _rows(report, system, heir, cause, found)
    for heir in ("asleep", "polling"):
        controls, longest = ([gap for (_, one, _), found in results.items() if one == heir for gap in gaps(found)]
                             for gaps in (lambda found: found.controls, lambda found: found.longest_controls))
        if controls:
            report.row({"cause": "none (control)", "heir": heir}, "tandem", "us", controls, longest_us=median(longest))
    base = next((row for row in report.data["rows"] if row["system"] == "tandem" and row["cause"] == "SIGSEGV"), None)
    for row in report.data["rows"]:
        if base and row["system"] != "tandem" and row["cause"] == "SIGSEGV":
            row["times_longer"] = round(row["median"] / base["median"], 1)
    report.note(f"nobody notices a hang of testpmd: its row ends when it is continued after {HANG_LIMIT} s")
    report.note(f"{RATE} frames of 64 B a second; gaps below {GAP_US} us are not told apart. With an heir that polls, on the prober's "
                f"core: {NAPPING['rate']} frames, and gaps below {NAPPING['gap_us']} us")
    report.note("prober_us: longest stretch of the gap in which the prober itself did not run. longest_us: Tandem's longest gap from 1 ms "
                "before the kill to 20 ms after the first packet, and of that longest_prober_us. heartbeat_to_...: from the dead owner's "
                "last round to the heir's first packet, and to where it begins to poll, by the backends' own clock. unasked: owners that "
                "their standby had ended before we could")
