# SPDX-License-Identifier: Apache-2.0
"""What tests with guests under libvirt share: host and Tandem set up and taken down, traffic that must be clean, the guest's console.

Uses the demo's own pieces for host, guest and pair. Exit status 77 means skipped: this host lacks what Tandem needs.
"""
import argparse
import json
import os
import re
import socket
import sys
import threading
import tty

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "config", "demo"))

import demo  # noqa: E402
import guest  # noqa: E402
import host  # noqa: E402
import measure  # noqa: E402
import pair  # noqa: E402

SKIPPED = 77


class Stage:
    def __init__(self, build, journal):
        self.build, self.journal = build, journal
        self.traffic = pair.find_program(build, "tandem-traffic")
        self.tandem = pair.Tandem(build)

    def set_up(self):
        host.start_libvirt(self.journal)
        host.make_network(self.journal)
        host.make_users(self.journal)
        host.mount_bpffs(self.journal)
        self.tandem.start(self.journal)
        host.install_hook(self.journal, os.path.join(ROOT, "config/libvirt/qemu.d/tandem"), self.tandem.command)
        guest.build_files(ROOT, self.traffic)

    def expect_traffic(self, when, address=host.GUEST_ADDRESS):
        """Two seconds of clean traffic both ways, over every queue pair that the guest uses."""
        report = os.path.join(host.FILES, "short.json")
        done = host.run("ip", "netns", "exec", host.NAME, self.traffic, "outside", "--guest", address, "--seconds", "2",
                        "--rate", "500", "--json", report, "--connect-limit", "90", check=False)
        if done.returncode != 0:
            raise host.DemoError(f"{when}: the traffic is not clean (status {done.returncode}): {done.stderr}")
        say(f"{when}: traffic is clean")

    @staticmethod
    def nics():
        """tandemd's view of all NICs, without a process for each look: moments are short."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(os.path.join(pair.RUN_DIR, "control.sock"))
            connection.sendall(b'{"command":"status"}\n')
            with connection.makefile() as lines:
                return json.loads(lines.readline())["nics"]

    def expect_released(self, when, shape=guest.Shape(), others=0):
        """Nothing of the guest is left: no NIC, no socket, no uplink. `others`: NICs of other guests, which stay."""
        host.wait_for(lambda: all(nic["mac"] != shape.mac for nic in self.nics()), 10,
                      f"{when}: waiting for tandemd to release the NIC")
        folder = os.path.join(pair.RUN_DIR, "nic")
        host.wait_for(lambda: (len(os.listdir(folder)) if os.path.isdir(folder) else 0) == others, 10,
                      f"{when}: waiting for the NIC's socket to go")
        host.wait_for(lambda: len(os.listdir(f"/sys/class/net/{host.NAME}/brif")) == 1 + others, 10,
                      f"{when}: waiting for the uplink to leave the bridge")
        say(f"{when}: everything is released")

    @staticmethod
    def expect_state(state):
        host.wait_for(lambda: guest.virsh("domstate", host.NAME).stdout.strip() == state, 30, f"waiting for the guest to be {state}",
                      0.2)


class Console:
    """A shell in the guest over its serial line: it works while the NIC does not."""

    def __init__(self, shape=guest.Shape()):
        path = guest.virsh("ttyconsole", shape.name).stdout.strip()
        self.file = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        tty.setraw(self.file)
        self.text, self.number, self.boots = "", 0, 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        while True:
            try:
                piece = os.read(self.file, 4096)
            except OSError:
                return  # the guest is gone
            if not piece:
                return
            self.text += piece.decode("utf-8", "replace")

    def start(self, command):
        """Begins a command; finish() waits for it."""
        self.number += 1
        # The shell's echo of this line does not look like the answer: there the status is a number.
        os.write(self.file, f"{command}; echo done-$?-{self.number}\n".encode())
        return self.number

    def finish(self, number, limit=60):
        pattern = re.compile(rf"done-(\d+)-{number}\b")
        found = host.wait_for(lambda: pattern.search(self.text), limit, f"waiting for the guest's shell: {self.text[-600:]!r}", 0.01)
        if found.group(1) != "0":
            raise host.DemoError(f"in the guest: status {found.group(1)}: {self.text[-600:]}")

    def run(self, command, limit=60):
        self.finish(self.start(command), limit)

    def ask(self, command, limit=60):
        """Runs it; the last line that it prints."""
        self.run(command, limit)
        return self.text.rpartition("done-0-")[0].strip().splitlines()[-1].strip()

    def wait_booted(self, limit=90):
        """Until init has said so once more than at the last call, and its shell listens."""
        self.boots += 1
        host.wait_for(lambda: self.text.count("init: guest ready") >= self.boots, limit, "waiting for the guest to boot", 0.1)
        host.wait_for(lambda: "guest# " in self.text.rpartition("init: guest ready")[2], 20, "waiting for the guest's shell")


def say(text):
    print(text, flush=True)


def leftovers(build):
    """What is there although the supervisor has ended, in words."""
    found = [f"link {name}" for name in os.listdir("/sys/class/net") if name.startswith("tdm")]
    for folder in (pair.RUN_DIR, os.path.join(pair.RUN_DIR, "nic"), "/sys/fs/bpf/tandem/demo"):
        if os.path.isdir(folder):
            found += [f"{folder}/{name}" for name in os.listdir(folder) if not os.path.isdir(os.path.join(folder, name))]
    for name in os.listdir("/proc"):
        try:
            program = os.readlink(f"/proc/{name}/exe") if name.isdigit() else ""
        except OSError:
            continue
        if program.startswith(os.path.abspath(build)) and os.path.basename(program).startswith("tandem"):
            found.append(f"process {name} ({program})")
    return found


def perform(name, test):
    """Runs test(build, journal) and takes everything down. Returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", type=os.path.abspath, required=True)
    args = parser.parse_args()
    try:
        host.check_host()
    except host.DemoError as error:
        print(f"SKIPPED: {error}")
        return SKIPPED
    _held = demo.lock()
    journal = host.Journal()
    journal.undo_all()
    try:
        test(args.build, journal)
    except host.DemoError as error:
        print(f"{name}: {error}", file=sys.stderr)
        demo.show_logs()
        return 1
    finally:
        for complaint in journal.undo_all():
            print(complaint, file=sys.stderr)
    found = leftovers(args.build)
    if found:
        print(f"{name}: left behind: " + ", ".join(found), file=sys.stderr)
        return 1
    journal.remove_files()
    return 0
