/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Reads and writes of files that a thread queues, and that go on without it: by io_uring or io_submit(2).
 *
 * In: completed requests. Out: TRANSFER records without a thread (tid 0), since nobody is inside a call meanwhile. The
 * requests of a process overlap: those on one file that the same thread completes are coalesced into a batch, from the
 * first one's submission to the last one's completion. While no vCPU runs, each request is kept. Sends and receives on
 * sockets and pipes are seen elsewhere.
 */
#pragma once

#include "sockets.h"

struct queue {
	u64 tgid, tid, direction;
	struct transfer_batch batch;
};
BPF_HASH(queues, u64, struct queue, 1024);	/* by queue_key; only one thread changes an entry */
BPF_PERCPU_ARRAY(no_queue, struct queue, 1);	/* in place of one that the table has no room for */

static __always_inline u64 queue_key(u64 pid_tgid, u32 direction, u64 carrier)
{
	return carrier ^ (pid_tgid & 0xffffffff) << 40 ^ (u64)direction << 63;
}

/* `took` is added up without the time in which a request before it was also under way, as far as that is known. */
static __always_inline void add_request(struct transfer_batch *batch, u64 begin, u64 now, u64 bytes)
{
	u64 took = now - begin;

	if (!batch->calls || begin <= batch->begin_ns) {
		batch->begin_ns = begin;
		batch->in_call_ns = took;
	} else {
		batch->in_call_ns += now - (begin > batch->end_ns ? begin : batch->end_ns);
	}
	batch->end_ns = now;
	batch->calls++;
	batch->bytes += bytes;
	if (took > batch->max_call_ns)
		batch->max_call_ns = took;
}

/* A request that began at `begin` moved `bytes`. */
static __always_inline void request_done(struct process_state *p, u64 pid_tgid, u64 begin, u64 now, u32 direction,
					 s64 bytes, u64 file)
{
	u64 nobody = pid_tgid & ~0xffffffffULL, carrier, key;
	struct transfer_batch *batch;
	struct queue *q, *none;
	u32 zero = 0;
	bool detail;

	if (!is_file(type_of(read_u64(file, OFF_file_inode))))
		return;
	carrier = carrier_of(file, bytes);
	if (!carrier)
		return;
	key = queue_key(pid_tgid, direction, carrier);
	none = no_queue.lookup(&zero);
	if (!none)
		return;
	q = queues.lookup(&key);
	if (!q) {
		queues.update(&key, none);
		q = queues.lookup(&key);
	}
	if (!q)
		q = none;
	batch = &q->batch;
	detail = in_detail(p, now);
	if (detail || batch->socket != carrier || q->tid != (u32)pid_tgid || batch->epoch != p->epoch ||
	    begin > batch->end_ns + COALESCE_GAP_NS || now - batch->begin_ns > COALESCE_MAX_NS) {
		emit_batch(batch, q->tgid << 32, q->direction);
		q->tgid = pid_tgid >> 32;
		q->tid = (u32)pid_tgid;
		q->direction = direction;
		batch->fd = -1;
		batch->file = file;
		batch->socket = carrier;
		batch->epoch = p->epoch;
		batch->calls = batch->bytes = batch->max_call_ns = 0;
	}
	if (!batch->calls)
		introduce(nobody, now, batch);
	add_request(batch, begin, now, bytes);
	if (detail)
		__sync_fetch_and_add(&p->budget, -1);
	if (detail || q == none)
		emit_batch(batch, nobody, direction);
}
