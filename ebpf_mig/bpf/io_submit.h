/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Reads and writes that io_submit(2) queues (QEMU: aio=native).
 *
 * In: a call that returned, and its requests in user memory. Out: TRANSFER records without a thread, as of queued.h. The
 * kernel shows no completion: such a request counts as done when the call returns, with the bytes that were asked for.
 * Of a call, the first IOCBS_SEEN requests count, as far as they are on the file of the first one, and of a request the
 * first IOVECS_SEEN buffers. Syncs are in aio_sync.bpf.c.
 */
#pragma once

#include "queued.h"

#define IOCBS_SEEN 32
#define IOVECS_SEEN 32
#define IOCB_CMD_PREAD 0		/* include/uapi/linux/aio_abi.h */
#define IOCB_CMD_PWRITE 1
#define IOCB_CMD_PREADV 7
#define IOCB_CMD_PWRITEV 8

/* The part of struct iocb from this offset on. */
#define IOCB_REQUEST 16
struct iocb_request {
	u16 opcode, priority;
	u32 fd;
	u64 buffer, length;		/* of a vectored request: struct iovec *, and their number */
};

static __always_inline u64 bytes_of(const struct iocb_request *r)
{
	struct {
		u64 base, length;
	} vector;
	u64 sum = 0;

	if (r->opcode == IOCB_CMD_PREAD || r->opcode == IOCB_CMD_PWRITE)
		return r->length;
#pragma clang loop unroll(disable)
	for (int i = 0; i < IOVECS_SEEN; i++) {
		if (i >= r->length)
			break;
		if (bpf_probe_read_user(&vector, sizeof(vector), (const void *)(r->buffer + i * sizeof(vector))))
			break;
		sum += vector.length;
	}
	return sum;
}

/* `requests`: pointers to struct iocb, of which the kernel took `count`. */
static __always_inline void submitted(struct process_state *p, u64 pid_tgid, u64 begin, u64 now, s64 count,
				      const u64 *requests)
{
	u64 read = 0, written = 0, moved;
	u32 fd = 0;

#pragma clang loop unroll(disable)
	for (int i = 0; i < IOCBS_SEEN; i++) {
		struct iocb_request r = {};
		u64 at = 0;

		if (i >= count)
			break;
		bpf_probe_read_user(&at, sizeof(at), requests + i);
		bpf_probe_read_user(&r, sizeof(r), (const void *)(at + IOCB_REQUEST));
		if (!i)
			fd = r.fd;
		if (r.fd != fd)
			continue;
		if (r.opcode == IOCB_CMD_PREAD || r.opcode == IOCB_CMD_PREADV)
			read += bytes_of(&r);
		else if (r.opcode == IOCB_CMD_PWRITE || r.opcode == IOCB_CMD_PWRITEV)
			written += bytes_of(&r);
	}
#pragma clang loop unroll(disable)	/* one copy of what follows is compiled and verified faster */
	for (int way = 0; way < 2; way++) {
		moved = way == SEND ? written : read;
		if (moved)
			request_done(p, pid_tgid, begin, now, way, moved, file_of(fd));
	}
}
