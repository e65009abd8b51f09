// SPDX-License-Identifier: GPL-2.0
/*
 * Records which lock a traced thread waits for inside a KVM ioctl.
 *
 * In: the raw tracepoints of the lock slow paths, which fire for the whole host, so the check for traced threads
 * comes first. Out: sums in the state of the thread, which become part of the record of the call.
 */
#pragma once

#include "kvm.h"

/*
 * contention_begin: lock, flags. Only the outermost wait counts: the slow path of a rwlock waits for an internal
 * spinlock. A mutex may report its wait twice: once spinning, once asleep.
 */
TRACED_PROGRAM(on_contention_begin, struct bpf_raw_tracepoint_args)
{
	struct thread_state *s = known_thread(pid_tgid);

	if (!s || s->nr != NR_ioctl + 1 || s->lock)
		return;
	s->lock = ctx->args[0];
	s->lock_since = bpf_ktime_get_ns();
	s->lock_off = s->off_call;
}

/*
 * contention_end: lock, ret. The lock is identified by its offset in struct kvm, which is the private data of the
 * VM's file.
 */
TRACED_PROGRAM(on_contention_end, struct bpf_raw_tracepoint_args)
{
	struct thread_state *s = known_thread(pid_tgid);
	u64 kvm, waited, slept;

	if (!s || !s->lock || s->lock != ctx->args[0])
		return;
	waited = bpf_ktime_get_ns() - s->lock_since;
	slept = s->off_call - s->lock_off;
	s->spin_ns += waited > slept ? waited - slept : 0;
	if ((u32)s->a1 == KVM_RUN) {
		s->span_lock += waited;
		s->lock = 0;
		return;
	}
	kvm = read_u64(file_of(s->a0), OFF_file_private);
	if (s->lock == kvm + OFF_kvm_mmu_lock)
		s->lock_ns[LOCK_MMU] += waited;
	else if (s->lock == kvm + OFF_kvm_slots_lock)
		s->lock_ns[LOCK_SLOTS] += waited;
	else
		s->lock_ns[LOCK_OTHER] += waited;
	s->lock = 0;
}
