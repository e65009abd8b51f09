# SPDX-License-Identifier: Apache-2.0
"""The longest waits in the window: which thread slept where while its side was on the critical path.

In: off-CPU events, the window's phases, the threads that drive the migration. Out: rows of the breakdown.

A VMM has many threads that sleep all the time and hold nobody up. Only those count that move the migration (they
fetch, send, receive or restore), and vCPU threads while vCPUs are being stopped or started.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ebpf_mig.analysis.process import Process
from ebpf_mig.breakdown import Phase, Wait

MOST = 10
"""Waits that are kept, the longest first."""
LEAST_NS = 100_000
"""Shorter ones are not worth a line."""
_SIDES = {
    "source": ("pause", "quiesce", "fetch.kernel", "fetch.user", "memory.send", "state.save", "state.send"),
    "destination": ("handover", "state.load", "resume"),
}
_VCPUS = ("pause", "resume")


@dataclass(frozen=True, slots=True)
class Party:
    """One side of the migration."""

    process: Process
    side: str
    """`source` or `destination`; `both` for a source that takes its guest back."""
    drivers: frozenset[int]
    """Threads whose waits count in every phase of the side."""
    senders: frozenset[int] = frozenset()
    """Threads that only send; idle most of the time."""


class _Cover:
    """How much of an interval a phase covers, in logarithmic time."""

    def __init__(self, phase: Phase, origin: int) -> None:
        spans = sorted(phase.spans)
        self._begins = [origin + begin for begin, _ in spans]
        self._lengths = [end - begin for begin, end in spans]
        self._before = [0, *accumulate(self._lengths)]

    def within(self, begin: int, end: int) -> int:
        return self._until(end) - self._until(begin)

    def _until(self, at: int) -> int:
        index = bisect_right(self._begins, at) - 1
        if index < 0:
            return 0
        return self._before[index] + min(at - self._begins[index], self._lengths[index])


def gather(parties: Sequence[Party], phases: Sequence[Phase], origin: int) -> list[Wait]:
    """The longest waits of all sides. Each is booked to the phase it overlaps most, and cut to it."""
    covers = {phase.phase: _Cover(phase, origin) for phase in phases}
    spans = [span for phase in phases for span in phase.spans]
    first, last = (origin + min((s[0] for s in spans), default=0), origin + max((s[1] for s in spans), default=0))
    found: list[tuple[int, int, Wait]] = []
    for party in parties:
        vcpus = frozenset(line.tid for line in party.process.vcpus.values())
        # Nearly all lie before the window: a destination waits for every byte of the pre-copy.
        near = [e for e in party.process.off_cpu if e.end_ns - first >= LEAST_NS and last - e.begin_ns >= LEAST_NS]
        for event in near:
            names = _phases_of(party, event.tid, vcpus)
            duration, phase = max(
                ((covers[name].within(event.begin_ns, event.end_ns), name) for name in names), default=(0, "")
            )
            if duration < LEAST_NS:
                continue
            stack = ["(preempted)"] if event.preempted else list(event.stack)
            thread = party.process.threads.get(event.tid)
            name = f"{thread.name if thread else ''} {event.tid}".strip()
            found.append((duration, event.begin_ns, Wait(phase=phase, thread=name, duration_ns=duration, stack=stack)))
    found.sort(key=lambda item: (-item[0], item[1], item[2].thread, item[2].stack))
    return [wait for _, _, wait in found[:MOST]]


def _phases_of(party: Party, tid: int, vcpus: Collection[int]) -> list[str]:
    own = [name for side, names in _SIDES.items() if party.side in (side, "both") for name in names]
    if tid in party.drivers:
        return [*own, "unattributed"]
    if tid in party.senders:
        return ["memory.send"]
    return [name for name in own if name in _VCPUS] if tid in vcpus else []
