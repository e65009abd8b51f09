/* SPDX-License-Identifier: GPL-2.0 */
/*
 * KVM ioctls. KVM_RUN is accounted in place and emitted only where it matters; each other ioctl is a record.
 *
 * In: entries and returns, from the attach tier in use. Out: IOCTL, VCPU_ENTER, VCPU_EXIT and KICK records.
 */
#pragma once

#include "common.h"
#include "own_runs.h"

#define KVM_TYPE 0xae
#define KVM_RUN 0xae80
#define KVM_CHECK_EXTENSION 0xae03
#define KVM_IRQ_LINE 0x4008ae61
#define KVM_IRQ_LINE_STATUS 0xc008ae67
#define KVM_INTERRUPT 0x4004ae86
#define KVM_SIGNAL_MSI 0x4020aea5
#define KVM_GET_DIRTY_LOG 0x4010ae42
#define KVM_CLEAR_DIRTY_LOG 0xc018aec0
#define KVM_RESET_DIRTY_RINGS 0xaec7
#define KVM_SET_USER_MEMORY_REGION 0x4020ae46
#define KVM_SET_USER_MEMORY_REGION2 0x40a0ae49
#define STOPPED_NS 1000000ULL		/* a guest whose vCPUs were all outside for longer was stopped */

#include "fetch_split.h"

struct ioctl_record {
	u64 kind, begin_ns, end_ns, pid, tid, fd, cmd;
	s64 ret;
	u64 slot, flags, addr, size;
	s64 off_cpu_ns, slots_lock_ns, mmu_lock_ns, other_lock_ns;	/* -1: unknown, as are all below */
	s64 walk_ns, flush_ns, copy_ns, spin_ns, off_total_ns;
};
struct vcpu_span_record {
	u64 kind, since_ns, until_ns, pid, tid, outside_ns, longest_ns, gaps;
	s64 lock_ns;
};
struct vcpu_enter_record {
	u64 kind, at_ns, pid, tid, fd, last_exit_ns;
	s64 last_ret;
	u64 runs;
};
struct vcpu_exit_record {
	u64 kind, at_ns, pid, tid, fd, enter_ns;
	s64 ret, preempted_ns;			/* -1: unknown */
};
struct kick_record {
	u64 kind, at_ns, pid, tid, target_tid, signal;
};

/* Interrupt injection is frequent, caused by the guest, and unrelated to a migration. */
static __always_inline bool is_noise(u32 cmd)
{
	return cmd == KVM_IRQ_LINE || cmd == KVM_IRQ_LINE_STATUS || cmd == KVM_INTERRUPT ||
	       cmd == KVM_SIGNAL_MSI || cmd == KVM_CHECK_EXTENSION;
}

static __always_inline bool is_tracked_ioctl(u32 cmd)
{
	return ((cmd >> 8) & 0xff) == KVM_TYPE && !is_noise(cmd);
}

static __always_inline bool is_dirty_log(u32 cmd)
{
	return cmd == KVM_GET_DIRTY_LOG || cmd == KVM_CLEAR_DIRTY_LOG || cmd == KVM_RESET_DIRTY_RINGS;
}

/* Skips the lookup for calls that do not change the state of the process. */
static __always_inline bool needs_process(u64 nr, u32 cmd)
{
	return nr == NR_ioctl && (cmd == KVM_RUN || cmd == KVM_GET_DIRTY_LOG);
}

static __always_inline void vcpu_enter(struct thread_state *s, struct process_state *p, u64 pid_tgid,
				       u64 now, u64 fd)
{
	u64 gap = s->run_exit_ns ? now - s->run_exit_ns : 0;
	bool worth_a_record = !s->runs || gap > VCPU_GAP_NS || s->run_ret < 0;
	bool starts = p->running <= 0 && (!s->run_exit_ns || gap > STOPPED_NS);
	struct vcpu_enter_record *r;

	if (starts)
		p->started = 1;
	s->runs++;
	s->vcpu_fd = fd;
	s->run_enter_ns = now;
	s->run_preempted = s->preempted;
	s->out_ns += gap;
	if (gap > s->max_gap_ns)
		s->max_gap_ns = gap;
	if (gap) {
		s->span_out += gap;
		s->span_gaps++;
		if (gap > s->span_max)
			s->span_max = gap;
	}
	if (!s->counted) {
		s->counted = 1;
		__sync_fetch_and_add(&p->running, 1);
	}
	if (!worth_a_record)
		return;
	r = events.ringbuf_reserve(sizeof(*r));
	if (!r) {
		count(KIND_VCPU_ENTER, true);
		return;
	}
	r->kind = KIND_VCPU_ENTER;
	r->at_ns = now;
	r->pid = pid_tgid >> 32;
	r->tid = (u32)pid_tgid;
	r->fd = fd;
	r->last_exit_ns = s->run_exit_ns;
	r->last_ret = s->run_ret;
	r->runs = s->runs;
	events.ringbuf_submit(r, starts ? RB_FORCE_WAKEUP : RB_NO_WAKEUP);
}

