# SPDX-License-Identifier: Apache-2.0
"""The window: where it begins and ends, and who owns it on the way.

In: a `Case`. Out: the window and its phases.
"""

from __future__ import annotations

from collections.abc import Sequence

from ebpf_mig.analysis import phases, source_work
from ebpf_mig.analysis import postcopy as served
from ebpf_mig.analysis.migration import Case, postcopy
from ebpf_mig.analysis.phases import Partition
from ebpf_mig.analysis.process import SEND, Process
from ebpf_mig.analysis.source_work import Work
from ebpf_mig.analysis.switchover import Switchover
from ebpf_mig.breakdown import Phase
from ebpf_mig.recording.events import Transfer

PAGES_BYTES = 65536
"""A send call of more than this carries pages: QEMU flushes state every 32 KiB."""


def attribute(case: Case) -> tuple[tuple[int, int] | None, list[Phase], Work | None]:
    """The window, its phases, and what the source did in it."""
    found, source = case.switchover, case.source
    if source is None:
        return _destination_alone(case)
    if found is None:
        return None, phases.unseen(), None
    if found.kind == "aborted":
        return _aborted(case, source, found)
    transfers = served.own_work(case)
    work = _work(case, source, found.stop, found.first_start)
    load = _loading(case, found, work, transfers)
    handed = _handed(case, source, found, work, load)
    end = found.last_start
    if end is None:
        talk = [t.end_ns for t in transfers if t.end_ns > found.stop]
        end = max([found.stop, handed, *talk, *([load.end] if load else [])])
    partition = Partition(found.requested, max(end, found.stop))
    handed = min(handed, found.first_start if found.first_start is not None else end)
    partition.until(found.stop, "pause")
    work = _work(case, source, found.stop, handed)
    phases.source(partition, found.stop, handed, work)
    if found.first_start is not None or load is not None:
        begin = found.first_start if found.first_start is not None else partition.end
        restores = [i for i in case.destination.ioctls if phases.is_restore(i)] if case.destination else []
        late = case.destination.ended(case.receives, found.stop) if case.destination else []
        receives = [t for t in late if t.end_ns <= begin]
        received = max((t.end_ns for t in receives), default=None)
        # Other threads may go on receiving memory meanwhile; they hold nobody up.
        loaders = {i.tid for i in restores}
        if any(t.tid in loaders and t.end_ns <= begin for t in case.receives):
            receives = [t for t in receives if t.tid in loaders]
        waits = phases.arrivals(receives, restores, handed, begin)
        phases.destination(partition, handed, load, received, begin, waits)
    partition.until(partition.end, "handover")
    return (partition.begin, partition.end), partition.phases(), work


def _work(case: Case, source: Process, stop: int, until: int | None) -> Work:
    until = until if until is not None else 1 << 63
    return source_work.observe(
        stop,
        until,
        [b for b in case.bursts or [] if stop <= b.begin < until],
        served.own_work(case),
        source.other_ioctls,
        source.off_cpu,
    )


def _loading(case: Case, found: Switchover, work: Work, transfers: list[Transfer]) -> phases.Loading | None:
    if case.destination is None:
        return None
    since = max(found.stop, work.state_from if work.state_from is not None else found.stop)
    answered = [t.begin_ns for t in transfers if t.direction == SEND]
    return phases.loading(case.destination.ioctls, since, found.first_start, answered)


def _handed(case: Case, source: Process, found: Switchover, work: Work, load: phases.Loading | None) -> int:
    """When the last byte that the destination needed had left the source."""
    limit = found.first_start if found.first_start is not None else 1 << 63
    sends = [t for t in served.own_work(case) if t.direction == SEND and t.end_ns > found.stop]
    if load is not None and postcopy(case):
        return _state_sent(sends, work, load)
    if load is not None:
        limit = min(limit, load.end)
    ends = [t.end_ns for t in sends if t.begin_ns < limit]
    if not ends:
        before = load.begin if load is not None else limit
        ends = [i.end_ns for i in source.ioctls if found.stop <= i.begin_ns < before]
    return max(ends, default=found.stop)


def _state_sent(sends: Sequence[Transfer], work: Work, load: phases.Loading) -> int:
    """In postcopy: the end of the state, which pages follow at once, while the destination has yet to load it."""
    state_from = work.state_from if work.state_from is not None else load.begin
    state = [t for t in sends if state_from <= t.begin_ns < load.begin]
    pages = next((index for index, t in enumerate(state) if t.bytes > PAGES_BYTES * t.calls), len(state))
    ends = [t.end_ns for t in state[:pages]] or [t.end_ns for t in sends if t.end_ns <= load.begin]
    return min(max(ends, default=load.begin), load.begin)


def _aborted(case: Case, source: Process, found: Switchover) -> tuple[tuple[int, int], list[Phase], Work]:
    """The source took the guest back: it owns everything up to the re-entry."""
    back = found.first_start if found.first_start is not None else found.stop
    partition = Partition(found.requested, max(back, found.last_start or back))
    work = _work(case, source, found.stop, back)
    partition.until(found.stop, "pause")
    worked = [end for begin, end, label in work.intervals if begin < back and label != source_work.SAVE]
    worked += [i.end_ns for i in source.ioctls if found.stop <= i.begin_ns < back and source_work.is_vcpu_read(i)]
    last = max(worked, default=found.stop)
    resuming = [i for i in source.ioctls if last <= i.begin_ns < back and phases.is_resume(i)]
    resume = resuming[0].begin_ns if resuming else back
    phases.source(partition, found.stop, resume, _work(case, source, found.stop, resume))
    partition.until(partition.end, "resume")
    return (partition.begin, partition.end), partition.phases(), work


def _destination_alone(case: Case) -> tuple[tuple[int, int] | None, list[Phase], None]:
    """Only the destination was traced: what it did from its first restore work after the memory on."""
    destination = case.destination
    if destination is None:
        return None, phases.unseen(), None
    starts = [line.first_run for line in destination.vcpus.values() if line.first_run is not None]
    if not starts:
        return None, phases.unseen(), None
    load = phases.last_loading(destination.ioctls, min(starts))
    if load is None:
        return None, phases.unseen(), None
    partition = Partition(load.begin, max(starts))
    phases.destination(partition, load.begin, load, None, min(starts))
    return (partition.begin, partition.end), partition.phases(), None
