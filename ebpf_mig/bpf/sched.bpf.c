// SPDX-License-Identifier: GPL-2.0
/*
 * Records when and where a traced thread is off the CPU.
 *
 * In: the raw tracepoints sched_switch and, from Linux 6.16 on, sched_exit_tp. They fire for the whole host, so the
 * check for traced threads comes first.
 * Out: sums in the state of the thread, which become part of the record of the call; sums of the sleeps of vCPUs
 * (vcpu_sleeps.h); and OFF_CPU records, with the
 * kernel stack, of long waits while no vCPU runs and of the wait before a kick. A thread that kicks vCPUs starts to
 * sleep while they still run; this sleep is recorded with its stack, too.
 *
 * A stack costs more than all else here, and most waits are too short for a record. sched_exit_tp fires in the thread
 * that has come back, at the end of the same __schedule(), where its stack is still the one it slept with. So only a
 * wait that has a record costs a stack. Without that tracepoint, the stack is taken whenever a thread leaves.
 */
#pragma once

#include "own_runs.h"
#include "user_stack.h"
#include "vcpu_sleeps.h"

#define KEPT_NS 5000000ULL		/* a wait that ended this long before a kick is unrelated to it */
#define KICKED_NS 20000000ULL		/* so is one that begins this long after; Cloud Hypervisor re-kicks after 10 ms */
#define NO_STACK 0xffffffffULL
#define MAX_RT_PRIO 100			/* include/linux/sched/prio.h; real-time and deadline tasks are below */

/* Values of WAIT_STACKS, which says when the stack of a wait is taken. */
#define STACK_NEVER 0			/* to measure what the stacks cost */
#define STACK_AS_IT_LEAVES 1
#define STACK_WHEN_BACK 2

struct off_cpu_record {
	u64 kind, begin_ns, end_ns, pid, tid, stack_id, preempted, cpu, next_tid, previous_tid, rt_throttled;
};

struct run_delay_record {
	u64 kind, at_ns, pid, tid, delay_ns;
};

BPF_STACK_TRACE(stacks, 1024);
#define SWITCHING_FRAMES 4
#define STACK_PLACE_TAKEN (-17)		/* EEXIST: another stack has this one's place in the map */
BPF_PERCPU_ARRAY(switched_from, u32, 1);	/* who had this CPU before the last switch; with STACK_WHEN_BACK */

/*
 * The innermost functions only say that the thread is switched: this program, who calls it, __schedule, schedule.
 * Without some of them the stack is the same, but has another place.
 */
static __always_inline s64 stack_here(void *ctx)
{
	s64 found = STACK_PLACE_TAKEN;

#pragma unroll
	for (int skip = 0; skip < SWITCHING_FRAMES; skip++) {
		found = stacks.get_stackid(ctx, skip);
		if (found != STACK_PLACE_TAKEN)
			break;
	}
	return found;
}

static __always_inline bool is_real_time(u64 task)
{
	return (s32)read_u64(task, OFF_task_prio) < MAX_RT_PRIO;
}

#if RUN_DELAY_KNOWN
/*
 * The scheduler adds to run_delay when a thread gets the CPU, after this tracepoint. So how long it could run at the
 * end of a sleep is known when it is switched out the next time.
 */
static __always_inline void emit_run_delay(struct thread_state *s, u64 pid_tgid, u64 task)
{
	u64 total = read_u64(task, OFF_task_run_delay), delay = total - s->run_delay, slept_until = s->slept_until;
	struct run_delay_record *r;

	s->run_delay = total;
	s->slept_until = 0;
	if (!slept_until || delay < LONG_WAIT_NS)
		return;
	r = events.ringbuf_reserve(sizeof(*r));
	if (!r) {
		count(KIND_RUN_DELAY, true);
		return;
	}
	r->kind = KIND_RUN_DELAY;
	r->at_ns = slept_until;
	r->pid = pid_tgid >> 32;
	r->tid = (u32)pid_tgid;
	r->delay_ns = delay;
	events.ringbuf_submit(r, RB_NO_WAKEUP);
}
#endif

/* The current task is still the previous one. If it is runnable, it was preempted and does not sleep. */
static __always_inline void switched_out(void *ctx, u64 pid_tgid, u64 now, u64 task, u64 next, u32 next_tid)
{
	struct thread_state *s = known_thread(pid_tgid);
	struct process_state *p;
	s64 stack = -1;
	bool preempted;

	if (!s)
		return;
	preempted = (u32)read_u64(task, OFF_task_state) == 0;
	s->off.since = now;
	s->off.preempted = preempted;
	s->off.rt_throttled = preempted && is_real_time(task) && !is_real_time(next);
	s->off.cpu = bpf_get_smp_processor_id();
	s->off.next_tid = next_tid;
#if RUN_DELAY_KNOWN
	emit_run_delay(s, pid_tgid, task);
#endif
	if (WAIT_STACKS != STACK_AS_IT_LEAVES)
		return;
	p = this_process(pid_tgid);
	if (p && !preempted && p->budget > 0 && (p->running <= 0 || now - s->kicked < KICKED_NS)) {
		stack = stack_here(ctx);
		keep_user_stack(pid_tgid);
	} else if (!preempted && sleeps_count(s, p)) {
		stack = stack_here(ctx);
	}
	s->off.stack = stack < 0 ? NO_STACK : stack;
}

