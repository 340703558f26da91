# SPDX-License-Identifier: Apache-2.0
"""A guest's life under libvirt: reboot, libvirtd restart, shutdown, start again, destroy. After each the NIC works or is gone.

Uses the demo's own pieces for host, guest and pair. Exit status 77 means skipped: this host lacks what Tandem needs.
"""
import argparse
import json
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "config", "demo"))

import demo  # noqa: E402
import guest  # noqa: E402
import host  # noqa: E402
import pair  # noqa: E402

SKIPPED = 77
ASK_AGENT = """
import json, socket, sys
connection = socket.create_connection((sys.argv[1], 7100), 10)
connection.sendall(sys.argv[2].encode() + b"\\n")
print(connection.makefile().readline(), end="")
"""


class Life:
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
        guest.start(self.journal, plain=False)

    def expect_traffic(self, when):
        """Two seconds of clean traffic both ways."""
        report = os.path.join(host.FILES, "life.json")
        done = host.run("ip", "netns", "exec", host.NAME, self.traffic, "outside", "--guest", host.GUEST_ADDRESS, "--seconds", "2",
                        "--rate", "500", "--json", report, "--connect-limit", "90", check=False)
        if done.returncode != 0:
            raise host.DemoError(f"{when}: the traffic is not clean (status {done.returncode}): {done.stderr}")
        print(f"{when}: traffic is clean", flush=True)

    def expect_released(self, when):
        """Nothing of the guest is left: no NIC, no socket, no uplink."""
        host.wait_for(lambda: not self.tandem.ask("status")["nics"], 10, f"{when}: waiting for tandemd to release the NIC")
        folder = os.path.join(pair.RUN_DIR, "nic")
        host.wait_for(lambda: not os.path.isdir(folder) or not os.listdir(folder), 10, f"{when}: waiting for the NIC's socket to go")
        host.wait_for(lambda: os.listdir(f"/sys/class/net/{host.NAME}/brif") == [host.OUTSIDE_PORT], 10,
                      f"{when}: waiting for the uplink to leave the bridge")
        print(f"{when}: everything is released", flush=True)

    def reboot_guest(self):
        host.in_namespace(sys.executable, "-c", ASK_AGENT, host.GUEST_ADDRESS, json.dumps({"do": "reboot"}))
        time.sleep(1)  # the agent obeys once we have hung up; what follows must meet the new one
        self.expect_traffic("after the guest's reboot")

    def restart_libvirtd(self):
        if host.has_systemd():
            host.run("systemctl", "restart", "libvirtd")
        else:
            pid = host.read_pid("/run/libvirtd.pid")
            host.end_process(pid, host.start_time(pid))
            host.start_daemon("libvirtd")  # the journal knows it already
        host.wait_for(host.libvirt_answers, 20, "waiting for libvirtd after its restart")
        self.expect_state("running")
        self.expect_traffic("after libvirtd's restart")

    @staticmethod
    def expect_state(state):
        host.wait_for(lambda: guest.virsh("domstate", host.NAME).stdout.strip() == state, 30, f"waiting for the guest to be {state}",
                      0.2)

    def run(self):
        self.set_up()
        self.expect_traffic("after virsh start")
        self.reboot_guest()
        self.restart_libvirtd()
        guest.virsh("shutdown", host.NAME)
        self.expect_state("shut off")
        self.expect_released("after virsh shutdown")
        guest.virsh("start", host.NAME)
        self.expect_traffic("after virsh start again")
        guest.virsh("destroy", host.NAME)
        self.expect_released("after virsh destroy")


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


def main():
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
        Life(args.build, journal).run()
    except host.DemoError as error:
        print(f"life_test: {error}", file=sys.stderr)
        demo.show_logs()
        return 1
    finally:
        for complaint in journal.undo_all():
            print(complaint, file=sys.stderr)
    found = leftovers(args.build)
    if found:
        print("life_test: left behind: " + ", ".join(found), file=sys.stderr)
        return 1
    journal.remove_files()
    return 0


if __name__ == "__main__":
    sys.exit(main())
