/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shared by all programs: the traced processes, the state per thread and process, the ring buffer and its losses.
 *
 * The loader sets macros with -D (probes/macros.py). EBPF_MIG_TARGETS(tgid) compares a tgid with literals. It is not
 * defined if targets change; then the processes in the map `processes` are traced. OFF_* are struct offsets from
 * BTF, or OFF_NONE if the kernel has no such member. Thresholds are those of recording/thresholds.py. The loader
 * also appends assertions that compare every record and every kind with the Python half (probes/contract.py).
 */
#pragma once

#include <linux/types.h>
#include "arch.h"

/*
 * Flags of bpf_ringbuf_submit, include/uapi/linux/bpf.h. Waking the reader costs an interrupt and a context switch
 * during the measurement. So the reader polls periodically, and only urgent records wake it.
 */
#define RB_NO_WAKEUP 1ULL
#define RB_FORCE_WAKEUP 2ULL

enum kind {
	KIND_IOCTL = 1,
	KIND_VCPU_ENTER = 2,
	KIND_VCPU_EXIT = 3,
	KIND_KICK = 5,
	KIND_TRANSFER = 6,
	KIND_SOCKET = 7,
	KIND_OFF_CPU = 8,
	KIND_SEGMENT = 9,
	KIND_SAMPLE = 10,
	KIND_VCPU_SPAN = 11,
	KIND_RETRANSMIT = 12,
	KIND_EXEC = 13,
	KIND_SOCKET_ERROR = 14,
	KIND_THREAD_TABLE = 15,		/* losses only: the table of threads was full */
	KIND_RUN_DELAY = 16,
	KIND_USER_STACK = 17,
	KIND_OWN_RUNS = 18,
	KIND_CALL = 19,
	KIND_OWN_TURN = 20,
	KIND_MISSED_RETURN = 21,	/* losses only: the end of a call was not seen */
	KIND_VCPU_SLEEP = 22,		/* losses only: the table of their sums was full */
	KIND_MAX = 23,
};

/* Every record is a struct of u64 and s64 that starts with the kind; recording/kinds.py lists its fields. */
BPF_RINGBUF_OUTPUT(events, EBPF_MIG_RING_PAGES);
BPF_PERCPU_ARRAY(lost, u64, KIND_MAX);
BPF_PERCPU_ARRAY(unpaired, u64, KIND_MAX);

struct transfer_batch {
	u64 begin_ns, end_ns;
	s64 fd;
	u64 file, socket, calls, bytes, in_call_ns, max_call_ns, failed, epoch, off_cpu_ns, off_before_ns;
	u64 descriptors;
};

/* A stretch off the CPU. */
struct off_cpu {
	u64 since;				/* 0: on the CPU, or not seen yet */
	u64 stack, preempted, rt_throttled;
	u64 cpu, next_tid;			/* the CPU it lost, and who got it */
};

struct thread_state {
	u64 tgid;
	u64 nr, enter;				/* the tracked call in flight; nr is stored + 1, 0: none */
	u64 a0, a1, a2;
	u64 descriptors;			/* that the send in flight passes */
	u64 slot, flags, addr, size;		/* from the argument of a memory ioctl */
	u64 seen;				/* an entry was seen, so an exit without one is not KVM_RUN */
	u64 vcpu_fd, run_enter_ns, run_exit_ns;
	s64 run_ret;
	u64 runs, in_ns, out_ns, max_gap_ns, counted;
	struct off_cpu off;			/* while switched out */
	u64 run_delay, slept_until;		/* task->sched_info.run_delay; end of the sleep recorded since, 0: none */
	u64 preempted, run_preempted;		/* ns without a CPU while runnable, in total; the same when KVM_RUN began */
	u64 off_call;				/* ns off the CPU within the call in flight */
	u64 off_all, off_before;		/* ns off the CPU in total; the same when the call in flight began */
	struct off_cpu kept;			/* the last long wait that has no record */
	u64 kept_until_ns, kept_previous_tid;
	u64 kicked;				/* when this thread last kicked another */
	u64 pages_pending;			/* that KVM fetches for this vCPU in the background */
	u64 lock, lock_since, lock_off;		/* the lock it waits for; off_call when the wait began */
	u64 lock_ns[3], spin_ns;		/* within the ioctl in flight, by LOCK_*; the part on the CPU */
	u64 split_ns[3];			/* within the ioctl in flight, by SPLIT_*; where SPLIT_KNOWN */
	u64 span_since, span_epoch, span_out, span_max, span_gaps, span_lock;	/* of a vCPU since its last record */
	u64 failure;				/* of its calls on sockets, the last that has a record */
	u64 samples;				/* taken in the ioctl in flight */
	u64 part, part_since, part_idle, flushing;	/* its current part (SPLIT_* + 1): see fetch_split.h */
	struct transfer_batch batch[3];		/* SEND, RECEIVE, UNTRACKED */
};

