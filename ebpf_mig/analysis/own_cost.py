# SPDX-License-Identifier: Apache-2.0
"""What our BPF programs took in the window: bounds, an estimate, and the estimate's part in each phase.

In: the readings of our own cost, the events around the window, the window, its phases. Out: an `OwnCost`.

The kernel gives a sum over all CPUs, which user space reads every 2 to 100 ms, and later if it has many events to read.
So the bounds that the readings give can be far apart. Between two readings the cost is shared out: runs for processes
that are not traced are even in time, the others follow the calls in the events. A test leaves out readings of the
recordings in tests/data: what the estimate is wrong by is a tenth of the cost, in sum.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

from ebpf_mig.analysis.material import Material
from ebpf_mig.analysis.process import Process, begun
from ebpf_mig.breakdown import Phase, Span, TracingCost

IDLE_RUN_NS = 55
"""One run of a program for a process that is not traced: 52 to 60 ns, measured on Linux 6.18 where nothing else ran."""
AROUND_NS = 1000
"""The programs run before the begin and after the end that they record: some 0.8 us a call (docs/overhead.md)."""
USUAL_CPUS = 2
"""An old recording does not say how many CPUs there were. In a short phase, no more than two threads make calls."""
RUNS_A_CALL = 2
"""A traced call runs a program at its entry and one at its return."""


class OwnCost(NamedTuple):
    """Run time of our programs in the window, ns, over all threads of the hosts. None: not measured."""

    least: int | None = None
    most: int | None = None
    """By the readings, and never more than all CPUs had in the window."""
    estimate: int | None = None
    phases: dict[str, int] | None = None
    """The estimate by phase."""


def of(tracing: TracingCost) -> OwnCost:
    """The same from the sums that the programs themselves recorded, which need no readings around the window."""
    about, doubt = tracing.programs_ns, tracing.doubt_ns
    phases = {name: cost.programs_ns for name, cost in tracing.phases.items()}
    return OwnCost(max(0, about - doubt), about + doubt, about, phases)


class _Reading(NamedTuple):
    at: int
    run_ns: int
    runs: int


def observe(material: Material, window: Span | None, phases: Sequence[Phase]) -> OwnCost:
    """The cost in the window that `phases` partition."""
    if window is None or not material.costs:
        return OwnCost()
    remote = material.header.remote
    sides = [_readings(material, of) for of in ((False, True) if remote is not None else (False,))]
    bounds = [_between(side, window) for side in sides if side]
    least = sum(at_least for at_least, _ in bounds)
    known = [at_most for _, at_most in bounds if at_most is not None]
    if len(known) < len(sides):
        return OwnCost(least)
    cpus = _cpus(material)
    taken = {
        phase.phase.value: [(window[0] + begin, window[0] + end) for begin, end in phase.spans] for phase in phases
    }
    found = dict.fromkeys(taken, 0.0)
    for side, of in zip(sides, (False, True), strict=False):
        for name, ns in _shares(side, _of_host(material, of), window, taken).items():
            found[name] += ns
    by_phase = {name: _limited(int(ns), taken[name], cpus or USUAL_CPUS) for name, ns in found.items()}
    most = max(least, _limited(sum(known), [window], cpus))
    return OwnCost(least, most, min(max(least, sum(by_phase.values())), most), by_phase)


def _cpus(material: Material) -> int | None:
    """The number of CPUs of all hosts; None if the recording does not say."""
    header = material.header
    counts = [header.cpus, *([header.remote.cpus] if header.remote is not None else [])]
    return sum(counts) if all(counts) else None


def _limited(ns: int, spans: Sequence[Span], cpus: int | None) -> int:
    """`ns`, at most the CPU time that existed in the spans."""
    return ns if cpus is None else min(ns, cpus * sum(end - begin for begin, end in spans))


def _readings(material: Material, remote: bool) -> list[_Reading]:
    """One kernel's readings in order of time, with the begin (nothing had run) and the end of tracing; maybe none."""
    found = [_Reading(cost.at_ns, cost.run_ns, cost.runs) for cost in material.costs if cost.remote is remote]
    if material.header.remote is None:
        ending = material.ending
        if ending and ending.observer_ns:
            sums = sum(ending.observer_ns.values()), sum(ending.observer_runs.values())
            found.append(_Reading(ending.at_ns, *sums))
        return sorted([_Reading(material.header.begin_ns, 0, 0), *found])
    return sorted([_Reading(min(material.header.begin_ns, found[0].at), 0, 0), *found]) if found else []


