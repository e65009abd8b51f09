# SPDX-License-Identifier: Apache-2.0
"""The window: where it begins and ends, and which phase each instant of it belongs to.

In: a `TracedMigration`. Out: an `Attribution`: the window, its phases and the source's work in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ebpf_mig.analysis import arrival, loading, management, phases, requests, source_work, through_files
from ebpf_mig.analysis.attributed import Attribution
from ebpf_mig.analysis.loading import Loading
from ebpf_mig.analysis.management import Managed
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.phases import Partition
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.source_work import Work
from ebpf_mig.analysis.spans import FOREVER, merged
from ebpf_mig.analysis.switchover import Switchover
from ebpf_mig.breakdown import PhaseName, Side, SwitchoverKind, Transport
from ebpf_mig.recording.events import SEND, Exec, Ioctl, Transfer

PAGES_BYTES = 65536
"""A send call of more than this carries pages: QEMU flushes state every 32 KiB."""


def attribute(traced: TracedMigration) -> Attribution:
    """The window, its phases and the source's work in it."""
    found, source = traced.switchover, traced.source
    if source is None:
        return through_files.of_a_restore(traced) if traced.restored is not None else _destination_alone(traced)
    if found is None:
        return Attribution(None, phases.unseen())
    activity = source_work.observe(source, found.stop, traced.bursts, traced.own_transfers)
    if traced.snapshot is not None:
        return through_files.attribute(traced, activity, source, found, traced.snapshot)
    if traced.loaded_again:
        return through_files.of_a_guest_loaded_again(traced, source, found)
    if found.kind == SwitchoverKind.ABORTED:
        return _aborted(traced, activity, source, found)
    born = traced.destination.born if traced.destination is not None else None
    if born is not None:
        return _replaced(traced, activity, source, found, born)
    transfers = traced.own_transfers
    work = activity.work(found.first_start if found.first_start is not None else FOREVER)
    load = _loading(traced, found, work)
    handed = _handed(traced, source, found, work, load)
    sent = any(t.direction == SEND and t.end_ns > found.stop for t in transfers)
    last_byte = handed if sent else None
    end = found.last_start
    if end is None:
        until = _pages_from(traced)
        moved = [t.end_ns for t in transfers if found.stop < t.end_ns <= until]
        end = max([found.stop, handed, *moved, *([load.end] if load else [])])
    partition = Partition(found.requested, max(end, found.stop))
    handed = min(handed, found.first_start if found.first_start is not None else end)
    partition.until(found.stop, PhaseName.PAUSE)
    work = activity.work(handed)
    managed = _managed(traced, found.stop, handed, load, found.first_start)
    phases.source(partition, found.stop, handed, work, management.spans(managed))
    if found.first_start is not None or load is not None:
        begin = found.first_start if found.first_start is not None else partition.end
        restores = [i for i in traced.destination.ioctls if loading.is_restore(i)] if traced.destination else []
        late = traced.destination.ended(traced.receives, found.stop) if traced.destination else []
        receives = [t for t in late if t.end_ns <= begin]
        received = max((t.end_ns for t in receives), default=None)
        # Other threads may still receive memory at the same time. They do not delay the loading.
        loaders = {i.tid for i in restores}
        if any(t.tid in loaders and t.end_ns <= begin for t in traced.receives):
            receives = [t for t in receives if t.tid in loaders]
        waits = loading.arrivals(receives, restores, handed, begin)
        phases.destination(partition, handed, load, received, begin, waits)
    partition.until(partition.end, PhaseName.HANDOVER)
    partition.give(management.spans(managed), PhaseName.MANAGEMENT)
    return Attribution(
        (partition.begin, partition.end),
        partition.phases(traced.unmeasured),
        work,
        managed,
        handed=last_byte,
        load=load,
    )


