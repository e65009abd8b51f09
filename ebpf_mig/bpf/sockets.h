/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Sends and receives on everything that can carry a migration: sockets, pipes and files. Calls of one thread on one of
 * them are coalesced into batches. While no vCPU runs, each call is kept.
 *
 * In: completed calls. Out: TRANSFER records, and one SOCKET record for each process and carrier on first use. The
 * inode shows what a file is. Eventfds and other files without a place are ignored, and so are small calls on regular
 * files: log lines, for example. Block devices are files.
 */
#pragma once

#include "common.h"

#define SEND 0
#define RECEIVE 1
#define UNTRACKED 2			/* sent by a system call that is not traced: see untracked_sends.bpf.c */
#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define S_IFREG 0100000
#define S_IFBLK 0060000
#define S_IFIFO 0010000
#define PIPEFS_MAGIC 0x50495045			/* include/uapi/linux/magic.h */
#define ANON_INODE_FS_MAGIC 0x09041934
#define PLACED (1ULL << 61)			/* set in the key of a file or a named pipe: see carrier_of */
#define BLOCK_DEVICE (0x1fffffULL << 40)	/* in place of the file system's device number */
#define FILE_LEAST_BYTES 512
#define EINTR 4
#define EAGAIN 11
#define AF_UNIX 1
#define SOL_SOCKET 1
#define SCM_RIGHTS 1
#define AF_INET 2
#define AF_INET6 10
#define AF_VSOCK 40

struct transfer_record {
	u64 kind, begin_ns, end_ns, pid, tid;
	s64 fd;
	u64 direction, socket, calls, bytes, in_call_ns, max_call_ns, failed, position;
	s64 off_cpu_ns, off_before_ns;			/* -1: unknown */
	u64 hidden, descriptors;
};
struct socket_record {
	u64 kind, at_ns, pid;
	s64 fd;
	u64 socket, family, local[2], remote[2], local_port, remote_port, peer;
};

struct socket_error_record {
	u64 kind, at_ns, pid, tid, socket, direction;
	s64 ret;
};

struct stream {
	u64 bytes[2];
};
BPF_HASH(streams, u64, struct stream, 4096);

/* Of a system call that moves bytes; -1 for others. */
static __always_inline int direction_of(u64 nr)
{
	switch (nr) {
	case NR_sendmsg:
	case NR_sendto:
	case NR_write:
	case NR_writev:
	case NR_pwrite64:
	case NR_pwritev:
	case NR_pwritev2:
	case NR_sendfile:
	case NR_splice:
		return SEND;
	case NR_recvmsg:
	case NR_recvfrom:
	case NR_read:
	case NR_readv:
	case NR_pread64:
	case NR_preadv:
	case NR_preadv2:
		return RECEIVE;
	}
	return -1;
}

static __always_inline u32 type_of(u64 inode)
{
	u16 mode = 0;

	bpf_probe_read_kernel(&mode, sizeof(mode), (void *)(inode + OFF_inode_mode));
	return mode & S_IFMT;
}

static __always_inline bool is_file(u32 type)
{
	return type == S_IFREG || type == S_IFBLK;
}

/*
 * The key of a socket, a pipe or a file that may carry a migration; 0 for all others. Sockets and pipes have inode
 * numbers of one number space (get_next_ino in fs/inode.c). Those of files and named pipes belong to their file system,
 * so its device number (dev_t) becomes part of the key. A block device is its own device number, whichever node was
 * opened. `moved` is what the call returned. Since Linux 6.16 an eventfd has the mode of a regular file, too.
 */
static __always_inline u64 carrier_of(u64 file, s64 moved)
{
	u64 inode = read_u64(file, OFF_file_inode), number, place;
	u32 type = type_of(inode), device = 0;

	if (type != S_IFSOCK && type != S_IFIFO && (!is_file(type) || moved < FILE_LEAST_BYTES))
		return 0;
	if (type == S_IFBLK) {
		bpf_probe_read_kernel(&device, sizeof(device), (void *)(inode + OFF_inode_rdev));
		return PLACED | BLOCK_DEVICE | device;
	}
	number = read_u64(inode, OFF_inode_ino);
	if (type == S_IFSOCK)
		return number;
	place = read_u64(inode, OFF_inode_sb);
	switch (read_u64(place, OFF_sb_magic)) {
	case PIPEFS_MAGIC:
		return number;
	case ANON_INODE_FS_MAGIC:
		return 0;
	}
	bpf_probe_read_kernel(&device, sizeof(device), (void *)(place + OFF_sb_dev));
	return PLACED | (u64)(device & 0x1fffff) << 40 | (number & 0xffffffffffULL);
}

