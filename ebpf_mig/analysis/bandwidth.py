# SPDX-License-Identifier: Apache-2.0
"""How long the link between the hosts limited the blackout, and how much the link carried in that time.

In: a `TracedMigration`. Out: a `LinkUse`, or the reason why there is none. It comes from two curves of the migration's
bytes: sent by the source, and arrived at the destination (TCP segments). The link is the limit while many sent bytes
have not arrived, the reader's window is open, and segments keep coming. Its rate is the bytes that arrive in that time.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.spans import covered, merged, total
from ebpf_mig.breakdown import Span, SwitchoverKind, Transport
from ebpf_mig.recording.events import Segment, Transfer, ahead

QUEUED_BYTES = 64 << 10
"""A queue that never reaches this is only single sends in transit. The link keeps up."""
HELD_NS = 20_000_000
HELD_BYTES = 128 << 10
"""If nothing arrives for HELD_NS and less than this is waiting, TCP holds it back (Nagle, a delayed ACK)."""
_SLICES = 8
_FULL = 0.9
"""If this share of the receive window is in flight, the reader is the limit."""


@dataclass(frozen=True, slots=True)
class LinkUse:
    """The link's use in the blackout; ns and bytes."""

    limited: tuple[tuple[int, int], ...]
    """Stretches in which the link was the limit; absolute, in order, disjoint."""
    limited_bytes: int
    """Bytes that arrived in these stretches."""
    span_ns: int
    """From the stop to the last arrival before the start."""
    span_bytes: int
    """Bytes that arrived in that span."""
    source_ns: int
    """The part of the limited time in which the source was not blocked in sends."""
    reader_ns: int
    """Time on the CPU in the destination's receive calls, within the limited time."""
    queued_bytes: int = 0
    """The largest queue in the limited time."""
    steadiness: float = 0.0
    """The least that arrived in an eighth of the limited time, as a share of the mean: 1 is an even stream. A link
    carries evenly; CPUs that forward or process the stream do not."""
    unread: tuple[Span, ...] = ()
    """Stretches in which QUEUED_BYTES or more had arrived and were not read. Absolute, in order, disjoint."""

    @property
    def limited_ns(self) -> int:
        return total(self.limited)

    @property
    def rate(self) -> float | None:
        """Payload, bytes/s; None if the link was never the limit."""
        return self.limited_bytes * 1e9 / self.limited_ns if self.limited_ns else None


def observe(traced: TracedMigration) -> LinkUse | str:
    """The link's use in the blackout, or the reason why it is unknown."""
    source, destination, switch = traced.source, traced.destination, traced.switchover
    if source is None or destination is None:
        return "only one side was traced"
    if switch is None or switch.first_start is None or switch.kind != SwitchoverKind.COMPLETED:
        return "the migration did not complete"
    if traced.channels.transport != Transport.TCP:
        return f"the transport is {traced.channels.transport}, not TCP"
    if traced.postcopy:
        return "in postcopy the memory follows after the start"
    segments = [s for s in destination.segments if s.socket in traced.channels.destination and s.payload]
    if not any(switch.stop <= s.at_ns < switch.first_start for s in segments):
        return "no TCP segments were traced"
    return _observe(traced, source, destination, segments, switch.stop, switch.first_start)


def _observe(
    traced: TracedMigration,
    source: Process,
    destination: Process,
    segments: Sequence[Segment],
    stop: int,
    start: int,
) -> LinkUse:
    last = segments[bisect_left(segments, start, key=_at_ns) - 1].at_ns
    sends = traced.sends[: bisect_right(traced.sends, last, key=_begin)]
    sent = _curve(sends, _begin, _bytes, stop)  # a call that blocks has offered all its bytes
    # By the last arrival, all bytes have arrived. With sequence numbers, only bytes before the first segment of each
    # socket are missing. Without them, those read before segments were traced had arrived by then; the kernel reports
    # most of the other arrivals, but not all: the missing bytes are spread evenly over them.
    arrivals = _curve(_arrivals(segments), _at_ns, _payload, stop)
    seen, offered = _at(arrivals, last), sent[1][-1] if sends else 0
    if all(segment.is_numbered for segment in segments):
        arrived = _scaled(arrivals, Fraction(1), max(0, offered - seen))
    else:
        first = segments[0].at_ns
        early = traced.receives[: bisect_left(traced.receives, first, key=_begin)]
        before = sum(t.bytes for t in early if t.end_ns < first)
        arrived = _scaled(arrivals, Fraction(max(0, offered - before), seen), before)
    acks = [s for s in source.segments if s.socket in traced.channels.source]
    limited, queued = _limited(sent, arrived, acks, stop, last)
    late = source.ended(sends, stop)  # nothing was limited before
    receives = destination.ended(traced.receives, stop)
    blocked = sum(
        max(0, t.off_cpu_ns) * covered(limited, (t.begin_ns, t.end_ns)) // max(1, t.end_ns - t.begin_ns) for t in late
    )
    done = max((t.end_ns for t in late), default=stop)
    reading = sum(
        max(0, t.in_call_ns - max(0, t.off_cpu_ns)) for t in receives if covered(limited, (t.begin_ns, t.end_ns + 1))
    )
    return LinkUse(
        limited=limited,
        limited_bytes=sum(_at(arrived, end) - _at(arrived, begin) for begin, end in limited),
        span_ns=last - stop,
        span_bytes=_at(arrived, last) - _at(arrived, stop),
        source_ns=max(0, covered(limited, (stop, done)) - blocked),
        reader_ns=reading,
        queued_bytes=queued,
        steadiness=_steadiness(arrived, limited),
        unread=_unread(_at_least(arrivals, segments, traced.receives, arrived), traced.receives, stop, last),
    )


