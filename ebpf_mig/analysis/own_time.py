# SPDX-License-Identifier: Apache-2.0
"""What tracing took in the window, by phase: our BPF programs, the kernel's way to them, and our process.

In: the sums that our programs record of their own runs, what a run and a system call take beside them, when our process
had a CPU, the window, its phases. Out: a `TracingCost`; and for a prediction, what delayed one side.

The programs record their sums on each CPU every 100 us after a stop, later every 32nd part of the time since. Between
two records the cost is even over the time from the first run to the last. What that can be wrong by is `doubt_ns`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ebpf_mig.analysis.material import Material
from ebpf_mig.breakdown import Phase, PhaseCost, Span, TracingCost
from ebpf_mig.recording import events as ev

SAME_NS = 100_000_000
"""The kernel's statistics and our last sums are compared if they were read at most this far apart."""
MOST_TIMES = 4
"""The time stamps leave at most this many times of what a run takes in a loop: code that ran long ago is slower."""


class Piece(NamedTuple):
    """An amount that is even over a stretch of time on one CPU."""

    begin: int
    end: int
    ns: float


class Curve:
    """What was spent until any instant, from pieces that do not overlap, in order."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = [p if p.end > p.begin else Piece(p.begin, p.begin + 1, p.ns) for p in pieces if p.ns > 0]
        self._begins = [piece.begin for piece in self.pieces]
        self._before = [0.0]
        for piece in self.pieces:
            self._before.append(self._before[-1] + piece.ns)

    def within(self, begin: int, end: int) -> float:
        """What was spent in [begin, end), in ns."""
        return self._until(end) - self._until(begin) if begin < end else 0.0

    def _until(self, at: int) -> float:
        last = bisect_right(self._begins, at) - 1
        if last < 0:
            return 0.0
        piece = self.pieces[last]
        return self._before[last] + piece.ns * min(1.0, (at - piece.begin) / (piece.end - piece.begin))

    def doubt(self, at: int) -> float:
        """How much more or less may have been spent before `at`, in ns: a CPU spends at most the time that passes."""
        last = bisect_right(self._begins, at) - 1
        if last < 0 or (piece := self.pieces[last]).end <= at:
            return 0.0
        earlier, later = at - piece.begin, piece.end - at
        assumed = piece.ns * earlier / (piece.end - piece.begin)
        return max(assumed - max(0.0, piece.ns - later), min(piece.ns, earlier) - assumed, 0.0)


@dataclass(frozen=True)
class Spent:
    """What was spent on one host: curves of each CPU."""

    vmms: list[Curve]
    """Runs of our programs in the traced processes."""
    others: list[Curve]
    """Runs in all other processes."""
    vmm_calls: list[Curve]
    """What system calls of the traced processes took longer in the kernel, our programs left out."""
    other_calls: list[Curve]
    """The same for all other processes."""
    turns: list[Curve] | None
    """CPU time of our process; None: not measured."""


def spent(material: Material, remote: bool) -> Spent | None:
    """What was spent on one host, at any time. None: not recorded."""
    rates, sums = _recorded(material, remote)
    if rates is None or not sums:
        return None
    run_ns = _run_ns(material, remote, sums, rates)
    path_ns = max(0, rates.call_ns - 2 * rates.run_ns)
    cpus = [[*map(Curve, _pieces(readings, rates.at_ns, run_ns, path_ns))] for readings in sums]
    vmms, others, vmm_calls, other_calls = map(list, zip(*cpus, strict=True))
    turns: dict[int, list[Piece]] = defaultdict(list)
    for turn in material.own_turns:
        if turn.remote is remote:
            turns[turn.cpu].append(Piece(turn.begin_ns, turn.end_ns, turn.end_ns - turn.begin_ns))
    own = [Curve(_apart(pieces)) for pieces in turns.values()] if turns else None
    return Spent(vmms, others, vmm_calls, other_calls, own)


def _recorded(material: Material, remote: bool) -> tuple[ev.OwnRates | None, list[list[ev.OwnRuns]]]:
    """The rates of one host, and the sums of each of its CPUs in order of time."""
    rates = [rate for rate in material.own_rates if rate.remote is remote]
    by_cpu: dict[int, list[ev.OwnRuns]] = defaultdict(list)
    for found in material.own_runs:
        if found.remote is remote:
            by_cpu[found.cpu].append(found)
    return rates[-1] if rates else None, list(by_cpu.values())


def in_all(material: Material) -> int | None:
    """Run time of our programs over the whole recording, over all CPUs of the hosts, in ns. None: not recorded."""
    total = 0.0
    for remote in (False, True) if material.header.remote is not None else (False,):
        rates, sums = _recorded(material, remote)
        if rates is None or not sums:
            return None
        run_ns, last = _run_ns(material, remote, sums, rates), [readings[-1] for readings in sums]
        total += sum(found.run_ns + (found.runs + found.other_runs) * run_ns for found in last)
    return round(total)


def _run_ns(material: Material, remote: bool, sums: Sequence[Sequence[ev.OwnRuns]], rates: ev.OwnRates) -> float:
    """What a run takes besides the time that it measures itself, in ns: what is missing to the kernel's statistics."""
    readings = [cost for cost in material.costs if cost.remote is remote]
    run_ns, at_ns = (readings[-1].run_ns, readings[-1].at_ns) if readings else (0, 0)
    if material.ending and not remote and material.header.remote is None and material.ending.observer_ns:
        run_ns, at_ns = sum(material.ending.observer_ns.values()), material.ending.at_ns
    together = [found for readings in sums for found in readings if found.at_ns == at_ns]
    then = together or [readings[-1] for readings in sums]
    if not run_ns or at_ns + SAME_NS < max(found.at_ns for found in then):
        return rates.run_ns
    runs = sum(found.runs + found.other_runs for found in then)
    rest = (run_ns - sum(found.run_ns for found in then)) / max(1, runs)
    return min(max(rest, rates.run_ns), MOST_TIMES * rates.run_ns)


