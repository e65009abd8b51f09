# SPDX-License-Identifier: Apache-2.0
"""The window of a guest that goes through files: a snapshot, a restore, or a guest that replaces another one.

In: a `TracedMigration` whose files are known (`snapshot.py`, `restore.py`). Out: an `Attribution`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ebpf_mig.analysis import loading, management, phases, requests, restore, snapshot, source_work
from ebpf_mig.analysis.attributed import Attribution
from ebpf_mig.analysis.loading import Loading
from ebpf_mig.analysis.management import Managed
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.phases import Partition
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.requests import Request
from ebpf_mig.analysis.snapshot import Snapshot
from ebpf_mig.analysis.sockets import family_of
from ebpf_mig.analysis.source_work import Work
from ebpf_mig.analysis.spans import FOREVER, uncovered
from ebpf_mig.analysis.switchover import Switchover
from ebpf_mig.breakdown import PhaseName, Side, Span, SwitchoverKind
from ebpf_mig.recording.events import FILE


def attribute(
    traced: TracedMigration, activity: source_work.Activity, source: Process, found: Switchover, written: Snapshot
) -> Attribution:
    """The guest went to files. It goes on here, or where another process loads it, or nowhere that is known."""
    restored = traced.restored if found.kind == SwitchoverKind.COMPLETED else None
    back = found.first_start if found.first_start is not None else FOREVER
    asked = requests.of(source, found.requested - requests.ASKED_BEFORE_NS, back, traced.channels.source)
    if written.disk or written.background:
        asked = []  # its one command was answered before, or will be answered at the end
    _, done = _written(traced, activity, source, found, back)
    if found.kind == SwitchoverKind.ABORTED:
        resume = _asked_to_resume(source, done, back, asked, written)
    else:
        answers = [r.answered for r in asked if r.waits and r.at < done and r.answered < FOREVER]
        resume = min(max([done, *answers]), back)
    work, _ = _written(traced, activity, source, found, resume)
    end = found.last_start or found.first_start or resume
    partition = Partition(found.requested, max(end, found.stop))
    partition.until(found.stop, PhaseName.PAUSE)
    spans = requests.waits(snapshot.acts(source, work, found.stop, resume), asked, found.stop, resume)
    if written.stream:
        phases.source(partition, found.stop, resume, work, spans)
        tail = [(begin, end) for begin, end, phase in partition.spans if phase == PhaseName.HANDOVER]
        partition.give(tail, PhaseName.STATE_SEND)  # nobody waits at the other end of a file
    else:
        snapshot.assign(partition, found.stop, resume, work, spans)
    managed = [Managed(Side.SOURCE, b, e, sum(b <= r.at <= e for r in asked)) for b, e in spans]
    syncs = snapshot.syncs(source, found.stop, resume)
    if syncs and syncs[-1][1] >= max(end for _, end in snapshot.acts(source, work, found.stop, resume)):
        syncs[-1] = syncs[-1][0], resume  # as in `assign`: time after an act belongs to it, up to the answer
    if restored is not None:
        if partition.cursor < restored.begin:
            managed.append(Managed(Side.DESTINATION, partition.cursor, restored.begin, 1))
            partition.until(restored.begin, PhaseName.MANAGEMENT)
        restore.assign(partition, restored)
        managed += [Managed(Side.DESTINATION, b, e, 1) for b, e in restored.managed]
    partition.until(partition.end, PhaseName.RESUME)
    partition.give(syncs, PhaseName.SYNC)
    partition.give(management.spans(managed), PhaseName.MANAGEMENT)
    parts = partition.phases(traced.unmeasured, aborted=found.kind == SwitchoverKind.ABORTED)
    handed = done if found.kind == SwitchoverKind.COMPLETED else None
    return Attribution((partition.begin, partition.end), parts, work, managed, handed=handed)


def _written(
    traced: TracedMigration, activity: source_work.Activity, source: Process, found: Switchover, until: int
) -> tuple[Work, int]:
    """What the source did until then, and when the last of it that is no resuming ended."""
    kept = traced.snapshot
    if kept is None or kept.stream:
        work = activity.work(until)
    else:
        work = snapshot.work(source, kept, traced.bursts, found.stop, until)
    ends = [end for _, end, label in work.intervals if label != source_work.SAVE]
    ends += [end for _, end in snapshot.syncs(source, found.stop, until)]
    ends += [i.end_ns for i in source.ioctls if found.stop <= i.begin_ns < until and source_work.is_vcpu_read(i)]
    return work, max([end for end in ends if end <= until], default=found.stop)


def _asked_to_resume(source: Process, done: int, back: int, asked: Sequence[Request], written: Snapshot) -> int:
    """When the source was asked to run its guest again, or began to do so by itself.

    If neither was seen, all time after the writing is the wait for the command, and part of resuming.
    """
    resuming = [i.begin_ns for i in source.ioctls if done <= i.begin_ns < back and loading.is_resume(i)]
    acts, by_itself = min(resuming, default=back), written.disk or written.background
    return max((r.at for r in asked if done <= r.at <= acts), default=acts if by_itself else done)


def of_a_restore(traced: TracedMigration) -> Attribution:
    """The window of a restore: from the request to load, or the first read, to the last vCPU's start."""
    found, destination = traced.restored, traced.destination
    assert found is not None and destination is not None  # noqa: S101 - asked before
    starts = [line.first_run for line in destination.vcpus.values() if line.first_run is not None]
    partition = Partition(found.begin, max(starts))
    restore.assign(partition, found)
    managed = [Managed(Side.DESTINATION, b, e, 1) for b, e in found.managed]
    partition.give(found.managed, PhaseName.MANAGEMENT)
    load = Loading(found.begin, found.loaded)
    return Attribution((partition.begin, partition.end), partition.phases(traced.unmeasured), None, managed, load=load)


