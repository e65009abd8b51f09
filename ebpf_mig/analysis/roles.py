# SPDX-License-Identifier: Apache-2.0
"""Decides which traced process is the source and which is the destination.

In: the processes of a recording. Out: the pair, and a note for each role hint that the events contradict.

The source fetched dirty logs, ran its guest when tracing began, and stopped. The destination's state was set
before its guest first ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.reception import LOADED_BYTES
from ebpf_mig.analysis.spans import FOREVER
from ebpf_mig.breakdown import Side
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import SEND


def assign(processes: Collection[Process]) -> tuple[Process | None, Process | None, list[str]]:
    """(source, destination, notes)."""
    scores = {id(process): (_as_source(process), _as_destination(process)) for process in processes}

    def leaning(process: Process) -> tuple[int, int, int]:
        """Sort key: the process most like a source comes first. Of equals, the one that ran first does."""
        own = scores[id(process)]
        return own[1] - own[0], _first(process), process.pid

    ranked = sorted(processes, key=leaning)
    source = next((p for p in ranked if scores[id(p)][0] > 0), None)
    destination = next((p for p in reversed(ranked) if p is not source and scores[id(p)][1] > 0), None)
    if source is not None and destination is None and _leans_away(source, scores[id(source)]):
        # There is only one side. No role is better than a wrong one.
        alone, source = source, None
        destination = alone if scores[id(alone)][1] > scores[id(alone)][0] else None
    notes = [
        f"process {process.pid} was given as the {process.hint}, but behaved as the {role}"
        for process, role in ((source, Side.SOURCE), (destination, Side.DESTINATION))
        if process is not None
        and process.born is None
        and process.hint in (Side.SOURCE, Side.DESTINATION)
        and process.hint != role
    ]
    return source, destination, notes


def _leans_away(process: Process, score: tuple[int, int]) -> bool:
    return score[1] > score[0] or (score[1] == score[0] and process.hint != Side.SOURCE)


def _as_source(process: Process) -> int:
    dirty = bool(process.dirty_log)
    several = dirty and _fetches_for_migration(process)
    ran_before = any(line.ran_before for line in process.vcpus.values())
    stopped = bool(process.gaps) and process.gaps[-1][1] is None
    missed = not dirty and _lost_logging(process)
    return 6 * several + (dirty or missed) + 2 * ran_before + 2 * stopped + (process.hint == Side.SOURCE)


def _as_destination(process: Process) -> int:
    lines = list(process.vcpus.values())
    fresh = not any(line.ran_before for line in lines)
    first = min((line.first_run for line in lines if line.first_run is not None), default=None)
    restored = any(
        kvm.name_of(i.cmd) in kvm.VCPU_STATE_SET and (first is None or i.begin_ns < first) for i in process.ioctls
    )
    return (
        4 * (fresh and (restored or process.born is not None))
        + (fresh and first is not None)
        + 2 * (process.hint == Side.DESTINATION)
    )


def _fetches_for_migration(process: Process) -> bool:
    slots = {i.slot for i in process.dirty_log}
    return len(slots) > 1 or process.largest_slot in slots


def _lost_logging(process: Process) -> bool:
    """Whether memory that existed lost the flag after much was sent: a migration ended whose beginning was missed."""
    made = {
        i.slot for i in process.ioctls if i.cmd in kvm.MEMSLOT and (not i.size or i.flags & kvm.MEM_LOG_DIRTY_PAGES)
    }
    sent: Counter[int] = Counter()
    lost = [i for i in process.ioctls if i.cmd in kvm.MEMSLOT and i.slot not in made and i.size >= LOADED_BYTES]
    for transfer in process.transfers:
        if transfer.direction == SEND and lost and transfer.begin_ns < lost[-1].begin_ns:
            sent[transfer.socket] += transfer.bytes
    return max(sent.values(), default=0) >= LOADED_BYTES


def _first(process: Process) -> int:
    """When it first ran its guest; 0 if it already ran it when tracing began."""
    if any(line.ran_before for line in process.vcpus.values()):
        return 0
    return min((line.first_run for line in process.vcpus.values() if line.first_run is not None), default=FOREVER)
