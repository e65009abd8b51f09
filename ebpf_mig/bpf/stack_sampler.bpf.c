// SPDX-License-Identifier: GPL-2.0
/*
 * Samples kernel stacks inside a dirty-log ioctl with a timer. They show where the call spends its CPU time if no
 * function can be hooked.
 *
 * In: a CPU clock event on one thread, opened by probes/stack_sampler.py. Out: SAMPLE records. They do not wake the
 * reader, since each wakeup would cost a context switch. A record behind a record without wakeup does not wake the
 * reader either, so the record of the ioctl forces the wakeup.
 */
#pragma once

#include "kvm.h"

#define SAMPLE_FRAMES 24
#define SAMPLES_A_WAKEUP 128		/* a call of seconds must not fill the buffer before the reader wakes */

struct sample_record {
	u64 kind, at_ns, pid, tid, begin_ns, period_ns, frames[SAMPLE_FRAMES];
};

BPF_ARRAY(sampling, u64, 1);		/* the period in ns, as the Python half last set it */

TRACED_PROGRAM(on_sample, void)
{
	struct thread_state *s;
	struct sample_record *r;
	u32 zero = 0;
	u64 *period;

	s = known_thread(pid_tgid);
	period = sampling.lookup(&zero);
	if (!s || !period || s->nr != NR_ioctl + 1 || !is_dirty_log(s->a1))
		return;
	r = events.ringbuf_reserve(sizeof(*r));
	if (!r) {
		count(KIND_SAMPLE, true);
		return;
	}
	r->kind = KIND_SAMPLE;
	r->at_ns = bpf_ktime_get_ns();
	r->pid = pid_tgid >> 32;
	r->tid = (u32)pid_tgid;
	r->begin_ns = s->enter;
	r->period_ns = *period;
	bpf_get_stack(ctx, r->frames, sizeof(r->frames), 0);	/* clears the rest of the buffer, also if it fails */
	s->samples++;
	events.ringbuf_submit(r, s->samples % SAMPLES_A_WAKEUP ? RB_NO_WAKEUP : RB_FORCE_WAKEUP);
}
