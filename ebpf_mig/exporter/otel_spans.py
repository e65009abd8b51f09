# SPDX-License-Identifier: Apache-2.0
"""A migration as an OpenTelemetry trace, with an id that both hosts derive independently.

In: the analysis of one host's recording. Out: spans in wall-clock time. The trace id is derived from the migration's
TCP connection, of which both hosts know the two ends. The source's span id is derived from the trace id, so the
destination can use it as the parent. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.exporter.observation import Observation

if TYPE_CHECKING:
    from ebpf_mig.analysis.result import Analysis

MOST_SPANS = 200
"""Of one trace. Beyond it, the shortest visits to a phase are left out."""

Attribute = str | int | float | bool


class Span(msgspec.Struct, frozen=True):
    """Times are nanoseconds since the epoch."""

    name: str
    begin_ns: int
    end_ns: int
    attributes: dict[str, Attribute] = {}


class Trace(msgspec.Struct, frozen=True, tag="trace"):
    """One host's part of a migration: `root` and the spans below it."""

    trace_id: str
    span_id: str
    """Of the root; empty: random."""
    parent_id: str
    """The source's root, for a destination whose source is on another host; empty: none."""
    root: Span
    spans: list[Span]
    vm: str


def trace_of(analysis: Analysis, seen: Observation) -> Trace | None:
    """None if no switchover was found, or the recording has no wall-clock time."""
    b, header = analysis.breakdown, analysis.header
    if b.window_ns is None or header.clock is None:
        return None
    zero = analysis.origin_ns - header.clock.monotonic_ns + header.clock.realtime_ns
    trace_id = migration_id(analysis)
    of_source = digest(f"{trace_id} source", 16)
    begin = b.window_ns - b.migration.total_ns if b.migration.total_ns is not None else 0
    visits = sorted(
        ((p.phase, p.side, begin, end) for p in b.phases for begin, end in p.spans),
        key=lambda visit: visit[2] - visit[3],
    )
    spans = [
        Span(phase, zero + first, zero + last, {"ebpf_mig.side": side})
        for phase, side, first, last in visits[: MOST_SPANS - 1]
    ]
    if b.blackout is not None:
        spans.append(Span("blackout", zero + b.blackout[0], zero + b.blackout[1]))
    return Trace(
        trace_id=trace_id,
        span_id=of_source if seen.role != "destination" else "",
        parent_id=of_source if seen.role == "destination" else "",
        root=Span("migration", zero + begin, zero + b.window_ns, _attributes(b, seen, len(visits) - len(spans))),
        spans=sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns)),
        vm=seen.vm,
    )


def migration_id(analysis: Analysis) -> str:
    """The trace id. It is the recording's own if the migration has no TCP connection that both hosts know."""
    header = analysis.header
    return id_of(analysis.connection or f"{header.boot_id} {header.begin_ns}")


def id_of(text: str) -> str:
    """A trace id, 32 hexadecimal digits, not all zero."""
    return digest(f"ebpf-mig migration {text}", 32)


def digest(text: str, digits: int) -> str:
    """The first hexadecimal digits of the SHA-256."""
    import hashlib  # here: the watch only uses the structs, and should not load a crypto library

    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _attributes(b: Breakdown, seen: Observation, left_out: int) -> dict[str, Attribute]:
    found: dict[str, Attribute] = {
        "ebpf_mig.vmm": seen.vmm,
        "ebpf_mig.role": seen.role,
        "ebpf_mig.result": seen.result,
        "ebpf_mig.mode": b.migration.mode,
        "ebpf_mig.verdict": seen.verdict,
        "ebpf_mig.recording": seen.recording,
        "ebpf_mig.window_ns": b.window_ns or 0,
    }
    if seen.final_bytes is not None:
        found["ebpf_mig.final_memory_bytes"] = seen.final_bytes
    if seen.blackout_ns is not None:
        found["ebpf_mig.blackout_ns"] = seen.blackout_ns
    if left_out > 0:
        found["ebpf_mig.spans_left_out"] = left_out
    return found
