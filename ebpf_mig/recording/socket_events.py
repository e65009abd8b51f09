# SPDX-License-Identifier: Apache-2.0
"""The part of the event model on sockets: what was sent and received, and what TCP did.

In: nothing. Out: structs. The conventions are those of `events.py`, which exports them all.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from ebpf_mig.recording.fields import (
    Address,
    Bits32,
    Bits64,
    Count,
    Duration,
    Event,
    Fd,
    Flag,
    Inode,
    Instant,
    MaybeBits32,
    MaybeDuration,
    Pid,
    Returned,
    Size,
    Way,
    Word,
)


class Direction(IntEnum):
    """Direction of the bytes on a socket, seen from the traced process."""

    SEND = 0
    """The traced process sends."""
    RECEIVE = 1
    """The traced process receives."""


SEND, RECEIVE = Direction


class Transfer(Event, frozen=True, tag=6):
    """A batch of send or receive calls of one thread on one socket, pipe or file, without long gaps.

    Outside a blackout many calls are coalesced into one batch. Inside (no vCPU of the process in KVM_RUN) each call has
    its own event until a budget is used up. `end_ns - begin_ns - in_call_ns` is the time between the calls.

    Requests on files that a process queues (io_uring, io_submit(2)) have no thread: `tid` is 0. They begin with their
    submission, end with their completion, and can overlap; `calls` counts requests. `in_call_ns` is the time in which
    any of a batch was under way, at least. The completion of a read or write that io_submit(2) queues is not seen:
    such a batch ends with the call, and `calls` counts these.
    """

    begin_ns: Instant
    end_ns: Instant
    pid: Pid
    tid: Pid
    fd: Fd
    direction: Way
    """A `Direction`."""
    socket: Inode
    """Inode number of the socket or of the pipe, which has one for both its ends. Of a file or a named pipe: bit 61,
    the device number (dev_t) from bit 40 on, and 40 bits of the inode number. Of a block device: bits 40 to 61, and its
    own device number. 0 if unknown.
    """
    calls: Count
    bytes: Size
    in_call_ns: Duration
    max_call_ns: Duration
    failed: Count
    """Calls that returned an error, mostly -EAGAIN. They transfer no bytes."""
    position: Size
    """Traced bytes on this socket in this direction before this batch."""
    off_cpu_ns: MaybeDuration = -1
    """Part of `in_call_ns` in which the thread was off the CPU; -1 unknown."""
    off_before_ns: MaybeDuration = -1
    """Total time off the CPU of this thread from the begin of tracing to the begin of the first call; -1 unknown."""
    hidden: Flag = 0
    """1: sends that no traced system call made (io_uring, for example). sock:sock_send_length reports them when they
    end. So `begin_ns` is the end of the first send, `in_call_ns` is 0, and the durations are unknown.
    """
    descriptors: Count = 0
    """File descriptors that these sends passed to the other process (SCM_RIGHTS)."""


AF_UNIX, AF_VSOCK = 1, 40
PIPE, FILE = 0o010000, 0o100000
"""S_IFIFO and S_IFREG: no families of sockets, but `Socket.family` of the other carriers."""


class Socket(Event, frozen=True, tag=7):
    """Describes a socket, a pipe or a file; recorded once for each process, when a traced call first uses it."""

    at_ns: Instant
    pid: Pid
    fd: Fd
    socket: Inode
    family: Bits64
    """AF_UNIX 1, AF_INET 2, AF_INET6 10, AF_VSOCK 40; S_IFIFO 4096: a pipe; S_IFREG 32768: a file or a block
    device."""
    local: Address
    """Address and port as `ADDR:PORT`, of vsock `CID:PORT` with `*` for an unknown CID, or empty (UNIX)."""
    remote: Address
    peer: Inode = 0
    """Inode of the other end; 0 unknown. For UNIX sockets, and for all sockets in a joined recording."""


class Segment(Event, frozen=True, tag=13):
    """A TCP segment that arrived at a traced socket in the blackout, recorded before TCP processed it.

    Source: tcp:tcp_probe. The figures are those of the receiving socket, in bytes (struct tcp_sock, Linux 6.12).
    """

    at_ns: Instant
    pid: Pid
    socket: Inode
    payload: Size
    """Data in the segment; 0 for a pure acknowledgement."""
    acked: Size
    """Newly acknowledged bytes."""
    in_flight: Size
    """Sent but not acknowledged before it arrived (snd_nxt - snd_una)."""
    unsent: Size
    """Written by the process but not yet sent (write_seq - snd_nxt)."""
    window: Size
    """The receive window of the other end before it arrived (snd_wnd)."""
    seq: MaybeBits32 = -1
    """Sequence number of its first byte, 32 bits as on the wire; -1 unknown."""
    ack: MaybeBits32 = -1
    """Its acknowledgement number."""
    received: MaybeBits32 = -1
    """Sequence number up to which all data had arrived before it (rcv_nxt)."""

    @property
    def is_numbered(self) -> bool:
        """Whether its sequence numbers are known."""
        return self.seq >= 0 and self.received >= 0

    @property
    def reached(self) -> int:
        """Sequence number up to which all data has arrived with it; may be 2^32 or more."""
        in_order = ahead(self.seq, self.received) <= 0
        return self.received + (max(0, ahead(self.seq + self.payload, self.received)) if in_order else 0)


def ahead(one: int, other: int) -> int:
    """How far a sequence number of 32 bits is ahead of another one; negative if it is behind."""
    return (one - other + (1 << 31)) % (1 << 32) - (1 << 31)


class Retransmit(Event, frozen=True, tag=18):
    """A TCP segment that a traced socket retransmitted in the blackout: it or its acknowledgement was lost or late.

    Source: tcp:tcp_retransmit_skb.
    """

    at_ns: Instant
    pid: Pid
    socket: Inode
    bytes: Size
    seq: Bits32
    """Sequence number of its first byte, 32 bits as on the wire."""
    number: Count
    """Ordinal of this retransmission on the socket since tracing began. Earlier ones may have no event."""


class SocketError(Event, frozen=True, tag=21):
    """A send or receive failed, other than by -EAGAIN or -EINTR; or one side closed the socket.

    One for each thread, until its calls fail on another socket or in another way.
    """

    at_ns: Instant
    pid: Pid
    tid: Pid
    socket: Inode
    direction: Way
    """A `Direction`."""
    ret: Returned
    """The negative errno. 0: the traced process called shutdown(2) (SEND), or the other end closed (RECEIVE)."""


class TcpInfo(Event, frozen=True, tag=16):
    """TCP's figures for a migration socket, read through sock_diag: `struct tcp_info` of include/uapi/linux/tcp.h."""

    at_ns: Instant
    pid: Pid
    socket: Inode
    values: dict[Word, Count] = msgspec.field(default_factory=dict)
    """Without the prefix `tcpi_`: `busy_time`, `rwnd_limited`, `sndbuf_limited` (us, but counted in jiffies),
    `total_retrans`, `bytes_retrans`, `bytes_acked`, `rtt` (us), ...; `queued`: unsent and unacknowledged bytes;
    `jiffy_us`: the resolution of the times.
    """
