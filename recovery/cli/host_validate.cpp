// SPDX-License-Identifier: Apache-2.0
// The checks behind `virt-tandem host-validate`.
#include "recovery/cli/host_validate.hpp"

#include <pwd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>

#include "common/unique_fd.hpp"
#include "recovery/cli/client.hpp"
#include "recovery/fence/kernel_version.hpp"

namespace tandem {

namespace {

using Verdict = HostCheck::Verdict;

bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

HostCheck check(std::string what, bool good, std::string remedy, Verdict otherwise = Verdict::kFail) {
  return {good ? Verdict::kPass : otherwise, std::move(what), good ? std::string{} : std::move(remedy)};
}

bool cpu_virtualizes() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string word; file >> word;)
    if (word == "vmx" || word == "svm") return true;
  return false;
}

}  // namespace

std::vector<HostCheck> validate_host(const std::string& control_socket) {
  std::vector<HostCheck> checks;
  const std::string release = running_kernel_release();
  const auto supported = kernel_is_supported(release);
  checks.push_back(check("kernel " + release + " maps AF_XDP rings after bind (6.4 or newer)", supported.has_value(),
                         supported ? "" : supported.error().text));
  checks.push_back(check("kernel types for BPF (/sys/kernel/btf/vmlinux)", exists("/sys/kernel/btf/vmlinux"),
                         "the fence needs a kernel with CONFIG_DEBUG_INFO_BTF=y, as Debian's have"));
  const UniqueFd xdp{::socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0)};
  checks.push_back(check("AF_XDP sockets", xdp.get() >= 0 || ::geteuid() != 0,
                         "the kernel needs CONFIG_XDP_SOCKETS=y, as Debian's have"));
  checks.push_back(check(
      "hardware virtualization (KVM)", cpu_virtualizes() && exists("/dev/kvm"),
      "guests run under QEMU's emulation (type='qemu'), many times slower; enable it in the firmware", Verdict::kWarn));
  checks.push_back(check("/dev/net/tun (not used by Tandem; libvirt's ordinary NICs need it)", exists("/dev/net/tun"),
                         "load the module: modprobe tun", Verdict::kWarn));
  checks.push_back(check("libvirt (/run/libvirt/libvirt-sock)",
                         exists("/run/libvirt/libvirt-sock") || exists("/run/libvirt/virtqemud-sock"),
                         "start it: systemctl start libvirtd, or libvirtd -d without systemd"));
  checks.push_back(check("libvirt hook (/etc/libvirt/hooks/qemu.d/tandem)", exists("/etc/libvirt/hooks/qemu.d/tandem"),
                         "install it, then restart libvirtd or send it SIGHUP: hooks are looked for only then"));
  checks.push_back(check("account \"tandem\" for backends", ::getpwnam("tandem") != nullptr,
                         "create it: adduser --system --group --no-create-home tandem"));
  checks.push_back(check("tandemd answers on " + control_socket,
                         ask_tandemd(control_socket, {{"command", "status"}}, 5).has_value(),
                         "start it: systemctl start tandem-vault tandemd"));
  return checks;
}

}  // namespace tandem
