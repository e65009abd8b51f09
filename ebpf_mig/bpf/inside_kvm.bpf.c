// SPDX-License-Identifier: GPL-2.0
/*
 * The threads of traced processes that are inside an ioctl of a vCPU, asleep or on a CPU. One that makes no traced call
 * meanwhile is inside KVM_RUN.
 *
 * KVM registers a preempt notifier of the task when it loads the vCPU, and removes it at the end of the ioctl
 * (vcpu_load and vcpu_put, virt/kvm/kvm_main.c). Nothing else in Linux 5.10 to 7.2 has preempt notifiers.
 *
 * In: the kernel's walk over all threads, which probes/tables.py starts (bpf_iter__task: meta, task). Out: a table.
 */
#pragma once

#include "common.h"

BPF_HASH(inside_kvm, u32, u64, 8192);	/* tid -> tgid */

int on_task(struct bpf_raw_tracepoint_args *ctx)
{
	u64 task = ctx->args[1], tgid;
	u32 tid;

	if (!task || OFF_task_notifiers == OFF_NONE || !read_u64(task, OFF_task_notifiers))	/* 0: the end of the walk */
		return 0;
	tgid = (u32)read_u64(task, OFF_task_tgid);
	if (!EBPF_MIG_TARGETS((u32)tgid))
		return 0;
	tid = read_u64(task, OFF_task_pid);
	inside_kvm.update(&tid, &tgid);
	return 0;
}
