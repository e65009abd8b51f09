# SPDX-License-Identifier: Apache-2.0
"""The breakdown: the result of the analysis. Every report, the gate and the exporter are made from it.

In: nothing. Out: frozen structs whose JSON form is the public schema `ebpf-mig/breakdown/1`. Durations are
integer nanoseconds; instants are nanoseconds from the window's begin (negative before it). `None` means
"not measured", never zero. Names are stable from the first release: add, never rename.
"""

from __future__ import annotations

from ebpf_mig.breakdown.completeness import Completeness, PhaseCost, TracingCost
from ebpf_mig.breakdown.delays import LiveUpdate, ManagerWait, Pausing, Stolen, Throttled, Wait
from ebpf_mig.breakdown.diagnosis import SINGLE, Cause, Diagnosis, Innocent, Mostly
from ebpf_mig.breakdown.dirty_log import (
    DirtyLog,
    Fetch,
    FetchIoctl,
    FinalFetch,
    Logging,
    Pass,
    Rearm,
    Slot,
    Split,
    Stretch,
    VcpuShare,
)
from ebpf_mig.breakdown.faults import PageSource, PageWaits, VcpuFaults
from ebpf_mig.breakdown.migration import Endpoint, Migration, Pairing
from ebpf_mig.breakdown.network import Hop, Postcopy, Served, SocketUse, Wire
from ebpf_mig.breakdown.prediction import Change, WhatIf
from ebpf_mig.breakdown.vocabulary import (
    IMMEDIATE,
    OF_FILES,
    PHASES,
    DirtyLogMode,
    Mode,
    PairedBy,
    PhaseName,
    Result,
    Side,
    Span,
    Struct,
    SwitchoverKind,
    Transport,
    Verdict,
    sides_of,
)

__all__ = [
    "IMMEDIATE",
    "OF_FILES",
    "PHASES",
    "SCHEMA",
    "SINGLE",
    "Breakdown",
    "Cause",
    "Change",
    "Clock",
    "Completeness",
    "Diagnosis",
    "DirtyLog",
    "DirtyLogMode",
    "Endpoint",
    "Fetch",
    "FetchIoctl",
    "FinalFetch",
    "Hop",
    "Innocent",
    "LiveUpdate",
    "Logging",
    "ManagerWait",
    "Migration",
    "Mode",
    "Mostly",
    "PageSource",
    "PageWaits",
    "PairedBy",
    "Pairing",
    "Pass",
    "Pausing",
    "Phase",
    "PhaseCost",
    "PhaseName",
    "Postcopy",
    "Rearm",
    "Result",
    "Served",
    "Side",
    "Slot",
    "SocketUse",
    "Span",
    "Split",
    "Stolen",
    "Stretch",
    "Struct",
    "SwitchoverKind",
    "Throttled",
    "TracingCost",
    "Transport",
    "Vcpu",
    "VcpuFaults",
    "VcpuShare",
    "Verdict",
    "Wait",
    "WhatIf",
    "Wire",
    "Witness",
    "sides_of",
]
SCHEMA = "ebpf-mig/breakdown/1"


class Phase(Struct, frozen=True, kw_only=True):
    phase: PhaseName
    """Its name."""
    side: Side
    """The side that it belongs to."""
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
    """Error bound of `blackout_ns` and `start`, as `Phase.bound_ns`, ns."""


class Witness(Struct, frozen=True, kw_only=True):
    name: str
    """What measured it, e.g. `qmp.downtime_ms`."""
    value_ns: int
    """Its value, ns."""
    difference_ns: int
    """`value_ns` minus our figure, ns."""
    explanation: str
    """Why the two values differ, or what the witness covers."""
    span: Span | None = None
    """Where the kernel's events show the very thing that it measured, ns from the window's begin; null if they do not.
    It is our figure, except of downtimes: those are compared with the blackout."""
    doubt_ns: int = 0
    """Time at the span's border that may belong to the neighbouring part, ns."""


class Clock(Struct, frozen=True, kw_only=True):
    """The destination's clock beside the source's. On one host it is the same: all are 0."""

    offset_ns: int = 0
    """How much it is ahead at the destination's start, ns."""
    bound_ns: int | None = 0
    """How far `offset_ns`, and so `blackout_ns`, can be off, ns; null: on one side there is no limit."""
    open: str = ""
    """With `bound_ns` null: durations that span the hosts are lower limits (`least`) or upper limits (`most`)."""
    drift_ppb: int = 0
    """How much the clocks' rates differ at most, in parts per billion."""
    pairs_there: int = 0
    """Number of pairs of an event on the source and a later one on the destination: they bound it from above."""
    pairs_back: int = 0
    """Number of pairs the other way: they bound it from below."""


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
    """How the dirty pages were found, and at what cost."""
    sockets: list[SocketUse]
    """The migration's sockets in the window."""
    wire: list[Wire] | None
    """The longest times that bytes were sent and not received; null: only one side was traced."""
    waits: list[Wait] | None
    """The longest waits in the window; null: not traced."""
    witnesses: list[Witness]
    """Downtime figures from other sources."""
    completeness: Completeness
    """What the recording lacks."""
    clock: Clock
    """How two hosts' clocks were aligned."""
    notes: list[str]
    """Doubts about single figures, one line each."""
    window_bound_ns: int | None = 0
    """How far `window_ns` can be off, as `Clock.bound_ns` for `blackout_ns`, ns."""
    what_if: WhatIf | None = None
    """A prediction; only if requested (`report --what-if`)."""
    pausing: Pausing | None = None
    """How the vCPUs were stopped; null: not seen."""
    postcopy: Postcopy | None = None
    """What the destination fetched; null in another mode."""
    page_faults: list[VcpuFaults] | None = None
    """What each vCPU waited for after the guest's start, and its page faults; null: not traced."""
    live_update: LiveUpdate | None = None
    """What a live update (mode `cpr`) took with it, and what its start-up did; null in another mode."""
    throttled: Throttled | None = None
    """Null: no throttling was seen."""
    management: list[ManagerWait] | None = None
    """Each wait for the manager, in order; null: not measured."""
    diagnosis: Diagnosis | None = None
    """What dominates the downtime, why, and what would help. Null: the breakdown was made by an earlier version."""
    stolen: list[Stolen] | None = None
    """CPUs that lost time to a hypervisor below the host, the most first; null: not read around the window."""

    hops: list[Hop] | None = None
    """The processes on this host that passed the migration's last byte on, from the source on; null: none was
    followed."""

    @property
    def came_back(self) -> bool:
        """The blackout ended on the source: it resumed its guest."""
        resumed = (PhaseName.RESUME, Side.SOURCE)
        return self.blackout_ns is not None and resumed in ((p.phase, p.side) for p in self.phases)

    def phase_ns(self, name: PhaseName | str) -> int | None:
        """Duration of a phase in ns, None if it was not measured; KeyError if there is no such phase."""
        took = {str(phase.phase): phase.duration_ns for phase in self.phases}
        return took[name] if name not in OF_FILES else took.get(name, 0)