#define LOCK_SLOTS 0
#define LOCK_MMU 1
#define LOCK_OTHER 2

#define SPLIT_WALK 0			/* write-protecting pages, or clearing their dirty bits */
#define SPLIT_FLUSH 1			/* flushing TLBs */
#define SPLIT_COPY 2			/* copying the bitmap to or from user space */

struct process_state {
	s64 running;				/* vCPUs known to be inside KVM_RUN; initially those seen in /proc */
	u64 passes_on;				/* it is no VMM, but passes a migration's bytes on */
	u64 epoch, last_fetch;			/* epoch: number of this process's dirty-log fetches so far */
	s64 budget;
	u64 granted, refilled;
	u64 user_stacks;			/* still to be taken until the next fetch */
	u64 started;				/* its guest was seen to start: see vcpu_sleeps.h */
};

BPF_HASH(threads, u32, struct thread_state, 8192);
BPF_HASH(processes, u32, struct process_state, 256);

#ifndef EBPF_MIG_TARGETS
static __always_inline bool is_target(u32 tgid)
{
	return processes.lookup(&tgid) != 0;
}
#define EBPF_MIG_TARGETS(tgid) is_target(tgid)
#endif

BPF_ARRAY(fetches, u64, 1);			/* by any traced process */
struct owner {
	u64 pid, socket, retransmits;
};
BPF_HASH(tcp_owners, u64, struct owner, 4096);	/* by struct sock */
BPF_PERCPU_ARRAY(blank_thread, struct thread_state, 1);

static __always_inline void count(u32 kind, bool is_lost)
{
	u32 key = kind;
	u64 *n = is_lost ? lost.lookup(&key) : unpaired.lookup(&key);

	if (n)
		(*n)++;
}

/* The state of the current thread, created when it is first seen; 0 if the table is full (counted). */
static __always_inline struct thread_state *this_thread(u64 pid_tgid)
{
	u32 tid = pid_tgid, zero = 0;
	struct thread_state *s = threads.lookup(&tid), *blank;

	if (s)
		return s;
	blank = blank_thread.lookup(&zero);
	if (!blank)
		return 0;
	blank->tgid = pid_tgid >> 32;
	threads.update(&tid, blank);
	s = threads.lookup(&tid);
	if (!s)
		count(KIND_THREAD_TABLE, true);
	return s;
}

static __always_inline struct thread_state *known_thread(u32 tid)
{
	return threads.lookup(&tid);
}

static __always_inline void begin_call(struct thread_state *s, u64 now, u64 nr, u64 a0, u64 a1)
{
	s->nr = nr + 1;
	s->off_call = 0;
	s->off_before = s->off_all;
	s->a0 = a0;
	s->a1 = a1;
	s->descriptors = 0;
	s->enter = now;
}

/* ns off the CPU within the call in flight, which ended at `now`: without a preemption of the program that says so. */
static __always_inline u64 off_cpu_in_call(struct thread_state *s, u64 now)
{
	u64 took = now - s->enter;

	return s->off_call < took ? s->off_call : took;
}

