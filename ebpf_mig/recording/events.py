# SPDX-License-Identifier: Apache-2.0
"""The event model: the events that tracing records and analysis reads, one struct per kind.

In: nothing. Out: the structs that `probes/` emits, `file.py` stores and `collector.py` reads.

All times are integer nanoseconds of CLOCK_MONOTONIC of the recording's host (`bpf_ktime_get_ns`); 0 means "not seen",
since a call can begin before tracing does. pids and tids are those of the initial pid namespace. The structs are stored
as arrays: fields may be appended with a default, never removed or reordered.
"""

from __future__ import annotations

import msgspec

from ebpf_mig.recording.fields import (
    LATEST,
    Bits64,
    Count,
    Duration,
    Event,
    Fd,
    Flag,
    FreeText,
    Instant,
    MaybeCpu,
    MaybeDuration,
    MaybePid,
    Pid,
    Probe,
    Returned,
    Symbol,
    ThreadName,
    Value,
    VcpuIndex,
    Word,
)
from ebpf_mig.recording.file_events import SYNCS, Call, FileCall
from ebpf_mig.recording.header import ClockPair, Header, Remote, Target
from ebpf_mig.recording.own_events import OwnCost, OwnRates, OwnRuns, OwnTurn
from ebpf_mig.recording.socket_events import (
    AF_UNIX,
    AF_VSOCK,
    FILE,
    PIPE,
    RECEIVE,
    SEND,
    Direction,
    Retransmit,
    Segment,
    Socket,
    SocketError,
    TcpInfo,
    Transfer,
    ahead,
)
from ebpf_mig.recording.user_events import Module, UserStack
from ebpf_mig.recording.vcpu_events import Kick, PageFaults, VcpuEnter, VcpuExit, VcpuSleep, VcpuSpan, VcpuState

__all__ = [
    "AF_UNIX",
    "AF_VSOCK",
    "CLOSED",
    "ENDED",
    "FILE",
    "FORWARDER",
    "HOP",
    "KEEPER",
    "LATEST",
    "NEIGHBOUR",
    "PIPE",
    "RECEIVE",
    "RECURSION_MISSES",
    "SEND",
    "SYNCS",
    "AnyEvent",
    "Call",
    "ClockPair",
    "CpuQuota",
    "CpuSteal",
    "Direction",
    "Ending",
    "Event",
    "Exec",
    "FileCall",
    "Header",
    "Ioctl",
    "Kick",
    "Mark",
    "Module",
    "OffCpu",
    "OwnCost",
    "OwnRates",
    "OwnRuns",
    "OwnTurn",
    "PageFaults",
    "Remote",
    "Retransmit",
    "RunDelay",
    "Samples",
    "Segment",
    "Slot",
    "Socket",
    "SocketError",
    "Target",
    "TcpInfo",
    "Thread",
    "Transfer",
    "UserStack",
    "VcpuEnter",
    "VcpuExit",
    "VcpuSleep",
    "VcpuSpan",
    "VcpuState",
    "ahead",
]


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
    """It did not sleep, it could run."""
    cpu: MaybeCpu = -1
    """The CPU that it lost."""
    next_tid: MaybePid = -1
    """The thread that got this CPU, by its tid in the initial pid namespace; 0: none."""
    previous_tid: MaybePid = -1
    """The thread that had the CPU that it then got; 0: none, so this CPU had been idle."""
    rt_throttled: bool = False
    """Its policy is real-time, and that of the thread that got the CPU is not, although it could run: the kernel limits
    real-time threads (sched_rt_runtime_us)."""


class RunDelay(Event, frozen=True, tag=22):
    """At the end of a sleep, a thread could run and had no CPU yet.

    Source: `task->sched_info.run_delay` before and after (kernel/sched/stats.h, Linux 6.12).
    """

    at_ns: Instant
    """When it got a CPU: `end_ns` of the `OffCpu`."""
    pid: Pid
    tid: Pid
    delay_ns: Duration


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


CLOSED, ENDED = "session.closed", "session.ended"
"""Marks of a passive tracer, from /proc. A VMM that continues to run closed the carrier of its migration: `value` is
its key as in `Transfer.socket`. A traced process ended.
"""
NEIGHBOUR, FORWARDER, KEEPER = "session.neighbour", "session.forwarder", "session.keeper"
"""Marks from /proc: who holds the other end of a carrier. `detail` is its name and pid, several after `, ` from the VMM
on; `value` is the carrier's key. A forwarder has sockets of its own, with which it can pass the bytes on. A keeper has
none, and its standard output is a regular file.
"""
HOP = "session.hop"
"""Mark of a process whose calls are recorded because it passes the migration's bytes on. `detail` is its name."""


class CpuQuota(Event, frozen=True, tag=19):
    """Time for which CPU quotas throttled the threads of a traced process, summed over their control groups."""

    at_ns: Instant
    pid: Pid
    held_ns: Duration
    """Since the creation of the groups (`cpu.stat`: throttled_time, throttled_usec)."""


class CpuSteal(Event, frozen=True, tag=23):
    """Time for which the hypervisor below this host withheld each CPU, since boot (steal in /proc/stat).

    The kernel counts it in ns and prints ticks of mostly 10 ms, rounded down. A reading has one event for all CPUs
    together, and one for each CPU that has lost any; and it has them for each traced process.
    """

    at_ns: Instant
    pid: Pid
    cpu: MaybeCpu
    """-1: all together."""
    stolen_ns: Duration


class Exec(Event, frozen=True, tag=20):
    """execve(2) of a traced process: the pid stays, the threads and the VM are new.

    Source: sched:sched_process_exec and sched:sched_prepare_exec.
    """

    at_ns: Instant
    """The new program begins."""
    pid: Pid
    begin_ns: Instant = 0
    """The kernel begins to replace the old program: it ends the threads, frees the memory, closes descriptors; 0 if
    unknown (Linux 6.9 and earlier)."""
    had_vm: Flag = 0
    """1: the process is known to have had a VM before. 0: only its earlier events tell."""


RECURSION_MISSES = "recursion-misses"
"""Key in `Ending.lost`: how often the kernel skipped one of our programs, for any kind of event."""


class Ending(Event, frozen=True, tag=11):
    """The last event of an orderly recording. A recording without one was cut off."""

    at_ns: Instant
    reason: Word
    """`migrated`, `failed`, `cancelled`, `duration`, `interrupted`, `target-died`, `command-ended`."""
    lost: dict[Probe, Count] = msgspec.field(default_factory=dict)
    """Events dropped in the kernel, by probe, and `RECURSION_MISSES`."""
    unpaired: dict[Probe, Count] = msgspec.field(default_factory=dict)
    """Exits without an entry and similar cases, by probe. Threads inside a call when tracing begins cause some;
    harmless.
    """
    observer_ns: dict[Probe, Count] = msgspec.field(default_factory=dict)
    """Run time of our BPF programs over the whole recording, by probe, if the kernel counted it to the end: in a
    recording of less than 0.1 s, or of `watch` and `exporter`."""
    observer_runs: dict[Probe, Count] = msgspec.field(default_factory=dict)
    missed_runs: dict[Probe, Count] = msgspec.field(default_factory=dict)
    """The parts of `RECURSION_MISSES`, by probe."""


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
    | SocketError
    | VcpuSpan
    | Samples
    | TcpInfo
    | OwnCost
    | OwnRuns
    | OwnRates
    | OwnTurn
    | CpuQuota
    | CpuSteal
    | RunDelay
    | Exec
    | UserStack
    | Module
    | Call
    | VcpuSleep
    | PageFaults
)
