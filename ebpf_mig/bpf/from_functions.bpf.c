// SPDX-License-Identifier: GPL-2.0
/*
 * The function tiers: the same signals from kernel functions that only VMs or sockets use, without overhead for
 * other calls.
 *
 * In: entries and returns of the functions named in probes/hook_points.py, by fentry and fexit, or by kprobe and
 * kretprobe, whichever was seen to fire. The return of KVM_RUN comes from kvm:kvm_userspace_exit: it also fires for
 * a vCPU that was in KVM_RUN when tracing began, and needs no return probe while a vCPU sleeps. SOCKET_FUNCTIONS is
 * a set of FENTRY and KPROBE. Out: as from_syscalls.bpf.c. The arguments of the system call are read from the
 * registers at kernel entry, since the arguments of the functions differ.
 */
#pragma once

#include "kvm.h"
#include "sockets.h"
#include "sched.bpf.c"
#include "own_runs.h"

/*
 * Reads a word of the context as a plain number, since the verifier treats fentry's arguments as typed pointers.
 * fentry: the arguments, one u64 each. fexit: the arguments, then the return value. kprobe and kretprobe: the
 * registers.
 */
static __always_inline u64 context_word(void *ctx, u32 offset)
{
	u64 v = 0;

	bpf_probe_read_kernel(&v, sizeof(v), (char *)ctx + offset);
	return v;
}

static __always_inline u64 first_argument(void *ctx, u32 how)
{
	return context_word(ctx, how == FENTRY ? 0 : REG_FIRST_ARGUMENT);
}

static __always_inline u64 returned(void *ctx, u32 how, u32 arguments)
{
	return context_word(ctx, how == FENTRY ? 8 * arguments : REG_RETURNED);
}

/* A call is still in flight when another begins: its return was missed. kretprobes miss some when many calls sleep. */
static __always_inline void forget_call(struct thread_state *s)
{
	if (s->nr != NR_ioctl + 1 || (u32)s->a1 != KVM_RUN)
		count(KIND_MISSED_RETURN, true);
}

#if KVM_FUNCTIONS

TRACED_PROGRAM(on_kvm_ioctl, void)
{
	u64 now;
	struct process_state *p;
	struct thread_state *s;
	struct call_args c;

	read_args(user_regs(), &c);
	if (c.nr != NR_ioctl || !is_tracked_ioctl(c.a1))
		return;
	s = this_thread(pid_tgid);
	p = needs_process(c.nr, c.a1) ? this_process(pid_tgid) : 0;
	if (!s)
		return;
	now = bpf_ktime_get_ns();
	if (s->nr)
		forget_call(s);
	any_ioctl_enter(s, p, pid_tgid, now, &c);
	begin_call(s, now, c.nr, c.a0, c.a1);
}

static __always_inline void kvm_ioctl_return(void *ctx, u64 pid_tgid, u32 how)
{
	u64 now;
	struct process_state *p;
	struct thread_state *s;
	s64 ret;

	s = known_thread(pid_tgid);
	if (!s || s->nr != NR_ioctl + 1)
		return;
	now = bpf_ktime_get_ns();
	ret = returned(ctx, how, 3);	/* struct file *, unsigned int, unsigned long: file_operations.unlocked_ioctl */
	s->nr = 0;
	p = needs_process(NR_ioctl, s->a1) ? this_process(pid_tgid) : 0;
	if ((u32)s->a1 != KVM_RUN)
		ioctl_exit(s, p, pid_tgid, now, ret);
	else if (p)			/* refused before it reached kvm_userspace_exit */
		vcpu_exit(s, p, pid_tgid, now, s->enter, s->a0, ret);
}

TRACED_PROGRAM(on_kvm_ioctl_fexit, void)
{
	kvm_ioctl_return(ctx, pid_tgid, FENTRY);
}

/*
 * Also attached to the functions that end a vCPU's ioctls other than KVM_RUN: a return probe on their caller would
 * be occupied while the vCPU sleeps.
 */