/* `previous_tid`: who had the CPU until the thread got it; 0: the idle task. */
static __always_inline void emit_off_cpu(u64 pid_tgid, struct off_cpu *off, u64 until, u32 previous_tid)
{
	struct off_cpu_record *r = events.ringbuf_reserve(sizeof(*r));

	if (!r) {
		count(KIND_OFF_CPU, true);
		return;
	}
	r->kind = KIND_OFF_CPU;
	r->begin_ns = off->since;
	r->end_ns = until;
	r->pid = pid_tgid >> 32;
	r->tid = (u32)pid_tgid;
	r->stack_id = off->stack;
	r->preempted = off->preempted;
	r->cpu = off->cpu;
	r->next_tid = off->next_tid;
	r->previous_tid = previous_tid;
	r->rt_throttled = off->rt_throttled;
	events.ringbuf_submit(r, RB_NO_WAKEUP);
}

/* With STACK_WHEN_BACK, the thread is the current one. */
static __always_inline void switched_in(void *ctx, u32 tid, u32 tgid, u64 now, u32 previous_tid)
{
	struct thread_state *s = known_thread(tid);
	struct process_state *p;
	struct off_cpu off;
	u64 since;
	s64 taken = -1;

	if (!s || !s->off.since)
		return;
	off = s->off;
	since = off.since;
	s->off.since = 0;
	s->off_all += now - since;
	if (off.preempted)
		s->preempted += now - since;
	if (s->nr)
		s->off_call += now - (since > s->enter ? since : s->enter);
	p = processes.lookup(&tgid);
	if (!off.preempted && sleeps_count(s, p)) {
		if (WAIT_STACKS == STACK_WHEN_BACK)
			taken = stack_here(ctx);
		vcpu_slept(s, tid, WAIT_STACKS == STACK_AS_IT_LEAVES ? off.stack : taken, since, now);
	}
	if (!p || now - since < LONG_WAIT_NS)
		return;
	if (!in_detail(p, now)) {
		s->kept = off;
		s->kept.stack = NO_STACK;
		s->kept_until_ns = now;
		s->kept_previous_tid = previous_tid;
		return;
	}
	__sync_fetch_and_add(&p->budget, -1);
	if (!off.preempted) {
		s->slept_until = now;
		if (WAIT_STACKS == STACK_WHEN_BACK)
			taken = stack_here(ctx);
	}
	if (WAIT_STACKS != STACK_AS_IT_LEAVES)
		off.stack = taken < 0 ? NO_STACK : taken;
	emit_off_cpu((u64)tgid << 32 | tid, &off, now, previous_tid);
	if (!off.preempted)
		emit_user_stack((u64)tgid << 32 | tid, now, p, WAIT_STACKS == STACK_WHEN_BACK);
}

/*
 * The first kick opens the window while vCPUs still run. A thread may lose the CPU between its decision to stop and
 * that kick. This record explains why the VMM's own time stamp is much earlier.
 */
static __always_inline void emit_wait_before_kick(u64 pid_tgid, u64 now)
{
	struct thread_state *s = known_thread(pid_tgid);

	if (!s)
		return;
	s->kicked = now;
	if (!s->kept_until_ns || now - s->kept_until_ns > KEPT_NS)
		return;
	emit_off_cpu(pid_tgid, &s->kept, s->kept_until_ns, s->kept_previous_tid);
	s->kept_until_ns = 0;
}

/* sched_switch: preempt, prev, next[, prev_state since 5.18]. */
int on_sched_switch(struct bpf_raw_tracepoint_args *ctx)
{
	u64 pid_tgid = bpf_get_current_pid_tgid(), next = ctx->args[2];
	bool of_target = EBPF_MIG_TARGETS((u32)(pid_tgid >> 32));
	u32 tgid = 0, tid = 0, zero = 0, *previous;
	u64 began;

	if (WAIT_STACKS == STACK_WHEN_BACK) {
		previous = switched_from.lookup(&zero);
		if (previous)
			*previous = (u32)pid_tgid;
		if (!of_target) {
			if (is_reading_process(pid_tgid >> 32))
				own_turn_ends();
			return not_traced(false);
		}
		began = bpf_ktime_get_ns();
		bpf_probe_read_kernel(&tid, sizeof(tid), (void *)(next + OFF_task_pid));
		switched_out(ctx, pid_tgid, began, ctx->args[1], next, tid);
		return traced(began, false);
	}
	bpf_probe_read_kernel(&tgid, sizeof(tgid), (void *)(next + OFF_task_tgid));
	if (is_reading_process(pid_tgid >> 32))
		own_turn_ends();
	if (is_reading_process(tgid))
		own_turn_begins();
	if (!of_target && !EBPF_MIG_TARGETS(tgid))
		return not_traced(false);
	began = bpf_ktime_get_ns();
	bpf_probe_read_kernel(&tid, sizeof(tid), (void *)(next + OFF_task_pid));
	if (of_target)
		switched_out(ctx, pid_tgid, began, ctx->args[1], next, tid);
	if (EBPF_MIG_TARGETS(tgid))
		switched_in(ctx, tid, tgid, began, (u32)pid_tgid);
	return traced(began, false);
}

/* sched_exit_tp: is_switch[, ip in 6.16]. It also fires if the thread kept the CPU; then `off.since` is 0. */
int on_sched_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 pid_tgid = bpf_get_current_pid_tgid(), began;
	u32 zero = 0, *previous;

	if (!EBPF_MIG_TARGETS((u32)(pid_tgid >> 32))) {
		if (ctx->args[0] && is_reading_process(pid_tgid >> 32))
			own_turn_begins();
		return not_traced(false);
	}
	began = bpf_ktime_get_ns();
	previous = switched_from.lookup(&zero);
	switched_in(ctx, pid_tgid, pid_tgid >> 32, began, previous ? *previous : 0);
	return traced(began, false);
}
