# SPDX-License-Identifier: Apache-2.0
"""On the CPU or off it, between a thread's system calls.

In: a process's ioctls and sends with the thread's running total of time off the CPU. Out: the part of given spans that
its threads were off the CPU.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

from ebpf_mig.breakdown import Span
from ebpf_mig.processes import Process

Gap = tuple[int, int, int]
"""From the return of one call to the next: begin, end, and time off the CPU between them."""


def gaps(process: Process, tids: Collection[int]) -> list[Gap]:
    """The stretches after the KVM ioctls of these threads, in order; none where the total was not recorded."""
    found: list[Gap] = []
    for tid in sorted(tids):
        calls = [
            (i.begin_ns, i.end_ns, i.off_total_ns - max(0, i.off_cpu_ns) if i.off_total_ns >= 0 else -1, i.off_total_ns)
            for i in process.ioctls
            if i.tid == tid
        ]
        calls += [(t.begin_ns, t.end_ns, t.off_before_ns, -1) for t in process.transfers if t.tid == tid]
        calls.sort()
        for (_, end, _, left), (begin, _, entered, _) in pairwise(calls):
            if left >= 0 and entered >= left and begin >= end:
                found.append((end, begin, min(entered - left, begin - end)))
    return sorted(found)


def off_cpu(spans: Iterable[Span], known: Sequence[Gap], slack_ns: int = 20_000) -> int | None:
    """Time off the CPU in the spans; None if a span is not covered by known gaps but for `slack_ns`.

    Gaps of one thread do not overlap; of two fetching threads' gaps all that touch a span count.
    """
    total = 0
    for begin, end in spans:
        covered = 0
        at = max(0, bisect_left(known, (begin, 0, 0)) - 1)
        for left, right, off in known[at:]:
            if left >= end:
                break
            inside = min(right, end) - max(left, begin)
            if inside > 0:
                covered += inside
                total += min(off, inside)
        if covered + slack_ns < end - begin:
            return None
    return total
