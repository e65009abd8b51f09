# SPDX-License-Identifier: Apache-2.0
"""What the rules of the diagnosis are applied to.

In: a breakdown, all waits and long calls near the window, the link's use. Out: `Facts`, with all instants in ns from
the window's begin, as in the breakdown.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter

from ebpf_mig.analysis.bandwidth import LinkUse
from ebpf_mig.analysis.diagnosis.frames import meaningful
from ebpf_mig.analysis.long_calls import LongCall
from ebpf_mig.analysis.lost_cpu import NO_CPU
from ebpf_mig.analysis.spans import merged, uncovered
from ebpf_mig.analysis.waits import Sleep
from ebpf_mig.breakdown import Breakdown, PairedBy, PhaseName, Side, Span, Wire

_begin = itemgetter(0)
SENDER = (PhaseName.MEMORY_SEND,)
"""The phases of a thread that only sends: it delays the migration only while the driving thread waits for it."""
_WIRE_DOUBT = 4
"""A stretch in flight counts if its clock bound is less than this fraction of it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Time that a rule explains."""

    spans: Sequence[Span]
    side: Side
    evidence: Sequence[str] = ()
    what: str = ""
    """Replaces the rule's words."""
    sleep: Sleep | None = None
    """The wait that it is made from; what is left of it becomes evidence."""


@dataclass(frozen=True)
class Facts:
    """One migration with a blackout."""

    breakdown: Breakdown
    blackout: Span
    sleeps: Sequence[Sleep] | None
    """None: time off the CPU was not traced."""
    link: LinkUse | None
    """None: not known."""
    calls: Sequence[LongCall] = ()
    _known: dict[tuple[str, ...], list[Span]] = field(default_factory=dict)
    """Spans by the phases that were asked for."""

    def phase(self, *names: str) -> list[Span]:
        """The spans of some phases, in order."""
        if names not in self._known:
            self._known[names] = sorted(
                span for p in self.breakdown.phases if str(p.phase) in names for span in p.spans
            )
        return self._known[names]

    def own(self, test: Callable[[Sleep], bool], *names: PhaseName) -> Iterator[Claim]:
        """Waits that delay the migration and pass the test, with the part in their phases, or in those named."""
        for sleep in self.sleeps or ():
            wanted = [name for name in sleep.phases if not names or name in names]
            if wanted and test(sleep) and not (sleep.side == Side.DESTINATION and self.breakdown.came_back):
                spans = cut(self.phase(*wanted), sleep)
                if sleep.phases == SENDER:
                    spans = shared(spans, self.sending)
                if spans:
                    yield Claim(spans, sleep.side, sleep=sleep)

    @cached_property
    def sending(self) -> list[Span]:
        """Time in which the thread that drives the source waits for another thread, so that its senders matter."""
        drivers = [
            s for s in self.sleeps or () if PhaseName.QUIESCE in s.phases and "futex_wait" in meaningful(s.stack)
        ]
        return merged((s.begin, s.end) for s in drivers)

    def lost_cpu(self, side: Side) -> list[Span]:
        """When a thread that drives this side could run and had no CPU, in any phase."""
        return merged(
            (s.begin, s.end)
            for s in self.sleeps or ()
            if s.side == side
            and s.phases
            and not s.vcpu
            and s.phases != SENDER
            and s.stack[:1]
            and s.stack[0] in NO_CPU
        )

    @property
    def direct(self) -> bool:
        """The two VMMs are the ends of one connection: nothing that forwards it can be slow, and no wire is hidden."""
        migration = self.breakdown.migration
        paired = migration.pairing is None or migration.pairing.by == PairedBy.CONNECTION
        return paired and not migration.through and None not in (migration.source, migration.destination)

    @property
    def wires(self) -> list[Wire]:
        """Stretches in flight that are longer than the doubt of the clocks."""
        rows = self.breakdown.wire or []
        return [w for w in rows if w.bound_ns is not None and w.bound_ns * _WIRE_DOUBT <= w.in_flight_ns]


def gather(
    breakdown: Breakdown,
    sleeps: Sequence[Sleep] | None,
    calls: Sequence[LongCall],
    link: LinkUse | str,
    origin: int,
) -> Facts | None:
    """The facts; None without a blackout. `origin` is the breakdown's instant 0 on the clock of the waits."""
    if breakdown.blackout is None or not breakdown.blackout_ns:
        return None
    near = None
    if sleeps is not None:
        # Of two that overlap, the first explains the time. So the order of the recording's events must not matter.
        ordered = sorted(sleeps, key=lambda s: (s.side != Side.SOURCE, s.begin, s.end, s.thread, s.stack, s.phases))
        near = [replace(s, begin=s.begin - origin, end=s.end - origin) for s in ordered]
    use = None
    if not isinstance(link, str) and breakdown.clock.bound_ns is not None:
        limited, unread = ([(begin - origin, end - origin) for begin, end in s] for s in (link.limited, link.unread))
        use = replace(link, limited=tuple(limited), unread=tuple(unread))
    moved = [replace(call, begin=call.begin - origin, end=call.end - origin) for call in calls]
    return Facts(breakdown, breakdown.blackout, near, use, moved)


def cut(spans: Sequence[Span], within: Sleep | LongCall | Span) -> list[Span]:
    """The parts of the spans inside another one. The spans are in order and do not overlap."""
    low, high = within if isinstance(within, tuple) else (within.begin, within.end)
    first = max(0, bisect_right(spans, low, key=_begin) - 1)
    near = itertools.takewhile(lambda span: span[0] < high, itertools.islice(spans, first, None))
    return [(max(begin, low), min(end, high)) for begin, end in near if max(begin, low) < min(end, high)]


def shared(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """The parts that lie in both sets, merged."""
    ordered = merged(others)
    return merged(part for span in merged(spans) for part in cut(ordered, span))


def without(spans: Iterable[Span], taken: Iterable[Span]) -> list[Span]:
    """The parts of the first set outside the second, merged."""
    holes = merged(taken)
    return [part for span in merged(spans) for part in uncovered(cut(holes, span), span)]