/*
 * Time outside KVM_RUN since the last record. Emitted at the first exit after a fetch, so that every gap counts in
 * the interval in which it began. A vCPU that never leaves KVM_RUN has no such record.
 */
static __always_inline void emit_vcpu_span(struct thread_state *s, struct process_state *p, u64 pid_tgid, u64 now)
{
	struct vcpu_span_record *r;

	if (s->span_epoch == p->epoch && now - s->span_since < SPAN_MAX_NS)
		return;
	if (s->span_gaps || s->span_lock) {
		r = events.ringbuf_reserve(sizeof(*r));
		if (r) {
			r->kind = KIND_VCPU_SPAN;
			r->since_ns = s->span_since;
			r->until_ns = s->run_enter_ns;
			r->pid = pid_tgid >> 32;
			r->tid = (u32)pid_tgid;
			r->outside_ns = s->span_out;
			r->longest_ns = s->span_max;
			r->gaps = s->span_gaps;
			r->lock_ns = LOCKS_KNOWN ? s->span_lock : -1;
			events.ringbuf_submit(r, RB_NO_WAKEUP);
		} else {
			count(KIND_VCPU_SPAN, true);
		}
	}
	s->span_since = now;
	s->span_epoch = p->epoch;
	s->span_out = s->span_max = s->span_gaps = s->span_lock = 0;
}

/* `enter` is 0 if the thread was inside before tracing began. */
static __always_inline void vcpu_exit(struct thread_state *s, struct process_state *p, u64 pid_tgid,
				      u64 now, u64 enter, u64 fd, s64 ret)
{
	struct vcpu_exit_record *r;

	emit_vcpu_span(s, p, pid_tgid, now);
	s->vcpu_fd = fd;
	s->run_exit_ns = now;
	s->run_ret = ret;
	if (enter)
		s->in_ns += now - enter;
	else
		count(KIND_VCPU_EXIT, false);
	if (s->counted) {
		s->counted = 0;
		__sync_fetch_and_add(&p->running, -1);
	}
	if (ret >= 0)
		return;
	r = events.ringbuf_reserve(sizeof(*r));
	if (!r) {
		count(KIND_VCPU_EXIT, true);
		return;
	}
	r->kind = KIND_VCPU_EXIT;
	r->at_ns = now;
	r->pid = pid_tgid >> 32;
	r->tid = (u32)pid_tgid;
	r->fd = fd;
	r->enter_ns = enter;
	r->ret = ret;
	r->preempted_ns = OFF_CPU_KNOWN && enter ? s->preempted - s->run_preempted : -1;
	events.ringbuf_submit(r, RB_NO_WAKEUP);
}

/* Saves the parts of a memory ioctl's argument that the report needs; `arg` points to user memory. */
static __always_inline void read_memory_argument(struct thread_state *s, u32 cmd, const void *arg)
{
	struct {
		u32 slot, second;
		u64 third, fourth;
	} a = {};

	s->slot = s->flags = s->addr = s->size = 0;
	if (cmd == KVM_GET_DIRTY_LOG) {
		bpf_probe_read_user(&a, 4, arg);
		s->slot = a.slot;
	} else if (cmd == KVM_CLEAR_DIRTY_LOG) {
		bpf_probe_read_user(&a, 16, arg);
		s->slot = a.slot;
		s->size = a.second;
		s->addr = a.third;
	} else if (cmd == KVM_SET_USER_MEMORY_REGION || cmd == KVM_SET_USER_MEMORY_REGION2) {
		bpf_probe_read_user(&a, 24, arg);
		s->slot = a.slot;
		s->flags = a.second;
		s->addr = a.third;
		s->size = a.fourth;
	}
}

