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

from typing import Annotated

import msgspec

from ebpf_mig.recording.meaning import Meaning

Instant = Annotated[int, Meaning.INSTANT]
"""ns of CLOCK_MONOTONIC; 0: not seen."""
Address = Annotated[str, Meaning.ADDRESS]
"""`ADDR:PORT`, or empty."""
HostName = Annotated[str, Meaning.HOST]
MachineId = Annotated[str, Meaning.MACHINE_ID]
ProcessName = Annotated[str, Meaning.PROCESS]
ThreadName = Annotated[str, Meaning.THREAD]
FreeText = Annotated[str, Meaning.TEXT]
Word = Annotated[str, Meaning.WORD]
"""A word of ours, of the VMM's protocol or of the kernel: it names nobody."""


class Event(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all events; `tag` is the first array element of the stored form."""


class Ioctl(Event, frozen=True, tag=1):
    """One KVM ioctl that is not KVM_RUN, of a traced process; injected-interrupt ioctls are left out."""

    begin_ns: Instant
    end_ns: Instant
    pid: int
    tid: int
    fd: int
    cmd: int
    """The request number; names in `kvm.py`."""
    ret: int
    slot: int = 0
    """Memslot, address space id in bits 16 and up: GET/CLEAR_DIRTY_LOG, SET_USER_MEMORY_REGION[2]."""
    flags: int = 0
    """SET_USER_MEMORY_REGION[2]: bit 0 is KVM_MEM_LOG_DIRTY_PAGES."""
    addr: int = 0
    """SET_USER_MEMORY_REGION[2]: guest physical address. CLEAR_DIRTY_LOG: first page."""
    size: int = 0
    """SET_USER_MEMORY_REGION[2]: bytes. CLEAR_DIRTY_LOG: number of pages."""
    off_cpu_ns: int = -1
    """Part of the call that the thread was off the CPU; -1 unknown."""
    slots_lock_ns: int = -1
    """Waiting for `kvm.slots_lock`; -1 unknown (no contention tracepoints)."""
    mmu_lock_ns: int = -1
    """Waiting for `kvm.mmu_lock`."""
    other_lock_ns: int = -1
    """Waiting for any other lock."""
    walk_ns: int = -1
    """Dirty-log ioctls: time in the write-protect walk over the page tables, by function probes; -1 unknown."""
    flush_ns: int = -1
    """The same for flushing TLBs."""
    copy_ns: int = -1
    """The same for copying the bitmap to or from user space."""
    spin_ns: int = -1
    """Part of the waiting for locks that was spent on the CPU, spinning; -1 unknown."""
    off_total_ns: int = -1
    """Time off the CPU of this thread since tracing began, when the call returned; -1 unknown."""


class VcpuEnter(Event, frozen=True, tag=2):
    """A KVM_RUN entry worth keeping: the first of its thread, after a gap, after an error."""

    at_ns: Instant
    pid: int
    tid: int
    fd: int
    last_exit_ns: Instant
    """Return of this thread's previous KVM_RUN, 0 if tracing has seen none."""
    last_ret: int
    """Its return value; -4 is -EINTR."""
    runs: int
    """How many KVM_RUN entries of this thread tracing has seen, this one included."""


class VcpuExit(Event, frozen=True, tag=3):
    """A KVM_RUN that returned an error, nearly always -EINTR: the vCPU was kicked."""

    at_ns: Instant
    pid: int
    tid: int
    fd: int
    enter_ns: Instant
    """Entry of the same call, 0 if the thread was already inside when tracing began."""
    ret: int


class VcpuState(Event, frozen=True, tag=4):
    """The in-kernel accounting of one vCPU thread, read when tracing ended or the thread died."""

    at_ns: Instant
    pid: int
    tid: int
    fd: int
    enter_ns: Instant
    """Entry of the latest KVM_RUN."""
    exit_ns: Instant
    """Return of the latest KVM_RUN that returned; smaller than `enter_ns` while inside one."""
    ret: int
    runs: int
    in_ns: int
    """Time inside KVM_RUN, all calls whose both ends were seen."""
    out_ns: int
    """Time between KVM_RUN calls."""
    max_gap_ns: int


class Kick(Event, frozen=True, tag=5):
    """tgkill(2) by a thread of a traced process to another of its threads; VMMs stop vCPUs this way."""

    at_ns: Instant
    pid: int
    tid: int
    target_tid: int
    signal: int


class Transfer(Event, frozen=True, tag=6):
    """A run of send or receive calls of one thread on one socket with no long gap between them.

    Outside a blackout many calls are folded into one; inside (no vCPU of the process in KVM_RUN) each call is
    kept until a budget is spent. `end_ns - begin_ns - in_call_ns` is the time between the calls.
    """

    begin_ns: Instant
    end_ns: Instant
    pid: int
    tid: int
    fd: int
    direction: int
    """0 send, 1 receive."""
    socket: int
    """Inode number of the socket, 0 if it could not be told."""
    calls: int
    bytes: int
    in_call_ns: int
    max_call_ns: int
    failed: int
    """Calls that returned an error, for the most part -EAGAIN. They move no bytes."""
    position: int
    """Bytes that tracing saw on this socket in this direction before this run began."""
    off_cpu_ns: int = -1
    """Part of `in_call_ns` that the thread was off the CPU; -1 unknown."""
    off_before_ns: int = -1
    """Time off the CPU of this thread since tracing began, when the first call began; -1 unknown."""
    hidden: int = 0
    """1: sends that no followed system call made (io_uring, say), as sock:sock_send_length tells them when they are
    done. `begin_ns` is the first one's end, `in_call_ns` is 0 and nobody knows the durations."""


class Socket(Event, frozen=True, tag=7):
    """What a socket inode is, told once when traced calls first use it."""

    at_ns: Instant
    pid: int
    fd: int
    socket: int
    family: int
    """AF_UNIX 1, AF_INET 2, AF_INET6 10."""
    local: Address
    """Address and port as `ADDR:PORT`, or empty (UNIX)."""
    remote: Address
    peer: int = 0
    """UNIX, and of any kind in a joined recording: inode of the other end, 0 unknown."""


class Thread(Event, frozen=True, tag=8):
    """A thread's name as /proc tells it; a hint for labels, never for attribution."""

    pid: int
    tid: int
    name: ThreadName
    vcpu: int = -1
    """vCPU index where its KVM_RUN file descriptor is `anon_inode:kvm-vcpu:N`, else -1."""


class Mark(Event, frozen=True, tag=9):
    """Something the VMM or the session said, set beside the kernel's figures: a witness, never a boundary."""

    at_ns: Instant
    pid: int
    name: Word
    """Dotted: `qmp.STOP`, `qmp.RESUME`, `qmp.MIGRATION.completed`, `qmp.downtime_ms`, `session.trigger`."""
    detail: FreeText = ""
    value: int = 0
    doubt_ns: int = 0
    """How far `at_ns` may be off (a wall-clock stamp turned into a monotonic one)."""


class Slot(Event, frozen=True, tag=10):
    """A memslot known before tracing saw it set; reserved for what /proc or the VMM tells."""

    at_ns: Instant
    pid: int
    slot: int
    addr: int
    size: int
    flags: int


class OffCpu(Event, frozen=True, tag=12):
    """A traced thread was off the CPU for a while: with no vCPU of its process in KVM_RUN (so: in the blackout), or
    shortly before it kicked one."""

    begin_ns: Instant
    end_ns: Instant
    pid: int
    tid: int
    stack: tuple[Word, ...] = ()
    """Kernel functions it slept in, innermost first; empty if it was preempted or no stack was taken."""
    preempted: bool = False
    """It did not sleep, it lost the CPU to another thread."""


class Segment(Event, frozen=True, tag=13):
    """A TCP segment that arrived at a traced socket in the blackout, as TCP was about to work on it.

    Source: tcp:tcp_probe; the numbers are the receiving socket's own, in bytes (struct tcp_sock, Linux 6.12).
    """

    at_ns: Instant
    pid: int
    socket: int
    payload: int
    """Data in the segment; 0 is a bare acknowledgement."""
    acked: int
    """What it newly acknowledges."""
    in_flight: int
    """Sent and not acknowledged before it came (snd_nxt - snd_una)."""
    unsent: int
    """Written by the process and not yet sent (write_seq - snd_nxt)."""
    window: int
    """The other end's receive window before it came (snd_wnd)."""
    seq: int = -1
    """Sequence number of its first byte, 32 bits as on the wire; -1 unknown."""
    ack: int = -1
    """Its acknowledgement number."""
    received: int = -1
    """Sequence number up to which all had arrived before it came (rcv_nxt)."""


class VcpuSpan(Event, frozen=True, tag=14):
    """What one vCPU thread spent outside KVM_RUN from one fetch of its process to the next (or for 250 ms).

    A gap counts where it began. A vCPU that never left KVM_RUN meanwhile has no span.
    """

    since_ns: Instant
    """Begin of the first gap; 0 for the first span of a thread."""
    until_ns: Instant
    """End of the last gap."""
    pid: int
    tid: int
    outside_ns: int
    longest_ns: int
    gaps: int
    lock_ns: int = -1
    """Inside KVM_RUN, waiting for locks (mmu_lock, for the most part); -1 unknown."""


class Samples(Event, frozen=True, tag=15):
    """Timer samples with the same kernel stack, inside one dirty-log ioctl. Each stands for `period_ns` on the CPU."""

    begin_ns: Instant
    """Of the ioctl."""
    pid: int
    tid: int
    period_ns: int
    count: int
    stack: tuple[Word, ...] = ()
    """Functions, innermost first."""


class TcpInfo(Event, frozen=True, tag=16):
    """What TCP says of a migration socket, read through sock_diag: `struct tcp_info` of include/uapi/linux/tcp.h."""

    at_ns: Instant
    pid: int
    socket: int
    values: dict[Word, int] = {}
    """Without the prefix `tcpi_`: `busy_time`, `rwnd_limited`, `sndbuf_limited` (us, but counted in jiffies),
    `total_retrans`, `bytes_retrans`, `bytes_acked`, `rtt` (us), ...; `queued`: unsent and unacknowledged bytes;
    `jiffy_us`: how coarse the times are."""


class OwnCost(Event, frozen=True, tag=17):
    """Run time of our own BPF programs since tracing began, by the kernel's statistics."""

    at_ns: Instant
    run_ns: int
    runs: int
    remote: bool = False
    """Of the other host, in a joined recording."""


class Retransmit(Event, frozen=True, tag=18):
    """A TCP segment that a traced socket sent again in the blackout: it, or the answer to it, got lost or late.

    Source: tcp:tcp_retransmit_skb.
    """

    at_ns: Instant
    pid: int
    socket: int
    bytes: int
    seq: int
    """Sequence number of its first byte, 32 bits as on the wire."""
    number: int
    """The how-manieth it is on this socket since tracing began; earlier ones may have no event."""


RECURSION_MISSES = "recursion-misses"
"""In `Ending.lost`: how often the kernel did not run a program of ours, whatever event it would have made."""


class Ending(Event, frozen=True, tag=11):
    """The last event of an orderly recording. A recording without one was cut off."""

    at_ns: Instant
    reason: Word
    """`migrated`, `failed`, `cancelled`, `duration`, `interrupted`, `target-died`, `command-ended`."""
    lost: dict[Word, int] = {}
    """Events dropped in the kernel, by probe; and `RECURSION_MISSES`."""
    unpaired: dict[Word, int] = {}
    """Exits without entry and the like, by probe. Threads already inside a call make some; harmless."""
    observer_ns: dict[Word, int] = {}
    """Run time of our BPF programs over the whole recording, by probe, where the kernel counts it."""
    observer_runs: dict[Word, int] = {}


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
)


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One traced process."""

    pid: int
    role: Word
    """`source`, `destination` or `unknown` as the user said; the collector checks it."""
    comm: ProcessName = ""
    vmm: Word = ""
    vmm_version: Word = ""


class ClockPair(msgspec.Struct, frozen=True, array_like=True):
    """CLOCK_MONOTONIC and CLOCK_REALTIME read together."""

    monotonic_ns: int
    realtime_ns: int
    doubt_ns: int


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """The other host's share of a joined recording: the destination's. Its events are on the clock of this host."""

    host: HostName = ""
    pid: int = 0
    """The destination in this recording."""
    own_pid: int = 0
    """The destination on its host: another number only if the source had the same."""
    boot_id: MachineId = ""
    kernel: Word = ""
    machine: Word = ""
    offset_ns: int = 0
    """The destination's clock minus the source's, taken away from each of its instants."""
    bound_ns: int | None = 0
    """How far that can be off at `at_ns`; None: on one side there is no limit."""
    open: Word = ""
    """`least` or `most`: nothing bounds the offset from below, or from above."""
    at_ns: int = 0
    """When, on the source's clock: the destination's start."""
    drift_ppb: int = 0
    """How much the two rates differ at most."""
    pairs: tuple[int, int] = (0, 0)
    """How many pairs of events bound the offset from above and from below."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first block of a recording: whose it is and how it was made."""

    format: int = 1
    tool: Word = ""
    host: HostName = ""
    boot_id: MachineId = ""
    kernel: Word = ""
    machine: Word = ""
    page_size: int = 4096
    begin_ns: int = 0
    clock: ClockPair | None = None
    targets: list[Target] = []
    attach: dict[Word, Word] = {}
    """Attach tier by signal: `fentry`, `kprobe`, `tracepoint`, `absent: why`."""
    notes: list[FreeText] = []
    remote: Remote | None = None
    """Only in a joined recording."""
