# SPDX-License-Identifier: Apache-2.0
"""The demo: a guest's NIC backend is killed again and again under traffic, and the guest notices nothing. Started by ./demo."""
import argparse
import fcntl
import json
import os
import platform
import random
import signal
import sys
import time

import guest
import host
import measure
import pair

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CAUSES = tuple(pair.FAULTS)


def say(text):
    print(text, flush=True)


def parse_arguments(words):
    parser = argparse.ArgumentParser(prog="./demo", description=__doc__)
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="kills of the active backend (10)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--keep", action="store_true", help="leave everything running and say how to play with it")
    parser.add_argument("--stop", action="store_true", help="end what --keep, or a demo that was killed, left behind")
    parser.add_argument("--rate", type=int, default=2000, metavar="N", help="datagrams a second each way (2000)")
    parser.add_argument("--plain-nic", action="store_true",
                        help="control: the same traffic for 10 s through an ordinary bridge NIC, without Tandem and kills")
    parser.add_argument("--packed", action="store_true", help="give the guest packed virtqueues")
    parser.add_argument("--no-install", action="store_true", help="do not install packages")
    parser.add_argument("--build", type=os.path.abspath, default=os.path.join(ROOT, "build"), help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.kills < 0 or args.rate < 1:
        parser.error("--kills must be 0 or more, --rate 1 or more")
    return args


def lock():
    """One demo at a time. Held until the process ends."""
    os.makedirs(host.FILES, exist_ok=True)
    file = open(os.path.join(host.FILES, "lock"), "w", encoding="ascii")  # pylint: disable=consider-using-with
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise host.DemoError("another demo is running on this host; wait for it, or end it") from None
    return file


def clean_up(journal, passed):
    # A second Ctrl-C must not leave half of it behind.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for complaint in journal.undo_all():
        say(complaint)
    if passed:
        journal.remove_files()


def set_up(args, journal):
    traffic_program = pair.find_program(args.build, "tandem-traffic")
    tandem = None if args.plain_nic else pair.Tandem(args.build)
    host.start_libvirt(journal)
    host.make_network(journal)
    if tandem:
        host.make_users(journal)
        host.mount_bpffs(journal)
        tandem.start(journal)
        host.install_hook(journal, os.path.join(ROOT, "config/libvirt/qemu.d/tandem"), tandem.command)
    guest.build_files(ROOT, traffic_program)
    kind = "KVM" if host.has_virtualization() else "TCG (no svm/vmx here)"
    say(f"starting the guest under {kind}")
    guest.start(journal, args.plain_nic, args.packed)
    host.keep_order_in_host_queues()
    traffic = measure.Traffic(journal, traffic_program, args.rate)
    traffic.wait_running()
    if tandem and tandem.has_packed_rings() != args.packed:
        raise host.DemoError("the guest's driver chose the other ring layout: --packed needs a Linux 5.0 or newer, and QEMU 4.2")
    say("traffic runs: numbered UDP both ways, one TCP stream")
    return tandem, traffic


def kill_repeatedly(count, tandem, traffic):
    """Returns (cause, incident, problem) for each kill."""
    outcomes = []
    for number in range(count):
        cause = CAUSES[number % len(CAUSES)]
        tandem.wait_whole()
        traffic.wait_flow(1.0)
        time.sleep(random.uniform(0, 0.1))  # not in step with the traffic
        incident, problem = tandem.kill_active(cause)
        host.keep_order_in_host_queues()
        outcomes.append((cause, incident, problem))
        say(f"kill {number + 1} of {count}: {cause}" + (f": {problem}" if problem else ""))
    traffic.wait_flow(1.0)
    return outcomes


def run_demo(args, journal):
    tandem, traffic = set_up(args, journal)
    outcomes = []
    if tandem:
        outcomes = kill_repeatedly(args.kills, tandem, traffic)
    else:
        traffic.wait_flow(10.0)
    report = traffic.finish()
    arrivals = {direction: measure.Arrivals(report["arrivals"][direction]) for direction in measure.DIRECTIONS}
    kills = [measure.describe_kill(*outcome, arrivals) for outcome in outcomes]
    windows = [measure.window(incident) for _, incident, _ in outcomes]
    summary = measure.summarize(args.kills if tandem else 0, kills, windows, report, arrivals)
    summary["host"] = {"kernel": os.uname().release, "machine": platform.machine(), "processors": os.cpu_count(),
                       "accelerator": "kvm" if host.has_virtualization() else "tcg"}
    summary["incidents"] = [incident for _, incident, _ in outcomes]
    say("\n" + "\n".join(measure.table(summary) + [""] + measure.totals(summary)))
    return summary


def explain_keep(args):
    virt_tandem = "" if args.plain_nic else f"""
  {pair.find_program(args.build, "virt-tandem")} status
  {pair.find_program(args.build, "virt-tandem")} drill --pair {pair.PAIR} --fault segv"""
    say(f"""
Everything is still running. To play with it:
  virsh -c qemu:///system console {host.NAME}          a shell in the guest; leave with Ctrl-]
  ip netns exec {host.NAME} ping -i 0.01 {host.GUEST_ADDRESS}{virt_tandem}
To end it:
  ./demo --stop""")


def write_json(path, summary):
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=2)
            file.write("\n")


def interrupted(number, _frame):
    raise host.DemoError(f"interrupted by {signal.Signals(number).name}")


def main(words):
    args = parse_arguments(words)
    journal, passed = None, False
    try:
        host.check_host()
        _held = lock()  # until this function's end
        journal = host.Journal()
        if journal.entries:
            say("ending what an earlier demo left")
            for complaint in journal.undo_all():
                say(complaint)
        if args.stop:
            journal.remove_files()
            return 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupted)
        summary = run_demo(args, journal)
        write_json(args.json, summary)
        if args.keep:
            explain_keep(args)
            journal = None
        passed = summary["verdict"] == "pass"
        return 0 if passed else 1
    except host.UnfitHost as error:
        print(f"demo: {error}", file=sys.stderr)
        return 77
    except host.DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        if journal:
            show_logs()
        write_json(args.json, {"kills": [], "lost": None, "duplicated": None, "reordered": None, "tcp_ok": False,
                               "guest_link_changes": None, "verdict": "fail", "problems": [str(error)]})
        return 2
    finally:
        if journal:
            clean_up(journal, passed)


def show_logs():
    for name, path in (("tandemd", pair.LOG), ("guest's console", os.path.join(host.FILES, "console.log"))):
        if not os.path.exists(path) or os.path.getsize(path) == 0:
            continue
        with open(path, encoding="utf-8", errors="replace") as file:
            tail = file.readlines()[-15:]
        print(f"--- last lines of {name} ({path}):\n{''.join(tail)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
