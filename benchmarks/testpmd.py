# SPDX-License-Identifier: Apache-2.0
"""dpdk-testpmd as a guest (net_virtio_user), as the peer's backend (net_vhost), and what it says of its ports."""
import os
import queue
import re
import subprocess
import threading
import time

from world import BACKEND_CORE, GUEST_CORE, NICE, Failed, wait_for

_PACKAGE = "dpdk-dev"


class Testpmd:
    """One testpmd driven over its prompt. `core` forwards; its main thread, which only waits for commands, is on the other."""

    _number = 0

    def __init__(self, world, core, vdevs, arguments, socket_memory=96):
        Testpmd._number += 1
        main = GUEST_CORE if core == BACKEND_CORE else BACKEND_CORE
        world.need_huge_pages()
        # --single-file-segments: virtio_user shares its memory by descriptor, and a front end has at most 8 regions.
        # stdbuf: its answers go through stdio, its prompt does not; unbuffered they come in the order of the commands.
        words = ["nice", "-n", str(NICE), "stdbuf", "-oL", world.tool("dpdk-testpmd", _PACKAGE), "--no-pci", "-l",
                 f"{BACKEND_CORE},{GUEST_CORE}", "--main-lcore", str(main), "--in-memory", "--single-file-segments", "-m",
                 str(socket_memory), "--no-telemetry",
                 f"--file-prefix=benchmark{os.getpid()}x{Testpmd._number}"]
        for vdev in vdevs:
            words += ["--vdev", vdev]
        # Its default of mbufs is made for 32 ports.
        words += ["--", "-i", "--nb-cores=1", "--total-num-mbufs=16384", *arguments]
        self._world = world
        self.child = world.start(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._lines = queue.Queue()
        self._said = []
        threading.Thread(target=self._read, daemon=True).start()
        self._command_number = 0
        self.command("show port summary all")  # answered once all ports are up

    def _read(self):
        for line in self.child.stdout:
            self._said.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def command(self, text, limit=30):
        """Sends a command; everything said until it was done."""
        # A word that is no command is complained about in order, so it marks the end of the answer.
        self._command_number += 1
        mark = f"endofanswer{self._command_number}"
        try:
            self.child.stdin.write(f"{text}\n{mark}\n")
            self.child.stdin.flush()
        except OSError as error:
            raise Failed(f"tell testpmd '{text}': it is gone; it said: {self.last_words()}") from error
        answer = []
        end = time.monotonic() + limit
        while True:
            try:
                line = self._lines.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                raise Failed(f"testpmd did not answer '{text}' within {limit} s; it said: {self.last_words()}") from None
            if line is None:
                raise Failed(f"testpmd ended at '{text}'; it said: {self.last_words()}")
            if mark in line:
                return "".join(answer)
            answer.append(line)

    def last_words(self):
        return " / ".join(line.strip() for line in self._said[-6:] if line.strip())

    def packets(self, port=0):
        """(received, sent) since it started."""
        text = self.command(f"show port stats {port}")
        received, sent = re.search(r"RX-packets:\s*(\d+)", text), re.search(r"TX-packets:\s*(\d+)", text)
        if received is None or sent is None:
            raise Failed(f"read testpmd's port statistics in: {text}")
        return int(received.group(1)), int(sent.group(1))

    def rates(self, seconds, port=0):
        """(received, sent) packets a second in a stretch of `seconds`, by testpmd's own clock."""
        self.command(f"show port stats {port}")
        time.sleep(seconds)
        text = self.command(f"show port stats {port}")
        found = [re.search(rf"{way}-pps:\s*(\d+)", text) for way in ("Rx", "Tx")]
        if None in found:
            raise Failed(f"read testpmd's rates in: {text}")
        return tuple(int(match.group(1)) for match in found)

    def close(self):
        self._world.forget(self.child)


def guest(world, socket, mode, length=64, mergeable=True, packed=False, queue_size=1024, listen=False):
    """A guest on its core: `mode` is testpmd's (rxonly, txonly, io). It forwards when this returns.

    `listen`: the backend connects to the guest, instead of the guest to it.
    """
    vdev = (f"net_virtio_user0,path={socket},queues=1,queue_size={queue_size},mrg_rxbuf={int(mergeable)},"
            f"packed_vq={int(packed)},server={int(listen)}")
    found = Testpmd(world, GUEST_CORE, [vdev],
                    [f"--forward-mode={mode}", f"--rxd={queue_size}", f"--txd={queue_size}", f"--txpkts={length}"])
    if listen:
        wait_for(lambda: "Link status: up" in found.command("show port info 0"), 30, "the backend to connect to the guest", 0.1)
    found.command("start")
    return found


def looping_guest(world, socket, length, bursts):
    """A guest that sends back what comes in, beginning with `bursts` of 32 packets, against a network that sends back what it
    gets: so many packets are on their way at any time.
    """
    found = Testpmd(world, GUEST_CORE, [f"net_virtio_user0,path={socket},queues=1,queue_size=1024,mrg_rxbuf=1"],
                    ["--forward-mode=io", "--rxd=1024", "--txd=1024", f"--txpkts={length}"])
    _send_round(found, bursts, 1)
    return found


def _send_round(found, bursts, ports):
    """Starts forwarding with `bursts`. A backend that is not polling yet may drop the first packets: all but one burst wait until
    that one comes round."""
    def goes_round():
        found.command("start tx_first 1")
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            if all(found.packets(port)[0] > 0 for port in range(ports)):
                return True
        found.command("stop")
        return False

    wait_for(goes_round, 15, "a packet to come round", 0.1)
    found.command("stop")
    found.command(f"start tx_first {bursts - 1}")


def two_guests(world, sockets, macs, length, bursts, listen=False, queue_size=1024):
    """Two guests as two ports of one testpmd, each the other's peer. What comes in at one goes out at the other, addressed to the
    first; they begin with `bursts` of 32 packets each way.
    """
    vdevs = [f"net_virtio_user{number},path={path},queues=1,queue_size={queue_size},mac={mac},mrg_rxbuf=1,server={int(listen)}"
             for number, (path, mac) in enumerate(zip(sockets, macs))]
    peers = [f"--eth-peer={number},{mac}" for number, mac in enumerate(reversed(macs))]
    found = Testpmd(world, GUEST_CORE, vdevs, ["--forward-mode=mac", f"--rxd={queue_size}", f"--txd={queue_size}",
                                               f"--txpkts={length}", *peers])
    if listen:
        for port in range(2):
            wait_for(lambda port=port: "Link status: up" in found.command(f"show port info {port}"), 30,
                     "the backend to connect to a guest", 0.1)
    _send_round(found, bursts, 2)
    return found


def vhost(world, socket, others, mode="io"):
    """The peer's backend on its core: net_vhost and whatever else, forwarding in pairs of ports."""
    found = Testpmd(world, BACKEND_CORE, [f"net_vhost0,iface={socket},queues=1", *others], [f"--forward-mode={mode}"])
    found.command("start")
    wait_for(lambda: os.path.exists(socket), 10, "testpmd to make its vhost socket")
    return found