def _pieces(readings: Sequence[ev.OwnRuns], begin_ns: int, run_ns: float, path_ns: int) -> Iterable[list[Piece]]:
    """Runs of the traced processes, runs of others, system calls of the traced processes, system calls of others."""
    found: tuple[list[Piece], ...] = ([], [], [], [])
    at, was = min(begin_ns, readings[0].since_ns or begin_ns), ev.OwnRuns(0, 0, 0, 0, 0, 0, 0, 0, 0)
    for now in readings:
        since, until = max(at, now.since_ns), max(at, now.until_ns)
        spans = ((since, until), (at, now.at_ns))
        runs, other_runs = max(0, now.runs - was.runs), max(0, now.other_runs - was.other_runs)
        calls, other_calls = max(0, now.calls - was.calls), max(0, now.other_calls - was.other_calls)
        found[0].append(Piece(*spans[0], max(0, now.run_ns - was.run_ns) + runs * run_ns))
        found[1].append(Piece(*spans[1], other_runs * run_ns))
        found[2].append(Piece(*spans[0], calls * path_ns))
        found[3].append(Piece(*spans[1], other_calls * path_ns))
        at, was = max(at, now.at_ns), now
    return found


def _apart(pieces: Iterable[Piece]) -> Iterable[Piece]:
    """The pieces, each not before the end of the one before."""
    reached = 0
    for begin, end, _ in sorted(pieces):
        since = max(begin, reached)
        if since < end:
            yield Piece(since, end, end - since)
        reached = max(reached, end)


def observe(material: Material, window: Span | None, phases: Sequence[Phase]) -> TracingCost | None:
    """The cost in the window that `phases` partition, over all CPUs of the hosts. None: not recorded."""
    if window is None:
        return None
    hosts = [spent(material, remote) for remote in ((False, True) if material.header.remote is not None else (False,))]
    known = [host for host in hosts if host is not None]
    if len(known) < len(hosts):
        return None
    programs = [curve for host in known for curve in (*host.vmms, *host.others)]
    calls = [curve for host in known for curve in (*host.vmm_calls, *host.other_calls)]
    turns = [curve for host in known for curve in host.turns or ()] if all(host.turns for host in known) else None
    by_phase = {
        phase.phase.value: PhaseCost(
            programs_ns=_sum(programs, phase.spans, window[0]),
            calls_ns=_sum(calls, phase.spans, window[0]),
            process_ns=None if turns is None else _sum(turns, phase.spans, window[0]),
        )
        for phase in phases
    }
    doubts = [curve.doubt(edge) for curve in (*programs, *calls) for edge in window]
    return TracingCost(
        programs_ns=sum(cost.programs_ns for cost in by_phase.values()),
        calls_ns=sum(cost.calls_ns for cost in by_phase.values()),
        process_ns=None if turns is None else sum(cost.process_ns or 0 for cost in by_phase.values()),
        doubt_ns=round(sum(doubts)),
        phases=by_phase,
    )


def _sum(curves: Iterable[Curve], spans: Iterable[Span], origin: int) -> int:
    spans = list(spans)
    return round(sum(curve.within(origin + begin, origin + end) for curve in curves for begin, end in spans))
