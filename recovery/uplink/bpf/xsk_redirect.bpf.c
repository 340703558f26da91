/* SPDX-License-Identifier: (GPL-2.0 OR Apache-2.0) */
/* Sends each received frame to the AF_XDP socket of the queue it arrived on; a queue without one gets the configured
 * verdict. */
/* libbpf's headers take the kernel's types from those before them. */
/* clang-format off */
#include <linux/bpf.h>
#include <linux/types.h>

#include <bpf/bpf_helpers.h>
/* clang-format on */

char LICENSE[] SEC("license") = "GPL";

/* Set before load: XDP_DROP for a veth of ours, XDP_PASS if the host uses the netdev too. */
const volatile __u32 verdict_without_socket = XDP_DROP;

struct {
  __uint(type, BPF_MAP_TYPE_XSKMAP);
  __uint(max_entries, 64);
  __type(key, __u32);
  __type(value, __u32);
} sockets SEC(".maps");

SEC("xdp")
int xsk_redirect(struct xdp_md* frame) {
  /* The low bits of the flags are the verdict when the map has no socket at that index. */
  return (int)bpf_redirect_map(&sockets, frame->rx_queue_index, verdict_without_socket);
}