def _replaced(
    traced: TracedMigration, activity: source_work.Activity, source: Process, found: Switchover, born: Exec
) -> Attribution:
    """The process replaced itself by execve(2): the old program saves the state, the new one starts and loads it."""
    destination = traced.destination
    load = loading.again(destination.ioctls, found.first_start) if destination is not None else None
    acts = [i.end_ns for i in source.ioctls if found.stop <= i.begin_ns < born.at_ns]
    acts += [t.end_ns for t in traced.own_transfers if found.stop <= t.begin_ns < born.at_ns]
    handed = max(acts, default=found.stop)
    began = born.begin_ns or handed
    end = found.last_start or max(born.at_ns, load.end if load is not None else 0)
    partition = Partition(found.requested, max(end, found.stop))
    partition.until(found.stop, PhaseName.PAUSE)
    work = activity.work(handed)
    managed = _managed(traced, found.stop, handed, load, found.first_start)
    phases.source(partition, found.stop, handed, work, management.spans(managed))
    # What is left of saving, and of writing the state where the next program finds it, makes no call that is followed.
    partition.until(began, PhaseName.STATE_SAVE)
    partition.until(born.at_ns, PhaseName.EXEC)
    partition.until(load.begin if load is not None else end, PhaseName.STARTUP)
    if load is not None:
        partition.until(load.end, PhaseName.STATE_LOAD)
    partition.until(partition.end, PhaseName.RESUME)
    partition.give(management.spans(managed), PhaseName.MANAGEMENT)
    parts = partition.phases(traced.unmeasured)
    return Attribution((partition.begin, partition.end), parts, work, managed, load=load)


def _managed(traced: TracedMigration, stop: int, handed: int, load: Loading | None, start: int | None) -> list[Managed]:
    """When the source, and then the destination, waited for its manager."""
    found: list[Managed] = []
    if traced.source is not None and traced.switchover is not None:
        keys, stopper = traced.channels.source, traced.switchover.stopper
        # If the vCPUs had left the guest by themselves, nobody is known to have stopped them.
        movers = traced.source.fetchers | ({stopper} if stopper is not None else set())
        found += management.of_source(traced.source, movers, keys, stop, handed)
    if traced.destination is not None and load is not None:
        found += management.of_destination(traced.destination, traced.channels.destination, load.end, start)
    return found


def _loading(traced: TracedMigration, found: Switchover, work: Work) -> Loading | None:
    if traced.destination is None:
        return None
    since = max(found.stop, work.state_from if work.state_from is not None else found.stop)
    sent_at = [t.begin_ns for t in traced.own_transfers if t.direction == SEND]
    return loading.after(traced.destination.ioctls, since, found.first_start, sent_at)


def _handed(traced: TracedMigration, source: Process, found: Switchover, work: Work, load: Loading | None) -> int:
    """When the last byte that the destination needed left the source. In postcopy that is seen from the source alone,
    pages that came before the first answer cannot be told from state.
    """
    limit = found.first_start if found.first_start is not None else FOREVER
    sends = [t for t in traced.own_transfers if t.direction == SEND and t.end_ns > found.stop]
    if load is not None and traced.postcopy:
        return _state_sent(sends, work, load)
    if load is not None:
        limit = min(limit, load.end)
    pages = _pages_from(traced)
    ends = [min(t.end_ns, pages) for t in sends if t.begin_ns < min(limit, pages)]
    if not ends:
        before = load.begin if load is not None else limit
        ends = [i.end_ns for i in source.ioctls if found.stop <= i.begin_ns < before]
    return max(ends, default=found.stop)


def _pages_from(traced: TracedMigration) -> int:
    """From when on a source that is seen alone may send pages to a guest that runs already: in postcopy, from the first
    answer to the state on; FOREVER in other migrations. What it sends from then on is no part of the downtime.
    """
    return traced.answered if traced.postcopy and traced.answered is not None else FOREVER


def _state_sent(sends: Sequence[Transfer], work: Work, load: Loading) -> int:
    """In postcopy: when the last send of state ended. Pages follow before the destination loads the state."""
    state_from = work.state_from if work.state_from is not None else load.begin
    state = [t for t in sends if state_from <= t.begin_ns < load.begin]
    pages = next((index for index, t in enumerate(state) if t.bytes > PAGES_BYTES * t.calls), len(state))
    ends = [t.end_ns for t in state[:pages]] or [t.end_ns for t in sends if t.end_ns <= load.begin]
    return min(max(ends, default=load.begin), load.begin)


