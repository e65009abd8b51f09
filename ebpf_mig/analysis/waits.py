# SPDX-License-Identifier: Apache-2.0
"""Time off the CPU: the longest waits in the window, and how much of a span a thread was off the CPU.

In: off-CPU events, the window's phases, the threads that drive the migration, and each thread's running total of time
off the CPU, which ioctls and sends carry. Out: rows of the breakdown; the off-CPU part of given spans.

Many threads of a VMM sleep most of the time without delaying the migration. Only waits of threads that drive the
migration count (they fetch, send, receive or restore), and waits of vCPU threads while vCPUs are stopped or started.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ebpf_mig.analysis import lost_cpu
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.spans import Cover
from ebpf_mig.breakdown import PHASES, Phase, PhaseName, Side, Span, Wait
from ebpf_mig.recording.thresholds import LONG_WAIT_NS

MOST_WAITS = 10
"""The number of waits that are reported, the longest first."""
SLACK_NS = 20_000
"""The running total is known at the begin and return of calls. A span's ends may be this far from such an instant."""
_SOURCE = tuple(name for name, side in PHASES if side == Side.SOURCE)
_DESTINATION = (
    PhaseName.STARTUP,
    PhaseName.HANDOVER,
    PhaseName.MEMORY_LOAD,
    PhaseName.STATE_LOAD,
    PhaseName.RESUME,
)
_OWN = {Side.SOURCE: _SOURCE, Side.DESTINATION: _DESTINATION, Side.BOTH: _SOURCE + _DESTINATION}
"""The phases in which a side's waits delay the migration."""
_VCPUS = (PhaseName.PAUSE, PhaseName.RESUME)


@dataclass(frozen=True, slots=True)
class Party:
    """One side of the migration."""

    process: Process
    side: Side
    """BOTH: a source that resumed its guest."""
    drivers: frozenset[int]
    """Threads whose waits count in every phase of the side."""
    senders: frozenset[int] = frozenset()
    """Threads that only send. They are idle most of the time."""

    def thread(self, tid: int) -> str:
        """Name and tid."""
        thread = self.process.threads.get(tid)
        return f"{thread.name if thread else ''} {tid}".strip()


@dataclass(frozen=True, slots=True)
class Sleep:
    """A stretch in which a thread was off the CPU, of LONG_WAIT_NS or more, that overlaps the window."""

    begin: int
    end: int
    side: Side
    thread: str
    """Name and tid."""
    stack: tuple[str, ...]
    """As `Wait.stack`."""
    phases: tuple[PhaseName, ...] = ()
    """The phases in which it delays the migration; empty: it does not."""
    vcpu: bool = False
    """It is a vCPU's thread."""
    user: tuple[str, ...] = ()
    """As `Wait.user_stack`."""


def sleeps(parties: Sequence[Party], phases: Sequence[Phase], origin: int) -> list[Sleep]:
    """The waits of all threads of all sides, also of threads that do not delay the migration; absolute."""
    first, last = extent(phases, origin)
    found: list[Sleep] = []
    for party in parties:
        vcpus = frozenset(line.tid for line in party.process.vcpus.values())
        # Nearly all waits lie before the window: a destination waits for every byte of the pre-copy.
        near = [
            e for e in party.process.off_cpu if e.end_ns - first >= LONG_WAIT_NS and last - e.begin_ns >= LONG_WAIT_NS
        ]
        delayed = {tid: phases_of(party, tid, phases, vcpus) for tid in {event.tid for event in near}}
        for event in near:
            for begin, end, stack in lost_cpu.parts(party.process, event):
                if end - begin >= LONG_WAIT_NS:
                    user = party.process.user_half(event, stack)
                    name = party.thread(event.tid)
                    found.append(
                        Sleep(begin, end, party.side, name, stack, delayed[event.tid], event.tid in vcpus, user)
                    )
    return found


def longest(found: Sequence[Sleep], phases: Sequence[Phase], origin: int) -> list[Wait]:
    """The longest waits of all sides. Each is assigned to the phase that it overlaps most, and cut to it."""
    covers = {p.phase: Cover((origin + begin, origin + end) for begin, end in p.spans) for p in phases}
    rows: list[tuple[int, int, Wait]] = []
    for sleep in found:
        overlaps = [(covers[name].within(sleep.begin, sleep.end), name) for name in sleep.phases if name in covers]
        duration, phase = max(overlaps, default=(0, PhaseName.UNATTRIBUTED))
        if duration >= LONG_WAIT_NS:
            stacks = list(sleep.stack), list(sleep.user)
            wait = Wait(phase=phase, thread=sleep.thread, duration_ns=duration, stack=stacks[0], user_stack=stacks[1])
            rows.append((duration, sleep.begin, wait))
    rows.sort(key=lambda item: (-item[0], item[1], item[2].thread, item[2].stack))
    return [wait for _, _, wait in rows[:MOST_WAITS]]


def extent(phases: Sequence[Phase], origin: int) -> Span:
    """From the first instant of the phases to the last one; absolute."""
    spans = [span for phase in phases for span in phase.spans]
    return origin + min((s[0] for s in spans), default=0), origin + max((s[1] for s in spans), default=0)


def phases_of(party: Party, tid: int, phases: Sequence[Phase], vcpus: Collection[int] = ()) -> tuple[PhaseName, ...]:
    """The phases in which a thread delays the migration. `vcpus`: the threads of vCPUs."""
    own: tuple[PhaseName, ...] = ()
    if tid in party.drivers:
        own = (*_OWN[party.side], PhaseName.UNATTRIBUTED)
    elif tid in party.senders:
        own = (PhaseName.MEMORY_SEND,)
    elif tid in vcpus:
        own = tuple(name for name in _OWN[party.side] if name in _VCPUS)
    if not own or party.side != Side.DESTINATION:
        return own
    sources = {p.phase for p in phases if p.side == Side.SOURCE}
    return tuple(name for name in own if name not in sources)


class OffCpuTotals:
    """The running totals of some threads' time off the CPU, at the instants at which they are known."""

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
        """Time off the CPU in the spans, in ns; None if a span does not lie between two calls of one thread."""
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
    """The total at the known instant nearest to `at`; None if that is too far away."""
    index = bisect_left(known, (at, -1))
    near = min(known[max(0, index - 1) : index + 1], key=lambda point: abs(point[0] - at))
    return near[1] if abs(near[0] - at) <= SLACK_NS else None
