# SPDX-License-Identifier: Apache-2.0
"""Assigns each instant of the window to a phase.

In: the switchover's instants, the source's work after the stop, the destination's loading. Out: the phases of
the breakdown, which partition the window to the nanosecond.

A `Partition` only moves a cursor forward. So spans cannot overlap, leave a hole or be negative, whatever the events
contain. The critical path decides between the sides: until the last byte that the destination needs has left the
source, time belongs to the source. After that it belongs to the destination.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ebpf_mig import breakdown
from ebpf_mig.analysis import source_work
from ebpf_mig.analysis.loading import SHORT_NS, Loading
from ebpf_mig.analysis.source_work import CLEAR, FETCH, MEMORY, REPLY, SAVE, STATE, Work
from ebpf_mig.analysis.spans import covered, total
from ebpf_mig.breakdown import PhaseName


@dataclass
class Partition:
    """Spans of one phase each, without holes, from `begin` on."""

    begin: int
    end: int
    cursor: int = field(init=False)
    spans: list[tuple[int, int, PhaseName]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cursor = self.begin

    def until(self, at: int, phase: PhaseName) -> None:
        """Assigns the time from the cursor to `at` to `phase`; it stops at the window's end."""
        at = min(at, self.end)
        if at <= self.cursor:
            return
        if self.spans and self.spans[-1][2] == phase:
            self.spans[-1] = (self.spans[-1][0], at, phase)
        else:
            self.spans.append((self.cursor, at, phase))
        self.cursor = at

    def give(self, spans: Iterable[tuple[int, int]], phase: PhaseName) -> None:
        """Assigns these spans to `phase` instead of their phase so far. Time that has no phase yet is unchanged."""
        for begin, end in spans:
            rest: list[tuple[int, int, PhaseName]] = []
            for since, until, owner in self.spans:
                cut = max(since, begin), min(until, end)
                if cut[0] >= cut[1]:
                    rest.append((since, until, owner))
                    continue
                parts = [(since, cut[0], owner), (*cut, phase), (cut[1], until, owner)]
                rest += [part for part in parts if part[0] < part[1]]
            self.spans = rest

    def phases(self, unmeasured: Collection[PhaseName] = (), *, aborted: bool = False) -> list[breakdown.Phase]:
        """Every phase, with instants relative to `begin`. `aborted`: the source resumed.

        A phase without spans has the duration 0, or None if it is one of the `unmeasured`.
        """
        self.until(self.end, PhaseName.UNATTRIBUTED)
        result = []
        for name, side in breakdown.sides_of(aborted, {phase for _, _, phase in self.spans}):
            spans = [(b - self.begin, e - self.begin) for b, e, phase in self.spans if phase == name]
            took = total(spans) if spans or name not in unmeasured else None
            result.append(breakdown.Phase(phase=name, side=side, duration_ns=took, spans=spans))
        assert sum(phase.duration_ns or 0 for phase in result) == self.end - self.begin  # noqa: S101
        return result


def unseen() -> list[breakdown.Phase]:
    """Every phase with the duration None, for a migration without a window."""
    return [
        breakdown.Phase(phase=name, side=side, duration_ns=None, spans=[]) for name, side in breakdown.sides_of(False)
    ]


_INSIDE = {
    FETCH: PhaseName.FETCH_KERNEL,
    CLEAR: PhaseName.FETCH_KERNEL,
    MEMORY: PhaseName.MEMORY_SEND,
    STATE: PhaseName.STATE_SEND,
    SAVE: PhaseName.STATE_SAVE,
}
_BETWEEN = {
    (FETCH, FETCH): PhaseName.FETCH_USER,
    (FETCH, CLEAR): PhaseName.FETCH_USER,
    (FETCH, MEMORY): PhaseName.FETCH_USER,
    # The fetch found no dirty page; the state is being saved.
    (FETCH, STATE): PhaseName.STATE_SAVE,
    (MEMORY, MEMORY): PhaseName.MEMORY_SEND,
    (MEMORY, CLEAR): PhaseName.MEMORY_SEND,
    (MEMORY, FETCH): PhaseName.MEMORY_SEND,
    (MEMORY, REPLY): PhaseName.MEMORY_SEND,
    (MEMORY, STATE): PhaseName.STATE_SAVE,
    (SAVE, SAVE): PhaseName.STATE_SAVE,
    (SAVE, FETCH): PhaseName.STATE_SAVE,
    (SAVE, STATE): PhaseName.STATE_SAVE,
    (STATE, STATE): PhaseName.STATE_SEND,
    (STATE, SAVE): PhaseName.STATE_SAVE,
    (STATE, REPLY): PhaseName.HANDOVER,
    (REPLY, STATE): PhaseName.HANDOVER,
    (REPLY, REPLY): PhaseName.HANDOVER,
}
"""The phase of the time between two kinds of work. The time between any other pair is unattributed."""
_BETWEEN_SHORT = {
    (FETCH, SAVE): PhaseName.FETCH_USER,
    (MEMORY, SAVE): PhaseName.MEMORY_SEND,
    (SAVE, MEMORY): PhaseName.STATE_SAVE,
}
"""The same, but only up to SHORT_NS."""


