# SPDX-License-Identifier: Apache-2.0
"""What benchmarks run in: a network and mount namespace, huge pages, and processes that are ended by id whatever happens.

`benchmarks/run` starts this program in new namespaces, so bridges, bpffs and sockets here are nobody else's.
"""
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time

# Backend and guest each have a core of their own; whatever only waits shares the guest's.
BACKEND_CORE = 0
GUEST_CORE = 1
NICE = -10  # of everybody who polls: what tandemd gives poll threads (pair.nice), peers and guests get too
HUGE_PAGES = 192  # of 2 MiB: two testpmds of 96 MiB and a third that starts while one dies, or an OVS of 256 MiB
_HUGE = "/proc/sys/vm/nr_hugepages"


class CannotRun(Exception):
    """This host lacks something; the text says what."""


class Failed(CannotRun):
    """Everything was there, and it did not work."""


def furnish_namespaces():
    """Once, in fresh namespaces: a sysfs that shows this network namespace, an empty bpffs, loopback."""
    for words in (("mount", "-t", "sysfs", "sysfs", "/sys"), ("mount", "-t", "bpf", "bpf", "/sys/fs/bpf"),
                  ("ip", "link", "set", "lo", "up")):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CannotRun(f"{' '.join(words)}: {done.stderr.strip()}")


def wait_for(event, limit, what, period=0.002):
    """The first true value of event(); Failed with `what` after `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        value = event()
        if value:
            return value
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {limit} s")
        time.sleep(period)


def ip(*words):
    done = subprocess.run(("ip", *words), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotRun(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _number(path):
    with open(path, encoding="ascii") as file:
        return int(file.read())


def _free_huge_pages():
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("HugePages_Free"))


class World:
    """Context of one run. Everything that was started or made is ended and removed on leaving."""

    def __init__(self, build):
        self.build = os.path.abspath(build)
        self.directory = None
        self._children = []
        self._huge_pages = None

    def __enter__(self):
        if len(os.sched_getaffinity(0)) < 2:
            raise CannotRun("needs two CPUs: one for the backend, one for the guest")
        # Nobody's core dump shall lengthen a blackout.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self.directory = tempfile.mkdtemp(prefix="tandem-benchmark-")
        os.chmod(self.directory, 0o755)
        signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        return self

    def __exit__(self, *_):
        for child in reversed(self._children):
            end(child)
        if self._huge_pages is not None and _number(_HUGE) == self._huge_pages[1]:
            with open(_HUGE, "w", encoding="ascii") as file:
                file.write(str(self._huge_pages[0]))
        shutil.rmtree(self.directory, ignore_errors=True)

    def need_huge_pages(self):
        """Raises the kernel's pool if fewer than HUGE_PAGES are free; the pool is given back on leaving."""
        free = _free_huge_pages()
        if free >= HUGE_PAGES:
            return
        before = _number(_HUGE)
        for _ in range(20):
            with open(_HUGE, "w", encoding="ascii") as file:
                file.write(str(before + HUGE_PAGES - free))
            if _free_huge_pages() >= HUGE_PAGES:
                break
            with open("/proc/sys/vm/compact_memory", "w", encoding="ascii") as file:
                file.write("1")
            time.sleep(0.2)  # what other processes have just freed comes back late
        # What was there at first, and what we left: if it is another number at the end, somebody else changed it as well.
        self._huge_pages = (before if self._huge_pages is None else self._huge_pages[0], _number(_HUGE))
        if _free_huge_pages() < HUGE_PAGES:
            raise CannotRun(f"needs {HUGE_PAGES} free huge pages of 2 MiB; memory is too full or too scattered")

    def program(self, name, mode=os.X_OK):
        """A program of this build; or, with another `mode`, another file of it."""
        for folder, _, files in os.walk(self.build):
            if name in files and os.access(os.path.join(folder, name), mode):
                return os.path.join(folder, name)
        raise CannotRun(f"{name} is not built in {self.build}; cmake --build {self.build} --target benchmarks")

    def tool(self, name, package):
        found = shutil.which(name)
        if found is None:
            raise CannotRun(f"{name} is not installed (Debian package {package}; benchmarks/install-peers)")
        return found

    def path(self, name):
        return os.path.join(self.directory, name)

    def start(self, words, log=None, **more):
        """A child in a process group of its own; its output goes to the file `log` unless `more` says otherwise."""
        if log is not None:
            with open(self.path(log), "ab") as file:
                child = subprocess.Popen(words, stdin=more.pop("stdin", subprocess.DEVNULL), stdout=file, stderr=file,
                                         start_new_session=True, **more)
        else:
            child = subprocess.Popen(words, start_new_session=True, **more)
        self._children.append(child)
        return child

    def forget(self, child):
        """Ends a child before the end of the run."""
        end(child)
        if child in self._children:
            self._children.remove(child)


def end(child, patience=30):
    """SIGTERM to the child alone, SIGKILL to what is left of it after `patience` seconds."""
    if child.poll() is None:
        child.send_signal(signal.SIGCONT)
        child.terminate()
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
