# SPDX-License-Identifier: Apache-2.0
"""The demo's view of Tandem: starting the supervisor, and virt-tandem's answers as Python data."""
import json
import os
import shutil
import signal
import subprocess

from host import FILES, VAULT_USER, DemoError, run, start_time, wait_for

PAIR = "default"
RUN_DIR = "/run/tandem"
LOG = os.path.join(FILES, "tandemd.log")

# cause in the incident -> how the demo brings it about
FAULTS = {"SIGSEGV": "segv", "SIGKILL": None, "SIGABRT": "abort", "SIGBUS": "bus"}

CONFIG = """\
instance = "demo"
run_dir = "{run_dir}"
incident_dir = "{incidents}"
log_level = "info"

[backend]
path = "{backend}"
user = "tandem"

[qemu]
socket_user = "libvirt-qemu"
socket_group = "libvirt-qemu"

[pair]
shards = 1
polling = "adaptive"
hugepages = "auto"
"""


def find_program(build, name):
    """The program somewhere in the build folder."""
    for folder, _, files in os.walk(build):
        path = os.path.join(folder, name)
        if name in files and os.access(path, os.X_OK):
            return path
    raise DemoError(f"{name} is not built; run: cmake -S . -B build -G Ninja && ninja -C build {name}")


class Tandem:
    def __init__(self, build):
        self.build = os.path.abspath(build)
        self.command = find_program(build, "virt-tandem")

    def ask(self, *words):
        done = run(self.command, *words, "--json", check=False, timeout=30)
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = {"ok": False, "error": (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"}
        if not answer.get("ok"):
            error = answer.get("error", "no reason given")
            raise DemoError(f"virt-tandem {' '.join(words)}: {error if isinstance(error, str) else json.dumps(error)}")
        return answer

    def answers(self):
        try:
            return self.ask("status")
        except (DemoError, subprocess.TimeoutExpired):
            return None

    def start(self, journal):
        """Starts vault and supervisor, unless a supervisor is there already and serves nobody else."""
        present = self.answers()
        if present:
            others = [nic["domain"] for nic in present["nics"]]
            if others:
                raise DemoError(f"A tandemd on this host already serves {', '.join(others)}; the demo would kill their backends. "
                                "Run it on another machine, or shut these domains down.")
            return
        config = os.path.join(FILES, "tandemd.toml")
        incidents = os.path.join(FILES, "incidents")
        shutil.rmtree(incidents, ignore_errors=True)  # a run that failed leaves its incidents; they are not this one's
        os.makedirs(incidents)
        with open(config, "w", encoding="utf-8") as file:
            file.write(CONFIG.format(run_dir=RUN_DIR, incidents=incidents, backend=find_program(self.build, "tandem-backend")))
        if not os.path.isdir(RUN_DIR):
            journal.note("directory", path=RUN_DIR, tree=True)
            os.mkdir(RUN_DIR)
        # The vault has a user of its own: whoever runs as that user may attach to it, and backends must not.
        self._launch(journal, (find_program(self.build, "tandem-vault"), "--socket", f"{RUN_DIR}/vault.sock", "--user",
                               VAULT_USER, "--supervise", find_program(self.build, "tandemd"), "--config", config))
        wait_for(self.answers, 20, f"tandemd was started; waiting for it to answer 'virt-tandem status' (its log: {LOG})", 0.1)

    @staticmethod
    def _launch(journal, words):
        with open(LOG, "wb") as log:
            child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        # The vault gives tandemd 30 s to end in order.
        journal.note("process", pid=child.pid, started=start_time(child.pid), patience=35, session=True)

    def pair(self):
        """The demo's pair from status; empty when there is none."""
        return next((pair for pair in self.ask("status")["pairs"] if pair["name"] == PAIR), {})

    def has_packed_rings(self):
        return any(nic["packed"] for nic in self.ask("status")["nics"])

    def wait_whole(self, not_pid=None):
        """The pair once it has an owner (another one than `not_pid`) and a standby that is ready."""

        def whole():
            pair = self.pair()
            active, standby = pair.get("active") or {}, pair.get("standby") or {}
            good = (active.get("pid") or 0) > 0 and active["pid"] != not_pid and standby.get("state") == "ready"
            return pair if good else None

        return wait_for(whole, 30, f"waiting for pair {PAIR} to have an owner and a standby that is ready", 0.05)

    def incidents(self):
        return self.ask("incidents")["incidents"]

    def kill_active(self, cause):
        """Kills the owner in the given way. Returns the incident that came of it, and what is wrong with it (or None)."""
        before = {incident["id"] for incident in self.incidents()}
        pair = self.wait_whole()
        victim, heir = pair["active"]["pid"], pair["standby"]["pid"]
        if FAULTS[cause]:
            self.ask("drill", "--pair", PAIR, "--fault", FAULTS[cause])
        else:
            os.kill(victim, signal.SIGKILL)

        def complete():
            """The new incident, once traffic has gone on."""
            new = next((incident for incident in self.incidents() if incident["id"] not in before), None)
            return new if new and new["timeline_ns"].get("first_transaction") is not None else None

        incident = wait_for(complete, 15, f"waiting for the incident after {cause} of process {victim}", 0.02)
        owner = self.wait_whole(not_pid=victim)["active"]["pid"]
        if incident["cause"] != cause:
            return incident, f"the incident names {incident['cause']}, the demo caused {cause}"
        if owner != heir:
            return incident, f"process {owner} took over, the standby was {heir}"
        return incident, None
