// SPDX-License-Identifier: GPL-2.0
/*
 * Sends that no system call of ours shows: io_uring, sendmmsg, splice and whatever comes next.
 *
 * In: sock:sock_send_length (Linux 6.3 and later), which every path into a socket's sendmsg passes when it is done.
 * Out: TRANSFER records marked hidden. Nobody tells when such a send began: they have an end and bytes, no duration.
 */
#pragma once

#include "sockets.h"

/* sock_send_length: sk, ret, flags. */
int on_sock_send_length(struct bpf_raw_tracepoint_args *ctx)
{
	u64 pid_tgid = bpf_get_current_pid_tgid(), sock, now;
	s64 sent = (s32)ctx->args[1];
	struct transfer_run *run;
	struct thread_state *s;
	struct process_state *p;
	bool detail;

	if (!EBPF_MIG_TARGETS((u32)(pid_tgid >> 32)) || sent <= 0)
		return 0;
	s = this_thread(pid_tgid);
	p = this_process(pid_tgid);
	if (!s || !p || (s->nr && s->nr != NR_ioctl + 1))	/* within a call whose return tells it all */
		return 0;
	sock = word_at(ctx->args[0], OFF_sock_socket);
	if (!sock)
		return 0;
	now = bpf_ktime_get_ns();
	detail = in_detail(p, now);
	run = &s->run[HIDDEN];
	if (run->file != word_at(sock, OFF_socket_file) || run->epoch != p->epoch || detail ||
	    now - run->end > FOLD_GAP_NS || now - run->begin > FOLD_MAX_NS) {
		flush_run(run, pid_tgid, now, HIDDEN);
		run->begin = now;
		run->fd = -1;
		run->file = word_at(sock, OFF_socket_file);
		run->socket = word_at(sock - OFF_alloc_socket + OFF_alloc_inode, OFF_inode_ino);
		run->epoch = p->epoch;
		run->bytes = run->failed = 0;
	}
	run->end = now;
	run->calls++;
	run->bytes += sent;
	if (detail) {
		__sync_fetch_and_add(&p->budget, -1);
		flush_run(run, pid_tgid, now, HIDDEN);
	}
	return 0;
}
