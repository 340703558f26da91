# SPDX-License-Identifier: Apache-2.0
"""A guest's life under libvirt: reboot, libvirtd restart, shutdown, start again, destroy. After each the NIC works or is gone."""
import json
import sys
import time

from stage import Stage, guest, host, perform

ASK_AGENT = """
import json, socket, sys
connection = socket.create_connection((sys.argv[1], 7100), 10)
connection.sendall(sys.argv[2].encode() + b"\\n")
print(connection.makefile().readline(), end="")
"""


class Life(Stage):
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

    def run(self):
        self.set_up()
        guest.start(self.journal, plain=False)
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


if __name__ == "__main__":
    sys.exit(perform("life_test", lambda build, journal: Life(build, journal).run()))
