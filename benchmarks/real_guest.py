# SPDX-License-Identifier: Apache-2.0
"""A Linux guest under QEMU on the guest's core, with one virtio-net card, and what the host's `ping` says of it.

Kernel and initramfs are those of the tests (tests/guest/build-initramfs). Without hardware virtualization QEMU emulates the guest's
CPU; then most of a round trip is the guest's.
"""
import os
import re
import subprocess

from world import GUEST_CORE, CannotRun, Failed, wait_for

HOST_ADDRESS, GUEST_ADDRESS, PREFIX = "10.98.77.1", "10.98.77.2", 24
_BOOT_LIMIT = 120
_BUILDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests/guest/build-initramfs")


def is_accelerated():
    """As the demo decides: some machines have a /dev/kvm under which no kernel boots, and no such flag."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    return ("svm" in flags or "vmx" in flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)


def _files(world):
    """Folder with the guest's kernel and initramfs, made once a run."""
    folder = world.path("guest")
    if not os.path.isdir(folder):
        done = subprocess.run((_BUILDER, "--program", world.program("tandem-traffic"), "--output", folder), capture_output=True,
                              text=True, check=False)
        if done.returncode != 0:
            raise CannotRun(f"build the guest: {done.stderr.strip()}")
    return folder


class RealGuest:
    """Booted, with its address set, when the constructor returns. `netdev`: QEMU's words for a -netdev with id=net0."""

    _number = 0

    def __init__(self, world, mac, netdev):
        RealGuest._number += 1
        self._world = world
        folder = _files(world)
        self._console = f"console{RealGuest._number}.log"
        accelerated = is_accelerated()
        # QEMU 7.2 without KVM crashes when a vhost-user device uses MSI-X (msix_set_vector_notifiers): then nobody does.
        vectors = "" if accelerated else ",vectors=0"
        words = ["taskset", "-c", str(GUEST_CORE), world.tool("qemu-system-x86_64", "qemu-system-x86"), "-machine",
                 f"q35,accel={'kvm' if accelerated else 'tcg'},memory-backend=memory", *(("-cpu", "host") if accelerated else ()),
                 "-m", "256M", "-object", "memory-backend-memfd,id=memory,size=256M,share=on", "-nodefaults", "-display", "none",
                 "-serial", f"file:{world.path(self._console)}", "-kernel", f"{folder}/vmlinuz", "-initrd",
                 f"{folder}/initramfs.gz", "-append",
                 f"console=ttyS0 quiet panic=1 tandem.address={GUEST_ADDRESS}/{PREFIX} tandem.agent=no", *netdev, "-device",
                 f"virtio-net-pci,netdev=net0,mac={mac}{vectors}"]
        self.child = world.start(words, "qemu.log")
        wait_for(self._is_ready, _BOOT_LIMIT, "the guest to boot", 0.05)

    def _text(self, name):
        try:
            with open(self._world.path(name), encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    def _is_ready(self):
        if self.child.poll() is not None:
            raise Failed(f"QEMU ended: {self._text('qemu.log').strip()[-300:]}")
        return "init: guest ready" in self._text(self._console)

    def round_trips_us(self, count, interval_s):
        """Of `count` echoes, one every `interval_s`, after a few that also resolve addresses."""
        warm_up = 20
        words = (self._world.tool("ping", "iputils-ping"), "-n", "-W", "5", "-i", str(interval_s), "-c", str(count + warm_up),
                 GUEST_ADDRESS)
        done = subprocess.run(("taskset", "-c", str(GUEST_CORE), *words), capture_output=True, text=True, check=False,
                              timeout=60 + count * interval_s)
        found = [1000 * float(value) for value in re.findall(r"icmp_seq=\d+ .*time=([0-9.]+) ms", done.stdout)]
        if len(found) < count:
            raise Failed(f"ping the guest: {len(found)} of {count + warm_up} answers: {(done.stderr or done.stdout).strip()[-200:]}")
        return found[warm_up:]

    def close(self):
        self._world.forget(self.child)
