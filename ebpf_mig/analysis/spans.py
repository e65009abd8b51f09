# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on spans and on sorted instants.

In: spans [begin, end) in ns, or sorted instants. Out: their length, their overlap, the gaps between them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

from ebpf_mig.breakdown import Span

FOREVER = 1 << 63
"""Later than any instant of the clock, which has 63 bits. It is the end of a span without an end."""


def total(spans: Iterable[Span]) -> int:
    """The sum of their lengths."""
    return sum(end - begin for begin, end in spans)


def common(one: Span, other: Span) -> int:
    """The length of their overlap; 0 if they do not overlap."""
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def covered(spans: Iterable[Span], within: Span) -> int:
    """How much of `within` the spans cover. They do not overlap each other."""
    return sum(common(span, within) for span in spans)


def overlap(spans: Sequence[Span], others: Iterable[Span]) -> int:
    """The overlap of two sets of spans. Spans of one set do not overlap each other."""
    return sum(covered(spans, other) for other in others)


def merged(spans: Iterable[Span]) -> list[Span]:
    """The spans in order, with overlapping and adjacent ones merged."""
    result: list[Span] = []
    for begin, end in sorted(spans):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def uncovered(spans: Iterable[Span], within: Span) -> list[Span]:
    """The parts of `within` that the spans do not cover. `spans` are in order of their begin."""
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
    """Finds in logarithmic time how much of a span a set of spans covers. The spans must not overlap each other."""

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
