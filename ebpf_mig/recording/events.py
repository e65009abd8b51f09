# SPDX-License-Identifier: Apache-2.0
"""The event model: the events that tracing records and analysis reads, one struct per kind.

In: nothing. Out: the structs that `probes/` emits, `file.py` stores and `collector.py` reads.

All times are integer nanoseconds of CLOCK_MONOTONIC of the recording's host (`bpf_ktime_get_ns`); 0 means "not seen",
since a call can begin before tracing does. pids and tids are those of the initial pid namespace. The structs are stored
as arrays: fields may be appended with a default, never removed or reordered.

The type of a field gives its meaning, unless it is a plain number. `Instant`s are shifted when two recordings are
joined; `HostName`, `Address` and similar fields are replaced when a recording is redacted. `kinds.py` reads these
meanings.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from ebpf_mig.recording.meaning import Meaning

LATEST = 1 << 62
"""Upper limit of times (ns) and counts. A sum or difference of two such values still fits into 64 bits."""
_MOST_PID = 1 << 33
"""The kernel's limit is 2^22. In a joined recording 2^32 is added to ids that both hosts use."""

Instant = Annotated[int, Meaning.INSTANT, Meta(ge=0, le=LATEST)]
"""ns of CLOCK_MONOTONIC; 0: not seen."""
WallClock = Annotated[int, Meta(ge=0, le=LATEST)]
"""ns of CLOCK_REALTIME."""
Duration = Annotated[int, Meta(ge=0, le=LATEST)]
"""ns."""
MaybeDuration = Annotated[int, Meta(ge=-1, le=LATEST)]
"""ns; -1: unknown."""
Count = Annotated[int, Meta(ge=0, le=LATEST)]
Size = Annotated[int, Meta(ge=0, le=LATEST)]
"""Bytes."""
Value = Annotated[int, Meta(ge=-LATEST, le=LATEST)]
"""A figure of the VMM in its own unit, or a difference of two clocks."""
Bits64 = Annotated[int, Meta(ge=0)]
"""An argument that a process passed to the kernel: any 64 bits, not validated."""
Bits32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
MaybeBits32 = Annotated[int, Meta(ge=-1, le=(1 << 32) - 1)]
"""-1: unknown."""
Returned = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
"""The return value of a system call."""
Pid = Annotated[int, Meta(ge=0, le=_MOST_PID)]
Fd = Annotated[int, Meta(ge=-1, le=(1 << 32) - 1)]
"""A file descriptor; -1: unknown."""
Inode = Annotated[int, Meta(ge=0)]
Way = Annotated[int, Meta(ge=0, le=1)]
"""A `Direction`."""
Flag = Annotated[int, Meta(ge=0, le=1)]
VcpuIndex = Annotated[int, Meta(ge=-1, le=1 << 20)]
"""-1: not a vCPU."""

Address = Annotated[str, Meaning.ADDRESS]
"""`ADDR:PORT`, or empty."""
HostName = Annotated[str, Meaning.HOST]
MachineId = Annotated[str, Meaning.MACHINE_ID]
ProcessName = Annotated[str, Meaning.PROCESS]
ThreadName = Annotated[str, Meaning.THREAD]
FreeText = Annotated[str, Meaning.TEXT]
Symbol = Annotated[str, Meaning.SYMBOL]
"""A kernel function."""
Version = Annotated[str, Meaning.VERSION]
Probe = Annotated[str, Meaning.PROBE]
"""One of our BPF programs, or a kind of record."""
Tier = Annotated[str, Meaning.TIER]
"""How a signal was attached, or `absent: ` and the reason."""
Word = Annotated[str, Meaning.WORD]
"""A word of ebpf-mig or of the VMM's protocol; it identifies nobody."""


class Direction(IntEnum):
    """Direction of the bytes on a socket, seen from the traced process."""

    SEND = 0
    """The traced process sends."""
    RECEIVE = 1
    """The traced process receives."""


SEND, RECEIVE = Direction


