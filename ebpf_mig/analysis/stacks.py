# SPDX-License-Identifier: Apache-2.0
"""The stacks in the window: where threads were off the CPU, and where dirty-log calls were sampled on it.

In: an `Analysis`. Out: rows by side, phase, thread and stack. Together they are exactly what the recording has: each
wait is cut to the window and divided at the borders of the phases; each sample stands for its period.

Waits shorter than LONG_WAIT_NS are not in the recording. Samples are taken only inside dirty-log calls that take long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

from ebpf_mig.analysis import lost_cpu
from ebpf_mig.analysis.diagnosis import headline
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.result import Analysis
from ebpf_mig.analysis.spans import Cover
from ebpf_mig.breakdown import Side
from ebpf_mig.recording.thresholds import LONG_WAIT_NS

NO_STACK = "(no stack)"
"""The only frame of a wait without a recorded stack."""


class Kind(StrEnum):
    """What a row measures."""

    OFF_CPU = "off-CPU"
    """A thread slept, or was runnable and did not run. Exact."""
    ON_CPU = "on-CPU"
    """A thread worked inside a dirty-log call. Estimated from samples."""


@dataclass(frozen=True, slots=True, order=True)
class Stack:
    """All time of one kind that a thread spent in one stack during one phase."""

    kind: Kind
    side: Side
    """UNKNOWN: a process that was traced and takes no part in the migration."""
    phase: str
    thread: str
    """Name and tid."""
    frames: tuple[str, ...]
    """Kernel functions, and behind them those of user space where they were recorded, innermost first; never empty.
    What stands in brackets is a reason, not a function."""
    duration_ns: int
    count: int
    """Waits that began in the phase or before the window; samples."""


def why_none(analysis: Analysis) -> str:
    """Why there are no rows."""
    if analysis.attribution.window is None:
        return f"there is no window to show ({headline(analysis.breakdown)})"
    if analysis.traced.material.absent("off-cpu"):
        return "time off the CPU was not traced"
    return f"no thread was off the CPU for {LONG_WAIT_NS // 1000} us, and no dirty-log call was sampled"


_Key = tuple[Kind, Side, str, str, tuple[str, ...]]


def observe(analysis: Analysis) -> list[Stack]:
    """The rows in a fixed order; none without a window."""
    if analysis.attribution.window is None:
        return []
    phases = _Phases(analysis)
    sums: dict[_Key, list[int]] = {}
    traced = analysis.traced
    for process in traced.material.processes.values():
        side = traced.side_of(process)
        for key, duration, count in chain(_waits(side, process, phases), _samples(side, process, phases)):
            found = sums.setdefault(key, [0, 0])
            found[0] += duration
            found[1] += count
    return sorted(Stack(*key, duration, count) for key, (duration, count) in sums.items())


def _waits(side: Side, process: Process, phases: _Phases) -> Iterator[tuple[_Key, int, int]]:
    for wait in process.off_cpu:
        counted = False
        for begin, end, stack in lost_cpu.parts(process, wait) if wait.end_ns > wait.begin_ns else ():
            for phase, duration in phases.of(begin, end):
                frames = (*stack, *process.user_half(wait, stack))
                key = Kind.OFF_CPU, side, phase, _thread(process, wait.tid), frames or (NO_STACK,)
                yield key, duration, int(not counted)
                counted = True


def _samples(side: Side, process: Process, phases: _Phases) -> Iterator[tuple[_Key, int, int]]:
    """A sample belongs to the phase in which its call began; its own time is not recorded."""
    for some in process.samples:
        phase = phases.at(some.begin_ns)
        if phase is not None and some.count > 0:
            key = (Kind.ON_CPU, side, phase, _thread(process, some.tid), some.stack or (NO_STACK,))
            yield key, some.count * some.period_ns, some.count


def _thread(process: Process, tid: int) -> str:
    thread = process.threads.get(tid)
    return f"{thread.name if thread else ''} {tid}".strip()


class _Phases:
    """The phase of each instant of the window. The spans of all phases partition it."""

    def __init__(self, analysis: Analysis) -> None:
        origin = analysis.origin_ns
        phases = analysis.attribution.phases
        self._covers = {str(p.phase): Cover((origin + b, origin + e) for b, e in p.spans) for p in phases if p.spans}
        self._begin = min((origin + span[0] for p in phases for span in p.spans), default=origin)

    def of(self, begin: int, end: int) -> Iterator[tuple[str, int]]:
        """(phase, ns) of each phase that [begin, end) touches; first the one in which it begins."""
        first = self.at(max(begin, self._begin))
        for phase in sorted(self._covers, key=lambda name: name != first):
            if inside := self._covers[phase].within(begin, end):
                yield phase, inside

    def at(self, instant: int) -> str | None:
        """The phase of an instant; None outside the window."""
        return next((phase for phase, cover in self._covers.items() if cover.within(instant, instant + 1)), None)