def _at_least(arrivals: Curve, segments: Sequence[Segment], receives: Sequence[Transfer], arrived: Curve) -> Curve:
    """What had surely arrived: what was read before the first segment of its socket, and what the segments show.

    `arrived` may be ahead of the truth, by what was not reported at the end.
    """
    first: dict[int, int] = {}
    for one in segments:
        first.setdefault(one.socket, one.at_ns)
    before = sum(t.bytes for t in receives if t.end_ns < first.get(t.socket, 0))
    return _scaled(arrivals, Fraction(1), min(before, arrived[1][0]))


def _unread(arrived: Curve, receives: Sequence[Transfer], stop: int, last: int) -> tuple[Span, ...]:
    read = _curve(sorted(receives, key=_end), _end, _bytes, stop)
    marks = sorted({stop, last, *_inside(arrived[0], stop, last), *_inside(read[0], stop, last)})
    pairs = itertools.pairwise(marks)
    return tuple(merged(span for span in pairs if _at(arrived, span[0]) - _at(read, span[0]) >= QUEUED_BYTES))


def _steadiness(arrived: Curve, limited: Sequence[Span]) -> float:
    whole = total(limited)
    slices: list[int] = []
    for part in range(_SLICES):
        low, high = whole * part // _SLICES, whole * (part + 1) // _SLICES
        count, at = 0, 0
        for begin, end in limited:
            first, last = max(begin, begin + low - at), min(end, begin + high - at)
            if first < last:
                count += _at(arrived, last) - _at(arrived, first)
            at += end - begin
        slices.append(count)
    return _SLICES * min(slices) / (sum(slices) or 1)


Curve = tuple[list[int], list[int]]
"""Instants in order, and the sum up to and including each."""
_begin, _end, _bytes, _at_ns, _payload = map(attrgetter, ("begin_ns", "end_ns", "bytes", "at_ns", "payload"))
_T = TypeVar("_T")


class _Arrival(NamedTuple):
    """Bytes that are known to have arrived at an instant, and were not known before."""

    at_ns: int
    payload: int


def _arrivals(segments: Sequence[Segment]) -> list[_Arrival]:
    """The arrivals by the sequence numbers, so that a segment that was not reported is not missing for long.

    Recordings of earlier versions have no sequence numbers; there, each segment counts for its payload.
    """
    ends: dict[int, int] = {}
    found = []
    for one in segments:
        size = one.payload
        if one.is_numbered:
            reached = one.reached
            last = ends.get(one.socket)
            size = size if last is None else max(0, ahead(reached, last))
            ends[one.socket] = reached if last is None else last + size
        found.append(_Arrival(one.at_ns, size))
    return found


def _curve(events: Sequence[_T], at: Callable[[Any], int], size: Callable[[Any], int], since: int) -> Curve:
    """The curve of events in order, from `since` on: all up to then are one step, at the last of them."""
    until = bisect_right(events, since, key=at)
    early, late = events[:until], events[until:]
    steps = itertools.accumulate(map(size, late), initial=sum(map(size, early)))
    return [*map(at, early[-1:]), *map(at, late)], list(itertools.islice(steps, 0 if early else 1, None))


def _scaled(curve: Curve, share: Fraction, before: int) -> Curve:
    """The curve with each sum times `share`, rounded down, and with `before` added from its beginning on."""
    times, sums = curve
    numerator, denominator = share.as_integer_ratio()
    return [times[0] - 1, *times], [before, *(before + count * numerator // denominator for count in sums)]


def _at(curve: Curve, at: int) -> int:
    index = bisect_right(curve[0], at)
    return curve[1][index - 1] if index else 0


def _inside(instants: Sequence[int], begin: int, end: int) -> Sequence[int]:
    """The instants after `begin` and before `end`."""
    return instants[bisect_right(instants, begin) : bisect_left(instants, end)]


def _limited(
    sent: Curve, arrived: Curve, acks: Sequence[Segment], stop: int, last: int
) -> tuple[tuple[Span, ...], int]:
    """Stretches of [stop, last] in which a large queue drained as fast as the link could, and the largest queue."""
    marks = sorted({stop, last, *_inside(sent[0], stop, last), *_inside(arrived[0], stop, last)})
    ack_times = [a.at_ns for a in acks]
    found: list[tuple[int, int]] = []
    busy: list[tuple[int, int]] = []
    most = largest = 0
    arrivals = arrived[0]
    for begin, end in itertools.pairwise(marks):
        queue = _at(sent, begin) - _at(arrived, begin)
        if queue <= 0:
            found += busy if most >= QUEUED_BYTES else []
            busy, most = [], 0
            continue
        most = max(most, queue)
        largest = max(largest, queue)
        index = bisect_right(arrivals, begin)
        silence = (arrivals[index] if index < len(arrivals) else last) - (arrivals[index - 1] if index else begin)
        held = silence >= HELD_NS and queue < HELD_BYTES
        ack = acks[bisect_right(ack_times, begin) - 1] if ack_times and ack_times[0] <= begin else None
        full = ack is not None and ack.window > 0 and ack.in_flight >= _FULL * ack.window
        if not held and not full:
            busy.append((begin, end))
    found += busy if most >= QUEUED_BYTES else []
    return tuple(merged(found)), largest