class Event(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all events; `tag` is the first array element of the stored form."""


class Ioctl(Event, frozen=True, tag=1):
    """One KVM ioctl of a traced process, other than KVM_RUN and interrupt injection."""

    begin_ns: Instant
    end_ns: Instant
    pid: Pid
    tid: Pid
    fd: Fd
    cmd: Bits64
    """The request number; names in `kvm.py`."""
    ret: Returned
    slot: Bits64 = 0
    """Memslot, address space id in bits 16 and up: GET/CLEAR_DIRTY_LOG, SET_USER_MEMORY_REGION[2]."""
    flags: Bits64 = 0
    """SET_USER_MEMORY_REGION[2]: bit 0 is KVM_MEM_LOG_DIRTY_PAGES."""
    addr: Bits64 = 0
    """SET_USER_MEMORY_REGION[2]: guest physical address. CLEAR_DIRTY_LOG: first page."""
    size: Bits64 = 0
    """SET_USER_MEMORY_REGION[2]: bytes. CLEAR_DIRTY_LOG: number of pages."""
    off_cpu_ns: MaybeDuration = -1
    """Time within the call that the thread was off the CPU; -1 unknown."""
    slots_lock_ns: MaybeDuration = -1
    """Time waiting for `kvm.slots_lock`; -1 unknown (no contention tracepoints)."""
    mmu_lock_ns: MaybeDuration = -1
    """Time waiting for `kvm.mmu_lock`; -1 unknown."""
    other_lock_ns: MaybeDuration = -1
    """Time waiting for any other lock; -1 unknown."""
    walk_ns: MaybeDuration = -1
    """Dirty-log ioctls: time in the write-protect walk over the page tables, by function probes; -1 unknown."""
    flush_ns: MaybeDuration = -1
    """The same for flushing TLBs."""
    copy_ns: MaybeDuration = -1
    """The same for copying the bitmap to or from user space."""
    spin_ns: MaybeDuration = -1
    """Part of the lock waits that the thread spent spinning on the CPU; -1 unknown."""
    off_total_ns: MaybeDuration = -1
    """Total time off the CPU of this thread from the begin of tracing to the return of the call; -1 unknown."""


class VcpuEnter(Event, frozen=True, tag=2):
    """A recorded KVM_RUN entry: the first of its thread, or the first after a gap or an error."""

    at_ns: Instant
    pid: Pid
    tid: Pid
    fd: Fd
    last_exit_ns: Instant
    """Return of this thread's previous KVM_RUN; 0 if none was seen."""
    last_ret: Returned
    """Its return value; -4 is -EINTR."""
    runs: Count
    """Number of KVM_RUN entries of this thread so far, including this one."""


class VcpuExit(Event, frozen=True, tag=3):
    """A KVM_RUN that returned an error. It is nearly always -EINTR: the vCPU was kicked."""

    at_ns: Instant
    pid: Pid
    tid: Pid
    fd: Fd
    enter_ns: Instant
    """Entry of the same call; 0 if the thread was already inside when tracing began."""
    ret: Returned


class VcpuState(Event, frozen=True, tag=4):
    """The in-kernel accounting of one vCPU thread, read when tracing ended or the thread exited."""

    at_ns: Instant
    pid: Pid
    tid: Pid
    fd: Fd
    enter_ns: Instant
    """Entry of the latest KVM_RUN."""
    exit_ns: Instant
    """Latest return of KVM_RUN; smaller than `enter_ns` while the thread is inside a call."""
    ret: Returned
    runs: Count
    in_ns: Duration
    """Time inside KVM_RUN, of all calls of which entry and return were seen."""
    out_ns: Duration
    """Time between KVM_RUN calls."""
    max_gap_ns: Duration


class Kick(Event, frozen=True, tag=5):
    """tgkill(2) from one thread of a traced process to another. VMMs stop vCPUs this way."""

    at_ns: Instant
    pid: Pid
    tid: Pid
    target_tid: Pid
    signal: Bits64


class Transfer(Event, frozen=True, tag=6):
    """A batch of send or receive calls of one thread on one socket, without long gaps.

    Outside a blackout many calls are coalesced into one batch. Inside (no vCPU of the process in KVM_RUN) each call has
    its own event until a budget is used up. `end_ns - begin_ns - in_call_ns` is the time between the calls.
    """

    begin_ns: Instant
    end_ns: Instant
    pid: Pid
    tid: Pid
    fd: Fd
    direction: Way
    """A `Direction`."""
    socket: Inode
    """Inode number of the socket; 0 if unknown."""
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


class Socket(Event, frozen=True, tag=7):
    """Describes a socket inode; recorded once, when a traced call first uses it."""

    at_ns: Instant
    pid: Pid
    fd: Fd
    socket: Inode
    family: Bits64
    """AF_UNIX 1, AF_INET 2, AF_INET6 10."""
    local: Address
    """Address and port as `ADDR:PORT`, or empty (UNIX)."""
    remote: Address
    peer: Inode = 0
    """Inode of the other end; 0 unknown. For UNIX sockets, and for all sockets in a joined recording."""


class Thread(Event, frozen=True, tag=8):
    """The name of a thread in /proc. It is used for labels only, never for attribution."""

    pid: Pid
    tid: Pid
    name: ThreadName
    vcpu: VcpuIndex = -1
    """vCPU index if its KVM_RUN file descriptor is `anon_inode:kvm-vcpu:N`, otherwise -1."""


class Mark(Event, frozen=True, tag=9):
    """A statement of the VMM or the session. It is a witness for the kernel's figures, never a boundary."""

    at_ns: Instant
    pid: Pid
    name: Word
    """Dotted: `qmp.STOP`, `qmp.RESUME`, `qmp.MIGRATION.completed`, `qmp.downtime_ms`, `session.trigger`."""
    detail: FreeText = ""
    value: Value = 0
    doubt_ns: Duration = 0
    """Error bound of `at_ns` (a wall-clock time converted to a monotonic one)."""


class Slot(Event, frozen=True, tag=10):
    """A memslot that was set before tracing began. Reserved for data from /proc or the VMM."""

    at_ns: Instant
    pid: Pid
    slot: Bits64
    addr: Bits64
    size: Bits64
    flags: Bits64


class OffCpu(Event, frozen=True, tag=12):
    """A traced thread was off the CPU for a while, either with no vCPU of its process in KVM_RUN (that is, in the
    blackout) or shortly before it kicked one.
    """

    begin_ns: Instant
    end_ns: Instant
    pid: Pid
    tid: Pid
    stack: tuple[Symbol, ...] = ()
    """Kernel functions in which it slept, innermost first; empty if it was preempted or no stack was taken."""
    preempted: bool = False
    """It did not sleep, it lost the CPU to another thread."""


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


class VcpuSpan(Event, frozen=True, tag=14):
    """Time of one vCPU thread outside KVM_RUN from one fetch of its process to the next (or for 250 ms).

    A gap counts in the span in which it began. A vCPU that did not leave KVM_RUN has no span.
    """

    since_ns: Instant
    """Begin of the first gap; 0 for the first span of a thread."""
    until_ns: Instant
    """End of the last gap."""
    pid: Pid
    tid: Pid
    outside_ns: Duration
    longest_ns: Duration
    gaps: Count
    lock_ns: MaybeDuration = -1
    """Time inside KVM_RUN waiting for locks (mostly mmu_lock); -1 unknown."""


class Samples(Event, frozen=True, tag=15):
    """Timer samples with the same kernel stack in one dirty-log ioctl. Each represents `period_ns` on the CPU."""

    begin_ns: Instant
    """Begin of the ioctl."""
    pid: Pid
    tid: Pid
    period_ns: Duration
    count: Count
    stack: tuple[Symbol, ...] = ()
    """Kernel functions, innermost first."""


class TcpInfo(Event, frozen=True, tag=16):
    """TCP's figures for a migration socket, read through sock_diag: `struct tcp_info` of include/uapi/linux/tcp.h."""

    at_ns: Instant
    pid: Pid
    socket: Inode
    values: dict[Word, Count] = {}
    """Without the prefix `tcpi_`: `busy_time`, `rwnd_limited`, `sndbuf_limited` (us, but counted in jiffies),
    `total_retrans`, `bytes_retrans`, `bytes_acked`, `rtt` (us), ...; `queued`: unsent and unacknowledged bytes;
    `jiffy_us`: the resolution of the times.
    """


class OwnCost(Event, frozen=True, tag=17):
    """Run time of our BPF programs since tracing began, from the kernel's statistics."""

    at_ns: Instant
    run_ns: Duration
    runs: Count
    remote: bool = False
    """Of the other host, in a joined recording."""


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


CLOSED, ENDED, WRITTEN = "session.closed", "session.ended", "session.written"
"""Marks of a passive tracer, from /proc. A VMM that continues to run closed the connection of its migration: `value` is
the socket's inode. A traced process ended. A process wrote `value` bytes with write(2) and similar calls since tracing
began.
"""


class CpuQuota(Event, frozen=True, tag=19):
    """Time for which CPU quotas throttled the threads of a traced process, summed over their control groups."""

    at_ns: Instant
    pid: Pid
    held_ns: Duration
    """Since the creation of the groups (`cpu.stat`: throttled_time, throttled_usec)."""


RECURSION_MISSES = "recursion-misses"
"""Key in `Ending.lost`: how often the kernel skipped one of our programs, for any kind of event."""


class Ending(Event, frozen=True, tag=11):
    """The last event of an orderly recording. A recording without one was cut off."""

    at_ns: Instant
    reason: Word
    """`migrated`, `failed`, `cancelled`, `duration`, `interrupted`, `target-died`, `command-ended`."""
    lost: dict[Probe, Count] = {}
    """Events dropped in the kernel, by probe, and `RECURSION_MISSES`."""
    unpaired: dict[Probe, Count] = {}
    """Exits without an entry and similar cases, by probe. Threads inside a call when tracing begins cause some;
    harmless.
    """
    observer_ns: dict[Probe, Count] = {}
    """Run time of our BPF programs over the whole recording, by probe, if the kernel counts it."""
    observer_runs: dict[Probe, Count] = {}


AnyEvent = (
    Ioctl
    | VcpuEnter
    | VcpuExit
    | VcpuState
    | Kick
    | Transfer
    | Socket
    | Thread
    | Mark
    | Slot
    | Ending
    | OffCpu
    | Segment
    | Retransmit
    | VcpuSpan
    | Samples
    | TcpInfo
    | OwnCost
    | CpuQuota
)


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One traced process."""

    pid: Pid
    role: Word
    """`source`, `destination` or `unknown`, as given by the user; the collector checks it."""
    comm: ProcessName = ""
    vmm: Word = ""
    vmm_version: Version = ""


class ClockPair(msgspec.Struct, frozen=True, array_like=True):
    """CLOCK_MONOTONIC and CLOCK_REALTIME, read at the same time."""

    monotonic_ns: Instant
    realtime_ns: WallClock
    doubt_ns: Duration


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """The destination host's part of a joined recording. Its events are on the clock of the source host."""

    host: HostName = ""
    pid: Pid = 0
    """Pid of the destination in this recording."""
    own_pid: Pid = 0
    """Pid of the destination on its host. It differs from `pid` only if the source host uses the same pid."""
    boot_id: MachineId = ""
    kernel: Version = ""
    machine: Word = ""
    offset_ns: Value = 0
    """The destination's clock minus the source's; subtracted from each instant of the destination."""
    bound_ns: Duration | None = 0
    """Error bound of the offset at `at_ns`; None: unbounded on one side."""
    open: Word = ""
    """`least` or `most`: nothing bounds the offset from below, or from above."""
    at_ns: Instant = 0
    """The start of the destination, on the source's clock."""
    drift_ppb: Count = 0
    """Largest difference of the two clock rates."""
    pairs: tuple[Count, Count] = (0, 0)
    """Number of pairs of events that bound the offset from above and from below."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first block of a recording: its host, its processes and how it was made."""

    format: Count = 1
    tool: Version = ""
    host: HostName = ""
    boot_id: MachineId = ""
    kernel: Version = ""
    machine: Word = ""
    page_size: Size = 4096
    begin_ns: Instant = 0
    clock: ClockPair | None = None
    targets: list[Target] = []
    attach: dict[Word, Tier] = {}
    """Attach tier by signal: `fentry`, `kprobe`, `tracepoint`, `absent: why`."""
    notes: list[FreeText] = []
    remote: Remote | None = None
    """Only in a joined recording."""
