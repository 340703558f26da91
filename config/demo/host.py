# SPDX-License-Identifier: Apache-2.0
"""The demo's hold on the host: what it makes, a journal of it, and how each thing is undone.

Everything is written to the journal before it is made. The journal lies in a file, so that a demo that was killed is cleaned
up by the next one.
"""
import ctypes
import json
import os
import platform
import pwd
import shutil
import signal
import subprocess
import time

FILES = "/var/lib/tandem/demo"  # guest files; readable to QEMU's user, unlike a home folder
STATE = os.path.join(FILES, "state.json")
NAME = "tandem-demo"  # of bridge, namespace and domain
OUTSIDE_PORT = "tandem-demo-o"  # host's end of the namespace's cable
OUTSIDE_ADDRESS, GUEST_ADDRESS = "10.98.76.1", "10.98.76.2"
USER, VAULT_USER = "tandem", "tandem-vault"  # of backends, of the vault


class DemoError(Exception):
    """A sentence for the operator: what was being done, why it failed, what to do."""


class UnfitHost(DemoError):
    """This host cannot run the demo, whatever the demo does."""


def run(*words, check=True, **options):
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if check and done.returncode != 0:
        raise DemoError(f"'{' '.join(words)}' failed: {(done.stderr or done.stdout).strip()}")
    return done


def wait_for(condition, seconds, what, step=0.05):
    """The condition's first true value. Raises when it has none within the time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise DemoError(f"{what}: not within {seconds} s")
        time.sleep(step)


def start_time(pid):
    """When the process began, in clock ticks since boot; with the pid it names one process for ever. None: no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def session_members(leader):
    """Processes of the session that process `leader` began, which may be gone itself."""
    members = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or start_time(name) is None:
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                session = int(file.read().rpartition(")")[2].split()[3])
        except OSError:
            continue
        if session == leader:
            members.append(int(name))
    return members


def end_process(pid, started, patience=10):
    """SIGTERM, then SIGKILL, to exactly that process."""
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5)):
        if started is None or start_time(pid) != started:
            return
        os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while start_time(pid) == started and time.monotonic() < deadline:
            reap(pid)
            time.sleep(0.02)


def reap(pid):
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass


class Journal:
    """What was made, oldest first."""

    def __init__(self):
        self.entries = []
        try:
            with open(STATE, encoding="utf-8") as file:
                self.entries = json.load(file)
        except (OSError, ValueError):
            pass

    def note(self, kind, **details):
        self.entries.append({"kind": kind, **details})
        self._save()

    def undo_all(self):
        """Undoes everything, newest first; goes on after a failure. Returns what could not be undone, in words."""
        complaints = []
        while self.entries:
            entry = self.entries.pop()
            try:
                UNDO[entry["kind"]](entry)
            except (DemoError, OSError, KeyError) as error:
                complaints.append(f"cannot undo {entry}: {error}")
            self._save()
        if os.path.exists(STATE):
            os.unlink(STATE)
        return complaints

    @staticmethod
    def remove_files():
        """Guest, logs and measurements; kept after a failure, for whoever looks for its reason."""
        shutil.rmtree(FILES, ignore_errors=True)
        try:
            os.rmdir(os.path.dirname(FILES))  # only if nothing else is there
        except OSError:
            pass

    def _save(self):
        os.makedirs(FILES, exist_ok=True)
        beside = STATE + ".new"
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(self.entries, file)
        os.replace(beside, STATE)


def _undo_process(entry):
    end_process(entry["pid"], entry["started"], entry.get("patience", 10))
    if entry.get("session"):
        # What it started and could not end any more.
        for pid in session_members(entry["pid"]):
            end_process(pid, start_time(pid), patience=2)


def _undo_file(entry):
    if os.path.lexists(entry["path"]):
        os.unlink(entry["path"])
    if entry.get("backup") and os.path.exists(entry["backup"]):
        shutil.move(entry["backup"], entry["path"])


def _undo_directory(entry):
    if entry.get("tree"):  # ours alone; what a supervisor that crashed left in it goes too
        shutil.rmtree(entry["path"], ignore_errors=True)
        return
    try:
        os.rmdir(entry["path"])  # only if nobody has put anything there
    except OSError:
        pass