TRACED_PROGRAM(on_kvm_ioctl_kretprobe, void)
{
	kvm_ioctl_return(ctx, pid_tgid, KPROBE);
}

/* kvm_userspace_exit: reason, errno; once for each return of KVM_RUN. */
TRACED_PROGRAM(on_kvm_userspace_exit, struct userspace_exit)
{
	u64 enter = 0;
	s64 ret = EXIT_ERROR(ctx);
	struct process_state *p;
	struct thread_state *s;
	struct call_args c;

	s = this_thread(pid_tgid);
	p = this_process(pid_tgid);
	if (!s || !p)
		return;
	if (s->nr == NR_ioctl + 1 && (u32)s->a1 == KVM_RUN) {
		enter = s->enter;
		c.a0 = s->a0;
		s->nr = 0;
	} else {
		read_args(user_regs(), &c);
	}
	vcpu_exit(s, p, pid_tgid, bpf_ktime_get_ns(), enter, c.a0, ret);
}

TRACED_PROGRAM(on_tgkill, void)
{
	u64 now;
	struct call_args c;

	read_args(user_regs(), &c);
	now = bpf_ktime_get_ns();
	emit_wait_before_kick(pid_tgid, now);
	emit_kick(pid_tgid, now, c.a1, c.a2);
}

/* The thread, if it is inside a dirty-log ioctl. */
static __always_inline struct thread_state *fetching(u64 pid_tgid)
{
	struct thread_state *s = known_thread(pid_tgid);

	return s && s->nr == NR_ioctl + 1 && is_dirty_log(s->a1) ? s : 0;
}

/* Return of kvm_arch_sync_dirty_log. */
TRACED_PROGRAM(on_synced, void)
{
	struct thread_state *s = fetching(pid_tgid);

	if (s)
		split_synced(s, bpf_ktime_get_ns());
}

TRACED_PROGRAM(on_flush, void)
{
	struct thread_state *s = fetching(pid_tgid);

	if (s && !s->flushing++)
		split_flush(s, bpf_ktime_get_ns());
}

TRACED_PROGRAM(on_flushed, void)
{
	struct thread_state *s = fetching(pid_tgid);

	if (s && s->flushing && !--s->flushing)
		split_flushed(s, bpf_ktime_get_ns());
}

/* kvm_dirty_ring_reset, one vCPU's ring. */
TRACED_PROGRAM(on_ring_reset, void)
{
	struct thread_state *s = fetching(pid_tgid);

	if (s)
		begin_part(s, SPLIT_WALK, bpf_ktime_get_ns());
}

TRACED_PROGRAM(on_ring_was_reset, void)
{
	struct thread_state *s = fetching(pid_tgid);

	if (s)
		end_part(s, bpf_ktime_get_ns());
}

#endif

#if SOCKET_FUNCTIONS

/* Number of descriptors that a send passes; `message` is a struct msghdr, whose control data the kernel has copied. */
static __always_inline u64 passed_by_kernel(u64 message)
{
	u64 control = read_u64(message, OFF_msghdr_control), length = read_u64(message, OFF_msghdr_controllen);
	struct control_header h = {};

	if (!control || length < sizeof(h))
		return 0;
	bpf_probe_read_kernel(&h, sizeof(h), (const void *)control);
	return descriptors_in(&h, length);
}

TRACED_PROGRAM(on_shutdown, void)
{
	struct call_args c;

	read_args(user_regs(), &c);
	socket_shut_down(pid_tgid, bpf_ktime_get_ns(), c.a0);
}

#include "file_functions.h"

