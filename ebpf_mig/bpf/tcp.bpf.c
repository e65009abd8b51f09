// SPDX-License-Identifier: GPL-2.0
/*
 * TCP segments of the traced sockets as they arrive, while no vCPU of their process runs.
 *
 * In: tcp:tcp_probe, which fires for each incoming segment of the host, before TCP has worked on it; sockets that no
 * traced call has used fail the first lookup. Out: SEGMENT records: the segment, the bytes that the socket has in
 * flight, and the bytes that it has not sent yet. Also in: tcp:tcp_retransmit_skb, which fires for each
 * retransmitted segment. Out: RETRANSMIT records.
 */
#pragma once

#include "sockets.h"
#include "own_runs.h"

struct segment_record {
	u64 kind, at_ns, pid, socket, payload, acked, in_flight, unsent, window, seq, ack, received;
};

struct retransmit_record {
	u64 kind, at_ns, pid, socket, bytes, seq, number;
};

static __always_inline u32 read_u32(u64 base, u32 offset)
{
	u32 v = 0;

	bpf_probe_read_kernel(&v, sizeof(v), (void *)(base + offset));
	return v;
}

/* tcp_probe: sk, skb. skb->data points at the TCP header (tcp_rcv_established, net/ipv4/tcp_input.c, Linux 6.12). */
static __always_inline void tcp_probe(u64 sk, u64 skb, struct owner *o, u64 now)
{
	u64 header;
	struct process_state *p;
	struct segment_record *r;
	u32 tgid, una, nxt, ack, length;
	u8 offset = 0;

	tgid = o->pid;
	p = processes.lookup(&tgid);
	if (!p || !in_detail(p, now))
		return;
	r = events.ringbuf_reserve(sizeof(*r));
	if (!r) {
		count(KIND_SEGMENT, true);
		return;
	}
	header = read_u64(skb, OFF_skb_data);
	bpf_probe_read_kernel(&offset, sizeof(offset), (void *)(header + 12));
	ack = bpf_ntohl(read_u32(header, 8));
	length = read_u32(skb, OFF_skb_len);
	una = read_u32(sk, OFF_tcp_una);
	nxt = read_u32(sk, OFF_tcp_nxt);
	r->kind = KIND_SEGMENT;
	r->at_ns = now;
	r->pid = tgid;
	r->socket = o->socket;
	r->payload = length - (offset >> 4) * 4;
	r->acked = (u32)(ack - una);
	r->in_flight = (u32)(nxt - una);
	r->unsent = (u32)(read_u32(sk, OFF_tcp_write) - nxt);
	r->window = read_u32(sk, OFF_tcp_wnd);
	r->seq = bpf_ntohl(read_u32(header, 4));
	r->ack = ack;
	r->received = read_u32(sk, OFF_tcp_rcv_nxt);
	events.ringbuf_submit(r, RB_NO_WAKEUP);
	__sync_fetch_and_add(&p->budget, -1);
}

int on_tcp_probe(struct bpf_raw_tracepoint_args *ctx)
{
	u64 sk = ctx->args[0], now = bpf_ktime_get_ns();
	struct owner *o = tcp_owners.lookup(&sk);

	if (!o || inode_of(sk) != o->socket)	/* closed; the memory may belong to another connection by now */
		return not_traced(false);
	tcp_probe(sk, ctx->args[1], o, now);
	return traced(now, false);
}

/*
 * tcp_retransmit_skb: sk, skb. skb->cb begins with the first sequence number and the sequence number after the last
 * byte (struct tcp_skb_cb, include/net/tcp.h, Linux 5.8 to 6.18). Each retransmission is counted. While no vCPU
 * runs, each is a record with the count so far.
 */
static __always_inline void tcp_retransmit_skb(u64 sk, u64 skb, struct owner *o, u64 now)
{
	struct retransmit_record *r;
	struct process_state *p;
	u32 tgid, seq;

	__sync_fetch_and_add(&o->retransmits, 1);
	tgid = o->pid;
	p = processes.lookup(&tgid);
	if (!p || !in_detail(p, now))
		return;
	r = events.ringbuf_reserve(sizeof(*r));
	if (!r) {
		count(KIND_RETRANSMIT, true);
		return;
	}
	seq = read_u32(skb, OFF_skb_cb);
	r->kind = KIND_RETRANSMIT;
	r->at_ns = now;
	r->pid = tgid;
	r->socket = o->socket;
	r->bytes = (u32)(read_u32(skb, OFF_skb_cb + 4) - seq);
	r->seq = seq;
	r->number = o->retransmits;
	events.ringbuf_submit(r, RB_NO_WAKEUP);
	__sync_fetch_and_add(&p->budget, -1);
}

int on_tcp_retransmit_skb(struct bpf_raw_tracepoint_args *ctx)
{
	u64 sk = ctx->args[0], now = bpf_ktime_get_ns();
	struct owner *o = tcp_owners.lookup(&sk);

	if (!o || inode_of(sk) != o->socket)	/* closed; the memory may belong to another connection by now */
		return not_traced(false);
	tcp_retransmit_skb(sk, ctx->args[1], o, now);
	return traced(now, false);
}
