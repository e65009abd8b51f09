// SPDX-License-Identifier: GPL-2.0
/*
 * The threads of traced processes that are inside an ioctl of a vCPU, asleep or on a CPU. One that makes no traced call
 * meanwhile is inside KVM_RUN.
 *
 * KVM registers a preempt notifier of the task when it loads the vCPU, and removes it at the end of the ioctl
 * (vcpu_load and vcpu_put, virt/kvm/kvm_main.c). Nothing else in Linux 5.10 to 7.2 has preempt notifiers. The notifier
 * is a member of struct kvm_vcpu, and its first member is what the task's list points to.
 *
 * In: the kernel's walk over all threads, which probes/tables.py starts (bpf_iter__task: meta, task). Out: a table.
 */
#pragma once

#include "common.h"

struct inside_kvm_state {
	u64 tgid;
	s64 vcpu_id;				/* -1: unknown */
};
BPF_HASH(inside_kvm, u32, struct inside_kvm_state, 8192);	/* by tid */

int on_task(struct bpf_raw_tracepoint_args *ctx)
{
	u64 task = ctx->args[1], notifier;
	struct inside_kvm_state state = {.vcpu_id = -1};
	u32 tid;

	if (!task || OFF_task_notifiers == OFF_NONE)	/* 0: the end of the walk */
		return 0;
	notifier = read_u64(task, OFF_task_notifiers);
	if (!notifier)
		return 0;
	state.tgid = (u32)read_u64(task, OFF_task_tgid);
	if (!EBPF_MIG_TARGETS((u32)state.tgid))
		return 0;
	if (OFF_notifier_vcpu_id != OFF_NONE)
		state.vcpu_id = (u32)read_u64(notifier, OFF_notifier_vcpu_id);
	tid = read_u64(task, OFF_task_pid);
	inside_kvm.update(&tid, &state);
	return 0;
}