/* A send inside a KVM ioctl is made by the kernel itself, for example to fetch remote guest memory. */
static __always_inline void transfer_entry(void *ctx, u64 pid_tgid, u32 how, u32 nr)
{
	struct thread_state *s = this_thread(pid_tgid);

	if (!s || s->nr == NR_ioctl + 1 || is_inside_file_call(s))
		return;
	if (s->nr)
		forget_call(s);
	begin_call(s, bpf_ktime_get_ns(), nr, first_argument(ctx, how), 0);
	if (nr == NR_sendmsg)
		s->descriptors = passed_by_kernel(context_word(ctx, how == FENTRY ? 8 : REG_SECOND_ARGUMENT));
}

/* The functions of sockets have a struct socket * first, those of pipes a struct kiocb *. */
static __always_inline bool is_socket_call(u32 nr)
{
	return nr == NR_sendmsg || nr == NR_recvmsg;
}

static __always_inline u32 arguments_of(u32 nr)
{
	if (!is_socket_call(nr))
		return 2;			/* iocb, iter */
	return nr == NR_sendmsg ? 3 : 4;	/* sock, msg, size; and flags */
}

static __always_inline void transfer_exit(void *ctx, u64 pid_tgid, u32 how, u32 nr)
{
	u64 now, file;
	struct process_state *p;
	struct thread_state *s;
	bool sends;
	s64 ret;

	s = known_thread(pid_tgid);
	if (!s || s->nr != nr + 1)
		return;
	now = bpf_ktime_get_ns();
	s->nr = 0;
	p = this_process(pid_tgid);
	if (!p)
		return;
	ret = (s32)returned(ctx, how, arguments_of(nr));
	file = read_u64(s->a0, is_socket_call(nr) ? OFF_socket_file : OFF_kiocb_file);
	sends = nr == NR_sendmsg || nr == NR_write;
	transfer_done(s, p, pid_tgid, now, sends ? SEND : RECEIVE, ret, file, -1);
}

#define TRANSFER_HOOKS(how, entry, exit)				\
TRACED_PROGRAM(on_file_##entry, void)					\
{									\
	file_entry(pid_tgid);						\
}									\
TRACED_PROGRAM(on_file_##exit, void)					\
{									\
	file_exit(ctx, pid_tgid, how);					\
}									\
TRACED_PROGRAM(on_io_submit_##entry, void)				\
{									\
	io_submit_entry(pid_tgid);					\
}									\
TRACED_PROGRAM(on_io_submit_##exit, void)				\
{									\
	io_submit_exit(ctx, pid_tgid, how);				\
}									\
TRACED_PROGRAM(on_write_##entry, void)					\
{									\
	transfer_entry(ctx, pid_tgid, how, NR_write);			\
}									\
TRACED_PROGRAM(on_write_##exit, void)					\
{									\
	transfer_exit(ctx, pid_tgid, how, NR_write);			\
}									\
TRACED_PROGRAM(on_read_##entry, void)					\
{									\
	transfer_entry(ctx, pid_tgid, how, NR_read);			\
}									\
TRACED_PROGRAM(on_read_##exit, void)					\
{									\
	transfer_exit(ctx, pid_tgid, how, NR_read);			\
}									\
TRACED_PROGRAM(on_send_##entry, void)					\
{									\
	transfer_entry(ctx, pid_tgid, how, NR_sendmsg);			\
}									\
TRACED_PROGRAM(on_send_##exit, void)					\
{									\
	transfer_exit(ctx, pid_tgid, how, NR_sendmsg);			\
}									\
TRACED_PROGRAM(on_receive_##entry, void)				\
{									\
	transfer_entry(ctx, pid_tgid, how, NR_recvmsg);			\
}									\
TRACED_PROGRAM(on_receive_##exit, void)					\
{									\
	transfer_exit(ctx, pid_tgid, how, NR_recvmsg);			\
}

#if SOCKET_FUNCTIONS & FENTRY
TRANSFER_HOOKS(FENTRY, fentry, fexit)
#endif
#if SOCKET_FUNCTIONS & KPROBE
TRANSFER_HOOKS(KPROBE, kprobe, kretprobe)
#endif

#endif
