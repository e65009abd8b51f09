# SPDX-License-Identifier: Apache-2.0
"""The breakdown: the result of the analysis, and what every report, the gate and the exporter live on.

In: nothing. Out: frozen structs whose JSON form is the public schema `ebpf-mig/breakdown/1`. Durations are
integer nanoseconds; instants are nanoseconds from the window's begin (negative before it). `None` means
"not measured", never zero. Names are stable from the first release: add, never rename.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

SCHEMA = "ebpf-mig/breakdown/1"


class Side(StrEnum):
    """Whose a phase, a process or a lane is."""

    SOURCE = "source"
    """The VM's old process."""
    DESTINATION = "destination"
    """The VM's new process."""
    BOTH = "both"
    """Of both processes, or of what lies between them."""
    UNKNOWN = "unknown"
    """Of a traced process that is neither; never that of a phase."""


class PhaseName(StrEnum):
    """The phases, in the order in which reports print them. Each instant of the window belongs to one."""

    PAUSE = "pause"
    """From the pause request to the last vCPU's stop."""
    QUIESCE = "quiesce"
    """What the source does next: device handlers, clock reads, draining of block devices."""
    FETCH_KERNEL = "fetch.kernel"
    """Inside the ioctls of the final dirty-log fetch."""
    FETCH_USER = "fetch.user"
    """Between these ioctls, and up to the first page sent."""
    MEMORY_SEND = "memory.send"
    """From the first send of the final pages to the last."""
    STATE_SAVE = "state.save"
    """Reading vCPU and device state."""
    STATE_SEND = "state.send"
    """Sending that state."""
    HANDOVER = "handover"
    """All has been sent, and the destination waits for it or for its turn."""
    STATE_LOAD = "state.load"
    """The destination writes vCPU and device state."""
    RESUME = "resume"
    """From there to the last vCPU's start."""
    UNATTRIBUTED = "unattributed"
    """What no rule explains."""


class Verdict(StrEnum):
    """How far a result can be relied upon."""

    COMPLETE = "complete"
    """Nothing is known to be missing."""
    BOUNDED = "bounded"
    """Something was not traced: what that is known of is a part."""
    INCOMPLETE = "incomplete"
    """Events were lost, or the recording was cut off."""


class Result(StrEnum):
    """How a migration ended."""

    COMPLETED = "completed"
    """The guest runs on the destination."""
    FAILED = "failed"
    """It did not, as the VMM or its driver reported, or as a process ended; the source has the guest again."""
    CANCELLED = "cancelled"
    """Somebody called it off, as the VMM or its driver reported."""
    SAVED = "saved"
    """The state went to a file or a pipe, and nobody was seen to take over."""
    UNKNOWN = "unknown"
    """The recording does not say. See `analysis.outcome` for what says the others."""


class Mode(StrEnum):
    """When the memory moves."""

    PRECOPY = "precopy"
    """While the guest runs on the source, and what is left in the blackout."""
    POSTCOPY = "postcopy"
    """Also after the guest's start on the destination."""
    LOCAL = "local"
    """Not at all: both processes share it."""
    UNKNOWN = "unknown"
    """The recording does not say."""


class Transport(StrEnum):
    """What carries the migration."""

    TCP = "tcp"
    """TCP, also with TLS."""
    UNIX = "unix"
    """A UNIX socket."""
    NONE = "none"
    """No socket was used."""
    UNKNOWN = "unknown"
    """The recording does not say."""


class DirtyLogMode(StrEnum):
    """How KVM tells which pages are dirty."""

    MANUAL = "manual"
    """A bitmap that KVM_CLEAR_DIRTY_LOG re-arms (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)."""
    LEGACY = "legacy"
    """A bitmap that KVM_GET_DIRTY_LOG re-arms by itself."""
    RING = "ring"
    """Dirty rings (KVM_CAP_DIRTY_LOG_RING)."""
    NONE = "none"
    """Nothing was logged."""
    UNKNOWN = "unknown"
    """The source, or what it does with its log, was not traced."""