def of_a_guest_loaded_again(traced: TracedMigration, source: Process, found: Switchover) -> Attribution:
    """The process stopped its guest, loaded another one from a file, and ran that one."""
    restored, back = traced.restored, found.first_start
    assert restored is not None and back is not None  # noqa: S101 - asked before
    partition = Partition(found.requested, max(back, found.last_start or back))
    partition.until(found.stop, PhaseName.PAUSE)
    partition.until(restored.begin, PhaseName.QUIESCE)
    restore.assign(partition, restored)
    spans = [*_wait_to_load(source, found.stop, restored.begin), *restored.managed]
    managed = [Managed(Side.SOURCE, begin, end, 1) for begin, end in spans]
    partition.give(snapshot.syncs(source, found.stop, back), PhaseName.SYNC)
    partition.give(spans, PhaseName.MANAGEMENT)
    parts = partition.phases(traced.unmeasured, aborted=True)
    load = Loading(restored.begin, restored.loaded)
    return Attribution((partition.begin, partition.end), parts, None, managed, load=load)


def _wait_to_load(source: Process, stop: int, begin: int) -> list[Span]:
    """When the VMM waited for the command to load, if another one had stopped the guest: the longest time in which it
    did nothing, up to the last command in it. QEMU answers no command while it loads.
    """
    acts = [(i.begin_ns, i.end_ns) for i in source.ioctls if stop <= i.begin_ns < begin]
    acts += [
        (t.begin_ns, t.end_ns)
        for (_, key), transfers in source.streams.items()
        if family_of(source, key) == FILE
        for t in transfers
        if stop <= t.begin_ns < begin
    ]
    idle = uncovered(sorted([*acts, *snapshot.syncs(source, stop, begin)]), (stop, begin))
    longest = max(idle, key=lambda span: span[1] - span[0], default=(stop, stop))
    came = [r.at for r in requests.of(source, *longest)]
    return [(longest[0], came[-1])] if came and came[-1] > longest[0] else []