/* Inode number of a struct sock, 0 once its file is closed. */
static __always_inline u64 inode_of(u64 sk)
{
	u64 sock = read_u64(sk, OFF_sock_socket);

	return sock ? read_u64(sock - OFF_alloc_socket + OFF_alloc_inode, OFF_inode_ino) : 0;
}

/* include/linux/socket.h; CMSG_DATA begins behind this header. */
struct control_header {
	u64 length;
	u32 level, type;
};

/* Number of descriptors in the first control message of a send (SCM_RIGHTS); VMMs send no second one. */
static __always_inline u64 descriptors_in(const struct control_header *h, u64 length)
{
	if (h->level != SOL_SOCKET || h->type != SCM_RIGHTS || h->length > length || h->length < sizeof(*h))
		return 0;
	return (h->length - sizeof(*h)) / 4;
}

/* Inode number of the other end of a UNIX socket, 0 if there is none. */
static __always_inline u64 unix_peer(u64 sk)
{
	u64 peer = read_u64(sk, OFF_unix_peer);

	return peer ? inode_of(peer) : 0;
}

static __always_inline void emit_socket(u64 pid_tgid, u64 now, u64 fd, u64 file, u64 socket)
{
	struct socket_record *r = events.ringbuf_reserve(sizeof(*r));
	u64 sk = read_u64(read_u64(file, OFF_file_private), OFF_socket_sk);
	u32 type = type_of(read_u64(file, OFF_file_inode));
	u16 family = 0, port = 0;
	struct owner owner = {};

	if (!r) {
		count(KIND_SOCKET, true);
		return;
	}
	if (type == S_IFSOCK)
		bpf_probe_read_kernel(&family, sizeof(family), (void *)(sk + OFF_skc_family));
	else
		family = is_file(type) ? S_IFREG : type;
	r->kind = KIND_SOCKET;
	r->at_ns = now;
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
		r->remote_port = bpf_ntohs(port);
	} else if (family == AF_VSOCK) {		/* struct sockaddr_vm, ports included */
		bpf_probe_read_kernel(r->local, 16, (void *)(sk + OFF_vsock_local));
		bpf_probe_read_kernel(r->remote, 16, (void *)(sk + OFF_vsock_remote));
	}
	events.ringbuf_submit(r, RB_NO_WAKEUP);
}

/* Processes can share a carrier: one writes into a pipe, the other reads from it. Python: `tables.stream_key`. */
static __always_inline u64 stream_key(u64 pid_tgid, u64 socket)
{
	return socket ^ (pid_tgid >> 32) << 40;
}

/* Emits the carrier of a batch that begins, on first use: its file is still open then. */
static __always_inline void introduce(u64 pid_tgid, u64 now, struct transfer_batch *batch)
{
	u64 key = stream_key(pid_tgid, batch->socket);
	struct stream fresh = {};

	if (streams.lookup(&key))
		return;
	emit_socket(pid_tgid, now, batch->fd, batch->file, batch->socket);
	if (streams.update(&key, &fresh))
		count(KIND_SOCKET, true);
}

/* Bytes seen on the carrier in this direction before this batch. */
static __always_inline u64 advance(u64 pid_tgid, struct transfer_batch *batch, u32 direction)
{
	u64 key = stream_key(pid_tgid, batch->socket), before;
	struct stream *st = streams.lookup(&key);

	if (!st)
		return 0;
	before = direction == SEND ? st->bytes[0] : st->bytes[1];
	if (direction == SEND)		/* an atomic add that returns a value needs a newer instruction set */
		__sync_fetch_and_add(&st->bytes[0], batch->bytes);
	else
		__sync_fetch_and_add(&st->bytes[1], batch->bytes);
	return before;
}

/* Without a thread in `pid_tgid`, it is a batch of queued requests: see queued.h. */
static __always_inline void emit_batch(struct transfer_batch *batch, u64 pid_tgid, u32 way)
{
	struct transfer_record *r;
	u32 direction = way == RECEIVE ? RECEIVE : SEND;
	bool timed = OFF_CPU_KNOWN && way != UNTRACKED && (u32)pid_tgid;
	u64 position;

	if (!batch->calls)
		return;
	position = advance(pid_tgid, batch, direction);
	r = events.ringbuf_reserve(sizeof(*r));
	if (r) {
		r->kind = KIND_TRANSFER;
		r->begin_ns = batch->begin_ns;
		r->end_ns = batch->end_ns;
		r->pid = pid_tgid >> 32;
		r->tid = (u32)pid_tgid;
		r->fd = batch->fd;
		r->direction = direction;
		r->socket = batch->socket;
		r->calls = batch->calls;
		r->bytes = batch->bytes;
		r->in_call_ns = batch->in_call_ns;
		r->max_call_ns = batch->max_call_ns;
		r->failed = batch->failed;
		r->position = position;
		r->off_cpu_ns = timed ? batch->off_cpu_ns : -1;
		r->off_before_ns = timed ? batch->off_before_ns : -1;
		r->hidden = way == UNTRACKED;
		r->descriptors = way == UNTRACKED ? 0 : batch->descriptors;
		events.ringbuf_submit(r, RB_NO_WAKEUP);
	} else {
		count(KIND_TRANSFER, true);
	}
	batch->calls = 0;
}

