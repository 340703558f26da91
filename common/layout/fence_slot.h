/* SPDX-License-Identifier: (GPL-2.0 OR Apache-2.0) */
/* Fence slots and watch entries: what the BPF fence writes and poll threads read. Shared by C (BPF) and C++.
 *
 * A poll-thread incarnation is named by a tag, a number that the supervisor never reuses. Its slot is
 * slots[tag % TANDEM_FENCE_SLOTS]; the incarnation is dead if and only if slot.tag == tag. Tag 0 means "nobody" and is
 * dead by definition: that is how a first owner comes into being by the same path as an heir.
 *
 * Writers: the BPF programs only (the slots map is frozen for user space). Readers: every process of the pair,
 * read-only. */
#ifndef TANDEM_COMMON_LAYOUT_FENCE_SLOT_H
#define TANDEM_COMMON_LAYOUT_FENCE_SLOT_H

#ifdef __cplusplus
#include <cstdint>
typedef std::uint64_t tandem_u64;
typedef std::uint32_t tandem_u32;
#else
typedef unsigned long long tandem_u64;
typedef unsigned int tandem_u32;
#endif

#define TANDEM_FENCE_SLOTS 4096u
#define TANDEM_FENCE_RINGS 256u
/* One BPF ring buffer per heir; a page is plenty for wake-ups that carry no data anyone needs. */
#define TANDEM_FENCE_RING_BYTES 4096u
#define TANDEM_FENCE_NO_RING 0xffffffffu

enum tandem_fence_cause {
  TANDEM_FENCE_ALIVE = 0,
  TANDEM_FENCE_SIGNAL = 1, /* a fatal signal was delivered to the thread */
  TANDEM_FENCE_EXIT = 2,   /* the thread left without one (exit, exec): the backstop */
};

/* 64 bytes, so that no two slots share a cache line. `tag` is stored last, with release order. */
struct tandem_fence_slot {
  tandem_u64 time_ns;   /* CLOCK_MONOTONIC at the mark */
  tandem_u32 cause;     /* enum tandem_fence_cause */
  tandem_u32 signal;    /* signal number for TANDEM_FENCE_SIGNAL, else 0 */
  tandem_u32 tid;       /* thread that died, init pid namespace */
  tandem_u32 own_doing; /* 1: the signal is a fault of the thread, or its own process sent it */
  tandem_u64 tag;       /* incarnation that is dead; stored last */
  tandem_u64 padding[4];
};

/* Value of the watch map; key is the tid in the init pid namespace. The entry is deleted when it trips. */
struct tandem_fence_watch {
  tandem_u64 tag;
  tandem_u32 ring; /* index of the heir's ring buffer, or TANDEM_FENCE_NO_RING */
  tandem_u32 reserved;
};

#ifdef __cplusplus
static_assert(sizeof(tandem_fence_slot) == 64, "a slot is one cache line");
static_assert(sizeof(tandem_fence_watch) == 16, "shared with BPF");
#endif

#endif
