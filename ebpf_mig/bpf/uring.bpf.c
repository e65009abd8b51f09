// SPDX-License-Identifier: GPL-2.0
/*
 * Reads, writes and syncs of files by io_uring, for every tier.
 *
 * In: io_uring:io_uring_submit_req (io_uring_submit_sqe before Linux 6.4) and io_uring:io_uring_complete, whose
 * arguments probes/uring.py finds. Both run in a thread of the process that made the ring, since Linux 5.12 also those
 * of its workers and of the thread that polls the queue (create_io_thread). Out: TRANSFER and CALL records.
 *
 * The file of a request is read when it completes: since Linux 5.19 it is looked up after the submission
 * (io_assign_file), and put only after the completion was posted (io_free_batch_list). What was submitted before
 * tracing began, or completes after it ended, does not count; nor what fails, or completes without a CQE.
 */
#pragma once

#include "file_calls.h"
#include "own_runs.h"
#include "queued.h"

/* enum io_uring_op, include/uapi/linux/io_uring.h; one part of user space's ABI, as the rest of this. */
#define IORING_OP_READV 1
#define IORING_OP_WRITEV 2
#define IORING_OP_FSYNC 3
#define IORING_OP_READ_FIXED 4
#define IORING_OP_WRITE_FIXED 5
#define IORING_OP_READ 22
#define IORING_OP_WRITE 23
#define IORING_OP_READV_FIXED 60
#define IORING_OP_WRITEV_FIXED 61
#define IORING_FSYNC_DATASYNC 1
#define CQE_RESULT 8			/* struct io_uring_cqe */

#define NOT_TRACED 2			/* beside SEND and RECEIVE */
#define SYNC 3

struct request {
	u64 begin_ns, tgid, kind, call, carrier;
};
BPF_HASH(requests, u64, struct request, 4096);	/* in flight, by struct io_kiocb, or as of aio_sync.bpf.c */

static __always_inline u32 kind_of(u8 opcode)
{
	switch (opcode) {
	case IORING_OP_READV:
	case IORING_OP_READ_FIXED:
	case IORING_OP_READ:
	case IORING_OP_READV_FIXED:
		return RECEIVE;
	case IORING_OP_WRITEV:
	case IORING_OP_WRITE_FIXED:
	case IORING_OP_WRITE:
	case IORING_OP_WRITEV_FIXED:
		return SEND;
	case IORING_OP_FSYNC:
		return SYNC;
	}
	return NOT_TRACED;
}

/* One of `enum file_call`. */
static __always_inline u32 sync_of(u64 request)
{
	u32 flags = 0;

	if (OFF_request_fsync != OFF_NONE)
		bpf_probe_read_kernel(&flags, sizeof(flags), (void *)(request + OFF_request_fsync));
	return flags & IORING_FSYNC_DATASYNC ? CALL_FDATASYNC : CALL_FSYNC;
}

/* The kernel reuses a request that has completed: its entry is replaced. */
TRACED_PROGRAM(on_io_uring_submit, struct bpf_raw_tracepoint_args)
{
	u64 key = ctx->args[URING_SUBMITTED];
	struct request r = {};
	u8 opcode = 0;

	bpf_probe_read_kernel(&opcode, sizeof(opcode), (void *)(key + OFF_request_opcode));
	r.kind = kind_of(opcode);
	if (r.kind == NOT_TRACED)
		return;
	r.begin_ns = bpf_ktime_get_ns();
	r.tgid = pid_tgid >> 32;
	if (r.kind == SYNC)
		r.call = sync_of(key);
	if (requests.update(&key, &r))
		count(r.kind == SYNC ? KIND_CALL : KIND_TRANSFER, true);
}

static __always_inline void sync_done(struct process_state *p, const struct request *request, u64 now, s64 ret)
{
	struct call_record *r = new_call(p, now);

	if (!r)
		return;
	r->begin_ns = request->begin_ns;
	r->pid = request->tgid;
	r->tid = 0;				/* as of queued.h */
	r->call = request->call;
	r->file = request->carrier;
	r->bytes = 0;
	r->ret = ret;
	r->off_cpu_ns = -1;
	events.ringbuf_submit(r, RB_NO_WAKEUP);
}

TRACED_PROGRAM(on_io_uring_complete, struct bpf_raw_tracepoint_args)
{
	u64 key = ctx->args[1], file, now;
	struct request *found = requests.lookup(&key), request;
	struct process_state *p;
	s32 result = 0;

	if (!found)
		return;
	request = *found;
	requests.delete(&key);
	p = this_process(pid_tgid);
	if (!p || request.tgid != pid_tgid >> 32)
		return;
#if URING_RESULT_IN_CQE
	bpf_probe_read_kernel(&result, sizeof(result), (void *)(ctx->args[URING_RESULT] + CQE_RESULT));
#else
	result = (s32)ctx->args[URING_RESULT];
#endif
	now = bpf_ktime_get_ns();
	file = read_u64(key, OFF_request_file);
	if (request.kind == SYNC) {
		request.carrier = carrier_of(file, FILE_LEAST_BYTES);
		sync_done(p, &request, now, result);
	} else if (result > 0) {
		request_done(p, pid_tgid, request.begin_ns, now, request.kind, result, file);
	}
}
