# SPDX-License-Identifier: Apache-2.0
"""Which thread requested the source's vCPUs to stop, and when.

In: the source's kicks and the threads that work on the migration. Out: a `Stopper`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from ebpf_mig.analysis.process import Process, begun
from ebpf_mig.analysis.vcpu import Timeline
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import Kick


@dataclass(frozen=True, slots=True)
class Workers:
    """The threads that work on the migration."""

    fetchers: frozenset[int]
    """Threads that fetch the dirty log, including the dirty ring's reaper."""
    senders: frozenset[int]


@dataclass(frozen=True, slots=True)
class Stopper:
    """The thread that requested the stop, and its first kick of each vCPU by vCPU index."""

    tid: int | None
    kicks: dict[int, int]


def find(source: Process, stop: int, workers: Workers) -> Stopper:
    """The thread that stopped the vCPUs, of the threads that kicked one in the gap around `stop`.

    A throttle's timer and the dirty ring's reaper kick vCPUs for other reasons. So a thread that sends for the
    migration is preferred, then one that fetches. Of several, the one that kicked the most vCPUs is chosen, then the
    earliest.
    """
    first: dict[int, dict[int, int]] = {}
    for index, line in source.vcpus.items():
        for kick in _in_gap(source, line, stop):
            first.setdefault(kick.tid, {}).setdefault(index, kick.at_ns)
    if not first:
        return Stopper(None, {})

    def rank(tid: int) -> tuple[bool, bool, int, int, int]:
        return tid not in workers.senders, tid not in workers.fetchers, -len(first[tid]), min(first[tid].values()), tid

    chosen = min(first, key=rank)
    if chosen in workers.senders | workers.fetchers:
        return Stopper(chosen, first[chosen])
    # None of them is known to work on the migration: take the first one, with the kicks of all of them.
    earliest: dict[int, int] = {}
    for kicks in first.values():
        for index, at in kicks.items():
            earliest[index] = min(at, earliest.get(index, at))
    begun = min(earliest.values())
    return Stopper(next(tid for tid, kicks in first.items() if begun in kicks.values()), earliest)


def _in_gap(source: Process, line: Timeline, stop: int) -> Sequence[Kick]:
    """The kicks after which the vCPU did not re-enter before `stop`, in order.

    Without those after the guest's clock was read, if there are others: the vCPUs have stopped by then, and kicks only
    bring them to a task, such as reading their registers.
    """
    gap = line.covering(stop)
    if gap is None:
        return ()
    kicks = source.kicks_by_tid.get(line.tid, [])
    begin = bisect_left(kicks, gap.entry or 0, key=_at)
    end = len(kicks) if gap.end is None else bisect_left(kicks, gap.end, lo=begin, key=_at)
    read = next((i.begin_ns for i in begun(source.ioctls, stop) if kvm.name_of(i.cmd) == "GET_CLOCK"), None)
    before = end if read is None else bisect_left(kicks, read, lo=begin, hi=end, key=_at)
    return kicks[begin:before] or kicks[begin:end]


def _at(kick: Kick) -> int:
    return kick.at_ns
