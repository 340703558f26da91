# SPDX-License-Identifier: Apache-2.0
"""Real guests' TCP through checksum and segmentation offloads: to the uplink, between guests, with kills, and switched off in the XML.

That a guest makes use of them is told by the NIC's own counters: packets longer than the MTU, also on average.
"""
import os
import signal
import subprocess
import sys

from stage import Console, Stage, guest, host, perform, say

PORT = 7300
MTU = 1500
MEGABYTES = 48
SENDER = guest.Shape()
NEIGHBOUR = guest.Shape(name=f"{host.NAME}-2", mac="52:54:00:7a:6d:02", address="10.98.76.3")
PLAIN = guest.Shape(name=f"{host.NAME}-3", mac="52:54:00:7a:6d:03", address="10.98.76.4",
                    offloads="<host csum='off' gso='off' tso4='off' tso6='off' ecn='off' ufo='off'/>"
                             "<guest csum='off' tso4='off' tso6='off' ecn='off' ufo='off'/>")
ALL = ["csum", "tso4", "tso6", "ecn"]

# Fetches the file, at least once and until its input ends; says each time how many bytes came and their hash.
FETCH = """
import hashlib, select, sys, urllib.request
ended = False
while not ended:
    digest, count = hashlib.sha256(), 0
    with urllib.request.urlopen(sys.argv[1], timeout=60) as answer:
        while piece := answer.read(1 << 20):
            digest.update(piece)
            count += len(piece)
    print(count, digest.hexdigest(), flush=True)
    ended = bool(select.select([sys.stdin], [], [], 0)[0])
"""


class Offload(Stage):
    def nic(self, shape):
        return next(nic for nic in self.nics() if nic["mac"] == shape.mac)

    def expect_offloads(self, shape, host_side, guest_side):
        host.wait_for(lambda: self.nic(shape)["running_queues"] > 0, 60, f"waiting for {shape.name}'s driver")
        found = self.nic(shape)["offloads"]
        if found != {"host": host_side, "guest": guest_side}:
            raise host.DemoError(f"{shape.name} agreed to {found}, expected {host_side} and {guest_side}")
        say(f"{shape.name}: offloads of the host {found['host']}, of the guest {found['guest']}")

    @staticmethod
    def average(before, after, way):
        packets = after[way]["packets"] - before[way]["packets"]
        return (after[way]["bytes"] - before[way]["bytes"]) / max(packets, 1)

    @staticmethod
    def outside_received():
        folder = "/sys/class/net/eth0/statistics"
        words = host.in_namespace("cat", f"{folder}/rx_packets", f"{folder}/rx_bytes").stdout.split()
        return int(words[0]), int(words[1])

    @staticmethod
    def serve(console):
        """Makes a file and serves it: httpd hands whole pages to the kernel, so that its segments are as long as they may be."""
        console.run(f"dd if=/dev/urandom of=/tmp/piece bs=1M count=8 && for i in $(seq {MEGABYTES // 8}); do cat /tmp/piece; done "
                    f">/tmp/all && rm /tmp/piece && httpd -p {PORT} -h /tmp")
        return console.ask("sha256sum </tmp/all | cut -c1-64")

    def send_outside(self, what, shape, digest, kills=0):
        """From the guest to the namespace. Returns the average length of the guest's packets."""
        before, seen = self.nic(shape), self.outside_received()
        fetch = subprocess.Popen(("ip", "netns", "exec", host.NAME, sys.executable, "-c", FETCH, f"http://{shape.address}:{PORT}/all"),
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.journal.note("process", pid=fetch.pid, started=host.start_time(fetch.pid))
        for number in range(kills):
            already = self.outside_received()[1]
            host.wait_for(lambda: self.outside_received()[1] > already + (4 << 20), 60, f"{what}: waiting for the flow", 0.01)
            victim = self.tandem.wait_whole()["active"]["pid"]
            os.kill(victim, signal.SIGKILL)
            self.tandem.wait_whole(not_pid=victim)
            say(f"{what}: kill {number + 1}")
        if set(fetch.communicate(timeout=120)[0].splitlines()) != {f"{MEGABYTES << 20} {digest}"}:
            raise host.DemoError(f"{what}: what arrived is not what was sent")
        after, now = self.nic(shape), self.outside_received()
        if after["tx"]["dropped"] != before["tx"]["dropped"]:
            raise host.DemoError(f"{what}: {after['tx']['dropped'] - before['tx']['dropped']} packets were refused")
        wire = (now[1] - seen[1]) / max(now[0] - seen[0], 1)
        length = self.average(before, after, "tx")
        say(f"{what}: stream whole; {length:.0f} bytes a packet from the guest, {wire:.0f} on the wire")
        if wire > MTU + 14:
            raise host.DemoError(f"{what}: frames of {wire:.0f} bytes on a wire of {MTU}")
        return length

    def send_to_neighbour(self, what, digest, receiver, shape):
        before = self.nic(shape)
        got = receiver.ask(f"wget -q -O - http://{SENDER.address}:{PORT}/all | sha256sum | cut -c1-64", 120)
        if got != digest:
            raise host.DemoError(f"{what}: what arrived is not what was sent: {got}")
        length = self.average(before, self.nic(shape), "rx")
        say(f"{what}: stream whole; {length:.0f} bytes a packet to the receiver")
        return length

    @staticmethod
    def tell_control_of_offloads(console):
        """Whether QEMU lets the driver switch receive offloads at run time (docs/vhost-user.md); only told, for it is QEMU's doing."""
        done = "yes" if console.ask("cut -c3 /sys/class/net/eth0/device/features") == "1" else "no"
        say(f"QEMU offers CTRL_GUEST_OFFLOADS: {done}")

    def run(self):
        self.set_up()
        consoles = {}
        for shape in (SENDER, NEIGHBOUR, PLAIN):
            guest.start(self.journal, plain=False, shape=shape)
            consoles[shape] = Console(shape)
            consoles[shape].wait_booted()
        self.expect_offloads(SENDER, ALL, ALL)
        self.expect_offloads(PLAIN, [], [])
        self.tell_control_of_offloads(consoles[SENDER])
        sent, plain = self.serve(consoles[SENDER]), self.serve(consoles[PLAIN])
        if self.send_outside("with offloads", SENDER, sent) < MTU + 100:
            raise host.DemoError("with offloads: the guest does not make use of segmentation")
        if self.send_outside("with offloads and kills", SENDER, sent, kills=3) < MTU + 100:
            raise host.DemoError("with offloads and kills: the guest does not make use of segmentation")
        if self.send_outside("switched off", PLAIN, plain) > MTU + 14:
            raise host.DemoError("switched off: the guest's packets are longer than the MTU")
        if self.send_to_neighbour("to a neighbour", sent, consoles[NEIGHBOUR], NEIGHBOUR) < MTU + 100:
            raise host.DemoError("to a neighbour: packets were cut for a guest that takes them whole")
        if self.send_to_neighbour("to a neighbour without offloads", sent, consoles[PLAIN], PLAIN) > MTU + 14:
            raise host.DemoError("to a neighbour without offloads: packets longer than the MTU")


if __name__ == "__main__":
    sys.exit(perform("offload_test", lambda build, journal: Offload(build, journal).run()))