def _between(readings: Sequence[_Reading], window: Span) -> tuple[int, int | None]:
    """Run time in the window according to one kernel's readings, in ns: (at least, at most)."""
    before = [reading.run_ns for reading in readings if reading.at <= window[0]]
    after = [reading.run_ns for reading in readings if reading.at >= window[1]]
    within = [reading.run_ns for reading in readings if window[0] <= reading.at <= window[1]]
    least = max(within) - min(within) if within else 0
    return least, max(least, min(after) - max(before)) if before and after else None


def _of_host(material: Material, remote: bool) -> list[Process]:
    """The traced processes of one host."""
    far = material.header.remote
    return [p for p in material.processes.values() if (far is not None and p.pid == far.pid) is remote]


def _shares(
    readings: Sequence[_Reading], processes: Sequence[Process], window: Span, taken: dict[str, list[Span]]
) -> dict[str, float]:
    """ns by phase: what ran between each two readings, shared out by calls and by time."""
    first = max(0, bisect_right(readings, window[0], key=lambda r: r.at) - 1)
    last = bisect_left(readings, window[1], key=lambda r: r.at) + 1
    around = readings[first:last]
    found = dict.fromkeys(taken, 0.0)
    if len(around) < 2:
        return found
    calls = Calls(span for process in processes for span in calls_of(process, around[0].at, around[-1].at))
    stretches = [_Stretch.of(one, other, calls) for one, other in pairwise(around)]
    at = [stretch.begin for stretch in stretches]
    for name, spans in taken.items():
        for begin, end in spans:
            first = max(0, bisect_right(at, begin) - 1)
            for stretch in islice(stretches, first, bisect_left(at, end)):
                found[name] += stretch.share(max(begin, stretch.begin), min(end, stretch.end), calls)
    return found


class _Stretch(NamedTuple):
    """The time between two readings, and what ran in it."""

    begin: int
    end: int
    calls: float
    even_ns: float
    """Run time that is even over the stretch."""
    calls_ns: float
    """Run time that follows the calls."""

    @classmethod
    def of(cls, one: _Reading, other: _Reading, calls: Calls) -> _Stretch:
        made, cost = calls.within(one.at, other.at), float(max(0, other.run_ns - one.run_ns))
        idle = max(0.0, other.runs - one.runs - RUNS_A_CALL * made) * IDLE_RUN_NS
        even = min(cost, idle) if made else cost
        return cls(one.at, other.at, made, even, cost - even)

    def share(self, begin: int, end: int, calls: Calls) -> float:
        """The run time in a part of it, ns."""
        if begin >= end:
            return 0.0
        even = self.even_ns * (end - begin) / (self.end - self.begin)
        return even + self.calls_ns * min(1.0, calls.within(begin, end) / self.calls) if self.calls else even


def calls_of(process: Process, since: int, until: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, number) of its calls and of other events that cost as much."""
    for transfer in process.ended(process.transfers, since):
        if transfer.begin_ns >= until:
            break
        yield transfer.begin_ns, transfer.end_ns, transfer.calls
    for ioctl in begun(process.ioctls, since):
        if ioctl.begin_ns >= until:
            break
        yield ioctl.begin_ns, ioctl.end_ns, 1
    for span in process.spans:
        if span.since_ns < until and span.until_ns > since:
            yield span.since_ns or span.until_ns, span.until_ns, span.gaps
    for events in (process.enters, process.exits, process.kicks):
        for event in events:
            if since <= event.at_ns < until:
                yield event.at_ns, event.at_ns, 1
    for wait in process.off_cpu:
        if wait.begin_ns < until and wait.end_ns > since:
            yield wait.begin_ns, wait.end_ns, 2  # the thread left, and came back


class Calls:
    """How many calls there are in a stretch of time, each evenly over its own length."""

    def __init__(self, calls: Iterator[tuple[int, int, int]]) -> None:
        turns: list[tuple[int, float]] = []
        for begin, end, number in calls:
            since, until = begin - AROUND_NS, max(begin, end) + AROUND_NS
            rate = number / (until - since)
            turns += [(since, rate), (until, -rate)]
        turns.sort()
        self._at = [at for at, _ in turns]
        self._rates: list[float] = []
        self._before: list[float] = []
        rate = count = 0.0
        previous = 0
        for at, change in turns:
            count += rate * (at - previous)
            rate = max(0.0, rate + change)
            previous = at
            self._rates.append(rate)
            self._before.append(count)

    def within(self, begin: int, end: int) -> float:
        """The number of calls in [begin, end)."""
        return max(0.0, self._until(end) - self._until(begin))

    def _until(self, at: int) -> float:
        last = bisect_right(self._at, at) - 1
        return self._before[last] + self._rates[last] * (at - self._at[last]) if last >= 0 else 0.0