class SwitchoverKind(StrEnum):
    """What became of the guest after its stop on the source."""

    COMPLETED = "completed"
    """The destination runs."""
    STOPPED = "stopped"
    """The source does not run; the rest is unknown."""
    ABORTED = "aborted"
    """The source runs again."""


PHASES: tuple[tuple[PhaseName, Side], ...] = (
    (PhaseName.PAUSE, Side.SOURCE),
    (PhaseName.QUIESCE, Side.SOURCE),
    (PhaseName.FETCH_KERNEL, Side.SOURCE),
    (PhaseName.FETCH_USER, Side.SOURCE),
    (PhaseName.MEMORY_SEND, Side.SOURCE),
    (PhaseName.STATE_SAVE, Side.SOURCE),
    (PhaseName.STATE_SEND, Side.SOURCE),
    (PhaseName.HANDOVER, Side.BOTH),
    (PhaseName.STATE_LOAD, Side.DESTINATION),
    (PhaseName.RESUME, Side.DESTINATION),
    (PhaseName.UNATTRIBUTED, Side.BOTH),
)
"""Every phase and its side, in the order in which reports print them. In an aborted blackout, `resume` is the source's:
see `sides_of`."""


def sides_of(aborted: bool) -> tuple[tuple[PhaseName, Side], ...]:
    """`PHASES` of a migration: where the source took its guest back, it is the source that resumes."""
    back = aborted and PhaseName.RESUME
    return tuple((name, Side.SOURCE if name == back else side) for name, side in PHASES)


IMMEDIATE = ": taken not to have run the guest"
"""How a note on KVM_RUN calls that returned at once ends."""

Span = tuple[int, int]


