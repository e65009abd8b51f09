# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of spans and of instants in order.

In: spans [begin, end) in ns, or sorted instants. Out: their length, their overlap, the gaps between them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

from ebpf_mig.breakdown import Span

FOREVER = 1 << 63
"""An instant after all others: the end of a span without an end. The clock's instants have 63 bits."""


def total(spans: Iterable[Span]) -> int:
    """How long they last together."""
    return sum(end - begin for begin, end in spans)


def common(one: Span, other: Span) -> int:
    """How long both last at the same time; 0 if they are apart."""
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def covered(spans: Iterable[Span], within: Span) -> int:
    """How much of `within` the spans cover. They do not overlap each other."""
    return sum(common(span, within) for span in spans)


def overlap(spans: Sequence[Span], others: Iterable[Span]) -> int:
    """The overlap of two sets of spans. Spans of one set do not overlap each other."""
    return sum(covered(spans, other) for other in others)


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time in as few spans as possible, in order."""
    result: list[Span] = []
    for begin, end in sorted(spans):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def uncovered(spans: Iterable[Span], within: Span) -> list[Span]:
    """What the spans, in order of their begin, leave of `within`."""
    left: list[Span] = []
    reached, until = within
    for begin, end in spans:
        if reached < min(begin, until):
            left.append((reached, min(begin, until)))
        reached = max(reached, end)
    if reached < until:
        left.append((reached, until))
    return left


def any_in(instants: Sequence[int], begin: int, end: int | None) -> bool:
    """Whether one of the sorted instants is in [begin, end). `end` None: no end."""
    at = bisect_left(instants, begin)
    return at < len(instants) and (end is None or instants[at] < end)


class Cover:
    """How much of a span a set of spans covers, in logarithmic time. They do not overlap each other."""

    def __init__(self, spans: Iterable[Span]) -> None:
        ordered = sorted(spans)
        self._begins = [begin for begin, _ in ordered]
        self._lengths = [end - begin for begin, end in ordered]
        self._before = [0, *accumulate(self._lengths)]

    def within(self, begin: int, end: int) -> int:
        """The covered part of [begin, end)."""
        return self._until(end) - self._until(begin)

    def _until(self, at: int) -> int:
        index = bisect_right(self._begins, at) - 1
        if index < 0:
            return 0
        return self._before[index] + min(at - self._begins[index], self._lengths[index])
