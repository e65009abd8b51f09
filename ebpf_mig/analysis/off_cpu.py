# SPDX-License-Identifier: Apache-2.0
"""On the CPU or off it, between a thread's system calls.

In: a process's ioctls and sends, which carry the thread's running total of time off the CPU. Out: the part of given
spans that its threads were off the CPU.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable

from ebpf_mig.analysis.process import Process
from ebpf_mig.breakdown import Span

SLACK_NS = 20_000
"""How far a span's end may be from the begin or return of a call, where the total is known."""


class OffCpu:
    """The totals of some threads, at the instants at which they are known."""

    def __init__(self, process: Process, tids: Collection[int]) -> None:
        points: dict[int, list[tuple[int, int]]] = {tid: [] for tid in sorted(tids)}
        for i in process.ioctls:
            if i.tid in points and i.off_total_ns >= 0:
                points[i.tid] += [(i.begin_ns, i.off_total_ns - max(0, i.off_cpu_ns)), (i.end_ns, i.off_total_ns)]
        for t in process.transfers:
            if t.tid in points and t.off_before_ns >= 0:
                points[t.tid].append((t.begin_ns, t.off_before_ns))
        self._points = [sorted(known) for known in points.values() if known]

    def within(self, spans: Iterable[Span]) -> int | None:
        """Time off the CPU in the spans; None if a span does not lie between two calls of one of the threads."""
        total = 0
        for begin, end in spans:
            found = next((off for known in self._points if (off := _between(known, begin, end)) is not None), None)
            if found is None:
                return None
            total += found
        return total


def _between(known: list[tuple[int, int]], begin: int, end: int) -> int | None:
    left, right = _nearest(known, begin), _nearest(known, end)
    if left is None or right is None or right < left:
        return None
    return min(right - left, end - begin)


def _nearest(known: list[tuple[int, int]], at: int) -> int | None:
    """The total at the known instant next to `at`, None if that is too far away."""
    index = bisect_left(known, (at, -1))
    near = min(known[max(0, index - 1) : index + 1], key=lambda point: abs(point[0] - at))
    return near[1] if abs(near[0] - at) <= SLACK_NS else None