/* `p` may be 0, except for GET_DIRTY_LOG. */
static __always_inline void ioctl_enter(struct thread_state *s, struct process_state *p, u64 now, u32 cmd,
					const void *arg)
{
	u32 zero = 0;
	u64 *all;

	if (p && cmd == KVM_GET_DIRTY_LOG && now - p->last_fetch > FETCH_GAP_NS) {
		p->epoch++;
		all = fetches.lookup(&zero);
		if (all)
			__sync_fetch_and_add(all, 1);
	}
	s->lock_ns[LOCK_SLOTS] = s->lock_ns[LOCK_MMU] = s->lock_ns[LOCK_OTHER] = s->spin_ns = 0;
	s->split_ns[SPLIT_WALK] = s->split_ns[SPLIT_FLUSH] = s->split_ns[SPLIT_COPY] = 0;
	s->part = s->flushing = 0;
	read_memory_argument(s, cmd, arg);
}

static __always_inline void any_ioctl_enter(struct thread_state *s, struct process_state *p, u64 pid_tgid, u64 now,
					    const struct call_args *c)
{
	if ((u32)c->a1 != KVM_RUN)
		ioctl_enter(s, p, now, c->a1, (const void *)c->a2);
	else if (p)
		vcpu_enter(s, p, pid_tgid, now, c->a0);
}

/* The reader decides on the sampling of the next fetch. If no vCPU runs, this was the final one. */
static __always_inline bool is_worth_sampling(struct thread_state *s, struct process_state *p, u64 now)
{
	return !(p && p->running <= 0) && (s->samples || (is_dirty_log(s->a1) && now - s->enter > LONG_FETCH_NS));
}

static __always_inline void ioctl_exit(struct thread_state *s, struct process_state *p, u64 pid_tgid, u64 now,
				       s64 ret)
{
	struct ioctl_record *r;

	if (p && (u32)s->a1 == KVM_GET_DIRTY_LOG)
		p->last_fetch = now;
	if (!is_dirty_log(s->a1))
		own_state_call(now);
	if (SPLIT_KNOWN)
		end_part(s, now);
	r = events.ringbuf_reserve(sizeof(*r));
	if (!r) {
		count(KIND_IOCTL, true);
		return;
	}
	r->kind = KIND_IOCTL;
	r->begin_ns = s->enter;
	r->end_ns = now;
	r->pid = pid_tgid >> 32;
	r->tid = (u32)pid_tgid;
	r->fd = s->a0;
	r->cmd = (u32)s->a1;
	r->ret = ret;
	r->slot = s->slot;
	r->flags = s->flags;
	r->addr = s->addr;
	r->size = s->size;
	r->off_cpu_ns = OFF_CPU_KNOWN ? off_cpu_in_call(s, now) : -1;
	r->slots_lock_ns = LOCKS_KNOWN ? s->lock_ns[LOCK_SLOTS] : -1;
	r->mmu_lock_ns = LOCKS_KNOWN ? s->lock_ns[LOCK_MMU] : -1;
	r->other_lock_ns = LOCKS_KNOWN ? s->lock_ns[LOCK_OTHER] : -1;
	r->walk_ns = SPLIT_KNOWN ? s->split_ns[SPLIT_WALK] : -1;
	r->flush_ns = SPLIT_KNOWN ? s->split_ns[SPLIT_FLUSH] : -1;
	r->copy_ns = SPLIT_KNOWN ? s->split_ns[SPLIT_COPY] : -1;
	r->spin_ns = LOCKS_KNOWN && OFF_CPU_KNOWN ? s->spin_ns : -1;
	r->off_total_ns = OFF_CPU_KNOWN ? s->off_all : -1;
	events.ringbuf_submit(r, is_worth_sampling(s, p, now) ? RB_FORCE_WAKEUP : RB_NO_WAKEUP);
	s->samples = 0;
}

static __always_inline void emit_kick(u64 pid_tgid, u64 now, u64 target, u64 signal)
{
	struct kick_record *r = events.ringbuf_reserve(sizeof(*r));
	bool stops = own_stop(now);

	if (!r) {
		count(KIND_KICK, true);
		return;
	}
	r->kind = KIND_KICK;
	r->at_ns = now;
	r->pid = pid_tgid >> 32;
	r->tid = (u32)pid_tgid;
	r->target_tid = (u32)target;
	r->signal = (u32)signal;
	events.ringbuf_submit(r, stops ? RB_FORCE_WAKEUP : RB_NO_WAKEUP);
}
