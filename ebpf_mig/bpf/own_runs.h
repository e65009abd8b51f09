/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What these programs themselves take: the time of each run for a traced process, and the number of all other runs.
 * And when the process that reads their records has a CPU.
 *
 * In: each run. Out: OWN_RUNS records with sums per CPU since tracing began. After a kick, or after the first ioctl on
 * a vCPU's state, they are OWN_APART_NS apart, later a part of the time since. So a window of any length has a few
 * dozen of them, and they need no reader that is awake. A record that is lost hides only where its cost lay.
 *
 * A run for another process ends after its first test and takes no time stamp: it is only counted. What one takes is
 * measured when the programs are attached (probes/own_rates.py).
 *
 * Out, too: an OWN_TURN record each time that a thread of the reading process leaves a CPU.
 */
#pragma once

#include "common.h"

#define OWN_PART 32			/* the part of the time since the stop by which records are apart */
#define STOP_APART_NS 1000000000ULL
#define KICKS_APART_NS 20000000ULL
#define OTHERS_A_LOOK 32		/* runs for other processes after which the clock is read */

struct own_runs_record {
	u64 kind, since_ns, until_ns, at_ns, cpu, run_ns, runs, calls, other_runs, other_calls;
};

struct own_turn_record {
	u64 kind, begin_ns, end_ns, cpu;
};

struct own_runs {
	u64 since_ns, until_ns, run_ns, runs, calls, other_runs, other_calls;
	u64 epoch, left, refilled, recorded_ns;
	u64 turn_ns;			/* when a thread of ours got this CPU */
	u64 unused[4];			/* 128 bytes: CPUs share no cache line */
};

BPF_ARRAY(own_runs, struct own_runs, CPUS);
BPF_ARRAY(reading_process, u64, 1);
BPF_ARRAY(stopping, u64, 1);		/* when the last stop began: see the top */

/* A vCPU was kicked. Returns whether this may begin a stop: none was kicked shortly before. */
static __always_inline bool own_stop(u64 now)
{
	u32 zero = 0;
	u64 *stop = stopping.lookup(&zero), before;

	if (!stop)
		return true;
	before = *stop;
	*stop = now;
	return now - before > KICKS_APART_NS;
}

/* State is read or written, which a destination on this host does without a kick. */
static __always_inline void own_state_call(u64 now)
{
	u32 zero = 0;
	u64 *stop = stopping.lookup(&zero);

	if (stop && now - *stop > STOP_APART_NS)
		*stop = now;
}

static __always_inline bool is_reading_process(u32 tgid)
{
	u32 zero = 0;
	u64 *own = reading_process.lookup(&zero);

	return own && *own == tgid;
}

/* A thread of the reading process got this CPU. */
static __always_inline void own_turn_begins(void)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct own_runs *o = own_runs.lookup(&cpu);

	if (o)
		o->turn_ns = bpf_ktime_get_ns();
}

/* It leaves it. */
static __always_inline void own_turn_ends(void)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct own_runs *o = own_runs.lookup(&cpu);
	struct own_turn_record *r;

	if (!o || !o->turn_ns)
		return;
	r = events.ringbuf_reserve(sizeof(*r));
	if (r) {
		r->kind = KIND_OWN_TURN;
		r->begin_ns = o->turn_ns;
		r->end_ns = bpf_ktime_get_ns();
		r->cpu = cpu;
		events.ringbuf_submit(r, RB_NO_WAKEUP);
	} else {
		count(KIND_OWN_TURN, true);
	}
	o->turn_ns = 0;
}

static __always_inline void emit_own_runs(struct own_runs *o, u32 cpu, u64 now)
{
	struct own_runs_record *r = events.ringbuf_reserve(sizeof(*r));

	o->recorded_ns = now;
	if (!r) {
		count(KIND_OWN_RUNS, true);
		return;
	}
	r->kind = KIND_OWN_RUNS;
	r->since_ns = o->since_ns ? o->since_ns : now;
	r->until_ns = o->since_ns ? o->until_ns : now;
	r->at_ns = now;
	r->cpu = cpu;
	r->run_ns = o->run_ns;
	r->runs = o->runs;
	r->calls = o->calls;
	r->other_runs = o->other_runs;
	r->other_calls = o->other_calls;
	o->since_ns = 0;
	events.ringbuf_submit(r, RB_NO_WAKEUP);
}

/* Whether the sums so far, of runs since `since`, get a record before the run that began at `began` is added. */
static __always_inline bool own_runs_due(struct own_runs *o, u64 began, u64 since)
{
	u32 zero = 0;
	u64 *stop = stopping.lookup(&zero), *all = fetches.lookup(&zero), apart, refill;

	if (!stop || !all)
		return false;
	apart = began > *stop ? (began - *stop) / OWN_PART : 0;
	apart = apart < OWN_APART_NS ? OWN_APART_NS : apart > OWN_APART_MOST_NS ? OWN_APART_MOST_NS : apart;
	if (began - since < apart)
		return false;
	refill = (began - o->refilled) / OWN_REFILL_NS;
	if (o->epoch != *all || refill >= OWN_RECORDS) {
		o->epoch = *all;
		o->left = OWN_RECORDS;
		o->refilled = began;
	} else if (refill) {
		o->left += refill;
		o->refilled = began;
	}
	if (!o->left)
		return began - since >= OWN_APART_MOST_NS;
	o->left--;
	return true;
}

/* A run for a traced process; `call`: at the entry of a system call. */
static __always_inline int traced_until(u64 began, u64 now, bool call)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct own_runs *o = own_runs.lookup(&cpu);

	if (!o)
		return 0;
	if (o->since_ns && own_runs_due(o, began, o->since_ns))
		emit_own_runs(o, cpu, began);
	if (!o->since_ns)
		o->since_ns = began;
	o->until_ns = now;
	o->run_ns += now - began;
	o->runs++;
	o->calls += call;
	return 0;
}

static __always_inline int traced(u64 began, bool call)
{
	return traced_until(began, bpf_ktime_get_ns(), call);
}

/* A run for a process that is not traced; `call`: at the entry of a system call. */
static __always_inline int not_traced(bool call)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct own_runs *o = own_runs.lookup(&cpu);
	u64 now;

	if (!o)
		return 0;
	o->other_runs++;
	o->other_calls += call;
	if (o->other_runs % OTHERS_A_LOOK)
		return 0;
	now = bpf_ktime_get_ns();
	if (own_runs_due(o, now, o->recorded_ns))
		emit_own_runs(o, cpu, now);
	return 0;
}

/* Defines a program, whose body follows, that runs for traced processes only. It began at `began`. */
#define TRACED_PROGRAM(name, context)						\
static __always_inline void name##_body(context *ctx, u64 pid_tgid, u64 began);	\
int name(context *ctx)								\
{										\
	u64 pid_tgid = bpf_get_current_pid_tgid(), began;			\
										\
	if (!EBPF_MIG_TARGETS((u32)(pid_tgid >> 32)))				\
		return not_traced(false);					\
	began = bpf_ktime_get_ns();						\
	name##_body(ctx, pid_tgid, began);					\
	return traced(began, false);						\
}										\
static __always_inline void name##_body(context *ctx, u64 pid_tgid, u64 began)
