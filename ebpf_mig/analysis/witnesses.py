# SPDX-License-Identifier: Apache-2.0
"""Witnesses: downtime figures from other sources, compared with our blackout.

In: the marks of a recording and the switchover. Out: rows of the breakdown. A witness never moves a boundary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ebpf_mig.analysis.switchover import Switchover
from ebpf_mig.breakdown import SwitchoverKind, Witness
from ebpf_mig.recording.events import Mark

MS = 1_000_000
SMALL_DOUBT_NS = 10_000


@dataclass(frozen=True)
class MarkNames:
    """The names of the marks that a VMM's adapter makes, by their meaning in the analysis."""

    stopped: frozenset[str] = frozenset()
    """Its vCPUs have stopped."""
    postcopy: frozenset[str] = frozenset()
    """The source has switched to postcopy."""
    downtime: Mapping[str, str] = field(default_factory=dict)
    """Its own downtime figures in whole ms: the mark's name, and which events it counts from and to."""
    pairs: tuple[tuple[str, str, str], ...] = ()
    """(name of the witness, mark at the stop on the source, mark at the start on the destination)."""


def merged(names: Iterable[MarkNames]) -> MarkNames:
    """The names of several VMMs combined."""
    all_names = list(names)
    return MarkNames(
        stopped=frozenset(name for one in all_names for name in one.stopped),
        postcopy=frozenset(name for one in all_names for name in one.postcopy),
        downtime={name: why for one in all_names for name, why in one.downtime.items()},
        pairs=tuple(pair for one in all_names for pair in one.pairs),
    )


def gather(
    marks: Sequence[Mark], names: MarkNames, switchover: Switchover, pids: tuple[int | None, int | None]
) -> list[Witness]:
    """All figures that can be compared with the blackout; empty if the blackout is unknown."""
    if switchover.first_start is None:
        return []
    blackout = switchover.first_start - switchover.stop
    found: list[Witness] = []
    for mark in marks:
        prefix, _, what = mark.name.rpartition(".")
        if what == "downtime_ms":
            found.append(
                Witness(
                    name=mark.name,
                    value_ns=mark.value * MS,
                    difference_ns=mark.value * MS - blackout,
                    explanation=names.downtime.get(mark.name, f"as reported by {prefix}, in whole ms"),
                )
            )
    for name, stop, resume in names.pairs:
        stopped = _nearest(marks, stop, pids[0], switchover.stop)
        resuming = pids[0] if switchover.kind == SwitchoverKind.ABORTED else pids[1]
        resumed = _nearest(marks, resume, resuming, switchover.first_start)
        if stopped and resumed:
            value = resumed.at_ns - stopped.at_ns
            doubt_ns = max(stopped.doubt_ns, resumed.doubt_ns)
            doubt = f", doubt {_span(doubt_ns)}" if doubt_ns > SMALL_DOUBT_NS else ""
            found.append(
                Witness(
                    name=name,
                    value_ns=value,
                    difference_ns=value - blackout,
                    explanation=f"{_us(stopped.at_ns - switchover.stop)} the stop, "
                    f"{_us(resumed.at_ns - switchover.first_start)} the start{doubt}",
                )
            )
    return sorted(found, key=lambda w: (w.name, w.value_ns))


def _nearest(marks: Sequence[Mark], name: str, pid: int | None, at: int) -> Mark | None:
    named = [mark for mark in marks if mark.name == name]
    own = [mark for mark in named if mark.pid == pid]
    return min(own, key=lambda mark: (abs(mark.at_ns - at), mark.at_ns), default=None)


def _us(difference: int) -> str:
    return f"{_span(abs(difference))} {'after' if difference >= 0 else 'before'}"


def _span(ns: int) -> str:
    return f"{ns / MS:.3f} ms"