def _undo_domain(entry):
    run("virsh", "-c", "qemu:///system", "destroy", entry["name"], check=False)
    done = run("virsh", "-c", "qemu:///system", "undefine", entry["name"], check=False)
    if done.returncode != 0 and "failed to get domain" not in done.stderr:
        raise DemoError(done.stderr.strip())


def _undo_reload(_entry):
    reload_libvirtd()


def _undo_daemon(entry):
    """A daemon that put itself into the background; known by its pid file."""
    pid = read_pid(entry["pid_file"])
    if pid:
        end_process(pid, start_time(pid))


def _undo_service(entry):
    run("systemctl", "stop", *entry["units"], check=False)


def _undo_user(entry):
    run("userdel", entry["name"], check=False)


UNDO = {
    "process": _undo_process,
    "file": _undo_file,
    "directory": _undo_directory,
    "domain": _undo_domain,
    "reload": _undo_reload,
    "daemon": _undo_daemon,
    "service": _undo_service,
    "user": _undo_user,
    "link": lambda entry: run("ip", "link", "delete", entry["name"], check=False),
    "namespace": lambda entry: run("ip", "netns", "delete", entry["name"], check=False),
    "mount": lambda entry: run("umount", entry["path"], check=False),
}


# --- preflight ----------------------------------------------------------------------------------------------------------------


def _bpf_works():
    """Asks the kernel for the smallest BPF map."""
    number = {"x86_64": 321, "aarch64": 280}.get(platform.machine())
    if number is None:
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    # union bpf_attr for BPF_MAP_CREATE (0): array (2), 4-byte key, 4-byte value, one entry.
    attributes = (ctypes.c_uint32 * 32)(2, 4, 4, 1)
    descriptor = libc.syscall(number, 0, ctypes.byref(attributes), ctypes.sizeof(attributes))
    if descriptor < 0:
        return False
    os.close(descriptor)
    return True


def check_host():
    if os.geteuid() != 0:
        raise UnfitHost("The demo makes bridges, namespaces and a guest: run it as root (sudo ./demo).")
    release = os.uname().release
    version = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in release.split(".")[:2])
    if version < (6, 4):
        raise UnfitHost(f"This kernel is {release}; Tandem needs 6.4 or newer, because older kernels cannot map AF_XDP's fill "
                        "and completion rings in a second process. Use Debian 13, or Debian 12 with the backports kernel.")
    if not _bpf_works():
        raise UnfitHost("This kernel or container refuses BPF, which the fence is made of. Run the demo on the host itself, "
                        "with a kernel that has CONFIG_BPF_SYSCALL.")
    for program, package in (("qemu-system-x86_64", "qemu-system-x86"), ("virsh", "libvirt-clients"),
                             ("libvirtd", "libvirt-daemon-system"), ("ip", "iproute2"), ("ethtool", "ethtool"),
                             ("busybox", "busybox-static"), ("cpio", "cpio")):
        if not shutil.which(program):
            raise UnfitHost(f"{program} is not installed. Leave out --no-install, or: apt-get install {package}")


def has_virtualization():
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    return ("svm" in flags or "vmx" in flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)


# --- network ------------------------------------------------------------------------------------------------------------------


def make_network(journal):
    """A bridge without addresses, and a namespace as the outside world on it."""
    journal.note("link", name=NAME)
    run("ip", "link", "add", NAME, "type", "bridge", "mcast_snooping", "0")
    journal.note("namespace", name=NAME)
    run("ip", "netns", "add", NAME)
    journal.note("link", name=OUTSIDE_PORT)
    run("ip", "link", "add", OUTSIDE_PORT, "type", "veth", "peer", "name", "eth0", "netns", NAME)
    for port in (NAME, OUTSIDE_PORT):
        _write(f"/proc/sys/net/ipv6/conf/{port}/disable_ipv6", "1")
    in_namespace("sh", "-c", "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 >$f; done")
    # As on a real cable: checksums finished, no frame larger than the MTU.
    in_namespace("ethtool", "-K", "eth0", "tx", "off", "tso", "off", "gso", "off")
    run("ip", "link", "set", "dev", OUTSIDE_PORT, "master", NAME, "up")
    run("ip", "link", "set", "dev", NAME, "up")
    run("ip", "-n", NAME, "link", "set", "dev", "lo", "up")
    run("ip", "-n", NAME, "link", "set", "dev", "eth0", "up")
    run("ip", "-n", NAME, "address", "add", f"{OUTSIDE_ADDRESS}/24", "dev", "eth0")


