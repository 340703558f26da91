# SPDX-License-Identifier: Apache-2.0
"""How long traffic stands still when the backend dies, and where the time goes.

A prober on one core sends numbered frames through a backend on the other that loops them back: Tandem with null='loopback',
testpmd forwarding between its one net_vhost port and itself, OVS-DPDK between two ports of a bridge. The blackout is the
longest gap between two arrivals around the kill. Tandem's incidents, on the same clock, break it down. Who restarts whom:
Tandem's standby takes over; testpmd is restarted by a loop here as soon as it has ended; ovs-vswitchd restarts itself
(--monitor).
"""
import os
import signal
import subprocess
import threading
import time

import ovs
import tandem
from prober import Prober, median
from world import BACKEND_CORE, NICE, CannotRun, wait_for

RATE = 100_000
GAP_US = 25  # two and a half intervals
CAUSES = {"SIGSEGV": signal.SIGSEGV, "SIGKILL": signal.SIGKILL, "hang": signal.SIGSTOP}
PEER_LIMIT = 15  # seconds for a peer to come back
HANG_LIMIT = 3  # seconds after which nobody is expected to notice a hang


def _us(value):
    return None if value is None else value / 1000


def _steps(incident):
    """The parts of one takeover in us, from the incident's time line (relative to the fence's mark)."""
    line = incident["timeline_ns"]
    awake, replayed, first = line["heir_awake"], line["replayed"], line["first_transaction"]
    heartbeat = None if incident["owner_state"] == "asleep" or line["last_heartbeat"] is None else -line["last_heartbeat"]
    return {"heartbeat_to_fence_us": _us(heartbeat), "fence_to_awake_us": _us(awake),
            "awake_to_replayed_us": None if None in (awake, replayed) else _us(replayed - awake),
            "replayed_to_first_us": None if None in (first, replayed) else _us(first - replayed)}


def _tandem_kills(world, report, number, heir):
    samples = {cause: {"blackout": [], "own": [], "steps": [], "account": None} for cause in CAUSES}
    controls = []
    for cause, signal_number in CAUSES.items():
        host = tandem.Tandem(world, polling="adaptive")
        try:
            host.provide({tandem.MAC: "null='loopback'"})
            prober = Prober(world, [host.socket()], RATE, gap_us=GAP_US).wait_running()
            kills = []
            known = {incident["id"] for incident in host.incidents()}
            victim = None
            for _ in range(number):
                pair = host.wait_whole(not_pid=victim)
                time.sleep(1.2)  # half a second around each kill is left out of the control
                victim = pair["active"]["pid"]
                at = time.monotonic_ns()
                os.kill(victim, signal_number)

                def complete(known=known):
                    return next((incident for incident in host.incidents() if incident["id"] not in known and
                                 incident["timeline_ns"]["first_transaction"] is not None), None)

                incident = wait_for(complete, 20, f"the incident after {cause}", 0.02)
                known.add(incident["id"])
                kills.append((at, incident))
            host.wait_whole(not_pid=victim)
            time.sleep(0.3)
            seen = prober.finish()
            lengths = []
            for at, incident in kills:
                resumed = incident["fence_time_ns"] + incident["timeline_ns"]["first_transaction"]
                longest = seen.longest(at - 1_000_000, resumed + 2_000_000)
                lengths.append(resumed + 3_000_000 - at)
                samples[cause]["blackout"].append(longest[0] if longest else GAP_US)
                samples[cause]["own"].append(longest[1] if longest else 0)
                samples[cause]["steps"].append(_steps(incident))
            samples[cause]["account"] = seen.account()
            controls += seen.control(int(median(lengths)), [at for at, _ in kills], GAP_US)
            host.release()
        finally:
            host.close()
    for cause, found in samples.items():
        steps = {key: median(step[key] for step in found["steps"]) for key in found["steps"][0]}
        report.row({"cause": cause, "heir": heir}, "tandem", "us", found["blackout"], prober_us=median(found["own"]), **steps,
                   **found["account"])
    report.row({"cause": "none (control)", "heir": heir}, "tandem", "us", controls)


