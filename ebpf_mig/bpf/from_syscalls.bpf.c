// SPDX-License-Identifier: GPL-2.0
/*
 * The tracepoint tier: raw_syscalls sys_enter and sys_exit carry every signal, on every kernel since 4.17.
 *
 * They add overhead to every system call of the host, so they are attached only during a migration. Seccomp denies a
 * call before sys_enter fires, and threads may already be inside a call when tracing begins: an exit without an
 * entry is normal. If KVM's signals come from its functions, this file handles sends and receives only.
 */
#pragma once

#include "kvm.h"
#include "file_calls.h"
#include "io_submit.h"
#include "sockets.h"
#include "sched.bpf.c"
#include "own_runs.h"

/* Number of descriptors that sendmsg(2) passes; `message` points to a struct user_msghdr in user memory. */
static __always_inline u64 passed(const void *message)
{
	struct control_header h = {};
	struct {
		u64 name, namelen, iov, iovlen, control, controllen;
	} m = {};

	bpf_probe_read_user(&m, sizeof(m), message);
	if (!m.control || m.controllen < sizeof(h))
		return 0;
	bpf_probe_read_user(&h, sizeof(h), (const void *)m.control);
	return descriptors_in(&h, m.controllen);
}

/*
 * splice moves bytes between two descriptors, at least one of which is a pipe. The other one counts, since the pipe is
 * an intermediate buffer; of two pipes the one that is written. Stores the descriptor in a0 and its direction in a1.
 */
static __always_inline void choose_end(struct call_args *c)
{
	u64 out = file_of(c->a2);

	if (type_of(read_u64(out, OFF_file_inode)) == S_IFIFO &&
	    type_of(read_u64(file_of(c->a0), OFF_file_inode)) != S_IFIFO) {
		c->a1 = RECEIVE;
	} else {
		c->a0 = c->a2;
		c->a1 = SEND;
	}
}

/*
 * Most calls are irrelevant: they are rejected by number, then by request, before any lookup. `nr` is never stale:
 * the exit after an entry resets it. Returns when the call began, if that was read last of all, so that the duration of
 * the call has no part of this program; else 0.
 */
static __always_inline u64 sys_enter(struct call_begins *ctx, u64 pid_tgid, u64 nr, u64 began)
{
	struct process_state *p;
	struct thread_state *s;
	struct call_args c;
	const void *regs;
	u64 descriptors = 0, now;

	if (direction_of(nr) < 0 && nr != NR_shutdown && !file_call(nr) && nr != NR_io_submit &&
	    (KVM_FUNCTIONS || (nr != NR_ioctl && nr != NR_tgkill)))
		return 0;
	regs = CALL_REGS(ctx);
	read_args(regs, &c);
	if (nr == NR_ioctl && !is_tracked_ioctl(c.a1))
		return 0;
	if (file_call(nr) && !takes_time(&c, regs))
		return 0;
	s = this_thread(pid_tgid);
	p = needs_process(nr, c.a1) ? this_process(pid_tgid) : 0;
	if (!s)
		return 0;
	s->seen = 1;
	if (nr == NR_tgkill) {
		emit_wait_before_kick(pid_tgid, began);
		emit_kick(pid_tgid, began, c.a1, c.a2);
		return 0;
	}
	if (nr == NR_shutdown) {
		socket_shut_down(pid_tgid, began, c.a0);
		return 0;
	}
	if (nr == NR_ioctl)
		any_ioctl_enter(s, p, pid_tgid, began, &c);
	else if (nr == NR_splice)
		choose_end(&c);
	else if (nr == NR_sendmsg)
		descriptors = passed((const void *)c.a1);
	if (nr == NR_ioctl && (u32)c.a1 == KVM_RUN) {
		begin_call(s, began, nr, c.a0, c.a1);	/* when the record says that it began */
		return 0;
	}
	now = bpf_ktime_get_ns();
	begin_call(s, now, nr, c.a0, nr == NR_io_submit ? c.a2 : c.a1);
	s->descriptors = descriptors;
	return now;
}

int on_sys_enter(struct call_begins *ctx)
{
	u64 pid_tgid = bpf_get_current_pid_tgid(), began, now;

	if (!EBPF_MIG_TARGETS((u32)(pid_tgid >> 32)))
		return not_traced(true);
	began = bpf_ktime_get_ns();
	now = sys_enter(ctx, pid_tgid, CALL_NUMBER(ctx), began);
	return traced_until(began, now ? now : bpf_ktime_get_ns(), true);
}

#define ERESTARTSYS 512
#define ERESTART_RESTARTBLOCK 516

/*
 * A thread that is first seen at an exit was inside the call when tracing began. Only KVM_RUN counts then: a call
 * without an enter. A signal ends a wait with one of the restart codes (linux/errno.h): when a VMM ends, each of its
 * threads leaves its call like this at the same moment, which would fill the table of threads. KVM_RUN returns -EINTR.
 */
static __always_inline struct thread_state *first_exit(u64 pid_tgid, const void *regs, s64 ret)
{
	struct thread_state *s;
	struct call_args c;

	if (ret >= -ERESTART_RESTARTBLOCK && ret <= -ERESTARTSYS)
		return 0;
	s = this_thread(pid_tgid);
	if (!s)
		return 0;
	s->seen = 1;
	read_args(regs, &c);
	if (c.nr != NR_ioctl || (u32)c.a1 != KVM_RUN)
		return 0;
	begin_call(s, 0, c.nr, c.a0, c.a1);
	return s;
}

TRACED_PROGRAM(on_sys_exit, struct call_ends)
{
	u64 now = began, nr;
	s64 ret = CALL_RETURNED(ctx);
	struct process_state *p;
	struct thread_state *s;

	s = known_thread(pid_tgid);
	if (!KVM_FUNCTIONS && (!s || !s->seen))
		s = first_exit(pid_tgid, CALL_REGS(ctx), ret);
	if (!s || !s->nr || (KVM_FUNCTIONS && s->nr == NR_ioctl + 1))
		return;
	nr = s->nr - 1;
	s->nr = 0;
	p = nr != NR_ioctl || needs_process(nr, s->a1) ? this_process(pid_tgid) : 0;
	if (nr == NR_ioctl && (u32)s->a1 != KVM_RUN)
		ioctl_exit(s, p, pid_tgid, now, ret);
	else if (!p)
		return;
	else if (nr == NR_ioctl)
		vcpu_exit(s, p, pid_tgid, now, s->enter, s->a0, ret);
	else if (file_call(nr))
		file_call_done(s, p, pid_tgid, now, nr, ret);
	else if (nr == NR_io_submit)
		submitted(p, pid_tgid, s->enter, now, ret, (const u64 *)s->a1);
	else
		transfer_done(s, p, pid_tgid, now, nr == NR_splice ? s->a1 : direction_of(nr), ret, file_of(s->a0), s->a0);
}
