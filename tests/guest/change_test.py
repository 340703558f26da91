# SPDX-License-Identifier: Apache-2.0
"""A guest and its QEMU change while backends are killed in the middle of each change; a neighbour on the same pair sees nothing.

Queue pairs, memory, driver, NIC unplugged and plugged, reset, QEMU killed, and at the end the vault killed. The neighbour's traffic
runs through all but the last of them and must be exactly once, with no change of its link.
"""
import os
import signal
import subprocess
import sys
import threading
import time

from stage import Console, Stage, guest, host, measure, pair, perform, say

# Without MSI in the guest: QEMU 7.2's vhost-user NICs crash it without KVM, and the override of guest.NO_VECTORS does not reach
# a NIC that is plugged in later.
MAIN = guest.Shape(growing=True, kernel_words="pci=nomsi")
NEIGHBOUR = guest.Shape(name=f"{host.NAME}-2", mac="52:54:00:7a:6d:02", address="10.98.76.3")
DIRECTIONS = measure.DIRECTIONS
CONFIGURE = f"ip link set eth0 up && ip address add {MAIN.address}/24 dev eth0"
DIMM = """<memory model='dimm' access='shared'>
  <target><size unit='MiB'>128</size><node>0</node></target>
</memory>
"""


class Moments:
    """When the active backend dies: as a change begins, once tandemd's description of the NIC moves, while no ring runs."""

    @staticmethod
    def begins(_before, _now):
        return True

    @staticmethod
    def moves(before, now):
        return now is None or now["generation"] != before["generation"]

    @staticmethod
    def stands(before, now):
        return now is None or (now["running_queues"] == 0 and now["generation"] != before["generation"])


TRIES = 4  # of a change whose kill came after it


