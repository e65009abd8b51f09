// SPDX-License-Identifier: GPL-2.0
/*
 * execve(2) of a traced process: the same pid continues with another program, new threads and a new VM.
 *
 * In: sched:sched_process_exec, and sched:sched_prepare_exec (Linux 6.10 and later), which fires before the kernel ends
 * the other threads and frees the memory. Out: EXEC records.
 */
#pragma once

#include "common.h"

struct exec_record {
	u64 kind, at_ns, pid, begin_ns, had_vm;
};

BPF_HASH(preparing, u32, u64, 256);	/* tgid -> when its execve began to replace the program */

/* sched_prepare_exec: task, bprm. */
int on_prepare_exec(struct bpf_raw_tracepoint_args *ctx)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	u64 now;

	if (!EBPF_MIG_TARGETS(tgid))
		return 0;
	now = bpf_ktime_get_ns();
	preparing.update(&tgid, &now);
	return 0;
}

/* sched_process_exec: task, pid of the thread before, bprm. No vCPU thread is left, and none was inside KVM_RUN. */
int on_process_exec(struct bpf_raw_tracepoint_args *ctx)
{
	u64 pid_tgid = bpf_get_current_pid_tgid(), *begin;
	struct process_state *p = this_process(pid_tgid);
	struct thread_state *s = known_thread(pid_tgid);
	u32 tgid = pid_tgid >> 32;
	struct exec_record *r;

	if (!EBPF_MIG_TARGETS(tgid))
		return 0;
	if (p)
		p->running = 0;
	if (s)
		s->nr = s->kicked = 0;	/* of the old program, and of the thread that had this id */
	begin = preparing.lookup(&tgid);
	r = events.ringbuf_reserve(sizeof(*r));
	if (r) {
		r->kind = KIND_EXEC;
		r->at_ns = bpf_ktime_get_ns();
		r->pid = tgid;
		r->begin_ns = begin ? *begin : 0;
		r->had_vm = 0;
		events.ringbuf_submit(r, RB_FORCE_WAKEUP);
	} else {
		count(KIND_EXEC, true);
	}
	preparing.delete(&tgid);
	return 0;
}
