# SPDX-License-Identifier: Apache-2.0
"""The demo's guest: its files, its domain XML, its life under libvirt. Tests give it another shape, or a neighbour."""
import dataclasses
import os

from host import FILES, GUEST_ADDRESS, NAME, DemoError, has_virtualization, run

MAC = "52:54:00:7a:6d:01"
HERE = os.path.dirname(os.path.abspath(__file__))



@dataclasses.dataclass(frozen=True)
class Shape:
    """What tells one guest from another; the demo's is the default."""
    name: str = NAME
    mac: str = MAC
    address: str = GUEST_ADDRESS
    growing: bool = False  # memory can be plugged in while it runs
    kernel_words: str = ""
    offloads: str = ""  # children of <driver>: what its NIC is not to have

    @property
    def console(self):
        return os.path.join(FILES, "console.log" if self.name == NAME else f"{self.name}.log")


METADATA = f"""<metadata>
    <tandem:domain xmlns:tandem="urn:tandem:domain:1">
      <tandem:nic mac="@MAC@" pair="default">
        <tandem:uplink bridge="{NAME}"/>
      </tandem:nic>
    </tandem:domain>
  </metadata>"""

TANDEM_NIC = """<interface type='vhostuser'>
      <mac address='@MAC@'/>
      <source type='unix' path='/run/tandem/nic/@SOCKET@.sock' mode='client'>
        <reconnect enabled='yes' timeout='1'/>
      </source>
      <model type='virtio'/>
      <driver queues='2'@PACKED@>@OFFLOADS@</driver>
      <alias name='ua-tandem0'/>
    </interface>"""

# The control: the same guest and traffic through an ordinary bridge port of QEMU.
PLAIN_NIC = f"""<interface type='bridge'>
      <mac address='@MAC@'/>
      <source bridge='{NAME}'/>
      <model type='virtio'/>
      <driver name='qemu' queues='2'/>
    </interface>"""

# Room for memory to be plugged in; libvirt then wants the memory in NUMA cells.
GROWTH = "<maxMemory slots='4' unit='MiB'>1024</maxMemory>"
CELL = "<numa><cell id='0' cpus='0' memory='256' unit='MiB' memAccess='shared'/></numa>"

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


def _cpu(shape, accelerated):
    mode = " mode='host-passthrough'" if accelerated else ""
    cell = CELL if shape.growing else ""
    return f"<cpu{mode}>{cell}</cpu>" if mode or cell else ""


def domain_xml(plain, packed, shape=Shape()):
    accelerated = has_virtualization()
    with open(os.path.join(HERE, "domain.xml.in"), encoding="utf-8") as file:
        text = file.read()
    for name, value in {  # those that contain others first
            "METADATA": "" if plain else METADATA,
            "INTERFACE": PLAIN_NIC if plain else TANDEM_NIC,
            "TYPE": "kvm" if accelerated else "qemu",
            "CPU": _cpu(shape, accelerated),
            "GROWTH": GROWTH if shape.growing else "",
            "NAME": shape.name,
            "FILES": FILES,
            "CONSOLE": shape.console,
            "ADDRESS": f"{shape.address}/24",
            "KERNEL_WORDS": shape.kernel_words,
            "MAC": shape.mac,
            "SOCKET": shape.mac.replace(":", "-"),
            "PACKED": " packed='on'" if packed else "",
            "OFFLOADS": shape.offloads,
            "OVERRIDE": "" if plain or accelerated else NO_VECTORS,
    }.items():
        text = text.replace(f"@{name}@", value)
    return text


def build_files(root, traffic):
    """Kernel and initramfs. The folders above must let QEMU's user pass."""
    run(os.path.join(root, "tests/guest/build-initramfs"), "--program", traffic, "--output", FILES)
    os.chmod(FILES, 0o755)


def remove_old_one(shape):
    """A definition that outlived its demo, for instance a reboot of this host in the middle of one."""
    old = virsh("dumpxml", shape.name, check=False)
    if old.returncode != 0:
        return
    if shape.mac not in old.stdout:
        raise DemoError(f"There is a domain named {shape.name} that is not the demo's. Rename or undefine it.")
    virsh("destroy", shape.name, check=False)
    virsh("undefine", shape.name)


def start(journal, plain, packed=False, shape=Shape()):
    path = os.path.join(FILES, f"{shape.name}.xml")
    with open(path, "w", encoding="utf-8") as file:
        file.write(domain_xml(plain, packed, shape))
    if os.path.exists(shape.console):
        os.unlink(shape.console)
    remove_old_one(shape)
    journal.note("domain", name=shape.name)
    virsh("define", path)
    done = virsh("start", shape.name, check=False)
    if done.returncode != 0:
        raise DemoError(f"virsh start {shape.name}: {done.stderr.strip()}")
