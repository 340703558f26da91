// SPDX-License-Identifier: Apache-2.0
// Loads and attaches bpf/xsk_redirect.bpf.c.
#include "recovery/uplink/xdp_redirect.hpp"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <linux/if_link.h>

#include <memory>

#include "recovery/fence/pins.hpp"
#include "xsk_redirect.skel.h"

namespace tandem {
namespace {

struct SkeletonDeleter {
  void operator()(xsk_redirect_bpf* skeleton) const noexcept { xsk_redirect_bpf__destroy(skeleton); }
};

UniqueFd attach_in_mode(int program, std::uint32_t ifindex, std::uint32_t mode) {
  bpf_link_create_opts options{};
  options.sz = sizeof options;
  options.flags = mode;
  return UniqueFd{::bpf_link_create(program, static_cast<int>(ifindex), BPF_XDP, &options)};
}

}  // namespace

Result<XdpRedirect> XdpRedirect::attach(std::uint32_t ifindex, bool pass_host_traffic, const std::string& pin_dir) {
  const std::string doing = "attach the XDP program to netdev " + std::to_string(ifindex);
  const std::unique_ptr<xsk_redirect_bpf, SkeletonDeleter> skeleton{xsk_redirect_bpf__open()};
  if (!skeleton) return fail_errno(doing);
  if (pass_host_traffic) skeleton->rodata->verdict_without_socket = XDP_PASS;
  if (const int error = xsk_redirect_bpf__load(skeleton.get()); error != 0)
    return fail_errno(doing, "needs root and a kernel with CONFIG_BPF_SYSCALL=y and CONFIG_XDP_SOCKETS=y", -error);

  XdpRedirect made;
  const int program = bpf_program__fd(skeleton->progs.xsk_redirect);
  made.link_ = attach_in_mode(program, ifindex, XDP_FLAGS_DRV_MODE);
  if (!made.link_ && errno != EBUSY && errno != EEXIST) {
    made.link_ = attach_in_mode(program, ifindex, XDP_FLAGS_SKB_MODE);
    made.generic_ = static_cast<bool>(made.link_);
  }
  if (!made.link_ && (errno == EBUSY || errno == EEXIST))
    return fail(ErrorKind::kInvalid, doing + ": it has another XDP program; detach that one (ip link set DEV xdp off)");
  if (!made.link_) return fail_errno(doing);
  made.map_ = UniqueFd{::fcntl(bpf_map__fd(skeleton->maps.sockets), F_DUPFD_CLOEXEC, 0)};
  if (!made.map_) return fail_errno(doing);

  if (auto directory = make_pin_directory(pin_dir); !directory) return within(doing, std::move(directory.error()));
  made.pin_dir_ = pin_dir;
  Status pinned = pin_object(made.link_.get(), pin_dir + "/link");
  if (pinned) pinned = pin_object(made.map_.get(), pin_dir + "/sockets");
  if (!pinned) {
    (void)made.unpin();
    return within(doing, std::move(pinned.error()));
  }
  return made;
}

Status XdpRedirect::add(std::uint32_t queue, int socket_fd) {
  if (::bpf_map_update_elem(map_.get(), &queue, &socket_fd, BPF_ANY) != 0)
    return fail_errno("direct frames of queue " + std::to_string(queue) + " to its AF_XDP socket");
  return {};
}

Result<XdpRedirect> XdpRedirect::adopt(const std::string& pin_dir) {
  XdpRedirect adopted;
  for (auto [fd, name] : {std::pair{&adopted.link_, "/link"}, std::pair{&adopted.map_, "/sockets"}}) {
    auto opened = open_pin(pin_dir + name);
    if (!opened) return tl::make_unexpected(std::move(opened.error()));
    *fd = std::move(*opened);
  }
  adopted.pin_dir_ = pin_dir;
  return adopted;
}

Status XdpRedirect::unpin() { return pin_dir_.empty() ? Status{} : remove_pin_directory(pin_dir_); }

}  // namespace tandem
