# SPDX-License-Identifier: Apache-2.0
"""Why a thread that could run had no CPU, and how much CPU time a hypervisor below the host withheld.

In: a wait, and the readings of control groups and of /proc/stat around it. Out: a word for the reason.

A word is given only if the evidence excludes the others; see `why`. The readings are some ms before and after a wait,
so they show the reason of a wait only where they explain about all of it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import TypeVar

from ebpf_mig.analysis.process import Process
from ebpf_mig.breakdown import Side, Span, Stolen
from ebpf_mig.recording.events import OffCpu

PREEMPTED = "(preempted)"
"""Another thread got the CPU, and nothing below withheld it."""
QUEUED = "(waits for a CPU)"
"""The same after a sleep: the thread was woken, and another thread had the CPU that it got in the end."""
CPU_QUOTA = "(CPU quota)"
"""The CPU quota throttled the thread's control groups for about as long."""
STOLEN = "(CPU stolen)"
"""A hypervisor below the host withheld the CPU for about as long."""
RT_THROTTLED = "(real-time throttling)"
"""A real-time thread could run, and a thread that is none got its CPU."""
RUNNABLE = "(runnable, not running)"
"""The reason is not known."""
NO_CPU = frozenset({PREEMPTED, QUEUED, CPU_QUOTA, STOLEN, RT_THROTTLED, RUNNABLE})
"""The thread could run and did not, whatever the reason."""
SHARE = 0.9, 2.0
"""What was withheld is the reason of a wait if it is between these shares of the wait. A short wait next to a long
throttling can have another reason."""
SEVERAL_NS = 10_000_000
"""The kernel adds up the throttled time of all CPUs (`throttled_time`, `throttled_usec`). A wait of this length is
longer than what a throttled group has left for another CPU, twice sched_cfs_bandwidth_slice_us. If a throttling ended
about when it ended, which a reading soon after it shows, the sum may be that of several CPUs."""
T = TypeVar("T")
_IDLE = 0
"""The tid of the idle task of each CPU."""


def parts(process: Process, wait: OffCpu) -> list[tuple[int, int, tuple[str, ...]]]:
    """The sleep, and the time after it in which the thread could run: begin, end, and the stack or the reason."""
    begin, end = wait.begin_ns, wait.end_ns
    delay = process.run_delay.get((wait.tid, end), 0)
    woken = begin if wait.preempted else max(begin, end - delay)
    found = [] if wait.preempted or woken == begin < end else [(begin, woken, wait.stack)]
    return [*found, (woken, end, (why(process, wait, woken),))] if woken < end or wait.preempted else found


def why(process: Process, wait: OffCpu, since: int) -> str:
    """Why the thread had no CPU from `since` to the end of the wait, although it could run.

    A wait for which no reading of the quota exists has no known reason. Recordings of earlier versions have neither
    readings of stolen time nor the threads that got the CPU; there, only the quota is excluded.
    """
    span = since, wait.end_ns
    if wait.rt_throttled:
        return RT_THROTTLED
    quotas, steals = _around(process.held, span), _around(process.stolen, span)
    if quotas is None:
        return RUNNABLE
    if held := quotas[1][1] - quotas[0][1]:
        # The kernel counts a throttling when it ends. What had ended by a reading within the wait did not end it.
        last = quotas[1][1] - _last(process.held, span[1])
        took, soon = span[1] - span[0], quotas[1][0] - span[1]
        cpus = process.cpus if took >= SEVERAL_NS and soon <= took // 2 else 1
        return CPU_QUOTA if _explains(held, span, cpus) or _explains(last, span, cpus) else RUNNABLE
    if steals and (stolen := steals[1][1].get(wait.cpu, 0) - steals[0][1].get(wait.cpu, 0)):
        return STOLEN if wait.cpu >= 0 and _explains(stolen, span) else RUNNABLE
    other = wait.next_tid if wait.preempted else wait.previous_tid
    if other == _IDLE:
        return RUNNABLE
    return PREEMPTED if wait.preempted else QUEUED


def stolen(sides: Iterable[tuple[Side, Process | None]], window: Span) -> list[Stolen] | None:
    """The CPUs from which time was stolen around the window; None if that was not read around it.

    Both processes on one host see the same CPUs: each figure is given once.
    """
    rows: dict[tuple[int, int, int], Stolen] = {}
    known = False
    for side, process in sides:
        around = _around(process.stolen, window) if process else None
        if around is None:
            continue
        known = True
        (begin, before), (end, after) = around
        for cpu, total in after.items():
            if cpu >= 0 and (took := total - before.get(cpu, 0)) > 0:
                key = cpu, took, end - begin
                both = Side.BOTH if key in rows else side
                rows[key] = Stolen(side=both, cpu=cpu, stolen_ns=took, between_ns=end - begin)
    return sorted(rows.values(), key=lambda row: (-row.stolen_ns, row.cpu, row.side)) if known else None


def _explains(withheld_ns: int, span: Span, cpus: int = 1) -> bool:
    return SHARE[0] <= withheld_ns / max(1, span[1] - span[0]) <= SHARE[1] * cpus


def _around(readings: Sequence[tuple[int, T]], span: Span) -> tuple[tuple[int, T], tuple[int, T]] | None:
    """The last reading before the span and the first after it; None without one of them. `readings` are in order."""
    before, after = bisect_right(readings, span[0], key=_at), bisect_left(readings, span[1], key=_at)
    return (readings[before - 1], readings[after]) if before and after < len(readings) else None


def _last(readings: Sequence[tuple[int, int]], at: int) -> int:
    """The last reading before an instant; there is one."""
    return readings[bisect_left(readings, at, key=_at) - 1][1]


_at = itemgetter(0)