class Change(Stage):
    console = None
    victims = ()  # pids of all active backends that were killed
    inside = 0  # of these, killed while the change was going on
    reroutes = ()  # begin and end of each command that moves the guest's flows between rings, ns of CLOCK_MONOTONIC

    def nic(self, shape=MAIN):
        """Its status; None while it is not served."""
        return next((nic for nic in self.nics() if nic["mac"] == shape.mac), None)

    def during(self, what, action, moment, undo=None):
        """Does it, and kills the active backend at that moment of it. The pair is whole again at the end.

        A change that was over when the kill came is done again, after `undo` if it cannot be done twice.
        """
        for attempt in range(TRIES):
            if attempt and undo:
                undo()
            if self._once(what, action, moment):
                self.inside += 1
                return
        raise host.DemoError(f"{what}: {TRIES} times the kill came after the change; is the host too busy for it?")

    def _once(self, what, action, moment):
        """Whether the kill landed inside the change: the moment had come, the change was not over."""
        before = self.nic()
        victim = self.tandem.wait_whole()["active"]["pid"]
        ended, inside = threading.Event(), []

        def kill():
            while not ended.is_set() and not moment(before, self.nic()):
                time.sleep(0.001)
            come = not ended.is_set()
            os.kill(victim, signal.SIGKILL)
            inside.append(come and not ended.is_set())

        killer = threading.Thread(target=kill)
        begun = time.monotonic()
        killer.start()
        try:
            action()
        finally:
            taken = time.monotonic() - begun
            ended.set()
            killer.join()
        self.victims += (victim,)
        self.tandem.wait_whole(not_pid=victim)
        if not inside:
            raise host.DemoError(f"{what}: backend {victim} was gone before it could be killed")
        say(f"{what}, killed as it {moment.__name__}: {taken:.2f} s" + ("" if inside[0] else " (the kill came after it)"))
        return inside[0]

    def check_incidents(self):
        """One for each kill, and none besides but owners that a busy host had kept from the CPU for too long."""
        incidents = [incident for incident in self.tandem.incidents() if incident["kind"] == "failover"]
        for victim in self.victims:
            of_it = [incident for incident in incidents if incident["victim_pid"] == victim]
            if len(of_it) != 1 or of_it[0]["cause"] != "SIGKILL" or of_it[0]["hang"] is not None or of_it[0]["fallback"]:
                raise host.DemoError(f"backend {victim} was killed: expected one incident of it, without a hang or a fallback: {of_it}")
        others = [incident for incident in incidents if incident["victim_pid"] not in self.victims]
        unasked = [incident for incident in others if incident["hang"] is None]
        if unasked:
            raise host.DemoError(f"{len(unasked)} incidents of backends that nobody killed: {unasked}")
        say(f"{len(self.victims)} kills, {self.inside} of them inside a change; {len(self.victims)} incidents, "
            f"{len(others)} of owners taken for hung")

    # --- traffic ------------------------------------------------------------------------------------------------------------------

    def begin_traffic(self):
        traffic = measure.Traffic(self.journal, self.traffic, 500)
        traffic.wait_running()
        traffic.wait_flow(0.5)
        return traffic

    def judge(self, what, traffic, interrupted=False, reroutes=()):
        """Nothing twice, out of order or damaged, the TCP stream whole; unless the device was away, nothing lost and no link change.

        Order is a ring's: a flow that the guest moves to another ring while frames of it wait in the first may be overtaken by
        itself, with any backend. So what comes late during one of these `reroutes`, and in order by itself, is counted apart.
        """
        traffic.wait_flow(0.5)
        report = traffic.finish()
        wrong = ("duplicated", "reordered", "corrupt") + (() if interrupted else ("lost",))
        udp = report["udp"]
        rerouted = self._late_while_rerouted(report, reroutes)
        udp["from_guest"]["reordered"] -= rerouted
        text = "; ".join(f"{way}: " + ", ".join(f"{udp[way][key]} {key}" for key in ("sent", "lost", "duplicated", "reordered", "corrupt"))
                         for way in DIRECTIONS)
        say(f"{what}: {text}; " + (f"late while the guest moved flows: {rerouted}; " if reroutes else "") +
            f"link changes {report['guest_link_changes']}")
        if any(udp[way][key] for way in DIRECTIONS for key in wrong) or not report["tcp"]["ok"]:
            raise host.DemoError(f"{what}: the traffic is not clean: {text}; TCP: {report['tcp']['why'] or 'whole'}")
        if report["guest_link_changes"] and not interrupted:
            raise host.DemoError(f"{what}: the guest's link changed {report['guest_link_changes']} times")

    def _late_while_rerouted(self, report, reroutes):
        """How many of the guest's datagrams came late while its flows were moved; a failover then makes the move longer."""
        failovers = sorted(measure.window(incident) for incident in self.tandem.incidents() if incident["kind"] == "failover")
        moves = []
        for begin, end in reroutes:
            for first, last in failovers:
                if first <= end and last >= begin:
                    end = max(end, last)
            moves.append((begin, end))
        return sum(not twice_late and any(begin <= time_ns <= end for begin, end in moves)
                   for time_ns, twice_late in measure.late(report["arrivals"]["from_guest"]))

    # --- the changes --------------------------------------------------------------------------------------------------------------

    def change_queue_pairs(self):
        traffic = self.begin_traffic()
        for count in (1, 2, 1, 2):
            self._set_channels(count)
            traffic.wait_flow(0.5)
        self.judge("queue pairs changed, without a kill", traffic, reroutes=self.reroutes)
        traffic = self.begin_traffic()
        for moment in (Moments.begins, Moments.moves):
            for count in (1, 2):
                self.during(f"ethtool -L combined {count}", lambda n=count: self._set_channels(n), moment,
                            undo=lambda n=count: self._set_channels(3 - n))
                traffic.wait_flow(0.5)
        self.judge("queue pairs changed", traffic, reroutes=self.reroutes)

    def _set_channels(self, count):
        begun = time.monotonic_ns()
        self.console.run(f"tandem-traffic channels eth0 {count}")
        self.reroutes += ((begun, time.monotonic_ns()),)

    def change_memory(self):
        path = os.path.join(host.FILES, "dimm.xml")
        with open(path, "w", encoding="utf-8") as file:
            file.write(DIMM)
        traffic = self.begin_traffic()
        for moment in (Moments.begins, Moments.moves):
            self.during("DIMM plugged in", lambda: self._plug_memory(path), moment,
                        undo=lambda: self._unplug_memory(path, self.dimms() - 1))
            traffic.wait_flow(0.5)
        for left in (1, 0):
            self.during("DIMM unplugged", lambda n=left: self._unplug_memory(path, n), Moments.moves,
                        undo=lambda: self._plug_memory(path))
            traffic.wait_flow(0.5)
        self.judge("memory changed", traffic)

    @staticmethod
    def dimms():
        return guest.virsh("dumpxml", MAIN.name).stdout.count("<memory model='dimm'")

    def _plug_memory(self, path):
        before, generation = self.dimms(), self.nic()["generation"]
        guest.virsh("attach-device", MAIN.name, path, "--live")
        host.wait_for(lambda: self.dimms() == before + 1, 20, "waiting for the DIMM")
        host.wait_for(lambda: self.nic()["generation"] != generation, 20, "waiting for the backends to be told of the DIMM")

    def _unplug_memory(self, path, left):
        guest.virsh("detach-device", MAIN.name, path, "--live")
        host.wait_for(lambda: self.dimms() == left, 30, "waiting for the guest to give the DIMM back")

    def rebind_driver(self):
        traffic = self.begin_traffic()
        for moment in (Moments.begins, Moments.moves, Moments.stands):
            self.during("driver unbound and bound", self._rebind, moment)
            traffic.wait_flow(0.5)
        self.judge("driver rebound", traffic, interrupted=True)
        self.expect_traffic("after the driver was rebound")

    def _rebind(self):
        self.console.run("cd /sys/bus/virtio/drivers/virtio_net && name=$(ls -d virtio*) && echo $name >unbind && echo $name >bind; "
                         f"cd /; tandem-traffic channels eth0 2 && {CONFIGURE}")

    def replug_nic(self):
        path = os.path.join(host.FILES, "nic.xml")
        text = guest.TANDEM_NIC.replace("@MAC@", MAIN.mac).replace("@SOCKET@", MAIN.mac.replace(":", "-")).replace("@PACKED@", "")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        traffic = self.begin_traffic()
        for moment in (Moments.begins, Moments.moves, Moments.stands):
            self.during("NIC unplugged and plugged in", lambda: self._replug(path), moment)
            traffic.wait_flow(0.5)
        self.judge("NIC replugged", traffic, interrupted=True)
        self.expect_traffic("after the NIC was replugged")

    def _replug(self, path):
        guest.virsh("detach-device", MAIN.name, path, "--live")
        host.wait_for(lambda: MAIN.mac not in guest.virsh("dumpxml", MAIN.name).stdout.partition("<devices>")[2], 30,
                      "waiting for the guest to give the NIC back")
        host.wait_for(lambda: not self.nic()["connected"], 10, "waiting for QEMU to disconnect the unplugged NIC")
        guest.virsh("attach-device", MAIN.name, path, "--live")
        self.console.run("for try in $(seq 200); do [ ! -d /sys/class/net/eth0 ] || break; usleep 100000; done; "
                         f"tandem-traffic channels eth0 2 && {CONFIGURE}")

    def reset(self):
        flood = ("ip", "netns", "exec", host.NAME, "ping", "-q", "-i", "0.002", "-s", "1000", MAIN.address)
        for moment in (Moments.begins, Moments.moves, Moments.stands):
            child = self.spawn(flood)
            try:
                self.during("virsh reset", self._reset, moment)
            finally:
                host.end_process(child.pid, host.start_time(child.pid))
            self.expect_traffic("after virsh reset")

    def _reset(self):
        guest.virsh("reset", MAIN.name)
        self.console.wait_booted()

    def kill_qemu(self):
        backends = self.backends()
        self._kill_qemu()
        if self.backends() != backends:
            raise host.DemoError(f"after SIGKILL of QEMU: backends were {backends}, are {self.backends()}")
        self._start_again()
        for moment in (Moments.begins, Moments.moves):
            self.during("SIGKILL of QEMU", self._kill_qemu, moment, undo=self._start_again)
            self._start_again()

    def _kill_qemu(self):
        os.kill(host.read_pid(f"/run/libvirt/qemu/{MAIN.name}.pid"), signal.SIGKILL)
        self.expect_state("shut off")
        self.expect_released("after SIGKILL of QEMU", MAIN, others=1)

    def _start_again(self):
        guest.virsh("start", MAIN.name)
        self.open_console()
        self.expect_traffic("after SIGKILL of QEMU and virsh start")

    def open_console(self):
        self.console = Console(MAIN)
        self.console.wait_booted()

    def backends(self):
        pairs = self.tandem.wait_whole()
        return pairs["active"]["pid"], pairs["standby"]["pid"]

    def kill_vault(self):
        """Both guests lose their link; QEMU connects again within its second, and every queue pair works again."""
        for backend_too in (False, True):
            what = "vault and active backend killed" if backend_too else "vault killed"
            traffic = self.begin_traffic()
            before = {nic["mac"]: nic["generation"] for nic in self.nics()}
            victim = self.tandem.wait_whole()["active"]["pid"]
            vaults = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_vault(pid)]
            begun = time.monotonic()
            os.kill(next(pid for pid in vaults if self._parent(pid) in vaults), signal.SIGKILL)
            if backend_too:
                os.kill(victim, signal.SIGKILL)
                self.victims += (victim,)

            def back():
                status = self.tandem.answers()
                return status and all(nic["generation"] != before[nic["mac"]] and nic["running_queues"] == 4 for nic in status["nics"])

            host.wait_for(back, 20, f"waiting for both guests' rings: {what}")
            say(f"{what}: all rings run again after {time.monotonic() - begun:.2f} s")
            # Frames that the guest sends while its link is down are lost, by definition; nothing comes twice.
            self.judge(what, traffic, interrupted=True)
            for shape in (MAIN, NEIGHBOUR):
                self.expect_traffic(f"after it ({shape.name})", shape.address)

    def _is_vault(self, pid):
        try:
            return os.readlink(f"/proc/{pid}/exe") == pair.find_program(self.build, "tandem-vault")
        except OSError:
            return False

    @staticmethod
    def _parent(pid):
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])

    def spawn(self, words):
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                 start_new_session=True)
        self.journal.note("process", pid=child.pid, started=host.start_time(child.pid))
        return child

    def run(self, steps):
        self.set_up()
        guest.start(self.journal, plain=False, shape=NEIGHBOUR)
        guest.start(self.journal, plain=False, shape=MAIN)
        host.keep_order_in_host_queues()
        self.open_console()
        others = measure.Traffic(self.journal, self.traffic, 200, NEIGHBOUR.address, "neighbour", 7130)
        others.wait_running()
        self.expect_traffic("after virsh start")
        for step in (step for step in steps if step != "kill_vault"):
            getattr(self, step)()
            others.check()
        self.judge("the neighbour", others)
        if "kill_vault" in steps:
            self.kill_vault()
        self.check_incidents()


STEPS = ("change_queue_pairs", "change_memory", "rebind_driver", "replug_nic", "reset", "kill_qemu", "kill_vault")

if __name__ == "__main__":
    # Names of steps, to run these alone by hand.
    chosen = [word for word in sys.argv[1:] if word in STEPS]
    sys.argv = [word for word in sys.argv if word not in STEPS]
    sys.exit(perform("change_test", lambda build, journal: Change(build, journal).run(chosen or STEPS)))
