# SPDX-License-Identifier: Apache-2.0
"""The event model: what tracing hands to analysis, one struct an event.

In: nothing. Out: the structs that `probes/` emits, `recording.py` stores and `collector.py` reads.

All times are integer nanoseconds of CLOCK_MONOTONIC of the recording's host (`bpf_ktime_get_ns`); 0 means
"not seen", because a call can have begun before tracing did. pids and tids are those of the initial pid
namespace. The structs are stored as arrays: fields may be appended with a default,
never removed or reordered.

Each field that is not just a number says what it means by its type: `Instant` is moved when two clocks are joined,
`HostName`, `Address` and the like are replaced when a recording is redacted. `kinds.py` reads these meanings.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from ebpf_mig.recording.meaning import Meaning

LATEST = 1 << 62
"""No clock shows more, ns, and nothing counted here is more: a sum or a difference of two still fits 64 bits."""
_MOST_PID = 1 << 33
"""Kernels give at most 2^22; in a joined recording 2^32 is added where both hosts have the same."""

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
"""A figure of the VMM's, in its own unit; a difference of two clocks."""
Bits64 = Annotated[int, Meta(ge=0)]
"""What a process handed to the kernel, any 64 bits of it: nobody has checked it."""
Bits32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
MaybeBits32 = Annotated[int, Meta(ge=-1, le=(1 << 32) - 1)]
"""-1: unknown."""
Returned = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
"""What a system call returned."""
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
"""A BPF program of ours, or a kind of record that one makes."""
Tier = Annotated[str, Meaning.TIER]
"""How a signal was attached, or `absent: ` and why."""
Word = Annotated[str, Meaning.WORD]
"""A word of ours or of the VMM's protocol: it names nobody."""


class Direction(IntEnum):
    """Which way bytes move on a socket, seen from the traced process."""

    SEND = 0
    """It sends."""
    RECEIVE = 1
    """It receives."""


SEND, RECEIVE = Direction


