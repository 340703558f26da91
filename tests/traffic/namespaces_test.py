# SPDX-License-Identifier: Apache-2.0
"""The traffic program between two network namespaces, with an honest or a faulty relay in the middle.

The relay commits one kind of fault; the report must name exactly that kind, and an honest relay must give a clean report.
Exit status 77 means skipped.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

GUEST, OUTSIDE = "10.97.0.2", "10.97.0.1"
SKIPPED = 77


def run(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True)


class Namespaces:
    """Two ends and the relay's place between them; gone at the end, whatever happens."""

    def __init__(self):
        # A veth name has at most 15 characters; the process id keeps runs apart.
        self.outside, self.guest, self.middle = (f"tt{role}{os.getpid()}" for role in "ogm")

    def __enter__(self):
        try:
            self.make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def make(self):
        for name in (self.outside, self.guest, self.middle):
            run("ip", "netns", "add", name)
        for name, address, port in ((self.outside, OUTSIDE, "left"), (self.guest, GUEST, "right")):
            run("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self.middle)
            run("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "dev", "eth0", "up")
            run("ip", "-n", self.middle, "link", "set", "dev", port, "up", "promisc", "on")
            # Frames that a raw socket copies must have their checksums finished and their real size.
            run("ip", "netns", "exec", name, "ethtool", "-K", "eth0", "tx", "off", "tso", "off", "gso", "off", "gro", "off")

    def __exit__(self, *_):
        for name in (self.outside, self.guest, self.middle):
            subprocess.run(("ip", "netns", "delete", name), check=False, capture_output=True)


class Process:
    """A program in a namespace, started once it has printed its first line, ended with the block."""

    def __init__(self, namespace, *words):
        self.child = subprocess.Popen(("ip", "netns", "exec", namespace, *words), stdout=subprocess.PIPE, text=True)
        self.first_line = self.child.stdout.readline()
        if not self.first_line:
            raise SystemExit(f"{words[0]} ended at once with status {self.child.wait()}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()


def measure(args, space, directory):
    report = os.path.join(directory, "report.json")
    prefix = os.path.join(directory, "arrivals")
    outcome = subprocess.run(("ip", "netns", "exec", space.outside, args.traffic, "outside", "--guest", GUEST, "--seconds", "2",
                              "--rate", "2000", "--json", report, "--arrivals", prefix, "--drain-limit", "1"),
                             stdout=subprocess.DEVNULL, timeout=100, check=False)
    with open(report, encoding="utf-8") as file:
        return outcome.returncode, json.load(file)


def check_arrivals(report):
    for direction, path in report["arrivals"].items():
        records = os.path.getsize(path) // 16
        udp = report["udp"][direction]
        expected = udp["received"] + udp["duplicated"]
        assert records == expected, f"{direction}: {records} arrivals recorded, {expected} counted"


def check_report(case, status, report):
    column = {"loss": "lost", "duplicates": "duplicated", "reordering": "reordered", "corruption": "corrupt"}.get(case)
    for direction, udp in report["udp"].items():
        assert udp["sent"] > 50, f"{direction}: only {udp['sent']} datagrams in two seconds"
        for name in ("lost", "duplicated", "reordered", "corrupt"):
            # A datagram that arrived changed is one that is missing as well.
            expected = name == column or (case == "corruption" and name == "lost")
            assert (udp[name] > 0) == expected, f"{case}, {direction}: {name} is {udp[name]}"
        assert udp["socket_drops"] == 0
    assert report["tcp"]["ok"] and report["tcp"]["bytes"] > 0, report["tcp"]
    assert report["guest_link_changes"] == 0
    assert report["ok"] == (case == "clean") and status == (0 if case == "clean" else 1)
    check_arrivals(report)


def guest_leaves(args, space):
    """The agent's death in mid-run is an error in words and status 2, not a hang and not a verdict."""
    with Process(space.guest, args.traffic, "guest") as agent:
        outside = subprocess.Popen(("ip", "netns", "exec", space.outside, args.traffic, "outside", "--guest", GUEST, "--seconds",
                                    "3"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert outside.stdout.readline() == "running\n"
        agent.child.kill()
        _, error = outside.communicate(timeout=60)
    assert outside.returncode == 2, outside.returncode
    assert "control connection" in error, error


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=("clean", "loss", "duplicates", "reordering", "corruption", "guest_leaves"))
    parser.add_argument("--traffic", required=True)
    parser.add_argument("--relay", required=True)
    args = parser.parse_args()
    if os.geteuid() != 0:
        print("SKIPPED: needs root to make network namespaces")
        return SKIPPED
    fault = args.case if args.case not in ("clean", "guest_leaves") else "none"
    with Namespaces() as space, Process(space.middle, args.relay, "left", "right", fault, "50"), \
            tempfile.TemporaryDirectory() as directory:
        if args.case == "guest_leaves":
            guest_leaves(args, space)
            return 0
        with Process(space.guest, args.traffic, "guest"):
            status, report = measure(args, space, directory)
            print(json.dumps(report, indent=1))
            check_report(args.case, status, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
