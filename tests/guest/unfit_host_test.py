#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The demo's checks of its host: each thing that is missing gives a sentence that names the remedy, before anything is changed."""
import collections
import os
import pathlib
import sys
import unittest
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "config" / "demo"))
import host  # noqa: E402

Release = collections.namedtuple("Release", "release")


class UnfitHost(unittest.TestCase):
    def setUp(self):
        self.good = [mock.patch.object(os, "geteuid", lambda: 0), mock.patch.object(os, "uname", lambda: Release("6.12.1-amd64")),
                     mock.patch.object(host, "_bpf_works", lambda: True),
                     mock.patch.object(host.shutil, "which", lambda program: "/usr/bin/" + program)]
        for patch in self.good:
            patch.start()
            self.addCleanup(patch.stop)

    def refused(self, *says):
        with self.assertRaises(host.UnfitHost) as caught:
            host.check_host()
        for part in says:
            self.assertIn(part, str(caught.exception))

    def test_fit(self):
        host.check_host()

    def test_not_root(self):
        with mock.patch.object(os, "geteuid", lambda: 1000):
            self.refused("sudo ./demo")

    def test_old_kernel(self):
        for release in ("5.10.0-30-amd64", "6.1.0-18-amd64", "6.3.13"):
            with mock.patch.object(os, "uname", lambda release=release: Release(release)):
                self.refused(release, "6.4", "backports")
        for release in ("6.4.0", "6.10.1", "7.0-rc1"):
            with mock.patch.object(os, "uname", lambda release=release: Release(release)):
                host.check_host()

    def test_no_bpf(self):
        with mock.patch.object(host, "_bpf_works", lambda: False):
            self.refused("BPF", "CONFIG_BPF_SYSCALL")

    def test_missing_program(self):
        for program, package in (("libvirtd", "libvirt-daemon-system"), ("virsh", "libvirt-clients"),
                                 ("qemu-system-x86_64", "qemu-system-x86"), ("ip", "iproute2")):
            with mock.patch.object(host.shutil, "which", lambda name, program=program: None if name == program else "/bin/" + name):
                self.refused(program, "apt-get install " + package)

    def test_libvirtd_that_does_not_answer(self):
        with mock.patch.object(host, "has_systemd", lambda: False), mock.patch.object(host, "read_pid", lambda path: 0), \
                mock.patch.object(host, "start_daemon", lambda program: None), \
                mock.patch.object(host, "libvirt_answers", lambda: False), \
                mock.patch.object(host.time, "sleep", lambda seconds: None), \
                mock.patch.object(host.time, "monotonic", mock.Mock(side_effect=range(0, 100000, 5))):
            with self.assertRaises(Exception) as caught:
                host.start_libvirt(mock.Mock())
            self.assertIn("libvirtd", str(caught.exception))


if __name__ == "__main__":
    unittest.main()
