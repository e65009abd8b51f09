# SPDX-License-Identifier: Apache-2.0
"""A migration as an OpenTelemetry trace, with an id that both hosts derive independently.

In: the analysis of one host's recording. Out: spans in wall-clock time. The trace id is derived from the migration's
TCP connection, of which both hosts know the two ends. Behind a forwarder between UNIX sockets or pipes, where each host
knows other ends, it is derived from the VM's name and the length of the stream. The source's span id is derived from
the trace id, so the destination can use it as the parent. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ebpf_mig.analysis import flow
from ebpf_mig.breakdown import Breakdown, Transport
from ebpf_mig.exporter.observation import Observation
from ebpf_mig.recording.events import RECEIVE, SEND

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
    trace_id = migration_id(analysis, seen.vm)
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
        root=Span(
            "migration",
            zero + begin,
            zero + b.window_ns,
            _attributes(b, seen, len(visits) - len(spans), stream_bytes(analysis)),
        ),
        spans=sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns)),
        vm=seen.vm,
    )


def migration_id(analysis: Analysis, vm: str) -> str:
    """The trace id. It is the recording's own if nothing that both hosts know identifies the migration."""
    header, length = analysis.header, stream_bytes(analysis)
    carrier = analysis.breakdown.migration.transport
    if not analysis.connection and length and carrier in (Transport.UNIX, Transport.VSOCK, Transport.PIPE):
        return id_of(f"{vm} {length}")
    return id_of(analysis.connection or f"{header.boot_id} {header.begin_ns}")


def stream_bytes(analysis: Analysis) -> int | None:
    """The length of the migration's stream in bytes, which both sides count alike, whatever lies between them."""
    traced = analysis.traced
    if traced.source is not None:
        return flow.length(traced.source, SEND, traced.channels.source)
    return flow.length(traced.destination, RECEIVE, traced.channels.destination) if traced.destination else None


def id_of(text: str) -> str:
    """A trace id, 32 hexadecimal digits, not all zero."""
    return digest(f"ebpf-mig migration {text}", 32)


def digest(text: str, digits: int) -> str:
    """The first hexadecimal digits of the SHA-256."""
    import hashlib  # here: the watch only uses the structs, and should not load a crypto library

    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _attributes(b: Breakdown, seen: Observation, left_out: int, length: int | None) -> dict[str, Attribute]:
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
    if length is not None:
        found["ebpf_mig.stream_bytes"] = length
    if left_out > 0:
        found["ebpf_mig.spans_left_out"] = left_out
    return found
