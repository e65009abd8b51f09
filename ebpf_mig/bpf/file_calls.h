/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Calls on files that move no bytes through the caller, but that take time in a snapshot or a restore: fsync and its
 * kind, mincore, io_uring_enter, and mmap of a file.
 *
 * In: completed system calls. Out: one CALL record for each, only while no vCPU of the process runs, from the budget of
 * the single transfers.
 */
#pragma once

#include "sockets.h"

#define MMAP_LEAST_BYTES 65536

/* As in recording/file_events.py. */
enum file_call {
	CALL_FSYNC = 1,
	CALL_FDATASYNC = 2,
	CALL_SYNC_FILE_RANGE = 3,
	CALL_MSYNC = 4,
	CALL_MINCORE = 5,
	CALL_MMAP = 6,
	CALL_IO_URING_ENTER = 7,
};

struct call_record {
	u64 kind, begin_ns, end_ns, pid, tid, call, file, bytes;
	s64 ret, off_cpu_ns;
};

/* One of `enum file_call`, or 0. */
static __always_inline u32 file_call(u64 nr)
{
	switch (nr) {
	case NR_fsync:
		return CALL_FSYNC;
	case NR_fdatasync:
		return CALL_FDATASYNC;
	case NR_sync_file_range:
		return CALL_SYNC_FILE_RANGE;
	case NR_msync:
		return CALL_MSYNC;
	case NR_mincore:
		return CALL_MINCORE;
	case NR_mmap:
		return CALL_MMAP;
	case NR_io_uring_enter:
		return CALL_IO_URING_ENTER;
	}
	return 0;
}

/* Whether a system call is one of these, or moves bytes to or from what may be a file. */
static __always_inline bool is_on_file(u64 nr)
{
	switch (nr) {
	case NR_write:
	case NR_pwrite64:
	case NR_writev:
	case NR_pwritev:
	case NR_pwritev2:
	case NR_read:
	case NR_pread64:
	case NR_readv:
	case NR_preadv:
	case NR_preadv2:
	case NR_io_submit:
		return true;
	}
	return file_call(nr);
}

/* Puts the descriptor into a0. mmap counts if it maps a file, and not only a page of it. */
static __always_inline bool takes_time(struct call_args *c, const void *regs)
{
	s64 fd = 0;

	if (c->nr != NR_mmap)
		return true;
	bpf_probe_read_kernel(&fd, sizeof(fd), (const char *)regs + REG_FIFTH_ARGUMENT);
	c->a0 = fd;
	return (s32)fd >= 0 && c->a1 >= MMAP_LEAST_BYTES;
}

/* Room for a record, from the budget; 0 if there is none. */
static __always_inline struct call_record *new_call(struct process_state *p, u64 now)
{
	struct call_record *r;

	if (!in_detail(p, now))
		return 0;
	__sync_fetch_and_add(&p->budget, -1);
	r = events.ringbuf_reserve(sizeof(*r));
	if (!r) {
		count(KIND_CALL, true);
		return 0;
	}
	r->kind = KIND_CALL;
	r->end_ns = now;
	return r;
}

static __always_inline void file_call_done(struct thread_state *s, struct process_state *p, u64 pid_tgid, u64 now,
					   u64 nr, s64 ret)
{
	u32 call = file_call(nr);
	bool named = call <= CALL_SYNC_FILE_RANGE || call == CALL_MMAP;
	struct call_record *r = new_call(p, now);

	if (!r)
		return;
	r->begin_ns = s->enter;
	r->pid = pid_tgid >> 32;
	r->tid = (u32)pid_tgid;
	r->call = call;
	r->file = named ? carrier_of(file_of(s->a0), FILE_LEAST_BYTES) : 0;
	r->bytes = call == CALL_FSYNC || call == CALL_FDATASYNC ? 0 : s->a1;
	r->ret = call == CALL_MMAP && ret > 0 ? 0 : ret;	/* no addresses in a recording */
	r->off_cpu_ns = OFF_CPU_KNOWN ? off_cpu_in_call(s, now) : -1;
	events.ringbuf_submit(r, RB_NO_WAKEUP);
}
