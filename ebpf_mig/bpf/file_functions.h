/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Files in the function tiers: there the system calls themselves are hooked, one pair of programs for all of them.
 *
 * In: entries and returns of the system calls. Out: as from_syscalls.bpf.c. Calls on sockets, pipes and whatever else is
 * no file do not count here: from_functions.bpf.c has other hooks for what can carry a migration.
 */
#pragma once

#include "file_calls.h"
#include "io_submit.h"

/* Whether the thread is inside the call on a file that was seen to begin: NFS, for example, sends in the caller. */
static __always_inline bool is_inside_file_call(struct thread_state *s)
{
	struct call_args c;

	if (!s->nr || !is_on_file(s->nr - 1))
		return false;
	read_args(user_regs(), &c);
	return c.nr == s->nr - 1 && (c.a0 == s->a0 || c.nr == NR_mmap);
}

static __always_inline void file_entry(u64 pid_tgid)
{
	struct thread_state *s;
	struct call_args c;
	const void *regs = user_regs();

	read_args(regs, &c);
	if (!is_on_file(c.nr) || !takes_time(&c, regs))
		return;
	if (!file_call(c.nr) && !is_file(type_of(read_u64(file_of(c.a0), OFF_file_inode))))
		return;
	s = this_thread(pid_tgid);
	if (!s || s->nr == NR_ioctl + 1)
		return;
	if (s->nr)
		forget_call(s);
	begin_call(s, bpf_ktime_get_ns(), c.nr, c.a0, c.a1);
}

static __always_inline void file_exit(void *ctx, u64 pid_tgid, u32 how)
{
	u64 now, nr;
	struct process_state *p;
	struct thread_state *s;
	s64 ret;

	s = known_thread(pid_tgid);
	if (!s || !s->nr || !is_on_file(s->nr - 1))
		return;
	now = bpf_ktime_get_ns();
	nr = s->nr - 1;
	s->nr = 0;
	p = this_process(pid_tgid);
	if (!p)
		return;
	ret = returned(ctx, how, 1);		/* struct pt_regs * */
	if (file_call(nr))
		file_call_done(s, p, pid_tgid, now, nr, ret);
	else
		transfer_done(s, p, pid_tgid, now, direction_of(nr), ret, file_of(s->a0), s->a0);
}

/* Its programs are apart: they are long, and those of files are loaded once for each system call. */
static __always_inline void io_submit_entry(u64 pid_tgid)
{
	struct thread_state *s = this_thread(pid_tgid);
	struct call_args c;

	if (!s || s->nr == NR_ioctl + 1)
		return;
	read_args(user_regs(), &c);
	if (s->nr)
		forget_call(s);
	begin_call(s, bpf_ktime_get_ns(), NR_io_submit, c.a0, c.a2);
}

static __always_inline void io_submit_exit(void *ctx, u64 pid_tgid, u32 how)
{
	struct thread_state *s = known_thread(pid_tgid);
	struct process_state *p;

	if (!s || s->nr != NR_io_submit + 1)
		return;
	s->nr = 0;
	p = this_process(pid_tgid);
	if (p)
		submitted(p, pid_tgid, s->enter, bpf_ktime_get_ns(), returned(ctx, how, 1), (const u64 *)s->a1);
}
