// SPDX-License-Identifier: GPL-2.0
/*
 * Syncs of files that io_submit(2) queues (IOCB_CMD_FSYNC, IOCB_CMD_FDSYNC; newer QEMUs: aio=native).
 *
 * In: workqueue:workqueue_queue_work, in the thread that submits, and workqueue:workqueue_execute_end, in a thread of the
 * kernel: it is aio_fsync_work that syncs (fs/aio.c, Linux 5.10 to 7.2). Out: CALL records without a thread.
 *
 * The work is a part of struct aio_kiocb. Any other work of the process is told from it by what user space asked for:
 * the pointer to struct iocb that the kernel returns with the result has to lead to a request to sync that file.
 */
#pragma once

#include "io_submit.h"
#include "uring.bpf.c"

#define IOCB_CMD_FSYNC 2		/* include/uapi/linux/aio_abi.h */
#define IOCB_CMD_FDSYNC 3

TRACED_PROGRAM(on_aio_sync_queued, struct bpf_raw_tracepoint_args)
{
	u64 work = ctx->args[2], sync = work - OFF_fsync_work, file;
	struct iocb_request asked = {};
	struct request r = {};

	if (OFF_aio_object == OFF_NONE)
		return;
	if (bpf_probe_read_user(&asked, sizeof(asked), (const void *)(read_u64(sync, OFF_aio_object) + IOCB_REQUEST)))
		return;
	if (asked.opcode != IOCB_CMD_FSYNC && asked.opcode != IOCB_CMD_FDSYNC)
		return;
	file = read_u64(sync, OFF_fsync_file);
	if (!file || file != file_of(asked.fd))
		return;
	r.begin_ns = bpf_ktime_get_ns();
	r.tgid = pid_tgid >> 32;
	r.kind = SYNC;
	r.call = asked.opcode == IOCB_CMD_FDSYNC ? CALL_FDATASYNC : CALL_FSYNC;
	r.carrier = carrier_of(file, FILE_LEAST_BYTES);
	if (requests.update(&work, &r))
		count(KIND_CALL, true);
}

/* The request is freed by now, so nothing of it is read. Its result is not known. */
int on_aio_sync_done(struct bpf_raw_tracepoint_args *ctx)
{
	u64 work = ctx->args[0], now;
	struct request *found = requests.lookup(&work), request;
	struct process_state *p;
	u32 tgid;

	if (!found)
		return not_traced(false);
	now = bpf_ktime_get_ns();
	request = *found;
	requests.delete(&work);
	tgid = request.tgid;
	p = processes.lookup(&tgid);
	if (p && request.kind == SYNC)
		sync_done(p, &request, now, 0);
	return traced(now, false);
}
