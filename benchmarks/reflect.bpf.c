// SPDX-License-Identifier: (GPL-2.0 OR Apache-2.0)
// The other end of a cable in the `uplink` benchmark: what comes in goes out again, in the kernel and at once.
// bpf_helpers.h takes the kernel's types from the header before it.
// clang-format off
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
// clang-format on

SEC("xdp") int reflect(struct xdp_md* frame) {
  (void)frame;
  return XDP_TX;
}

char LICENSE[] SEC("license") = "GPL";
