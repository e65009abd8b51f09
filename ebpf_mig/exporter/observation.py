# SPDX-License-Identifier: Apache-2.0
"""What the watch reports about a migration and about itself, to the terminal or to the listener.

In: a breakdown. Out: small structs for JSON. The field `vm` has everything that a tenant chose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ebpf_mig.breakdown import Breakdown, DirtyLogMode, Mode, Result, Side

if TYPE_CHECKING:
    from ebpf_mig.analysis.result import Analysis

ROLES = (Side.SOURCE, Side.DESTINATION, Side.BOTH)
RESULTS = tuple(Result)
MODES = tuple(Mode)
DELAYS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)
"""Upper ends of the buckets of `Status.delays`. A migration shorter than its delay may be missed."""


class Observation(msgspec.Struct, frozen=True, kw_only=True, tag="migration"):
    """One migration as this node saw it. Times are in ns; None is not measured."""

    at: float
    """Wall clock at the end, seconds since the epoch."""
    recording: str
    """Name of the recording in the state directory; empty if it could not be kept."""
    vmm: str
    vm: str
    role: str
    """source, destination or both: the sides on this node."""
    result: str
    trigger: str
    blackout_ns: int | None
    window_ns: int | None
    phases: dict[str, int]
    """Phases of the sides seen here."""
    fetch: dict[str, dict[str, int]]
    """Stage (precopy, blackout) to part (lock, off_cpu, kernel, user) to ns."""
    send: dict[str, int]
    """State (copy, blocked) to ns, of the source's migration sockets in the window."""
    final_bytes: int | None
    """Bytes of memory sent in the blackout; None: the source was not seen here, or there was no fetch."""
    verdict: str
    reasons: list[str]
    lost: dict[str, int]
    mode: str = Mode.UNKNOWN
    """When the memory moved: a `Mode`."""
    begin_seen: bool = True
    """For a source: dirty logging was seen to be switched on."""
    diagnosis: str = ""
    """What dominates the downtime, and why, on one line; empty without a downtime."""
    migration: str = ""
    """Its id, 32 hexadecimal digits, see `otel_spans.migration_id`: the same on both hosts. Empty: it has no half."""
    source_ns: int | None = None
    """The source's part of the downtime, see `analysis.parts`. This and the following: None unless the guest left the
    source or started on the destination."""
    until_state_ns: int | None = None
    """From the last vCPU's stop to the first byte of state sent."""
    destination_ns: int | None = None
    """The destination's part of the downtime."""
    stopped_at_ns: int | None = None
    """When the last vCPU stopped on the source, by the wall clock of the source's host, ns since the epoch."""
    started_at_ns: int | None = None
    """When the first vCPU started on the destination, by the wall clock of that host, ns since the epoch."""


