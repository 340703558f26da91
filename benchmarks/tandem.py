# SPDX-License-Identifier: Apache-2.0
"""A whole Tandem for a benchmark: vault, supervisor, pairs, and NICs without libvirt."""
import json
import os
import socket
import struct

from world import BACKEND_CORE, GUEST_CORE, Failed, wait_for

MAC = "52:54:00:12:34:56"
PACKED = 34  # VIRTIO_F_RING_PACKED

_CONFIG = """\
instance = "b{pid}x{number}"
run_dir = "{run_dir}"
incident_dir = "{run_dir}/incidents"
log_level = "info"
[backend]
path = "{backend}"
user = "nobody"
[qemu]
socket_user = ""
socket_group = ""
[pair]
shards = 1
polling = "{polling}"
heirs = "{heirs}"
hugepages = "never"
busy_poll = {busy_poll}
"""

_DOMAIN = """\
<domain type='qemu'><name>{name}</name><uuid>6c7dc2a6-5f0b-4d8c-a9d6-4c4fb0d1b7c1</uuid><metadata>
<tandem:domain xmlns:tandem='urn:tandem:domain:1'>{options}</tandem:domain></metadata>
<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking><devices>{interfaces}</devices></domain>
"""
_OPTION = "<tandem:nic mac='{mac}' pair='default'><tandem:uplink {uplink}/>{watchdog}</tandem:nic>"
_INTERFACE = """\
<interface type='vhostuser'><mac address='{mac}'/><source type='unix' path='{path}' mode='client'>
<reconnect enabled='yes' timeout='1'/></source><model type='virtio'/><driver queues='{queues}'/></interface>
"""


class Tandem:
    """Started by the constructor; the world ends it if close() does not.

    `others_apart`: the members' other threads are on the guest's core, as `pair.cpus` would have it.
    """

    _number = 0

    def __init__(self, world, polling="always", backend=None, watchdog="", heirs="real-time", busy_poll=0, others_apart=False):
        Tandem._number += 1
        self.world = world
        self.watchdog = watchdog
        self._others_apart = others_apart
        # An heir that polls and an owner that works cannot share a core.
        self._cores = {"active": BACKEND_CORE, "standby": GUEST_CORE if heirs == "polling" else BACKEND_CORE}
        self.run_dir = world.path(f"tandem{Tandem._number}")
        os.makedirs(self.run_dir)
        config = self.run_dir + ".toml"
        with open(config, "w", encoding="utf-8") as file:
            file.write(_CONFIG.format(pid=os.getpid(), number=Tandem._number, run_dir=self.run_dir, polling=polling, heirs=heirs,
                                      busy_poll=busy_poll, backend=backend or world.program("tandem-backend")))
        self.log = f"tandem{Tandem._number}.log"
        self._vault = world.start((world.program("tandem-vault"), "--socket", f"{self.run_dir}/vault.sock", "--user", "daemon",
                                   "--supervise", world.program("tandemd"), "--config", config), self.log)
        wait_for(lambda: self.ask({"command": "status"}, quiet=True), 30, f"tandemd to answer{self._log_hint()}")

    def _log_hint(self):
        try:
            with open(self.world.path(self.log), encoding="utf-8", errors="replace") as file:
                last = file.read().strip().splitlines()[-3:]
        except OSError:
            last = []
        return " (its log ends: " + " / ".join(last) + ")" if last else ""

    def ask(self, request, quiet=False):
        """One request to tandemd; None instead of an error if `quiet`."""
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(60)
                client.connect(f"{self.run_dir}/control.sock")
                client.sendall(json.dumps(request).encode() + b"\n")
                answer = b""
                while piece := client.recv(65536):
                    answer += piece
            answer = json.loads(answer)
        except (OSError, ValueError) as error:
            if quiet:
                return None
            raise Failed(f"ask tandemd: {error}{self._log_hint()}") from error
        if not answer.get("ok") and not quiet:
            raise Failed(f"tandemd refused {request['command']}: {answer.get('error')}")
        return answer

    def socket(self, mac=MAC):
        return f"{self.run_dir}/nic/{mac.replace(':', '-')}.sock"

    def provide(self, uplinks, name="benchmark", queues=1):
        """A domain with these NICs ({mac: uplink attributes}); returns when the pair is there."""
        options = "".join(_OPTION.format(mac=mac, uplink=uplink, watchdog=self.watchdog) for mac, uplink in uplinks.items())
        interfaces = "".join(_INTERFACE.format(mac=mac, path=self.socket(mac), queues=queues) for mac in uplinks)
        self.ask({"command": "hook", "name": name, "operation": "prepare", "sub_operation": "begin",
                  "xml": _DOMAIN.format(name=name, options=options, interfaces=interfaces)})
        self.wait_whole()

    def release(self, name="benchmark"):
        self.ask({"command": "hook", "name": name, "operation": "release", "sub_operation": "end", "xml": "<domain/>"})

    def pair(self):
        return next(iter(self.ask({"command": "status"})["pairs"]), {})

    def incidents(self):
        return self.ask({"command": "incidents"})["incidents"]

    def wait_whole(self, not_pid=None):
        """The pair with an owner (another one than `not_pid`) and a standby, each on its core."""

        def whole():
            pair = self.pair()
            good = pair and pair["state"] == "paired" and pair["standby"]["state"] == "ready" and pair["active"]["pid"] != not_pid
            return pair if good else None

        for _ in range(5):
            pair = wait_for(whole, 60, f"a pair with owner and standby{self._log_hint()}", 0.02)
            try:
                for member, core in self._cores.items():
                    pid, poller = pair[member]["pid"], pair[member]["tid"]
                    os.sched_setaffinity(poller, {core})
                    for thread in os.listdir(f"/proc/{pid}/task") if self._others_apart else ():
                        if int(thread) != poller:
                            os.sched_setaffinity(int(thread), {GUEST_CORE})
                return pair
            except (ProcessLookupError, FileNotFoundError):
                continue  # one has died since it was asked for
        raise Failed(f"the pair's members die as soon as they are there{self._log_hint()}")

    def close(self):
        self.world.forget(self._vault)


def offered_features(path):
    """Virtio features that the back end at this socket offers (vhost-user GET_FEATURES, request 1)."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(path)
        client.sendall(struct.pack("<III", 1, 1, 0))
        answer = b""
        while len(answer) < 20:
            piece = client.recv(20 - len(answer))
            if not piece:
                raise Failed(f"{path} closed the connection instead of naming its features")
            answer += piece
    return struct.unpack("<Q", answer[12:])[0]