static __always_inline u64 read_u64(u64 base, u32 offset)
{
	u64 v = 0;

	bpf_probe_read_kernel(&v, sizeof(v), (void *)(base + offset));
	return v;
}

/* The registers of the current task at kernel entry. The helpers exist since Linux 5.11 and 5.15. */
static __always_inline const void *user_regs(void)
{
#if TASK_REGS_HELPER
	void *(*current_task)(void) = (void *)158;	/* bpf_get_current_task_btf */
	void *(*task_regs)(void *) = (void *)175;	/* bpf_task_pt_regs */

	return task_regs(current_task());
#else
	return (const void *)(read_u64(bpf_get_current_task(), OFF_task_stack) + USER_REGS_AT);
#endif
}

/*
 * What a program gets where no event may be missed: see preemptible_tracepoints in probes/attach.py. The layouts of trace
 * events are those of their `format` files, events/raw_syscalls and events/kvm in tracefs; user space relies on them.
 */
#if TRACE_EVENTS
struct call_begins {
	u64 common;
	s64 nr;
};
struct call_ends {
	u64 common;
	s64 nr, ret;
};
struct userspace_exit {
	u64 common;
	u32 reason;
	s32 error;
};
#define CALL_NUMBER(ctx) ((u64)(ctx)->nr)
#define CALL_RETURNED(ctx) ((ctx)->ret)
#define CALL_REGS(ctx) user_regs()
#define EXIT_ERROR(ctx) ((ctx)->error)
#else
#define call_begins bpf_raw_tracepoint_args		/* regs, nr */
#define call_ends bpf_raw_tracepoint_args		/* regs, ret */
#define userspace_exit bpf_raw_tracepoint_args		/* reason, errno */
#define CALL_NUMBER(ctx) ((ctx)->args[1])
#define CALL_RETURNED(ctx) ((s64)(ctx)->args[1])
#define CALL_REGS(ctx) ((const void *)(ctx)->args[0])
#define EXIT_ERROR(ctx) ((s32)(ctx)->args[1])
#endif

/* The struct file behind a descriptor of the current task, or 0. */
static __always_inline u64 file_of(u64 fd)
{
	u64 task = bpf_get_current_task();
	u64 files = read_u64(task, OFF_task_files);
	u64 table = read_u64(files, OFF_files_fdt);
	u64 array = read_u64(table, OFF_fdtable_fd);

	return read_u64(array, (u32)fd * 8);
}

static __always_inline struct process_state *this_process(u64 pid_tgid)
{
	u32 tgid = pid_tgid >> 32;

	return processes.lookup(&tgid);
}

/*
 * Single calls are kept while no vCPU of the process is inside KVM_RUN. That covers the blackout on both sides and,
 * on a destination, all of pre-copy. The budget prevents a flood of records.
 */
static __always_inline bool in_detail(struct process_state *p, u64 now)
{
	u32 zero = 0;
	u64 *all = fetches.lookup(&zero), ms;

	/* Another program may have refilled it after `now` was read: on another CPU, or here after a preemption. */
	ms = now > p->refilled ? (now - p->refilled) / 1000000 : 0;

	if (p->running > 0)
		return false;
	if (all && p->granted != *all) {
		p->granted = *all;
		p->budget = DETAIL_BUDGET;
		p->user_stacks = USER_STACK_BUDGET;
		p->refilled = now;
	} else if (ms && p->budget < DETAIL_BUDGET) {
		p->budget += DETAIL_PER_MS * (ms > 1000 ? 1000 : ms);
		p->user_stacks += ms > USER_STACK_BUDGET ? USER_STACK_BUDGET : ms;
		if (p->user_stacks > USER_STACK_BUDGET)
			p->user_stacks = USER_STACK_BUDGET;
		p->refilled = now;
	}
	return p->budget > 0;
}