def _aborted(
    traced: TracedMigration, activity: source_work.Activity, source: Process, found: Switchover
) -> Attribution:
    """The source resumed the guest: all time up to the re-entry belongs to the source."""
    back = found.first_start if found.first_start is not None else found.stop
    partition = Partition(found.requested, max(back, found.last_start or back))
    work = activity.work(back)
    partition.until(found.stop, PhaseName.PAUSE)
    worked = [end for begin, end, label in work.intervals if begin < back and label != source_work.SAVE]
    worked += [i.end_ns for i in source.ioctls if found.stop <= i.begin_ns < back and source_work.is_vcpu_read(i)]
    last = max(worked, default=found.stop)
    resuming = [i for i in source.ioctls if last <= i.begin_ns < back and loading.is_resume(i)]
    resume = resuming[0].begin_ns if resuming else back
    asked: list[int] = []
    labels = {label for _, _, label in work.intervals}
    kept = traced.channels.transport in (Transport.FILE, Transport.PIPE) and not traced.channels.ends
    if source_work.SAVE in labels and (kept or not labels & {source_work.MEMORY, source_work.STATE}):
        resume = last  # The state was saved without a receiver. The rest is the wait for the command to resume.
        until = resuming[0].begin_ns if resuming else back
        asked = [r.at for r in requests.of(source, last, until, traced.channels.source)]
    managed = _managed(traced, found.stop, back, None, None)
    if managed and managed[-1].end >= last:
        resume = managed[-1].end  # the manager gave up
    if asked and asked[-1] > resume:
        managed = [*managed, Managed(Side.SOURCE, resume, asked[-1], len(asked))]
    phases.source(partition, found.stop, resume, activity.work(resume), management.spans(managed))
    partition.until(partition.end, PhaseName.RESUME)
    partition.give(management.spans(managed), PhaseName.MANAGEMENT)
    parts = partition.phases(traced.unmeasured, aborted=True)
    return Attribution((partition.begin, partition.end), parts, work, managed)


def _by_loaders(receives: list[Transfer], restores: list[Ioctl], until: int) -> list[Transfer]:
    """The receives before `until` by the threads that restore; those of all threads if the former received nothing.

    Other threads may still receive memory at the same time. They do not delay the loading.
    """
    early = [t for t in receives if t.end_ns <= until]
    loaders = {i.tid for i in restores}
    return [t for t in early if t.tid in loaders] or early


def _since_received(load: Loading, destination: Process, receives: Sequence[Transfer], start: int) -> Loading:
    """The loading without what came before the first byte: with CPR, the destination sets its VM up just before."""
    first = min((t.end_ns for t in receives if t.bytes), default=load.begin)
    return load if first <= load.begin else loading.after(destination.ioctls, first, start, ()) or load


def _destination_alone(traced: TracedMigration) -> Attribution:
    """If only the destination was traced: the window begins with its first restore work after the memory.

    If the last bytes came later, it begins with them: until they had left, the time was the source's.
    """
    destination = traced.destination
    if destination is None:
        return Attribution(None, phases.unseen())
    starts = [line.first_run for line in destination.vcpus.values() if line.first_run is not None]
    if not starts:
        return Attribution(None, phases.unseen())
    loaders = {i.tid for i in destination.ioctls if loading.is_restore(i)} - {
        line.tid for line in destination.vcpus.values()
    }
    lost = merged((w.begin_ns, w.end_ns) for w in destination.off_cpu if w.preempted and w.tid in loaders)
    load = loading.last(destination.ioctls, min(starts), traced.receives, lost)
    if load is None:
        return Attribution(None, phases.unseen())
    load = _since_received(load, destination, traced.receives, min(starts))
    handed = arrival.handed(destination, traced.receives, load)
    partition = Partition(handed, max(starts))
    restores = [i for i in destination.ioctls if loading.is_restore(i)]
    waits = loading.arrivals(_by_loaders(traced.receives, restores, min(starts)), restores, handed, min(starts))
    phases.destination(partition, handed, load, None, min(starts), waits)
    managed = _managed(traced, handed, handed, load, min(starts))
    partition.give(management.spans(managed), PhaseName.MANAGEMENT)
    return Attribution((partition.begin, partition.end), partition.phases(traced.unmeasured), None, managed, load=load)
