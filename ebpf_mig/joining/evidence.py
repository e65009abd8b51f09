# SPDX-License-Identifier: Apache-2.0
"""Indexes a recording for joining, and collects clock constraints from two recordings.

In: a recording; then two, with a connection in common. Out: a `Survey`; `clock.Evidence`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from ebpf_mig.analysis.process import Process
from ebpf_mig.joining import happens_before
from ebpf_mig.joining import match as matching
from ebpf_mig.joining.clock import Evidence, Hull
from ebpf_mig.joining.match import End, JoinError, Match
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.file import Recording

_SYN_FIN = 2
"""TCP counts these as acknowledged bytes too (tcp_snd_una_update, net/ipv4/tcp_input.c)."""


@dataclass
class Survey:
    """A recording indexed for joining."""

    name: str
    recording: Recording
    kinds: dict[type, list[Any]]
    """Its events by their type."""
    ends: list[End]
    segments: dict[tuple[int, int], list[ev.Segment]]
    """By process and socket, in order of time."""
    readings: dict[tuple[int, int], list[ev.TcpInfo]]
    """By process and socket."""

    @property
    def header(self) -> ev.Header:
        return self.recording.header

    @property
    def ending(self) -> ev.Ending | None:
        return next(reversed(self.kinds.get(ev.Ending, [])), None)

    def process(self, pid: int) -> Process:
        """The process with the events of its vCPUs."""
        enters, exits, states = (
            [event for event in self.kinds.get(kind, ()) if event.pid == pid]
            for kind in (ev.VcpuEnter, ev.VcpuExit, ev.VcpuState)
        )
        return Process(pid, enters=enters, exits=exits, states=states)


def survey(name: str, recording: Recording) -> Survey:
    """Indexes a recording in one pass. JoinError if it is a joined one."""
    if recording.header.remote is not None:
        raise JoinError(f"{name} is already a joined recording", "show it with: ebpf-mig report")
    kinds: dict[type, list[Any]] = defaultdict(list)
    for event in recording.events:
        kinds[type(event)].append(event)
    segments: dict[tuple[int, int], list[ev.Segment]] = defaultdict(list)
    for segment in sorted(kinds.get(ev.Segment, ()), key=attrgetter("at_ns")):
        segments[segment.pid, segment.socket].append(segment)
    readings: dict[tuple[int, int], list[ev.TcpInfo]] = defaultdict(list)
    for reading in kinds.get(ev.TcpInfo, ()):
        readings[reading.pid, reading.socket].append(reading)
    ends = matching.ends_of(kinds.get(ev.Transfer, ()), kinds.get(ev.Socket, ()))
    return Survey(name, recording, dict(kinds), ends, segments, readings)


def gathered(source: Survey, destination: Survey, near: End, far: End) -> Evidence:
    """The clock constraints from one connection."""
    found = Evidence()
    out, back, arrivals, returns, acks, replies, opened, reopened = (Hull() for _ in range(8))
    happens_before.follows(happens_before.Direction(near.sends, far.receives, _from_start(source, near)), out, True)
    happens_before.follows(
        happens_before.Direction(far.sends, near.receives, _from_start(destination, far)), back, False
    )
    here, there = source.segments[near.pid, near.inode], destination.segments[far.pid, far.inode]
    happens_before.arrived(near.sends, here, there, arrivals, True)
    happens_before.arrived(far.sends, there, here, returns, False)
    happens_before.released(here, there, opened, True)
    happens_before.released(there, here, reopened, False)
    happens_before.acknowledged(there, here, acks, True)
    happens_before.acknowledged(here, there, replies, False)
    found.most = [hull for hull in (out, arrivals, replies, opened) if hull.count]
    found.least = [hull for hull in (back, returns, acks, reopened) if hull.count]
    return found


def _readings(side: Survey, end: End) -> list[ev.TcpInfo]:
    return side.readings.get((end.pid, end.inode), [])


def _from_start(side: Survey, end: End) -> bool:
    """Whether tracing saw all bytes that TCP sent, and so the first one too."""
    readings = [reading.values for reading in _readings(side, end)]
    written = [v["bytes_acked"] + v["queued"] for v in readings if {"bytes_acked", "queued"} <= v.keys()]
    return bool(written) and 0 < max(written) <= end.sent + _SYN_FIN


def rough(evidence: Evidence) -> int | None:
    """An approximate offset, used to find the instant at which the exact one is needed."""
    most = [y for hull in evidence.most for _, y in hull.points]
    least = [-y for hull in evidence.least for _, y in hull.points]
    if most and least:
        return (min(most) + max(least)) // 2
    return min(most) if most else max(least) if least else None


def started(destination: Survey, match: Match) -> int:
    """The destination's first start, on its clock; its last receive if it never started."""
    lines = destination.process(match.far).vcpus.values()
    starts = [line.first_run for line in lines if line.first_run is not None]
    last = [t.end_ns for _, far in match.ends for t in (*far.receives, *far.sends)]
    return min(starts) if starts else max(last, default=0)