class Event(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all events; `tag` is the first array element of the stored form."""


class Ioctl(Event, frozen=True, tag=1):
    """One KVM ioctl that is not KVM_RUN, of a traced process; injected-interrupt ioctls are left out."""

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
    """Part of the call that the thread was off the CPU; -1 unknown."""
    slots_lock_ns: MaybeDuration = -1
    """Waiting for `kvm.slots_lock`; -1 unknown (no contention tracepoints)."""
    mmu_lock_ns: MaybeDuration = -1
    """Waiting for `kvm.mmu_lock`."""
    other_lock_ns: MaybeDuration = -1
    """Waiting for any other lock."""
    walk_ns: MaybeDuration = -1
    """Dirty-log ioctls: time in the write-protect walk over the page tables, by function probes; -1 unknown."""
    flush_ns: MaybeDuration = -1
    """The same for flushing TLBs."""
    copy_ns: MaybeDuration = -1
    """The same for copying the bitmap to or from user space."""
    spin_ns: MaybeDuration = -1
    """Part of the waiting for locks that was spent on the CPU, spinning; -1 unknown."""
    off_total_ns: MaybeDuration = -1
    """Time off the CPU of this thread since tracing began, when the call returned; -1 unknown."""


class VcpuEnter(Event, frozen=True, tag=2):
    """A KVM_RUN entry worth keeping: the first of its thread, after a gap, after an error."""

    at_ns: Instant
    pid: Pid
    tid: Pid
    fd: Fd
    last_exit_ns: Instant
    """Return of this thread's previous KVM_RUN, 0 if tracing has seen none."""
    last_ret: Returned
    """Its return value; -4 is -EINTR."""
    runs: Count
    """How many KVM_RUN entries of this thread tracing has seen, this one included."""


class VcpuExit(Event, frozen=True, tag=3):
    """A KVM_RUN that returned an error, nearly always -EINTR: the vCPU was kicked."""

    at_ns: Instant
    pid: Pid
    tid: Pid
    fd: Fd
    enter_ns: Instant
    """Entry of the same call, 0 if the thread was already inside when tracing began."""
    ret: Returned


class VcpuState(Event, frozen=True, tag=4):
    """The in-kernel accounting of one vCPU thread, read when tracing ended or the thread died."""

    at_ns: Instant
    pid: Pid
    tid: Pid
    fd: Fd
    enter_ns: Instant
    """Entry of the latest KVM_RUN."""
    exit_ns: Instant
    """Return of the latest KVM_RUN that returned; smaller than `enter_ns` while inside one."""
    ret: Returned
    runs: Count
    in_ns: Duration
    """Time inside KVM_RUN, all calls whose both ends were seen."""
    out_ns: Duration
    """Time between KVM_RUN calls."""
    max_gap_ns: Duration


class Kick(Event, frozen=True, tag=5):
    """tgkill(2) by a thread of a traced process to another of its threads; VMMs stop vCPUs this way."""

    at_ns: Instant
    pid: Pid
    tid: Pid
    target_tid: Pid
    signal: Bits64


class Transfer(Event, frozen=True, tag=6):
    """A run of send or receive calls of one thread on one socket with no long gap between them.

    Outside a blackout many calls are folded into one; inside (no vCPU of the process in KVM_RUN) each call is
    kept until a budget is spent. `end_ns - begin_ns - in_call_ns` is the time between the calls.
    """

    begin_ns: Instant
    end_ns: Instant
    pid: Pid
    tid: Pid
    fd: Fd
    direction: Way
    """A `Direction`."""
    socket: Inode
    """Inode number of the socket, 0 if it could not be told."""
    calls: Count
    bytes: Size
    in_call_ns: Duration
    max_call_ns: Duration
    failed: Count
    """Calls that returned an error, for the most part -EAGAIN. They move no bytes."""
    position: Size
    """Bytes that tracing saw on this socket in this direction before this run began."""
    off_cpu_ns: MaybeDuration = -1
    """Part of `in_call_ns` that the thread was off the CPU; -1 unknown."""
    off_before_ns: MaybeDuration = -1
    """Time off the CPU of this thread since tracing began, when the first call began; -1 unknown."""
    hidden: Flag = 0
    """1: sends that no followed system call made (io_uring, say), as sock:sock_send_length tells them when they are
    done. `begin_ns` is the first one's end, `in_call_ns` is 0 and nobody knows the durations."""


class Socket(Event, frozen=True, tag=7):
    """What a socket inode is, told once when traced calls first use it."""

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
    """UNIX, and of any kind in a joined recording: inode of the other end, 0 unknown."""


class Thread(Event, frozen=True, tag=8):
    """A thread's name as /proc tells it; a hint for labels, never for attribution."""

    pid: Pid
    tid: Pid
    name: ThreadName
    vcpu: VcpuIndex = -1
    """vCPU index where its KVM_RUN file descriptor is `anon_inode:kvm-vcpu:N`, else -1."""


class Mark(Event, frozen=True, tag=9):
    """Something the VMM or the session said, set beside the kernel's figures: a witness, never a boundary."""

    at_ns: Instant
    pid: Pid
    name: Word
    """Dotted: `qmp.STOP`, `qmp.RESUME`, `qmp.MIGRATION.completed`, `qmp.downtime_ms`, `session.trigger`."""
    detail: FreeText = ""
    value: Value = 0
    doubt_ns: Duration = 0
    """How far `at_ns` may be off (a wall-clock stamp turned into a monotonic one)."""


class Slot(Event, frozen=True, tag=10):
    """A memslot known before tracing saw it set; reserved for what /proc or the VMM tells."""

    at_ns: Instant
    pid: Pid
    slot: Bits64
    addr: Bits64
    size: Bits64
    flags: Bits64


class OffCpu(Event, frozen=True, tag=12):
    """A traced thread was off the CPU for a while: with no vCPU of its process in KVM_RUN (so: in the blackout), or
    shortly before it kicked one."""

    begin_ns: Instant
    end_ns: Instant
    pid: Pid
    tid: Pid
    stack: tuple[Symbol, ...] = ()
    """Kernel functions it slept in, innermost first; empty if it was preempted or no stack was taken."""
    preempted: bool = False
    """It did not sleep, it lost the CPU to another thread."""


class Segment(Event, frozen=True, tag=13):
    """A TCP segment that arrived at a traced socket in the blackout, as TCP was about to work on it.

    Source: tcp:tcp_probe; the numbers are the receiving socket's own, in bytes (struct tcp_sock, Linux 6.12).
    """

    at_ns: Instant
    pid: Pid
    socket: Inode
    payload: Size
    """Data in the segment; 0 is a bare acknowledgement."""
    acked: Size
    """What it newly acknowledges."""
    in_flight: Size
    """Sent and not acknowledged before it came (snd_nxt - snd_una)."""
    unsent: Size
    """Written by the process and not yet sent (write_seq - snd_nxt)."""
    window: Size
    """The other end's receive window before it came (snd_wnd)."""
    seq: MaybeBits32 = -1
    """Sequence number of its first byte, 32 bits as on the wire; -1 unknown."""
    ack: MaybeBits32 = -1
    """Its acknowledgement number."""
    received: MaybeBits32 = -1
    """Sequence number up to which all had arrived before it came (rcv_nxt)."""


class VcpuSpan(Event, frozen=True, tag=14):
    """What one vCPU thread spent outside KVM_RUN from one fetch of its process to the next (or for 250 ms).

    A gap counts where it began. A vCPU that never left KVM_RUN meanwhile has no span.
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
    """Inside KVM_RUN, waiting for locks (mmu_lock, for the most part); -1 unknown."""


class Samples(Event, frozen=True, tag=15):
    """Timer samples with the same kernel stack, inside one dirty-log ioctl. Each stands for `period_ns` on the CPU."""

    begin_ns: Instant
    """Of the ioctl."""
    pid: Pid
    tid: Pid
    period_ns: Duration
    count: Count
    stack: tuple[Symbol, ...] = ()
    """Functions, innermost first."""


class TcpInfo(Event, frozen=True, tag=16):
    """What TCP says of a migration socket, read through sock_diag: `struct tcp_info` of include/uapi/linux/tcp.h."""

    at_ns: Instant
    pid: Pid
    socket: Inode
    values: dict[Word, Count] = {}
    """Without the prefix `tcpi_`: `busy_time`, `rwnd_limited`, `sndbuf_limited` (us, but counted in jiffies),
    `total_retrans`, `bytes_retrans`, `bytes_acked`, `rtt` (us), ...; `queued`: unsent and unacknowledged bytes;
    `jiffy_us`: how coarse the times are."""


class OwnCost(Event, frozen=True, tag=17):
    """Run time of our own BPF programs since tracing began, by the kernel's statistics."""

    at_ns: Instant
    run_ns: Duration
    runs: Count
    remote: bool = False
    """Of the other host, in a joined recording."""


class Retransmit(Event, frozen=True, tag=18):
    """A TCP segment that a traced socket sent again in the blackout: it, or the answer to it, got lost or late.

    Source: tcp:tcp_retransmit_skb.
    """

    at_ns: Instant
    pid: Pid
    socket: Inode
    bytes: Size
    seq: Bits32
    """Sequence number of its first byte, 32 bits as on the wire."""
    number: Count
    """The how-manieth it is on this socket since tracing began; earlier ones may have no event."""


CLOSED, ENDED, WRITTEN = "session.closed", "session.ended", "session.written"
"""Marks of a passive tracer, by /proc. A VMM that lives on closed its migration's connection: `value` is the socket's
inode. A traced process ended. A process wrote `value` bytes with write(2) and its like since tracing began."""


class CpuQuota(Event, frozen=True, tag=19):
    """How long a CPU quota had held back a traced process's threads, by all their control groups together."""

    at_ns: Instant
    pid: Pid
    held_ns: Duration
    """Since the groups were made (`cpu.stat`: throttled_time, throttled_usec)."""


RECURSION_MISSES = "recursion-misses"
"""In `Ending.lost`: how often the kernel did not run a program of ours, whatever event it would have made."""


class Ending(Event, frozen=True, tag=11):
    """The last event of an orderly recording. A recording without one was cut off."""

    at_ns: Instant
    reason: Word
    """`migrated`, `failed`, `cancelled`, `duration`, `interrupted`, `target-died`, `command-ended`."""
    lost: dict[Probe, Count] = {}
    """Events dropped in the kernel, by probe; and `RECURSION_MISSES`."""
    unpaired: dict[Probe, Count] = {}
    """Exits without entry and the like, by probe. Threads already inside a call make some; harmless."""
    observer_ns: dict[Probe, Count] = {}
    """Run time of our BPF programs over the whole recording, by probe, where the kernel counts it."""
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
    """`source`, `destination` or `unknown` as the user said; the collector checks it."""
    comm: ProcessName = ""
    vmm: Word = ""
    vmm_version: Version = ""


class ClockPair(msgspec.Struct, frozen=True, array_like=True):
    """CLOCK_MONOTONIC and CLOCK_REALTIME read together."""

    monotonic_ns: Instant
    realtime_ns: WallClock
    doubt_ns: Duration


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """The other host's share of a joined recording: the destination's. Its events are on the clock of this host."""

    host: HostName = ""
    pid: Pid = 0
    """The destination in this recording."""
    own_pid: Pid = 0
    """The destination on its host: another number only if the source had the same."""
    boot_id: MachineId = ""
    kernel: Version = ""
    machine: Word = ""
    offset_ns: Value = 0
    """The destination's clock minus the source's, taken away from each of its instants."""
    bound_ns: Duration | None = 0
    """How far that can be off at `at_ns`; None: on one side there is no limit."""
    open: Word = ""
    """`least` or `most`: nothing bounds the offset from below, or from above."""
    at_ns: Instant = 0
    """When, on the source's clock: the destination's start."""
    drift_ppb: Count = 0
    """How much the two rates differ at most."""
    pairs: tuple[Count, Count] = (0, 0)
    """How many pairs of events bound the offset from above and from below."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first block of a recording: whose it is and how it was made."""

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
