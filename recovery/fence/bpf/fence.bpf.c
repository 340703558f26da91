/* SPDX-License-Identifier: (GPL-2.0 OR Apache-2.0) */
/* The fence: marks a watched poll thread as dead at the moment after which it can never run user code again.
 *
 * Three tracepoints, all of which run in the dying thread itself:
 *  - signal_deliver (kernel/signal.c, get_signal): before the core dump and before memory goes away. The order of tests
 * below is get_signal's own: SIGKILL, ignored, handled, default-ignored, unkillable, stopping; what is left kills.
 *  - sched_process_exit (kernel/exit.c, do_exit): the backstop, for exit, pthread_exit and seccomp kills.
 *  - sched_process_exec (fs/exec.c): the thread now runs another program in another address space. A thread that is not
 *    the leader takes the leader's tid here and never exits under its own.
 *
 * bpf_get_current_pid_tgid() counts in the init pid namespace, as the watch map's keys do. */
/* libbpf's headers take the kernel's types from those before them. */
/* clang-format off */
#include <linux/bpf.h>
#include <linux/types.h>

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#include "common/layout/fence_slot.h"
/* clang-format on */

char LICENSE[] SEC("license") = "GPL";

/* Signal numbers of asm-generic/signal.h, shared by x86-64 and arm64. */
enum {
  kSigKill = 9,
  kSigChld = 17,
  kSigCont = 18,
  kSigStop = 19,
  kSigTstp = 20,
  kSigTtin = 21,
  kSigTtou = 22,
  kSigUrg = 23,
  kSigWinch = 28,
};
#define SIGNAL_BIT(number) (1ULL << (number))
#define DEFAULT_IGNORES (SIGNAL_BIT(kSigChld) | SIGNAL_BIT(kSigCont) | SIGNAL_BIT(kSigUrg) | SIGNAL_BIT(kSigWinch))
#define DEFAULT_STOPS (SIGNAL_BIT(kSigStop) | SIGNAL_BIT(kSigTstp) | SIGNAL_BIT(kSigTtin) | SIGNAL_BIT(kSigTtou))
/* include/linux/sched/signal.h: a namespace's init, which default actions do not kill. */
#define SIGNAL_UNKILLABLE 0x40u
#define ENOENT 2

/* The fields used, found by name in the running kernel's BTF (CO-RE). */
struct sigaction {
  void* sa_handler;
} __attribute__((preserve_access_index));
struct k_sigaction {
  struct sigaction sa;
} __attribute__((preserve_access_index));
struct signal_struct {
  unsigned int flags;
} __attribute__((preserve_access_index));
struct task_struct {
  struct signal_struct* signal;
} __attribute__((preserve_access_index));
/* si_code and si_pid of siginfo_t (sigaction(2)). */
struct kernel_siginfo {
  int si_code;
  union {
    struct {
      int _pid;
    } _kill;
  } _sifields;
} __attribute__((preserve_access_index));
struct linux_binprm;

struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, TANDEM_FENCE_SLOTS);
  __type(key, __u32);
  __type(value, struct tandem_fence_watch);
} watch SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(map_flags, BPF_F_MMAPABLE);
  __uint(max_entries, TANDEM_FENCE_SLOTS);
  __type(key, __u32);
  __type(value, struct tandem_fence_slot);
} slots SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
  __uint(max_entries, TANDEM_FENCE_RINGS);
  __type(key, __u32);
  __array(
      values, struct {
        __uint(type, BPF_MAP_TYPE_RINGBUF);
        __uint(max_entries, TANDEM_FENCE_RING_BYTES);
      });
} rings SEC(".maps");

static __always_inline void wake(__u32 ring, __u64 tag) {
  void* heir = bpf_map_lookup_elem(&rings, &ring);
  /* A full ring is one that is readable already. */
  if (heir) bpf_ringbuf_output(heir, &tag, sizeof tag, BPF_RB_FORCE_WAKEUP);
}

/* Deleting the watch entry is the claim: it trips once. `last_chance` goes on if the map was too busy to delete from;
 * the entry then stays until its tag is unwatched, which is better than a death nobody hears of. */
static __always_inline void trip(__u32 tid, __u32 cause, __u32 signal, __u32 own_doing, int last_chance) {
  struct tandem_fence_watch* entry = bpf_map_lookup_elem(&watch, &tid);
  if (!entry) return;
  __u64 tag = entry->tag;
  __u32 ring = entry->ring;
  long error = bpf_map_delete_elem(&watch, &tid);
  if (error == -ENOENT || (error && !last_chance)) return;

  __u32 index = tag % TANDEM_FENCE_SLOTS;
  struct tandem_fence_slot* slot = bpf_map_lookup_elem(&slots, &index);
  if (!slot) return;
  slot->time_ns = bpf_ktime_get_ns();
  slot->cause = cause;
  slot->signal = signal;
  slot->tid = tid;
  slot->own_doing = own_doing;
  /* BPF_XCHG is a full barrier on every JIT: who sees this tag sees the stores above and the thread's own before them.
   */
  __sync_lock_test_and_set(&slot->tag, tag);
  wake(ring, tag);
}

static __always_inline int kills(int signal, const struct k_sigaction* action) {
  if (signal == kSigKill) return 1;
  /* Neither SIG_DFL (0): SIG_IGN and handlers. */
  if (action->sa.sa_handler) return 0;
  if (signal <= 0 || signal > 64) return 0;
  if (signal < 32 && (SIGNAL_BIT(signal) & DEFAULT_IGNORES)) return 0;
  if (signal < 32 && (SIGNAL_BIT(signal) & DEFAULT_STOPS)) return 0;
  struct task_struct* task = (struct task_struct*)bpf_get_current_task_btf();
  return !(task->signal->flags & SIGNAL_UNKILLABLE);
}

/* Whether the thread brought the signal upon itself: a fault (the kernel's codes are positive), or sent by its own
 * process (abort). A group's death is told to each thread as a SIGKILL without information.
 *
 * By reads that may fail: SEND_SIG_NOINFO and SEND_SIG_PRIV are 0 and 1 (include/linux/sched/signal.h), and
 * Debian's 6.12 lets no program follow this pointer itself ("marking pointer arg1 as scalar as it may encode error").
 */
static __always_inline __u32 own_doing(int signal, const struct kernel_siginfo* info) {
  int code = 0, sender = 0;
  if (signal == kSigKill || bpf_core_read(&code, sizeof code, &info->si_code)) return 0;
  if (code > 0) return 1;
  if (bpf_core_read(&sender, sizeof sender, &info->_sifields._kill._pid)) return 0;
  return (__u32)sender == (__u32)(bpf_get_current_pid_tgid() >> 32);
}

SEC("tp_btf/signal_deliver")
int BPF_PROG(on_signal, int signal, struct kernel_siginfo* info, struct k_sigaction* action) {
  __u32 tid = (__u32)bpf_get_current_pid_tgid();
  /* Nearly every signal on a host is for somebody else: one hash lookup and out. */
  if (!bpf_map_lookup_elem(&watch, &tid)) return 0;
  if (kills(signal, action)) trip(tid, TANDEM_FENCE_SIGNAL, (__u32)signal, own_doing(signal, info), 0);
  return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(on_exit) {
  trip((__u32)bpf_get_current_pid_tgid(), TANDEM_FENCE_EXIT, 0, 0, 1);
  return 0;
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(on_exec, struct task_struct* task, int old_tid, struct linux_binprm* program) {
  trip((__u32)old_tid, TANDEM_FENCE_EXIT, 0, 0, 1);
  return 0;
}