/* `ret` is a negative errno; 0: the thread shut the socket down (SEND), or the other end closed it (RECEIVE). */
static __always_inline void emit_socket_error(u64 pid_tgid, u64 now, u64 socket, u32 direction, s64 ret)
{
	struct socket_error_record *r = events.ringbuf_reserve(sizeof(*r));

	if (!r) {
		count(KIND_SOCKET_ERROR, true);
		return;
	}
	r->kind = KIND_SOCKET_ERROR;
	r->at_ns = now;
	r->pid = pid_tgid >> 32;
	r->tid = (u32)pid_tgid;
	r->socket = socket;
	r->direction = direction;
	r->ret = ret;
	events.ringbuf_submit(r, RB_NO_WAKEUP);
}

static __always_inline void socket_shut_down(u64 pid_tgid, u64 now, u64 fd)
{
	u64 socket = carrier_of(file_of(fd), 0);

	if (socket)
		emit_socket_error(pid_tgid, now, socket, SEND, 0);
}

/* A call moved no data. What fails again and again is one record. */
static __always_inline void transfer_failed(struct thread_state *s, u64 pid_tgid, u64 now, u32 direction, s64 ret,
					    u64 file)
{
	u64 failure = file + ret * 2 + direction, socket;

	if (ret == -EAGAIN || ret == -EINTR || (!ret && direction == SEND) || s->failure == failure)
		return;
	s->failure = failure;
	socket = carrier_of(file, ret);
	if (socket)
		emit_socket_error(pid_tgid, now, socket, direction, ret);
}

/* `fd` is -1 if a socket function was hooked instead of a call on a descriptor. */
static __always_inline void transfer_done(struct thread_state *s, struct process_state *p, u64 pid_tgid,
					  u64 now, u32 direction, s64 ret, u64 file, u64 fd)
{
	struct transfer_batch *batch = direction == SEND ? &s->batch[0] : &s->batch[1];
	u64 took = now - s->enter, gap = p->passes_on ? HOP_GAP_NS : COALESCE_GAP_NS, socket;
	bool detail = in_detail(p, now), introduced;

	if (ret <= 0)
		transfer_failed(s, pid_tgid, now, direction, ret, file);
	if (!batch->calls || batch->file != file || batch->fd != fd || batch->epoch != p->epoch || detail ||
	    s->enter - batch->end_ns > gap || now - batch->begin_ns > COALESCE_MAX_NS) {
		socket = carrier_of(file, ret);
		if (!socket)
			return;
		if (ret <= 0) {			/* no data moved: do not end or begin a batch */
			batch->failed++;
			return;
		}
#if !SOCKET_FUNCTIONS
		/* Positions are those of the bytes: at most one batch of a carrier's sends is open. */
		if (direction == SEND && s->batch[UNTRACKED].socket == socket)
			emit_batch(&s->batch[UNTRACKED], pid_tgid, UNTRACKED);
#endif
		emit_batch(batch, pid_tgid, direction);
		batch->begin_ns = s->enter;
		batch->off_before_ns = s->off_before;
		batch->fd = fd;
		batch->file = file;
		introduced = batch->socket == socket;	/* by the batch before */
		batch->socket = socket;
		batch->epoch = p->epoch;
		batch->bytes = batch->in_call_ns = batch->max_call_ns = batch->off_cpu_ns = batch->descriptors = 0;
		if (!introduced)
			introduce(pid_tgid, now, batch);
	}
	if (ret <= 0) {
		batch->failed++;
		return;
	}
	batch->end_ns = now;
	batch->calls++;
	batch->bytes += ret;
	batch->in_call_ns += took;
	batch->off_cpu_ns += off_cpu_in_call(s, now);
	batch->descriptors += s->descriptors;
	if (took > batch->max_call_ns)
		batch->max_call_ns = took;
	if (detail) {
		__sync_fetch_and_add(&p->budget, -1);
		emit_batch(batch, pid_tgid, direction);
		batch->failed = 0;
	}
}
