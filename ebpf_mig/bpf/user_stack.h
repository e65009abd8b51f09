/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The user half of a wait's stack: the registers at kernel entry, and the words above the stack pointer.
 *
 * In: a traced thread, which is the current one. Out: a USER_STACK record for an OFF_CPU record, with the same end.
 * Only where USER_STACKS is set. The thread stands at the same place when it leaves the CPU and when it is back, so
 * a record costs a copy of 4 KiB only for a wait that has a record. Without sched_exit_tp, the copy is made whenever
 * a thread leaves. probes/user_stacks.py finds the callers, by the unwind tables of the program or its frame pointers.
 */
#pragma once

#include "common.h"

#define USER_REGS 21			/* struct pt_regs of x86-64, in words */
#define USER_REG_SP 19
#define USER_CHUNK 64			/* words; a chunk is copied whole or not at all */
#define USER_CHUNKS 8

struct user_stack_record {
	u64 kind, at_ns, pid, tid, regs[USER_REGS], words, stack[USER_CHUNK * USER_CHUNKS];
};

#if USER_STACKS
BPF_HASH(user_stacks, u32, struct user_stack_record, 512);	/* of threads that are off the CPU */
BPF_PERCPU_ARRAY(user_stack_scratch, struct user_stack_record, 1);

static __always_inline void read_user_stack(struct user_stack_record *r, u64 pid_tgid)
{
	u64 sp;

	r->kind = KIND_USER_STACK;
	r->pid = pid_tgid >> 32;
	r->tid = (u32)pid_tgid;
	r->words = 0;
	bpf_probe_read_kernel(r->regs, sizeof(r->regs), user_regs());
	sp = r->regs[USER_REG_SP];
#pragma unroll
	for (int i = 0; i < USER_CHUNKS; i++) {
		if (bpf_probe_read_user(r->stack + i * USER_CHUNK, USER_CHUNK * 8, (void *)(sp + i * USER_CHUNK * 8)))
			break;
		r->words += USER_CHUNK;
	}
}

/* The thread is about to leave the CPU. */
static __always_inline void keep_user_stack(u64 pid_tgid)
{
	u32 tid = pid_tgid, zero = 0;
	struct user_stack_record *r = user_stack_scratch.lookup(&zero);

	if (!r)
		return;
	read_user_stack(r, pid_tgid);
	user_stacks.update(&tid, r);
}

/* The thread is back: it is the current one if `current`, else its stack was kept when it left. */
static __always_inline void emit_user_stack(u64 pid_tgid, u64 at, struct process_state *p, bool current)
{
	u32 tid = pid_tgid;
	struct user_stack_record *r;

	if (!p->user_stacks)
		return;
	p->user_stacks--;
	if (current) {
		r = events.ringbuf_reserve(sizeof(*r));
		if (!r) {
			count(KIND_USER_STACK, true);
			return;
		}
		read_user_stack(r, pid_tgid);
		r->at_ns = at;
		events.ringbuf_submit(r, RB_NO_WAKEUP);
		return;
	}
	r = user_stacks.lookup(&tid);
	if (!r)
		return;
	r->at_ns = at;
	if (events.ringbuf_output(r, sizeof(*r), RB_NO_WAKEUP))
		count(KIND_USER_STACK, true);
	user_stacks.delete(&tid);
}
#else
static __always_inline void keep_user_stack(u64 pid_tgid) {}
static __always_inline void emit_user_stack(u64 pid_tgid, u64 at, struct process_state *p, bool current) {}
#endif