def source(partition: Partition, stop: int, until: int, work: Work, managed: Sequence[tuple[int, int]] = ()) -> None:
    """Assigns [stop, until) to the source's phases. `managed`: when it waited for its manager."""
    idle = [*work.preempted, *managed]
    previous: int | None = None
    for begin, end, label in flatten(stop, min(until, partition.end), work.intervals):
        if label == REPLY and previous not in (MEMORY, STATE, REPLY):
            continue
        waited = begin - partition.cursor - covered(idle, (partition.cursor, begin))
        partition.until(begin, _between(previous, label, waited, work.fetched is not None))
        if label == REPLY:
            # Waiting for a reply to pages is part of sending them. A reply to state means that the destination works.
            partition.until(end, PhaseName.MEMORY_SEND if previous == MEMORY else PhaseName.HANDOVER)
        else:
            partition.until(end, _INSIDE[label])
        if label == MEMORY and previous is None and work.fetched is not None and end <= work.fetched:
            # The tail of the last pass. The VM's devices are still being stopped.
            continue
        previous = _after(previous, label)
    if previous is None:
        # What a manager had to allow came after the quiescing.
        quiet = max([work.quiet_until, *(begin for begin, _ in managed)])
        partition.until(min(quiet, until), PhaseName.QUIESCE)
    elif previous in (STATE, REPLY):
        partition.until(until, PhaseName.HANDOVER)
    partition.until(until, PhaseName.UNATTRIBUTED)


def _after(previous: int | None, label: int) -> int:
    """The kind of work that goes on after `label`. A CLEAR or a reply while pages are sent does not end the sending."""
    if label == CLEAR:
        return MEMORY if previous == MEMORY else FETCH
    return MEMORY if label == REPLY and previous == MEMORY else label


def _between(previous: int | None, following: int, gap: int, fetched: bool) -> PhaseName:
    """The phase of the `gap` between two kinds of work. `fetched`: there was a fetch after the stop."""
    if previous is None:
        return PhaseName.QUIESCE
    pair = previous, following
    if pair == (SAVE, MEMORY) and not fetched:
        # Dirty rings are read without an ioctl.
        return PhaseName.FETCH_USER
    if pair in _BETWEEN:
        return _BETWEEN[pair]
    return _BETWEEN_SHORT.get(pair, PhaseName.UNATTRIBUTED) if gap <= SHORT_NS else PhaseName.UNATTRIBUTED


def flatten(begin: int, end: int, intervals: Sequence[source_work.Interval]) -> list[source_work.Interval]:
    """The intervals cut to [begin, end) and made disjoint. Where they overlap, the lowest label wins."""
    changes: list[tuple[int, int, int]] = []
    for opened, closed, label in intervals:
        first, last = max(opened, begin), min(closed, end)
        if first < last:
            changes += [(first, 1, label), (last, -1, label)]
    changes.sort()
    active = [0] * 6
    result: list[source_work.Interval] = []
    since, current = begin, None
    for at, step, label in changes:
        active[label] += step
        top = next((index for index, count in enumerate(active) if count), None)
        if top != current:
            if current is not None and since < at:
                if result and result[-1][1] == since and result[-1][2] == current:
                    result[-1] = (result[-1][0], at, current)
                else:
                    result.append((since, at, current))
            since, current = at, top
    return result


def destination(
    partition: Partition,
    handed: int,
    load: Loading | None,
    received: int | None,
    start: int,
    waits: Sequence[tuple[int, int]] = (),
) -> None:
    """Assigns the time from `handed` on to the destination's phases.

    `waits` are the stretches of the loading in which it waited for bytes on the wire. They belong to the handover.
    """
    if load is None:
        partition.until(max(handed, received or handed), PhaseName.HANDOVER)
        partition.until(start, PhaseName.UNATTRIBUTED)
    else:
        partition.until(max(handed, load.begin), PhaseName.HANDOVER)
        for begin, end in waits:
            partition.until(min(begin, load.end), PhaseName.STATE_LOAD)
            partition.until(min(end, load.end), PhaseName.HANDOVER)
        partition.until(load.end, PhaseName.STATE_LOAD)
        partition.until(start, PhaseName.RESUME)
    partition.until(partition.end, PhaseName.RESUME)
