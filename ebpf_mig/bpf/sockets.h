/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Sends and receives. Calls of one thread on one socket are folded into runs; while no vCPU runs each is kept.
 *
 * In: completed calls. Out: TRANSFER records, and one SOCKET record for each socket inode on first use.
 * A file is recognised as a socket by its inode's mode; pipes, eventfds and log files are left out here.
 */
#pragma once

#include "common.h"

#define SEND 0
#define RECEIVE 1
#define HIDDEN 2			/* sent, but by no system call that we follow: see untracked_sends.bpf.c */
#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define AF_UNIX 1
#define AF_INET 2
#define AF_INET6 10

struct transfer_record {
	u64 kind, begin, end, pid, tid, fd, direction, socket, calls, bytes, in_call, max_call, failed, position, off_cpu;
	u64 off_before, hidden;
};
struct socket_record {
	u64 kind, at, pid, fd, socket, family, local[2], remote[2], local_port, remote_port, peer;
};

_Static_assert(sizeof(struct transfer_record) == 8 * TRANSFER_WORDS, "transfer record");
_Static_assert(sizeof(struct socket_record) == 8 * SOCKET_WORDS, "socket record");

struct stream {
	u64 bytes[2];
};
BPF_HASH(streams, u64, struct stream, 4096);

/* The inode number if the file is a socket, else 0. */
static __always_inline u64 socket_of(u64 file)
{
	u64 inode = word_at(file, OFF_file_inode);
	u16 mode = 0;

	bpf_probe_read_kernel(&mode, sizeof(mode), (void *)(inode + OFF_inode_mode));
	if ((mode & S_IFMT) != S_IFSOCK)
		return 0;
	return word_at(inode, OFF_inode_ino);
}

/* Inode number of a struct sock, 0 once its file is closed. */
static __always_inline u64 inode_of(u64 sk)
{
	u64 sock = word_at(sk, OFF_sock_socket);

	return sock ? word_at(sock - OFF_alloc_socket + OFF_alloc_inode, OFF_inode_ino) : 0;
}

/* Inode number of the other end of a UNIX socket, 0 while it has none. */
static __always_inline u64 unix_peer(u64 sk)
{
	u64 peer = word_at(sk, OFF_unix_peer);

	return peer ? inode_of(peer) : 0;
}

static __always_inline void tell_socket(u64 pid_tgid, u64 now, u64 fd, u64 file, u64 socket)
{
	struct socket_record *r = events.ringbuf_reserve(sizeof(*r));
	u64 sk = word_at(word_at(file, OFF_file_private), OFF_socket_sk);
	u16 family = 0, port = 0;
	struct owner owner = {};

	if (!r) {
		count(KIND_SOCKET, true);
		return;
	}
	bpf_probe_read_kernel(&family, sizeof(family), (void *)(sk + OFF_skc_family));
	r->kind = KIND_SOCKET;
	r->at = now;
	r->pid = pid_tgid >> 32;
	r->fd = fd;
	r->socket = socket;
	r->family = family;
	r->local[0] = r->local[1] = r->remote[0] = r->remote[1] = 0;
	r->local_port = r->remote_port = r->peer = 0;
	if (family == AF_UNIX) {
		r->peer = unix_peer(sk);
	} else if (family == AF_INET || family == AF_INET6) {
		owner.pid = pid_tgid >> 32;
		owner.socket = socket;
		tcp_owners.update(&sk, &owner);
		if (family == AF_INET) {
			bpf_probe_read_kernel(r->local, 4, (void *)(sk + OFF_skc_rcv_saddr));
			bpf_probe_read_kernel(r->remote, 4, (void *)(sk + OFF_skc_daddr));
		} else {
			bpf_probe_read_kernel(r->local, 16, (void *)(sk + OFF_skc_v6_rcv_saddr));
			bpf_probe_read_kernel(r->remote, 16, (void *)(sk + OFF_skc_v6_daddr));
		}
		bpf_probe_read_kernel(&port, sizeof(port), (void *)(sk + OFF_skc_num));
		r->local_port = port;
		bpf_probe_read_kernel(&port, sizeof(port), (void *)(sk + OFF_skc_dport));
		r->remote_port = (u16)(port << 8 | port >> 8);
	}
	events.ringbuf_submit(r, RB_NO_WAKEUP);
}