def keep_order_in_host_queues():
    """Gives each of the demo's own ports one processor for received frames: both ends of the outside's cable, and an ordinary NIC's port.

    The host queues received frames per processor: when the sending program moves to another processor, its first frames there can
    overtake the last ones of before. One queue keeps them in line, as one real cable would. Tandem does this for its own ports.
    """
    for port in os.listdir(f"/sys/class/net/{NAME}/brif"):
        queues = [] if port.startswith("tdm") else os.listdir(f"/sys/class/net/{port}/queues")
        for queue in queues:
            if queue.startswith("rx-"):
                _write(f"/sys/class/net/{port}/queues/{queue}/rps_cpus", "1")
    in_namespace("sh", "-c", "for f in /sys/class/net/eth0/queues/rx-*/rps_cpus; do echo 1 >$f; done")


def in_namespace(*words):
    return run("ip", "netns", "exec", NAME, *words)


def _write(path, text):
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


# --- libvirt ------------------------------------------------------------------------------------------------------------------


def has_systemd():
    return os.path.isdir("/run/systemd/system")


def read_pid(path):
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def libvirt_answers():
    return run("virsh", "-c", "qemu:///system", "version", check=False).returncode == 0


def start_daemon(program):
    # Without the demo's own output: a daemon must not hold its pipes open.
    subprocess.run((program, "-d"), check=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def start_libvirt(journal):
    if has_systemd():
        if run("systemctl", "is-active", "libvirtd", check=False).returncode != 0:
            journal.note("service", units=["libvirtd.service"])
        run("systemctl", "start", "libvirtd")
    else:
        for daemon, pid_file in (("virtlogd", "/run/virtlogd.pid"), ("libvirtd", "/run/libvirtd.pid")):
            pid = read_pid(pid_file)
            if pid and start_time(pid):
                continue
            journal.note("daemon", pid_file=pid_file)
            start_daemon(daemon)
    wait_for(libvirt_answers, 20, "libvirtd was started; waiting for it to answer 'virsh version'")


def reload_libvirtd():
    """SIGHUP: libvirtd looks for hooks only then and when it starts."""
    pid = read_pid("/run/libvirtd.pid")
    if has_systemd():
        run("systemctl", "reload", "libvirtd", check=False)
    elif pid and start_time(pid):
        os.kill(pid, signal.SIGHUP)


def apparmor_confines():
    try:
        with open("/sys/module/apparmor/parameters/enabled", encoding="ascii") as file:
            return file.read().strip() == "Y"
    except OSError:
        return False


def install_hook(journal, template, virt_tandem):
    """Puts the hook where libvirt looks, with what was there kept aside, and makes libvirtd see it."""
    if apparmor_confines():
        copy = "/usr/bin/tandem-demo-virt-tandem"  # the only folder from which a confined hook may execute
        journal.note("file", path=copy)
        shutil.copy2(virt_tandem, copy)
        virt_tandem = copy
    journal.note("reload")  # undone after the file's removal: libvirtd forgets the hook
    path = "/etc/libvirt/hooks/qemu.d/tandem"
    for directory in ("/etc/libvirt/hooks", "/etc/libvirt/hooks/qemu.d"):
        if not os.path.isdir(directory):
            journal.note("directory", path=directory)
            os.mkdir(directory)
    backup = os.path.join(FILES, "hook.backup")
    had_one = os.path.exists(path)
    if had_one:
        shutil.copy2(path, backup)
    journal.note("file", path=path, backup=backup if had_one else None)
    with open(template, encoding="utf-8") as source:
        text = source.read().replace("@TANDEM_VIRT_TANDEM@", virt_tandem)
    beside = os.path.join(FILES, "hook.new")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(beside, 0o755)
    shutil.move(beside, path)
    reload_libvirtd()


def make_users(journal):
    for name in (USER, VAULT_USER):
        try:
            pwd.getpwnam(name)
        except KeyError:
            journal.note("user", name=name)
            run("useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent", "--shell",
                "/usr/sbin/nologin", name)


def mount_bpffs(journal):
    with open("/proc/mounts", encoding="ascii", errors="replace") as file:
        if any(line.split()[1:3] == ["/sys/fs/bpf", "bpf"] for line in file):
            return
    journal.note("mount", path="/sys/fs/bpf")
    run("mount", "-t", "bpf", "bpf", "/sys/fs/bpf")