class Status(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    """The state of the watch; counters since it started."""

    run: str = ""
    """Which watch this is: each has another one."""
    vms: int
    armed: bool
    armed_seconds: float
    triggers: dict[str, dict[str, int]]
    """Kind of sign to outcome (migration, nothing, suppressed) to number."""
    delays: list[int]
    """Histogram of the time from a sign to the VM being traced: one count for each of `DELAYS_S`, one for longer."""
    delay_seconds: float
    """Sum of these times, in seconds."""
    attached: dict[str, bool]
    """Whether each standing probe is attached."""
    trigger: str
    """How migrations are noticed, see `probes.trigger`."""
    lost: dict[str, int]
    """Events lost in the kernel, by probe."""
    run_seconds: dict[str, float]
    """Run time of the costly programs, if the kernel counts it."""
    errors: dict[str, int]
    """By kind, see `troubles.ERRORS`."""
    limits: dict[str, int]
    """What was left out because of a limit, see `troubles.LIMITS`."""
    recordings: int
    recording_bytes: int


def vmms() -> tuple[str, ...]:
    """Values of the label `vmm`."""
    from ebpf_mig.vmm import migrating  # here: the listener gets the names in its options, and loads no adapter

    return (*migrating(), "other")


def observe(b: Breakdown, *, at: float, recording: str, vmm: str, vm: str, trigger: str) -> Observation:
    """The summary of a breakdown."""
    m = b.migration
    sides = {side for side, end in ((Side.SOURCE, m.source), (Side.DESTINATION, m.destination)) if end is not None}
    role = Side.BOTH if len(sides) == 2 else next(iter(sides), Side.UNKNOWN)
    return Observation(
        at=at,
        recording=recording,
        vmm=vmm if vmm in vmms() else "other",
        vm=vm,
        role=role,
        result=m.result,
        mode=m.mode,
        trigger=trigger,
        blackout_ns=b.blackout_ns,
        window_ns=b.window_ns,
        phases={p.phase: p.duration_ns for p in b.phases if p.duration_ns is not None},
        fetch=_fetch(b),
        send=_send(b),
        final_bytes=b.dirty_log.final.bytes if b.dirty_log.final else None,
        verdict=b.completeness.verdict,
        reasons=b.completeness.reasons,
        lost=b.completeness.lost or {},
        diagnosis=b.diagnosis.summary if b.diagnosis else "",
        begin_seen=m.source is None or m.total_ns is not None or b.window_ns is None or _without_log(b),
    )


def with_parts(seen: Observation, analysis: Analysis) -> Observation:
    """Adds what is needed to join both halves of a migration that completed.

    A source alone may not see whether it did. Its half counts as soon as the other one is there.
    """
    from ebpf_mig.analysis.parts import observe as observe_parts  # here: the listener needs no analysis
    from ebpf_mig.exporter.otel_spans import migration_id

    parts, clock = observe_parts(analysis.traced, analysis.attribution), analysis.header.clock
    left = seen.result == Result.UNKNOWN and parts.stop is not None and parts.start is None
    if (seen.result != Result.COMPLETED and not left) or seen.mode in (Mode.SNAPSHOT, Mode.RESTORE):
        return seen

    def wall(at: int | None) -> int | None:
        return None if at is None or clock is None else at - clock.monotonic_ns + clock.realtime_ns

    return msgspec.structs.replace(
        seen,
        migration=migration_id(analysis, seen.vm),
        source_ns=parts.source_ns,
        until_state_ns=parts.until_state_ns,
        destination_ns=parts.destination_ns,
        stopped_at_ns=wall(parts.stop),
        started_at_ns=wall(parts.start),
    )


def _without_log(b: Breakdown) -> bool:
    """Whether it is a snapshot whose begin cannot be missed, since no dirty logging is switched on for it."""
    return b.migration.mode == Mode.SNAPSHOT and b.dirty_log.mode == DirtyLogMode.NONE


def _fetch(b: Breakdown) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    if b.dirty_log.passes:
        found["precopy"] = {
            "kernel": sum(p.kernel_ns for p in b.dirty_log.passes),
            "user": sum(p.user_ns for p in b.dirty_log.passes),
        }
    final = b.dirty_log.final
    if final is None:
        return found
    ioctls = [ioctl for fetch in b.dirty_log.fetches for ioctl in fetch.ioctls]
    locks = [sum(ioctl.lock_wait_ns.values()) for ioctl in ioctls if ioctl.lock_wait_ns is not None]
    idle = [ioctl.off_cpu_ns for ioctl in ioctls if ioctl.off_cpu_ns is not None]
    lock, asleep = sum(locks), max(0, sum(idle) - sum(locks))
    parts = {"lock": lock if locks else None, "off_cpu": asleep if idle else None, "user": final.user_ns}
    parts["kernel"] = None if final.kernel_ns is None else max(0, final.kernel_ns - lock - asleep)
    found["blackout"] = {part: ns for part, ns in parts.items() if ns is not None}
    return found


def _send(b: Breakdown) -> dict[str, int]:
    used = [s for s in b.sockets if s.role == "source migration"]
    sums = {"copy": [s.copy_ns for s in used], "blocked": [s.blocked_ns for s in used]}
    return {state: sum(n for n in ns if n is not None) for state, ns in sums.items() if any(n is not None for n in ns)}