/* Bytes seen on the socket in this direction before this run; tells the socket on first use. */
static __always_inline u64 advance(u64 pid_tgid, u64 now, struct transfer_run *run, u32 direction)
{
	struct stream *st = streams.lookup(&run->socket), fresh = {};
	u64 before;

	if (!st) {
		tell_socket(pid_tgid, now, run->fd, run->file, run->socket);
		streams.update(&run->socket, &fresh);
		st = streams.lookup(&run->socket);
		if (!st) {
			count(KIND_SOCKET, true);
			return 0;
		}
	}
	before = direction == SEND ? st->bytes[0] : st->bytes[1];
	if (direction == SEND)		/* the value that an atomic add returns needs a newer instruction set */
		__sync_fetch_and_add(&st->bytes[0], run->bytes);
	else
		__sync_fetch_and_add(&st->bytes[1], run->bytes);
	return before;
}

static __always_inline void flush_run(struct transfer_run *run, u64 pid_tgid, u64 now, u32 way)
{
	struct transfer_record *r;
	u32 direction = way == RECEIVE ? RECEIVE : SEND;
	bool timed = OFF_CPU_KNOWN && way != HIDDEN;
	u64 position;

	if (!run->calls)
		return;
	position = advance(pid_tgid, now, run, direction);
	r = events.ringbuf_reserve(sizeof(*r));
	if (r) {
		r->kind = KIND_TRANSFER;
		r->begin = run->begin;
		r->end = run->end;
		r->pid = pid_tgid >> 32;
		r->tid = (u32)pid_tgid;
		r->fd = run->fd;
		r->direction = direction;
		r->socket = run->socket;
		r->calls = run->calls;
		r->bytes = run->bytes;
		r->in_call = run->in_call;
		r->max_call = run->max_call;
		r->failed = run->failed;
		r->position = position;
		r->off_cpu = timed ? run->off_cpu : -1;
		r->off_before = timed ? run->off_before : -1;
		r->hidden = way == HIDDEN;
		events.ringbuf_submit(r, RB_NO_WAKEUP);
	} else {
		count(KIND_TRANSFER, true);
	}
	run->calls = 0;
}

/* `fd` is -1 where a function of the socket was hooked, not a call of a descriptor. */
static __always_inline void transfer_done(struct thread_state *s, struct process_state *p, u64 pid_tgid,
					  u64 now, u32 direction, s64 ret, u64 file, u64 fd)
{
	struct transfer_run *run = direction == SEND ? &s->run[0] : &s->run[1];
	u64 took = now - s->enter, socket;
	bool detail = in_detail(p, now);

	if (!run->calls || run->file != file || run->fd != fd || run->epoch != p->epoch || detail ||
	    s->enter - run->end > FOLD_GAP_NS || now - run->begin > FOLD_MAX_NS) {
		socket = socket_of(file);
		if (!socket)
			return;
		if (ret <= 0) {			/* nothing moved: not worth ending or beginning a run */
			run->failed++;
			return;
		}
		flush_run(run, pid_tgid, now, direction);
		run->begin = s->enter;
		run->off_before = s->off_before;
		run->fd = fd;
		run->file = file;
		run->socket = socket;
		run->epoch = p->epoch;
		run->bytes = run->in_call = run->max_call = run->off_cpu = 0;
	}
	if (ret <= 0) {
		run->failed++;
		return;
	}
	run->end = now;
	run->calls++;
	run->bytes += ret;
	run->in_call += took;
	run->off_cpu += s->off_call;
	if (took > run->max_call)
		run->max_call = took;
	if (detail) {
		__sync_fetch_and_add(&p->budget, -1);
		flush_run(run, pid_tgid, now, direction);
		run->failed = 0;
	}
}
