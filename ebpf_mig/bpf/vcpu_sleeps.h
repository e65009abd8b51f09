/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Where vCPU threads sleep inside KVM_RUN once a guest runs that was started, or stopped and started, while traced.
 *
 * In: each sleep of a traced thread, from sched.bpf.c; on x86 and s390, KVM's tracepoints of asynchronous page faults.
 * Out: no records, but sums by thread and kernel stack in `vcpu_sleeps`, which are read when tracing ends. The stack
 * tells a sleep for a page from that of a halted vCPU.
 *
 * KVM does not let the vCPU's thread wait for a page if the guest can take an interrupt: a kernel thread fetches the
 * page, and the vCPU is halted meanwhile, or the guest runs another task (kvm_setup_async_pf, virt/kvm/async_pf.c;
 * kvm_arch_async_page_not_present, arch/x86/kvm/x86.c, Linux 5.10 to 6.18). So sums are kept apart by whether such a
 * page was outstanding.
 */
#pragma once

#include "kvm.h"

#define NO_SLEEP_STACK 0xffffULL	/* the stack map has 1024 stacks */
#define PENDING_BIT 16

struct vcpu_sleep {
	u64 tgid, count, slept_ns, longest_ns, since_ns, until_ns;
};

/* By tid (upper half), whether a page was outstanding (PENDING_BIT), and the number of the stack. */
BPF_HASH(vcpu_sleeps, u64, struct vcpu_sleep, 4096);

static __always_inline bool sleeps_count(struct thread_state *s, struct process_state *p)
{
	return s->counted && p && p->started;
}

static __always_inline void vcpu_slept(struct thread_state *s, u32 tid, u64 stack, u64 since, u64 until)
{
	u64 key = (u64)tid << 32 | (u64)!!s->pages_pending << PENDING_BIT |
		  (stack < NO_SLEEP_STACK ? stack : NO_SLEEP_STACK);
	struct vcpu_sleep *sum = vcpu_sleeps.lookup(&key), first = {};

	if (!sum) {
		first.tgid = s->tgid;
		first.since_ns = since;
		vcpu_sleeps.update(&key, &first);
		sum = vcpu_sleeps.lookup(&key);
		if (!sum) {
			count(KIND_VCPU_SLEEP, true);
			return;
		}
	}
	sum->count++;
	sum->slept_ns += until - since;
	if (until - since > sum->longest_ns)
		sum->longest_ns = until - since;
	sum->until_ns = until;
}

/* kvm_async_pf_not_present: token, gva. The vCPU's own thread. */
TRACED_PROGRAM(on_async_page_missing, struct bpf_raw_tracepoint_args)
{
	struct thread_state *s = known_thread(pid_tgid);

	if (s)
		s->pages_pending++;
}

/* kvm_async_pf_ready: token, gva. Also for a wake-up without a fault, so it may come more often. */
TRACED_PROGRAM(on_async_page_ready, struct bpf_raw_tracepoint_args)
{
	struct thread_state *s = known_thread(pid_tgid);

	if (s && s->pages_pending)
		s->pages_pending--;
}
