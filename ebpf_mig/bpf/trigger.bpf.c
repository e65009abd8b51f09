// SPDX-License-Identifier: GPL-2.0
/*
 * The standing trigger of `watch` and `exporter`: detects activity of VMs that may be the start of a migration.
 *
 * It runs when a thread is created, when a process calls execve(2), when a TCP socket changes state and, where KVM's
 * functions can be hooked, when a memslot is set. It never runs on system calls, so a node without migrations has no other overhead.
 * In: `vms`, the processes known to own a KVM VM. Out: node records. Threads of other processes are reported, too,
 * but rarely: the vCPU threads of a new VM reveal it.
 */
#include <linux/types.h>
#include "arch.h"

#define KVM_MEM_LOG_DIRTY_PAGES 1
#define CLONE_THREAD 0x00010000ULL

/* include/net/tcp_states.h */
#define TCP_ESTABLISHED 1
#define TCP_SYN_SENT 2
#define TCP_SYN_RECV 3
#define TCP_CLOSE 7
#define TCP_LISTEN 10

#define PROCESS_PAUSE_NS 5000000000ULL	/* a process that owns no VM is reported at most this often */
#define VM_PAUSE_NS 1000000ULL		/* a burst of new threads is one sign */

enum sign {
	SIGN_PROCESS = 1,
	SIGN_THREAD = 2,
	SIGN_CONNECT = 3,
	SIGN_ACCEPT = 4,
	SIGN_LOGGING = 5,
	SIGN_EXEC = 6,
};

struct node_record {
	u64 at_ns, pid, sign;
};

BPF_RINGBUF_OUTPUT(signs, 16);
BPF_PERCPU_ARRAY(lost, u64, 1);
BPF_HASH(vms, u32, u64, 4096);		/* tgid -> when its last new thread was reported */
BPF_ARRAY(ports, u32, 65536);		/* listening port -> tgid, or 0; has room for every port */
BPF_TABLE("lru_hash", u32, u64, unowned, 4096);
BPF_TABLE("lru_hash", u32, u64, logging, 4096);	/* tgid -> when dirty logging last started */

static __always_inline void emit_sign(u64 now, u32 pid, u64 sign)
{
	struct node_record *r = signs.ringbuf_reserve(sizeof(*r));
	u32 zero = 0;
	u64 *n;

	if (!r) {
		n = lost.lookup(&zero);
		if (n)
			(*n)++;
		return;
	}
	r->at_ns = now;
	r->pid = pid;
	r->sign = sign;
	signs.ringbuf_submit(r, 0);
}

/* task_newtask(struct task_struct *task, u64 clone_flags), in the parent's context */
int on_newtask(struct bpf_raw_tracepoint_args *ctx)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	u64 now, *last;

	if (!(ctx->args[1] & CLONE_THREAD))
		return 0;
	now = bpf_ktime_get_ns();
	last = vms.lookup(&tgid);
	if (last) {
		if (now - *last > VM_PAUSE_NS) {
			*last = now;
			emit_sign(now, tgid, SIGN_THREAD);
		}
		return 0;
	}
	last = unowned.lookup(&tgid);
	if (last && now - *last < PROCESS_PAUSE_NS)
		return 0;
	unowned.update(&tgid, &now);
	emit_sign(now, tgid, SIGN_PROCESS);
	return 0;
}

/* sched_process_exec(task, pid of the thread before, bprm): a VMM replaces itself by another program. */
int on_exec(struct bpf_raw_tracepoint_args *ctx)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;

	if (vms.lookup(&tgid))
		emit_sign(bpf_ktime_get_ns(), tgid, SIGN_EXEC);
	return 0;
}

/* inet_sock_set_state(const struct sock *sk, int oldstate, int newstate); in softirq for an accepted connection */
int on_state(struct bpf_raw_tracepoint_args *ctx)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32, *owner;
	int from = ctx->args[1], to = ctx->args[2], key;
	u64 now = bpf_ktime_get_ns();
	u16 port = 0;

	if (to == TCP_SYN_SENT) {
		if (vms.lookup(&tgid))
			emit_sign(now, tgid, SIGN_CONNECT);
		return 0;
	}
	/* An accepted socket is a copy of its listener, and first changes from LISTEN to SYN_RECV. */
	if (!(from == TCP_LISTEN && to == TCP_CLOSE) && to != TCP_LISTEN && !(from == TCP_SYN_RECV && to == TCP_ESTABLISHED))
		return 0;
	bpf_probe_read_kernel(&port, sizeof(port), (void *)(ctx->args[0] + OFF_skc_num));
	key = port;
	owner = ports.lookup(&key);
	if (!owner)
		return 0;
	if (to == TCP_ESTABLISHED) {
		if (*owner)
			emit_sign(now, *owner, SIGN_ACCEPT);
	} else if (to == TCP_LISTEN) {
		if (vms.lookup(&tgid))
			*owner = tgid;
	} else {
		*owner = 0;
	}
	return 0;
}

/* Dirty logging of a VM starts: this is the beginning of a migration, not only a sign of one. */
static __always_inline int memslot(u64 region)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32, flags = 0;
	u64 now, *last, size = 0;

	bpf_probe_read_kernel(&flags, sizeof(flags), (void *)(region + 4));
	bpf_probe_read_kernel(&size, sizeof(size), (void *)(region + 16));
	if (!(flags & KVM_MEM_LOG_DIRTY_PAGES) || !size)	/* size 0 removes the memslot */
		return 0;
	now = bpf_ktime_get_ns();
	last = logging.lookup(&tgid);
	if (last && now - *last < VM_PAUSE_NS) {
		*last = now;
		return 0;
	}
	logging.update(&tgid, &now);
	emit_sign(now, tgid, SIGN_LOGGING);
	return 0;
}

/* kvm_set_memory_region(struct kvm *, const struct kvm_userspace_memory_region[2] *): slot, flags, address, size */
int on_memslot_fentry(void *ctx)
{
	u64 region = 0;

	bpf_probe_read_kernel(&region, sizeof(region), (char *)ctx + 8);
	return memslot(region);
}

int on_memslot_kprobe(void *ctx)
{
	u64 region = 0;

	bpf_probe_read_kernel(&region, sizeof(region), (char *)ctx + REG_SECOND_ARGUMENT);
	return memslot(region);
}