class _RestartedTestpmd:
    """testpmd with one vhost port that forwards to itself, and the loop that starts it again."""

    def __init__(self, world):
        self.world = world
        self.path = world.path("restarted.sock")
        world.need_huge_pages()
        self._words = ("nice", "-n", str(NICE), world.tool("dpdk-testpmd", "dpdk-dev"), "--no-pci", "-l", "0,1", "--main-lcore", "1", "--in-memory",
                       "--single-file-segments", "-m", "128", "--no-telemetry", f"--file-prefix=restarted{os.getpid()}", "--vdev",
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




def _testpmd_kills(world, report, number):
    for cause, signal_number in CAUSES.items():
        backend = _RestartedTestpmd(world)
        try:
            wait_for(lambda: os.path.exists(backend.path), 30, "testpmd to make its vhost socket", 0.02)
            prober = Prober(world, [backend.path], RATE, gap_us=GAP_US).wait_running()
            kills = []
            for _ in range(1 if cause == "hang" else number):
                time.sleep(1.0)
                child = backend.child
                kills.append(time.monotonic_ns())
                child.send_signal(signal_number)
                if cause == "hang":
                    time.sleep(HANG_LIMIT)
                    break
                wait_for(lambda child=child: backend.child is not child and os.path.exists(backend.path), PEER_LIMIT,
                         "testpmd to come back", 0.01)
                time.sleep(2.0)  # for its ports, and the prober's new connection
            if cause == "hang":
                child.send_signal(signal.SIGCONT)
                time.sleep(0.5)
            seen = prober.finish()
            found = [seen.longest(at, at + PEER_LIMIT * 1_000_000_000) for at in kills]
            if None in found:
                report.skip(f"testpmd {cause}", "traffic did not come back within the limit")
                continue
            # A hang ends here only because we ended it.
            report.row({"cause": cause, "heir": "restart"}, "testpmd", "us", [longest[0] for longest in found],
                       noticed=cause != "hang", **seen.account())
        finally:
            backend.close()
    report.note(f"testpmd has nobody who notices a hang: its row ends when it was continued after {HANG_LIMIT} s")


def _ovs_kills(world, report, number):
    for cause in ("SIGSEGV", "SIGKILL"):
        switch = ovs.Switch(world, ["left", "right"])
        try:
            prober = Prober(world, [switch.socket("left"), switch.socket("right")], RATE, gap_us=GAP_US, senders=1, listen=True,
                            limit=90).wait_running()
            kills = []
            for _ in range(number):
                time.sleep(1.0)
                victim = switch.pid()
                kills.append(time.monotonic_ns())
                os.kill(victim, CAUSES[cause])
                try:
                    wait_for(lambda victim=victim: switch.pid() not in (None, victim), 5, "ovs-vswitchd to restart itself", 0.02)
                except CannotRun:
                    break
                time.sleep(4.0)  # its ports, the learnt reconnect of a second each, and traffic
            else:
                seen = prober.finish()
                found = [seen.longest(at, at + PEER_LIMIT * 1_000_000_000) for at in kills]
                report.row({"cause": cause, "heir": "restart"}, "ovs-dpdk", "us", [one[0] for one in found if one], noticed=True,
                           **seen.account())
                continue
            prober.finish()
            report.skip(f"ovs-dpdk {cause}", "its monitor does not start it again: no traffic any more")
        finally:
            switch.close()


def run(world, report, quick, only=None):
    number = 2 if quick else 30
    wanted = (only or {}).get("system")
    if wanted in (None, "tandem"):
        _tandem_kills(world, report, number, "asleep")
    report.note("the product has no polling heir: there are no rows for one")
    for name, measure, count in (("testpmd", _testpmd_kills, 1 if quick else 10), ("ovs-dpdk", _ovs_kills, 1 if quick else 10)):
        if wanted not in (None, name):
            continue
        try:
            measure(world, report, count)
        except CannotRun as error:
            report.skip(name, str(error))
    tandem_rows = [row for row in report.data["rows"] if row["system"] == "tandem" and row["cause"] == "SIGSEGV"]
    for row in report.data["rows"]:
        if tandem_rows and row["system"] != "tandem" and row["cause"] == "SIGSEGV" and row["median"] is not None:
            row["times_longer"] = round(row["median"] / tandem_rows[0]["median"], 1)
    report.note(f"{RATE} frames of 64 B a second; gaps below {GAP_US} us are not told apart; prober_us: longest stretch of such "
                "a gap in which the prober itself did not run. Backend, standby and restarted peer share CPU "
                f"{BACKEND_CORE}")
