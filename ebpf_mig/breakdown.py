# SPDX-License-Identifier: Apache-2.0
"""The breakdown: the result of the analysis, and what every report, the gate and the exporter live on.

In: nothing. Out: frozen structs whose JSON form is the public schema `ebpf-mig/breakdown/1`. Durations are
integer nanoseconds; instants are nanoseconds from the window's begin (negative before it). `None` means
"not measured", never zero. Names are stable from the first release: add, never rename.
"""

from __future__ import annotations

import msgspec

SCHEMA = "ebpf-mig/breakdown/1"

PHASES: tuple[tuple[str, str], ...] = (
    ("pause", "source"),
    ("quiesce", "source"),
    ("fetch.kernel", "source"),
    ("fetch.user", "source"),
    ("memory.send", "source"),
    ("state.save", "source"),
    ("state.send", "source"),
    ("handover", "both"),
    ("state.load", "destination"),
    ("resume", "destination"),
    ("unattributed", "both"),
)
"""Every phase and its side, in the order in which reports print them."""

IMMEDIATE = ": taken not to have run the guest"
"""How a note on KVM_RUN calls that returned at once ends."""

Span = tuple[int, int]


class Struct(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Base: immutable, built by name. It cannot be part of a cycle, so the garbage collector need not look at it."""


class Endpoint(Struct, frozen=True, kw_only=True):
    host: str
    pid: int


class Migration(Struct, frozen=True, kw_only=True):
    vmm: str
    vmm_version: str
    mode: str
    """precopy, postcopy, local or unknown."""
    transport: str
    """tcp, unix, none or unknown."""
    connections: int
    result: str
    """completed, failed, cancelled or unknown."""
    source: Endpoint | None
    destination: Endpoint | None
    total_ns: int | None
    """From dirty logging switched on (or the trigger) to the window's end."""


class Phase(Struct, frozen=True, kw_only=True):
    phase: str
    side: str
    duration_ns: int
    spans: list[Span]
    bound_ns: int | None = 0
    """How far `duration_ns` can be off where it spans two hosts' clocks; None: no limit is known, see `Clock.open`."""


class Vcpu(Struct, frozen=True, kw_only=True):
    vcpu: int
    kick_ns: int | None
    """Pause request to stop."""
    stop: int | None
    start: int | None
    blackout_ns: int | None
    bound_ns: int | None = 0
    """As that of a phase, of `blackout_ns` and `start`."""


class Pausing(Struct, frozen=True, kw_only=True):
    """The stop of the vCPUs, as the thread that asked for it saw it."""

    stop_ns: int
    """Pause request to the last vCPU's stop."""
    noticed_ns: int
    """From there to the next call of that thread: only then does it go on."""
    naps: int
    """How often it slept from its request until it went on."""
    asleep_ns: int
    """The part of `noticed_ns` that it slept."""
    polling: bool
    """It slept on a timer: nobody wakes it when the vCPUs have stopped."""
    kicked_late_ns: int
    """How long it had lost the CPU right before its request, and so before the window."""


class Served(Struct, frozen=True, kw_only=True):
    """What a destination received in postcopy in a while; where calls were recorded as runs, nearly."""

    bytes: int
    asked: int
    """Send calls with which it asked."""
    waited_ns: int | None
    """Of its threads together, off the CPU in receive calls; None if that was not measured."""


class Postcopy(Struct, frozen=True, kw_only=True):
    while_dark: Served | None
    """What it needed to restore the VM, before the start; None where pages have no connection of their own."""
    after: Served
    drained_ns: int
    """From the start to the last byte received."""


class Slot(Struct, frozen=True, kw_only=True):
    slot: int
    base: int
    size_bytes: int


class FetchIoctl(Struct, frozen=True, kw_only=True):
    ioctl: str
    slot: int
    begin: int
    duration_ns: int
    lock_wait_ns: dict[str, int] | None = None
    off_cpu_ns: int | None = None
    split: dict[str, int | str] | None = None
    """The part on the CPU that was no spinning: `walk`, `flush`, `copy`, `other` in ns, and `samples`: `exact`, or how
    many samples tell so, with `walk_error` and so on, in ns at 95 %. None: too short to be sampled, or not traced."""


class Fetch(Struct, frozen=True, kw_only=True):
    begin: int
    end: int
    kernel_ns: int
    ioctls: list[FetchIoctl]
    split: dict[str, int | str] | None = None
    """All its ioctls together."""


class VcpuShare(Struct, frozen=True, kw_only=True):
    vcpu: int
    outside_ns: int
    """Outside KVM_RUN."""
    longest_gap_ns: int
    lock_wait_ns: int | None
    """Inside KVM_RUN, waiting for locks."""


class Stretch(Struct, frozen=True, kw_only=True):
    """A while of the running guest, and what its vCPUs lost in it."""

    begin: int
    duration_ns: int
    vcpus: list[VcpuShare]


class Logging(Struct, frozen=True, kw_only=True):
    """Dirty logging switched on or off over some slots (KVM_SET_USER_MEMORY_REGION)."""

    on: bool
    begin: int
    end: int
    kernel_ns: int
    slots: int
    in_blackout_ns: int
    """The part of `kernel_ns` that lies in the blackout."""


class Rearm(Struct, frozen=True, kw_only=True):
    """Pages protected anew although no vCPU could write to them any more: work that is avoidable."""

    ns: int
    error_ns: int
    """At 95 %, where `ns` comes from samples."""
    samples: int | str
    """`exact`, or how many samples tell so."""
    pages: int
    """Of the slots, or parts of them, that were re-armed: dirty or not."""
    ns_per_page: float
    ms_per_gib: float


class Pass(Struct, frozen=True, kw_only=True):
    """One pre-copy pass: a fetch with the guest running, and the sending up to the next one."""

    begin: int
    kernel_ns: int
    user_ns: int
    pages: int | None
    bytes: int
    send_ns: int
    blocked_ns: int | None
    dirty_pages_per_s: int | None
    """`pages`, or else `pages_at_most`, by the time since the fetch before; None for the first."""
    pages_at_most: int | None = None
    """Whole pages that the bytes can hold. Pages that are sent as a mere header (all zero) are not among them."""
    user_off_cpu_ns: int | None = None
    """The part of `user_ns` that the fetching thread was off the CPU."""
    split: dict[str, int | str] | None = None
    brownout: Stretch | None = None
    """From this fetch to the next one, or to the stop."""
    baseline: Stretch | None = None
    """As long, or as long as was traced, before logging was switched on."""
    tcp_info: dict[str, int] | None = None
    """All migration sockets together, as `SocketUse.tcp_info`."""


class FinalFetch(Struct, frozen=True, kw_only=True):
    kernel_ns: int
    user_ns: int
    pages: int | None
    """Ring entries that KVM_RESET_DIRTY_RINGS gave back since the fetch before. A bitmap's bits are not counted."""
    bytes: int
    send_ns: int
    user_off_cpu_ns: int | None = None
    split: dict[str, int | str] | None = None
    rearm: Rearm | None = None


class DirtyLog(Struct, frozen=True, kw_only=True):
    mode: str
    """manual, legacy, ring or none."""
    slots: list[Slot]
    passes: list[Pass]
    final: FinalFetch | None
    fetches: list[Fetch]
    """The fetches that began after the last vCPU stopped."""
    logging: list[Logging] = []
    """Each time that dirty logging was switched."""


class SocketUse(Struct, frozen=True, kw_only=True):
    role: str
    """migration or control, with the side: `source migration`."""
    bytes: int
    calls: int
    copy_ns: int | None
    blocked_ns: int | None
    between_ns: int
    in_call_ns: int
    """copy + blocked; known even where the two cannot be told apart."""
    local: str = ""
    remote: str = ""
    tcp_info: dict[str, int] | None = None
    """TCP's own account between two readings around the window: `busy_us`, `rwnd_limited_us`, `sndbuf_limited_us`
    (counted in jiffies: `resolution_us`), `retransmits`, `bytes_retrans`; `from` and `until`, the instants of the
    readings; as last read `rtt_us`, `cwnd`, `mss`, `queued`."""


class Wire(Struct, frozen=True, kw_only=True):
    bytes: int
    sent: int
    received: int
    in_flight_ns: int
    reason: str
    evidence: str
    bound_ns: int | None = 0
    """As that of a phase, of `in_flight_ns`."""
    message: str = ""
    """What they belonged to: `pages`, `state`, or `state and pages` where pages follow on the same connection
    (postcopy); empty if the source's work is unknown."""


class Wait(Struct, frozen=True, kw_only=True):
    phase: str
    thread: str
    duration_ns: int
    stack: list[str]


class Witness(Struct, frozen=True, kw_only=True):
    name: str
    value_ns: int
    difference_ns: int
    """value - our figure."""
    explanation: str
    span: Span | None = None
    """Where the kernel's events show the very thing that it measured; None if they do not. It is our figure, except of
    downtimes: those are compared with the blackout."""
    doubt_ns: int = 0
    """Time at the span's border that may belong to the neighbouring part."""


class Completeness(Struct, frozen=True, kw_only=True):
    verdict: str
    """complete, bounded or incomplete."""
    lost: dict[str, int]
    unpaired: dict[str, int]
    attach: dict[str, str]
    observer_ns: int | None
    """Run time of our BPF programs, over the whole recording and all threads of the host."""
    reasons: list[str]
    """Why the verdict is not `complete`, one line each."""
    observer_window_ns: int | None = None
    """The same in the window, at most: between the last reading before it and the first after it."""
    observer_window_least_ns: int | None = None
    """At least: between the first and the last reading in it."""


class Clock(Struct, frozen=True, kw_only=True):
    """The destination's clock beside the source's. On one host it is the same: all are 0."""

    offset_ns: int = 0
    """How much it is ahead at the destination's start."""
    bound_ns: int | None = 0
    """How far `offset_ns`, and so `blackout_ns`, can be off; None: on one side there is no limit."""
    open: str = ""
    """With `bound_ns` None: `least`, figures that span the hosts are at least as long as said; `most`: at most."""
    drift_ppb: int = 0
    """How much the clocks' rates differ at most, in parts per billion."""
    pairs_there: int = 0
    """How many pairs of an event on the source and a later one on the destination bound it from above."""
    pairs_back: int = 0
    """The same the other way, from below."""


class Change(Struct, frozen=True, kw_only=True):
    """What one wish would change in the blackout."""

    wish: str
    """As the user wrote it: `fetch=0`."""
    change_ns: int | None
    """Negative: shorter. None: cannot be told."""
    why: str


class WhatIf(Struct, frozen=True, kw_only=True):
    """A prediction: the same migration, were something else. Never a measurement."""

    blackout_ns: int | None
    """None if one of the changes cannot be told."""
    changes: list[Change]
    assumptions: list[str]
    """What has to hold for it, one line each."""


class Breakdown(Struct, frozen=True, kw_only=True):
    schema: str = SCHEMA
    migration: Migration
    window_ns: int | None
    """None if no vCPU stop was found: there is no window, and no phase has a duration. Where only the
    destination was traced, the window begins with its restoring."""
    blackout_ns: int | None
    blackout: Span | None
    """The blackout's place in the window."""
    phases: list[Phase]
    vcpus: list[Vcpu]
    dirty_log: DirtyLog
    sockets: list[SocketUse]
    wire: list[Wire] | None
    waits: list[Wait] | None
    witnesses: list[Witness]
    completeness: Completeness
    clock: Clock
    notes: list[str]
    """Doubts about single figures, one line each."""
    window_bound_ns: int | None = 0
    """How far `window_ns` can be off, as `Clock.bound_ns` for `blackout_ns`."""
    what_if: WhatIf | None = None
    """Only where it was asked for (`report --what-if`)."""
    pausing: Pausing | None = None
    postcopy: Postcopy | None = None

    def phase_ns(self, name: str) -> int:
        """Duration of the phase called `name`, in ns; KeyError if there is no such phase."""
        return next(p.duration_ns for p in self.phases if p.phase == name)
