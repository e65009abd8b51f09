# SPDX-License-Identifier: Apache-2.0
"""The rows that every readable report is made of: a label and words, and the phases with their place in the downtime.

In: names, ns, bytes; a breakdown. Out: `Row`s and `PhaseRow`s. Text, markdown, HTML and CSV print the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ebpf_mig.breakdown import Breakdown, Mode, Phase, PhaseName, Side, Span, bounds
from ebpf_mig.text import ms, printable

__all__ = [
    "PHASE_WORDS",
    "PhaseRow",
    "Row",
    "cut",
    "figure",
    "ms",
    "phase_rows",
    "remark",
    "unmeasured",
    "unseen",
    "words_for",
]
PHASE_WORDS = {
    PhaseName.PAUSE: "stop the vCPUs",
    PhaseName.QUIESCE: "settle devices",
    PhaseName.FETCH_KERNEL: "read the dirty log",
    PhaseName.FETCH_USER: "scan its bitmap",
    PhaseName.MEMORY_SEND: "send the last pages",
    PhaseName.STATE_SAVE: "save VM state",
    PhaseName.STATE_SEND: "send VM state",
    PhaseName.SYNC: "wait for the disk",
    PhaseName.EXEC: "replace the program",
    PhaseName.STARTUP: "start the new program",
    PhaseName.HANDOVER: "destination waits",
    PhaseName.MEMORY_LOAD: "read the memory",
    PhaseName.STATE_LOAD: "load VM state",
    PhaseName.RESUME: "start the vCPUs",
    PhaseName.MANAGEMENT: "wait for the manager",
    PhaseName.UNATTRIBUTED: "not explained",
}
"""What happens in each phase, at most 22 columns."""
_TO_FILES = {PhaseName.MEMORY_SEND: "write the memory", PhaseName.STATE_SEND: "write VM state"}
"""The same, where a snapshot differs."""
_RARE = frozenset({PhaseName.EXEC, PhaseName.STARTUP, PhaseName.MANAGEMENT, PhaseName.UNATTRIBUTED})
"""Phases that most migrations do without; that they did not occur needs no mention."""
_LABEL = 21


class Row(NamedTuple):
    """A row of the report."""

    label: str
    text: str
    verbose: bool = False
    """It says nothing in nearly every run, or is a detail: only with `-v`, or folded in."""
    style: str = ""
    spare: int = 0
    """0: never left out. If the screen is too small, rows with the highest value are left out first."""


def figure(label: str, ns: int, text: str, style: str = "") -> Row:
    """A duration with details."""
    return Row(printable(label, _LABEL), f"{ms(ns)} ms, {text}", style=style)


def remark(label: str, text: str, style: str = "") -> Row:
    """A label and words."""
    return Row(printable(label, _LABEL), text, style=style)


class PhaseRow(NamedTuple):
    """A phase, or the part of it on one side of the downtime's ends."""

    phase: PhaseName | str
    words: str
    """What happens in it, or which part of the phase it is."""
    side: Side
    duration_ns: int
    took: str
    """Its duration in ms, or the limit that the clocks allow."""
    share: float | None
    """Its share of the downtime; None if it lies outside."""
    place: str
    """`before` or `after` the downtime; empty inside, or if there is no downtime."""
    spans: Sequence[Span]

    @property
    def where(self) -> str:
        """`75 %`, `before`, `after`, or a dash."""
        return self.place or ("-" if self.share is None else percent(self.share))


def words_for(phase: PhaseName, mode: Mode) -> str:
    """What happens in a phase of a migration of that mode."""
    return (_TO_FILES.get(phase) if mode == Mode.SNAPSHOT else None) or PHASE_WORDS.get(phase, "")


def percent(share: float) -> str:
    """A share of 1 as whole per cent; what is less than half of one is `<1 %`."""
    return "<1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def phase_rows(b: Breakdown, *, every: bool = False) -> Iterator[PhaseRow]:
    """The phases that were seen, in order, each split at the downtime's ends. `every`: also an empty `unattributed`."""
    for phase in b.phases:
        if phase.duration_ns is None or not (phase.duration_ns or phase.bound_ns):
            if every and phase.phase == PhaseName.UNATTRIBUTED and phase.duration_ns is not None:
                yield _row(phase, b, phase.spans, "", phase.bound_ns)
            continue
        if b.blackout is None or not b.blackout_ns:
            yield _row(phase, b, phase.spans, "", phase.bound_ns)
            continue
        begin, end = b.blackout
        parts = [("before", cut(phase.spans, (0, begin))), ("", cut(phase.spans, b.blackout))]
        parts.append(("after", cut(phase.spans, (end, max(end, b.window_ns or end)))))
        present = [(place, spans) for place, spans in parts if spans] or [("", [])]
        for at, (place, spans) in enumerate(present):
            row = _row(phase, b, spans, place, phase.bound_ns if at == len(present) - 1 else 0)
            yield row if not at else row._replace(words="its part " + (place or "in the downtime"))


def _row(phase: Phase, b: Breakdown, spans: Sequence[Span], place: str, bound: int | None) -> PhaseRow:
    took = sum(end - begin for begin, end in spans)
    share = took / b.blackout_ns if b.blackout_ns and not place else None
    words = words_for(phase.phase, b.migration.mode)
    limited = bounds.limited(took, bound, b.clock)
    return PhaseRow(phase.phase, words, phase.side, took, limited, share, place, spans)


def cut(spans: Sequence[Span], within: Span) -> list[Span]:
    """The parts of the spans inside another one."""
    parts = ((max(begin, within[0]), min(end, within[1])) for begin, end in spans)
    return [(begin, end) for begin, end in parts if begin < end]


def unmeasured(b: Breakdown) -> list[str]:
    """Phases that were not measured, because their side was not traced."""
    return [phase.phase for phase in b.phases if phase.duration_ns is None]


def unseen(b: Breakdown) -> list[str]:
    """Phases that were measured and did not occur."""
    return [p.phase for p in b.phases if p.duration_ns == 0 and not p.bound_ns and p.phase not in _RARE]
