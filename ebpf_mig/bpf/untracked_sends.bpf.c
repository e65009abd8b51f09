// SPDX-License-Identifier: GPL-2.0
/*
 * Sends that the traced system calls do not show: io_uring, sendmmsg, splice and future ones.
 *
 * In: sock:sock_send_length (Linux 6.3 and later), which fires at the end of every path into a socket's sendmsg.
 * Out: TRANSFER records marked hidden. The begin of such a send is unknown: the records have an end and bytes, but
 * no duration.
 */
#pragma once

#include "from_syscalls.bpf.c"
#include "sockets.h"
#include "own_runs.h"

/* sock_send_length: sk, ret, flags. */
TRACED_PROGRAM(on_sock_send_length, struct bpf_raw_tracepoint_args)
{
	u64 sock, now;
	s64 sent = (s32)ctx->args[1];
	struct transfer_batch *batch;
	struct thread_state *s;
	struct process_state *p;
	bool detail;

	if (sent <= 0)
		return;
	s = this_thread(pid_tgid);
	if (!s || (s->nr && direction_of(s->nr - 1) == SEND))	/* that call's exit makes the record */
		return;
	p = this_process(pid_tgid);
	if (!p)
		return;
	sock = read_u64(ctx->args[0], OFF_sock_socket);
	if (!sock)
		return;
	now = bpf_ktime_get_ns();
	detail = in_detail(p, now);
	batch = &s->batch[UNTRACKED];
	if (batch->file != read_u64(sock, OFF_socket_file) || batch->epoch != p->epoch || detail ||
	    now - batch->end_ns > COALESCE_GAP_NS || now - batch->begin_ns > COALESCE_MAX_NS) {
		emit_batch(batch, pid_tgid, UNTRACKED);
		batch->begin_ns = now;
		batch->fd = -1;
		batch->file = read_u64(sock, OFF_socket_file);
		batch->socket = read_u64(sock - OFF_alloc_socket + OFF_alloc_inode, OFF_inode_ino);
		batch->epoch = p->epoch;
		batch->bytes = batch->failed = 0;
		introduce(pid_tgid, now, batch);
	}
	if (s->batch[SEND].socket == batch->socket)	/* see transfer_done */
		emit_batch(&s->batch[SEND], pid_tgid, SEND);
	batch->end_ns = now;
	batch->calls++;
	batch->bytes += sent;
	if (detail) {
		__sync_fetch_and_add(&p->budget, -1);
		emit_batch(batch, pid_tgid, UNTRACKED);
	}
}