class Struct(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Base: immutable, built by name. It cannot be part of a cycle, so the garbage collector need not look at it."""


class Endpoint(Struct, frozen=True, kw_only=True):
    host: str
    """Name of its host, as that host tells it; a placeholder if it was redacted."""
    pid: int
    """Process id on its host."""


class Migration(Struct, frozen=True, kw_only=True):
    vmm: str
    """The VMM, as the one who traced called it; empty: unknown."""
    vmm_version: str
    """Its version; empty: unknown."""
    mode: Mode
    """When the memory moved."""
    transport: Transport
    """What carried the migration."""
    connections: int | None
    """Number of connections that carried it; null: not known."""
    result: Result
    """How it ended."""
    source: Endpoint | None
    """Null: not traced."""
    destination: Endpoint | None
    """Null: not traced."""
    total_ns: int | None
    """From dirty logging switched on (or the trigger) to the window's end, ns; null: the begin was not seen."""
    paused_before: bool | None = None
    """Whether the guest was paused when the migration began; null: not known."""
    paused_after: bool | None = None
    """Whether no vCPU ran on either side when tracing ended; null: not known, for lack of the other side."""


class Phase(Struct, frozen=True, kw_only=True):
    phase: PhaseName
    """Its name."""
    side: Side
    """Whose it is."""
    duration_ns: int | None
    """Sum of its spans, ns. 0: it took no time. Null: not measured; there is no window, or its side was not traced."""
    spans: list[Span]
    """Begin and end of each visit, ns from the window's begin."""
    bound_ns: int | None = 0
    """How far `duration_ns` can be off where it spans two hosts' clocks, ns; null: no limit known, see `Clock.open`."""


class Vcpu(Struct, frozen=True, kw_only=True):
    vcpu: int
    """Index of the vCPU."""
    kick_ns: int | None
    """From the pause request to its stop, ns; null: no kick was seen."""
    stop: int | None
    """Its last return from KVM_RUN on the source, ns from the window's begin; null: not seen."""
    start: int | None
    """Its first entry of KVM_RUN on the destination that ran guest code, ns from the window's begin; null: not seen."""
    blackout_ns: int | None
    """From its stop to its start, ns; null: one of them was not seen."""
    bound_ns: int | None = 0
    """As that of a phase, of `blackout_ns` and `start`, ns."""


class Pausing(Struct, frozen=True, kw_only=True):
    """The stop of the vCPUs, as the thread that asked for it saw it."""

    stop_ns: int
    """From the pause request to the last vCPU's stop, ns."""
    noticed_ns: int
    """From there to the next call of that thread, ns: only then does it go on."""
    naps: int | None
    """Number of times that it slept from its request until it went on; null: not measured."""
    asleep_ns: int | None
    """The part of `noticed_ns` that it slept, ns; null: not measured."""
    polling: bool | None
    """It slept on a timer: nobody wakes it when the vCPUs have stopped; null: not measured."""
    kicked_late_ns: int | None
    """How long it had lost the CPU right before its request, and so before the window, ns; null: not measured."""


class Throttled(Struct, frozen=True, kw_only=True):
    """Stretches before the pause request in which no vCPU ran because the VMM kept them out, to slow the guest down
    (auto-converge, dirty limit). The guest was dark, but this is no part of the switchover, nor of the blackout."""

    dark_ns: int
    """All stretches of a millisecond or more together, ns."""
    stretches: int
    """Number of those stretches."""
    longest_ns: int
    """The longest of them, ns."""
    before_request_ns: int
    """The part from the last vCPU's stop to the pause request, ns; 0 if a vCPU was running then."""


class Served(Struct, frozen=True, kw_only=True):
    """What a destination received in postcopy in a while; where calls were recorded as runs, nearly."""

    bytes: int
    """What arrived, bytes."""
    asked: int
    """Number of send calls with which it asked."""
    waited_ns: int | None
    """Of its threads together, off the CPU in receive calls, ns; null: not measured."""


class Postcopy(Struct, frozen=True, kw_only=True):
    while_dark: Served | None
    """What it needed to restore the VM, before the start; null: pages have no connection of their own."""
    after: Served
    """What it received after the start."""
    drained_ns: int
    """From the start to the last byte received, ns."""


class Slot(Struct, frozen=True, kw_only=True):
    slot: int
    """Number of the memslot, address space in bits 16 and up."""
    base: int
    """Guest physical address, bytes."""
    size_bytes: int
    """Its size, bytes."""


class Split(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What dirty-log ioctls did on the CPU, without spinning for locks. The errors are only there with samples."""

    walk: int
    """Write-protecting pages or clearing their dirty bits, ns."""
    flush: int
    """Flushing TLBs, with the wait for other CPUs, ns."""
    copy: int
    """Copying the bitmap to or from user space, ns."""
    other: int
    """The rest, ns."""
    samples: int | str
    """`exact`, or the number of samples that tell so."""
    walk_error: int | None = None
    """How far `walk` may be off at 95 %, ns."""
    flush_error: int | None = None
    """The same of `flush`, ns."""
    copy_error: int | None = None
    """The same of `copy`, ns."""
    other_error: int | None = None
    """The same of `other`, ns."""

    @property
    def parts(self) -> dict[str, int]:
        """Time by part, ns."""
        return {"walk": self.walk, "flush": self.flush, "copy": self.copy, "other": self.other}

    @property
    def errors(self) -> dict[str, int | None]:
        """How far each part may be off at 95 %, ns; None: it is exact."""
        return {
            "walk": self.walk_error,
            "flush": self.flush_error,
            "copy": self.copy_error,
            "other": self.other_error,
        }


class FetchIoctl(Struct, frozen=True, kw_only=True):
    ioctl: str
    """The request's name without its prefix, e.g. `GET_DIRTY_LOG`."""
    slot: int
    """Number of the memslot."""
    begin: int
    """When it was called, ns from the window's begin."""
    duration_ns: int
    """From call to return, ns."""
    lock_wait_ns: dict[str, int] | None = None
    """Waiting for locks, by lock (`slots_lock`, `mmu_lock`, `other`), ns; null: not measured."""
    off_cpu_ns: int | None = None
    """The part off the CPU, ns; null: not measured."""
    split: Split | None = None
    """What it did on the CPU; null: too short to be sampled, or not traced."""


class Fetch(Struct, frozen=True, kw_only=True):
    begin: int
    """Begin of its first ioctl, ns from the window's begin."""
    end: int
    """End of its last ioctl, ns from the window's begin."""
    kernel_ns: int
    """Inside its ioctls, ns."""
    ioctls: list[FetchIoctl]
    """In order of time."""
    split: Split | None = None
    """All its ioctls together; null: as of an ioctl."""


class VcpuShare(Struct, frozen=True, kw_only=True):
    vcpu: int
    """Index of the vCPU."""
    outside_ns: int
    """Time outside KVM_RUN, ns."""
    longest_gap_ns: int
    """The longest time outside at once, ns."""
    lock_wait_ns: int | None
    """Inside KVM_RUN, waiting for locks, ns; null: not measured."""


class Stretch(Struct, frozen=True, kw_only=True):
    """A while of the running guest, and what its vCPUs lost in it."""

    begin: int
    """When it began, ns from the window's begin."""
    duration_ns: int
    """How long it lasted, ns."""
    vcpus: list[VcpuShare]
    """One row for each vCPU."""


class Logging(Struct, frozen=True, kw_only=True):
    """Dirty logging switched on or off over some slots (KVM_SET_USER_MEMORY_REGION)."""

    on: bool
    """Switched on, or off."""
    begin: int
    """First ioctl's begin, ns from the window's begin."""
    end: int
    """Last ioctl's end, ns from the window's begin."""
    kernel_ns: int
    """Inside the ioctls, ns."""
    slots: int
    """Number of slots."""
    in_blackout_ns: int | None
    """The part of `kernel_ns` that lies in the blackout, ns; null: no stop was seen."""


class Rearm(Struct, frozen=True, kw_only=True):
    """Pages protected anew although no vCPU could write to them any more: work that is avoidable."""

    ns: int
    """What it took, ns."""
    error_ns: int
    """How far `ns` may be off at 95 %, where it comes from samples, ns."""
    samples: int | str
    """`exact`, or the number of samples."""
    pages: int
    """Number of pages of the slots, or parts of them, that were re-armed: dirty or not."""
    ns_per_page: float
    """`ns` by `pages`, ns a page."""
    ms_per_gib: float
    """The same by memory, ms/GiB."""


class Pass(Struct, frozen=True, kw_only=True):
    """One pre-copy pass: a fetch with the guest running, and the sending up to the next one."""

    begin: int
    """Begin of its fetch, ns from the window's begin."""
    kernel_ns: int
    """Inside the fetch's ioctls, ns."""
    user_ns: int
    """Between them, and up to the first send, ns."""
    pages: int | None
    """Number of dirty pages, by the ring; null with a bitmap."""
    bytes: int | None
    """What was sent up to the next fetch, bytes; null: sends were not traced."""
    send_ns: int | None
    """Inside these send calls, ns; null: sends were not traced."""
    blocked_ns: int | None
    """The part of `send_ns` off the CPU, ns; null: not measured, or nothing was sent."""
    dirty_pages_per_s: int | None
    """`pages`, or else `pages_at_most`, by the time since the fetch before, pages/s; null for the first."""
    pages_at_most: int | None = None
    """Number of whole pages that the bytes can hold; pages sent as a mere header (all zero) are not among them."""
    user_off_cpu_ns: int | None = None
    """The part of `user_ns` that the fetching thread was off the CPU, ns; null: not measured."""
    split: Split | None = None
    """What the ioctls did on the CPU; null: too short to be sampled, or not traced."""
    brownout: Stretch | None = None
    """What the vCPUs lost from this fetch to the next one, or to the stop; null: not measured."""
    baseline: Stretch | None = None
    """As long, or as long as was traced, before logging was switched on; null: not measured."""
    tcp_info: dict[str, int] | None = None
    """All migration sockets together, as `SocketUse.tcp_info`; us, bytes and numbers."""


class FinalFetch(Struct, frozen=True, kw_only=True):
    kernel_ns: int | None
    """Phase fetch.kernel, ns; null: fetches were not traced."""
    user_ns: int | None
    """Phase fetch.user, ns; null: fetches were not traced."""
    pages: int | None
    """Number of ring entries that KVM_RESET_DIRTY_RINGS gave back since the fetch before; null with a bitmap, whose
    bits are not counted."""
    bytes: int | None
    """What was sent of memory after the stop, bytes; null: sends were not traced."""
    send_ns: int | None
    """Phase memory.send, ns; null: sends were not traced."""
    user_off_cpu_ns: int | None = None
    """The part of `user_ns` that the fetching thread was off the CPU, ns; null: not measured."""
    split: Split | None = None
    """All its ioctls together; null: as of an ioctl."""
    rearm: Rearm | None = None
    """Work for nothing in it; null: none, or not known."""


class DirtyLog(Struct, frozen=True, kw_only=True):
    mode: DirtyLogMode
    """How dirty pages were logged."""
    slots: list[Slot]
    """The memslots that were fetched, as far as their place is known."""
    passes: list[Pass]
    """The pre-copy passes in order of time."""
    final: FinalFetch | None
    """The fetches after the stop, with what they caused; null: none."""
    fetches: list[Fetch]
    """The fetches that began after the last vCPU stopped."""
    logging: list[Logging] = []
    """Each time that dirty logging was switched."""


class SocketUse(Struct, frozen=True, kw_only=True):
    role: str
    """migration or control, with the side: `source migration`."""
    bytes: int
    """What went through in the window, bytes."""
    calls: int
    """Number of calls."""
    copy_ns: int | None
    """Inside the calls, on the CPU, ns; null: not measured."""
    blocked_ns: int | None
    """Inside the calls, off the CPU, ns; null: not measured."""
    between_ns: int
    """Between the calls, ns."""
    in_call_ns: int
    """copy + blocked, ns; known even where the two cannot be told apart."""
    local: str = ""
    """Own address and port; empty: unknown, or a UNIX socket."""
    remote: str = ""
    """The other end's address and port; empty: unknown, or a UNIX socket."""
    tcp_info: dict[str, int] | None = None
    """TCP's own account between two readings around the window: `busy_us`, `rwnd_limited_us`, `sndbuf_limited_us`
    (us, counted in jiffies: `resolution_us`), `retransmits` (number), `bytes_retrans` (bytes); `from` and `until`, the
    instants of the readings (ns); as last read `rtt_us` (us), `cwnd` (number of segments), `mss` and `queued` (bytes).
    Null: not measured."""


class Wire(Struct, frozen=True, kw_only=True):
    bytes: int
    """How much, bytes."""
    sent: int
    """When it had been sent, ns from the window's begin."""
    received: int
    """When it was received, ns from the window's begin."""
    in_flight_ns: int
    """From one to the other, ns."""
    reason: str
    """Why it took so long, by the kernel's events."""
    evidence: str
    """What tells so."""
    bound_ns: int | None = 0
    """As that of a phase, of `in_flight_ns`, ns."""
    message: str = ""
    """What they belonged to: `pages`, `state`, or `state and pages` where pages follow on the same connection
    (postcopy); empty if the source's work is unknown."""


class Wait(Struct, frozen=True, kw_only=True):
    phase: PhaseName
    """The phase that it overlaps most."""
    thread: str
    """Name and tid."""
    duration_ns: int
    """The part in that phase, ns."""
    stack: list[str]
    """Kernel functions that it slept in, innermost first. If it could run and did not: `(CPU quota)` or `(preempted)`
    where that is proven, else `(runnable, not running)`."""


class Witness(Struct, frozen=True, kw_only=True):
    name: str
    """What measured it, e.g. `qmp.downtime_ms`."""
    value_ns: int
    """What it says, ns."""
    difference_ns: int
    """`value_ns` minus our figure, ns."""
    explanation: str
    """Why the two differ, or what it covers."""
    span: Span | None = None
    """Where the kernel's events show the very thing that it measured, ns from the window's begin; null if they do not.
    It is our figure, except of downtimes: those are compared with the blackout."""
    doubt_ns: int = 0
    """Time at the span's border that may belong to the neighbouring part, ns."""


class Completeness(Struct, frozen=True, kw_only=True):
    verdict: Verdict
    """How far the result can be relied upon."""
    lost: dict[str, int] | None
    """Number of events lost in the kernel, by probe; null: the recording was cut off before it says."""
    unpaired: dict[str, int] | None
    """Number of exits without entry and the like, by probe; harmless. Null: as `lost`."""
    attach: dict[str, str]
    """By signal, how it was traced: `fentry`, `kprobe`, `tracepoint`, or `absent` and why."""
    observer_ns: int | None
    """Run time of our BPF programs, over the whole recording and all threads of the host, ns; null: not measured."""
    reasons: list[str]
    """Why the verdict is not `complete`, one line each."""
    observer_window_ns: int | None = None
    """In the window, at most: from the last reading before it to the first after it, ns; null: not measured."""
    observer_window_least_ns: int | None = None
    """At least: between the first and the last reading in it, ns; null: not measured."""


class Clock(Struct, frozen=True, kw_only=True):
    """The destination's clock beside the source's. On one host it is the same: all are 0."""

    offset_ns: int = 0
    """How much it is ahead at the destination's start, ns."""
    bound_ns: int | None = 0
    """How far `offset_ns`, and so `blackout_ns`, can be off, ns; null: on one side there is no limit."""
    open: str = ""
    """With `bound_ns` null: `least`, figures that span the hosts are at least as long as said; `most`: at most."""
    drift_ppb: int = 0
    """How much the clocks' rates differ at most, in parts per billion."""
    pairs_there: int = 0
    """Number of pairs of an event on the source and a later one on the destination: they bound it from above."""
    pairs_back: int = 0
    """Number of pairs the other way: they bound it from below."""


class Change(Struct, frozen=True, kw_only=True):
    """What one wish would change in the blackout."""

    wish: str
    """As the user wrote it: `fetch=0`."""
    change_ns: int | None
    """By how much the blackout would be longer, ns; negative: shorter. Null: cannot be told."""
    why: str
    """What that is worked out from."""


class WhatIf(Struct, frozen=True, kw_only=True):
    """A prediction: the same migration, were something else. Never a measurement."""

    blackout_ns: int | None
    """The predicted blackout, ns; null: one of the changes cannot be told."""
    changes: list[Change]
    """One row for each wish."""
    assumptions: list[str]
    """What has to hold for it, one line each."""


class Breakdown(Struct, frozen=True, kw_only=True):
    schema: str = SCHEMA
    """Name and version of this schema."""
    migration: Migration
    """What was migrated, and how."""
    window_ns: int | None
    """From the pause request to the last vCPU's start, ns. Null: no vCPU stop was found, so there is no window, and no
    phase has a duration. Where only the destination was traced, the window begins with its restoring."""
    blackout_ns: int | None
    """From the last vCPU's stop to the first vCPU's start, ns; null: not measured."""
    blackout: Span | None
    """The blackout's place in the window, ns from its begin; null: not measured."""
    phases: list[Phase]
    """All of them, also those that were not seen."""
    vcpus: list[Vcpu]
    """One row for each vCPU that was seen to stop or to start."""
    dirty_log: DirtyLog
    """What was done to find the dirty pages."""
    sockets: list[SocketUse]
    """The migration's sockets in the window."""
    wire: list[Wire] | None
    """The longest times that bytes were sent and not received; null: only one side was traced."""
    waits: list[Wait] | None
    """The longest waits in the window; null: not traced."""
    witnesses: list[Witness]
    """What others measured."""
    completeness: Completeness
    """What is missing."""
    clock: Clock
    """How two hosts' clocks were brought together."""
    notes: list[str]
    """Doubts about single figures, one line each."""
    window_bound_ns: int | None = 0
    """How far `window_ns` can be off, as `Clock.bound_ns` for `blackout_ns`, ns."""
    what_if: WhatIf | None = None
    """A prediction; only where it was asked for (`report --what-if`)."""
    pausing: Pausing | None = None
    """How the vCPUs were stopped; null: not seen."""
    postcopy: Postcopy | None = None
    """What the destination fetched; null in another mode."""
    throttled: Throttled | None = None
    """None if no throttling was seen."""

    @property
    def came_back(self) -> bool:
        """The blackout ended on the source: it resumed its guest."""
        resumed = (PhaseName.RESUME, Side.SOURCE)
        return self.blackout_ns is not None and resumed in ((p.phase, p.side) for p in self.phases)

    def phase_ns(self, name: PhaseName | str) -> int | None:
        """Duration of a phase in ns, None if it was not measured; KeyError if there is no such phase."""
        return {str(phase.phase): phase.duration_ns for phase in self.phases}[name]
