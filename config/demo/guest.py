# SPDX-License-Identifier: Apache-2.0
"""The demo's guest: its files, its domain XML, its life under libvirt."""
import os

from host import FILES, GUEST_ADDRESS, NAME, DemoError, has_virtualization, run

MAC = "52:54:00:7a:6d:01"
HERE = os.path.dirname(os.path.abspath(__file__))

METADATA = f"""<metadata>
    <tandem:domain xmlns:tandem="urn:tandem:domain:1">
      <tandem:nic mac="{MAC}" pair="default">
        <tandem:uplink bridge="{NAME}"/>
      </tandem:nic>
    </tandem:domain>
  </metadata>"""

TANDEM_NIC = f"""<interface type='vhostuser'>
      <mac address='{MAC}'/>
      <source type='unix' path='/run/tandem/nic/{MAC.replace(":", "-")}.sock' mode='client'>
        <reconnect enabled='yes' timeout='1'/>
      </source>
      <model type='virtio'/>
      <driver queues='2'@PACKED@/>
      <alias name='ua-tandem0'/>
    </interface>"""

# The control: the same guest and traffic through an ordinary bridge port of QEMU.
PLAIN_NIC = f"""<interface type='bridge'>
      <mac address='{MAC}'/>
      <source bridge='{NAME}'/>
      <model type='virtio'/>
      <driver name='qemu' queues='2'/>
    </interface>"""

# QEMU 7.2 without KVM crashes when a vhost-user device uses MSI-X (msix_set_vector_notifiers).
NO_VECTORS = """<qemu:override>
    <qemu:device alias='ua-tandem0'>
      <qemu:frontend>
        <qemu:property name='vectors' type='unsigned' value='0'/>
      </qemu:frontend>
    </qemu:device>
  </qemu:override>"""


def virsh(*words, check=True):
    return run("virsh", "-c", "qemu:///system", "-q", *words, check=check)


def domain_xml(plain, packed):
    accelerated = has_virtualization()
    with open(os.path.join(HERE, "domain.xml.in"), encoding="utf-8") as file:
        text = file.read()
    for name, value in {
            "TYPE": "kvm" if accelerated else "qemu",
            "CPU": "<cpu mode='host-passthrough'/>" if accelerated else "",
            "NAME": NAME,
            "FILES": FILES,
            "ADDRESS": f"{GUEST_ADDRESS}/24",
            "METADATA": "" if plain else METADATA,
            "INTERFACE": PLAIN_NIC if plain else TANDEM_NIC,
            "PACKED": " packed='on'" if packed else "",
            "OVERRIDE": "" if plain or accelerated else NO_VECTORS,
    }.items():
        text = text.replace(f"@{name}@", value)
    return text


def build_files(root, traffic):
    """Kernel and initramfs. The folders above must let QEMU's user pass."""
    run(os.path.join(root, "tests/guest/build-initramfs"), "--program", traffic, "--output", FILES)
    os.chmod(FILES, 0o755)


def remove_old_one():
    """A definition that outlived its demo, for instance a reboot of this host in the middle of one."""
    old = virsh("dumpxml", NAME, check=False)
    if old.returncode != 0:
        return
    if MAC not in old.stdout:
        raise DemoError(f"There is a domain named {NAME} that is not the demo's. Rename or undefine it.")
    virsh("destroy", NAME, check=False)
    virsh("undefine", NAME)


def start(journal, plain, packed=False):
    path = os.path.join(FILES, "domain.xml")
    with open(path, "w", encoding="utf-8") as file:
        file.write(domain_xml(plain, packed))
    console = os.path.join(FILES, "console.log")
    if os.path.exists(console):
        os.unlink(console)
    remove_old_one()
    journal.note("domain", name=NAME)
    virsh("define", path)
    done = virsh("start", NAME, check=False)
    if done.returncode != 0:
        raise DemoError(f"virsh start {NAME}: {done.stderr.strip()}")


def console_tail(lines=15):
    try:
        with open(os.path.join(FILES, "console.log"), encoding="utf-8", errors="replace") as file:
            return "".join(file.readlines()[-lines:])
    except OSError:
        return ""
