# SPDX-License-Identifier: Apache-2.0
"""OVS-DPDK of its own: database and ovs-vswitchd --monitor in the benchmark's folder, one userspace bridge, vhost-user ports.

Nothing of a system's Open vSwitch is touched: other sockets, another database, other files. Ports are dpdkvhostuserclient:
the front end listens, ovs-vswitchd connects, as Open vSwitch recommends.
"""
import os
import signal
import subprocess

from world import NICE, CannotRun, Failed, wait_for

_DAEMON = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk"
_SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"
_PACKAGE = "openvswitch-switch-dpdk"


class Switch:
    """A bridge with one port per name, all of which it floods broadcasts to. On the backend's core.

    With `null`, DPDK's arguments of a net_null device, that is one more port, and all goes between it and the only other one. With
    `crossed`, all goes between the two ports.
    """

    _number = 0

    def __init__(self, world, ports, null=None, crossed=False):
        if not os.access(_DAEMON, os.X_OK):
            raise CannotRun(f"{_DAEMON} is not installed (Debian package {_PACKAGE}; benchmarks/install-peers)")
        Switch._number += 1
        self.world = world
        self.directory = world.path(f"ovs{Switch._number}")
        os.makedirs(self.directory)
        world.need_huge_pages()
        self._environment = {**os.environ, "OVS_RUNDIR": self.directory, "OVS_LOGDIR": self.directory, "OVS_DBDIR": self.directory,
                             "OVS_SYSCONFDIR": self.directory}
        database = f"{self.directory}/conf.db"
        self._run("ovsdb-tool", "create", database, _SCHEMA)
        self._remote = f"unix:{self.directory}/db.sock"
        self._server = world.start((world.tool("ovsdb-server", _PACKAGE), database, f"--remote=p{self._remote}",
                                    f"--unixctl={self.directory}/db.ctl", f"--pidfile={self.directory}/db.pid"),
                                   f"ovs{Switch._number}.log", env=self._environment)
        wait_for(lambda: os.path.exists(f"{self.directory}/db.sock"), 20, "ovsdb-server to listen", 0.02)
        self._control("init")
        self._control("set", "Open_vSwitch", ".", "other_config:dpdk-init=true", "other_config:dpdk-socket-mem=256",
                      "other_config:pmd-cpu-mask=0x1", "other_config:dpdk-lcore-mask=0x2",
                      f"other_config:dpdk-extra=--in-memory --no-pci --file-prefix=ovs{os.getpid()}x{Switch._number}")
        self._control("add-br", "br-peer", "--", "set", "bridge", "br-peer", "datapath_type=netdev")
        for port in ports:
            self._control("add-port", "br-peer", port, "--", "set", "Interface", port, "type=dpdkvhostuserclient",
                          f"options:vhost-server-path={self.socket(port)}")
        if null is not None:
            self._control("add-port", "br-peer", "null", "--", "set", "Interface", "null", "type=dpdk",
                          f"options:dpdk-devargs={null}")
        self._pidfile = f"{self.directory}/vswitchd.pid"
        self._daemon = world.start(("nice", "-n", str(NICE), _DAEMON, self._remote, f"--pidfile={self._pidfile}",
                                    f"--unixctl={self.directory}/vswitchd.ctl", f"--log-file={self.directory}/vswitchd.log",
                                    "--monitor", "--no-chdir"), f"ovs{Switch._number}.log", env=self._environment)
        wait_for(self.pid, 30, "ovs-vswitchd to start", 0.02)
        if null is not None or crossed:
            one, other = (ports[0], "null") if null is not None else ports
            wait_for(lambda: os.path.exists(f"{self.directory}/br-peer.mgmt"), 30, "ovs-vswitchd to make its bridge", 0.02)
            for here, there in ((one, other), (other, one)):
                self._run("ovs-ofctl", "add-flow", f"unix:{self.directory}/br-peer.mgmt", f"in_port={here},actions=output:{there}")

    def _run(self, name, *words):
        done = subprocess.run((self.world.tool(name, _PACKAGE), *words), env=self._environment, capture_output=True, text=True,
                              check=False, timeout=60)
        if done.returncode != 0:
            raise Failed(f"{name} {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def _control(self, *words):
        return self._run("ovs-vsctl", f"--db={self._remote}", "--no-wait", *words)

    def give_address(self, address):
        """To the bridge's own port, a device of the kernel's through which the host reaches the others."""
        for words in (("address", "add", address, "dev", "br-peer"), ("link", "set", "br-peer", "up")):
            wait_for(lambda words=words: subprocess.run(("ip", *words), capture_output=True, check=False).returncode == 0, 30,
                     f"ip {' '.join(words)}", 0.1)

    def socket(self, port):
        return f"{self.directory}/{port}.sock"

    def pid(self):
        """Of the ovs-vswitchd that works now, not of its monitor; None: there is none."""
        try:
            with open(self._pidfile, encoding="ascii") as file:
                pid = int(file.read())
            os.kill(pid, 0)
            return pid
        except (OSError, ValueError):
            return None

    def given_up(self):
        """Whether the monitor has ended: then nobody restarts anything."""
        return self._daemon.poll() is not None

    def close(self):
        # The monitor must not start what we end: it goes with the child it waits for if that ends by SIGTERM.
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
        for child in (self._daemon, self._server):
            self.world.forget(child)
        # Its taps outlive it, with their addresses.
        for tap in ("br-peer", "ovs-netdev"):
            subprocess.run(("ip", "link", "del", tap), capture_output=True, check=False)
