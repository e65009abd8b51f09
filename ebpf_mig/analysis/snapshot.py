# SPDX-License-Identifier: Apache-2.0
"""A snapshot: a guest is stopped, and its memory and state are written to files.

In: the source, its switchover, the dirty-log fetches. Out: a `Snapshot` if this is one, and its `Work`: what the VMM
did while the guest was stopped, by kind.

Cloud Hypervisor and Firecracker write the memory to one file and state and configuration to others (CH 54:
`memory-ranges`, `state.json`, `config.json`; Firecracker: two files named by the caller). The file with most bytes is
the memory's. QEMU writes one stream: memory, then state. Its savevm goes into a disk image, by worker threads. With
its background-snapshot, nothing is written while the guest is stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ebpf_mig.analysis import dirty_log, source_work
from ebpf_mig.analysis.dirty_log import Burst
from ebpf_mig.analysis.phases import Partition, flatten
from ebpf_mig.analysis.process import Process, begun
from ebpf_mig.analysis.sockets import LEAST_BYTES, family_of
from ebpf_mig.analysis.source_work import FETCH, MEMORY, SAVE, STATE, Interval, Work
from ebpf_mig.analysis.spans import FOREVER
from ebpf_mig.analysis.switchover import Switchover
from ebpf_mig.breakdown import PhaseName, Span, SwitchoverKind
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import FILE, SEND, SYNCS, FileCall, Transfer

SAVED_BYTES = 64 << 10
"""A state that is saved together with memory is larger than this."""
_INSIDE = {
    FETCH: PhaseName.FETCH_KERNEL,
    MEMORY: PhaseName.MEMORY_SEND,
    STATE: PhaseName.STATE_SEND,
    SAVE: PhaseName.STATE_SAVE,
}
_AFTER = _INSIDE | {FETCH: PhaseName.FETCH_USER}
"""The phase of the time behind each kind of work, up to the next."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of a snapshot, as keys of carriers."""

    files: frozenset[int]
    memory: int
    """The file with the memory: the one with most bytes."""
    stream: bool = False
    """One file, which the thread that fetches dirty logs writes in order: memory, then state (QEMU)."""
    disk: bool = False
    """Inside of a disk image, written by worker threads; one command does all of it (QEMU's savevm)."""
    background: bool = False
    """Written while the guest runs on, its memory write-protected: QEMU's background-snapshot. It may be a pipe or a
    socket."""


def find(source: Process, found: Switchover | None, fetchers: Collection[int]) -> Snapshot | None:
    """The files that the threads of the stop wrote while the guest was stopped and its registers were read.

    Disks are no such files: other threads write them. The threads are those that stop the guest, fetch dirty logs, or
    read registers, without the vCPUs' own.
    """
    if found is None:
        return None
    until = found.first_start if found.first_start is not None else FOREVER
    reads = [i for i in begun(source.other_ioctls, found.stop) if i.begin_ns < until and source_work.is_vcpu_read(i)]
    if not reads:
        return None
    drivers = {i.tid for i in reads} | set(fetchers) | ({found.stopper} if found.stopper is not None else set())
    drivers -= {line.tid for line in source.vcpus.values()}
    written: Counter[int] = Counter()
    for (direction, key), transfers in source.streams.items():
        if direction == SEND and family_of(source, key) == FILE:
            mine = [t.bytes for t in begun(transfers, found.stop) if t.begin_ns < until and t.tid in drivers]
            written[key] += sum(mine)
    keys = frozenset(key for key, size in written.items() if size)
    if sum(written.values()) < LEAST_BYTES:
        return _into_a_disk(source, found)
    stream = len(keys) == 1 and bool(fetchers)
    return Snapshot(keys, max(keys, key=lambda key: (written[key], -key)), stream)


def in_background(source: Process, found: Switchover | None) -> Snapshot | None:
    """Where the thread that stopped the guest writes its memory while the guest runs again.

    QEMU (`bg_migration_thread`, migration/migration.c, 7.2 to 11.1) stops the guest, keeps its state in a buffer,
    write-protects the memory, sets the guest going, and then writes memory and state, without a dirty log. A main
    thread that stops the guest may write a log afterwards.
    """
    if found is None or found.kind != SwitchoverKind.ABORTED or found.first_start is None:
        return None
    if found.stopper in (None, source.pid) or found.stopper in source.fetchers:
        return None
    if dirty_log.switched_on(source, None) is not None:
        return None
    reads = [i for i in begun(source.other_ioctls, found.stop) if source_work.is_vcpu_read(i)]
    read = max((i.end_ns for i in reads if i.begin_ns < found.first_start), default=None)
    if read is None:
        return None
    sent: Counter[int] = Counter()
    before: Counter[int] = Counter()
    for (direction, key), transfers in source.streams.items():
        for one in transfers if direction == SEND else ():
            if one.tid == found.stopper:
                (before if one.end_ns < read else sent)[key] += one.bytes
    key = max(sent, key=lambda one: (sent[one], -one), default=0)
    if sent[key] < SAVED_BYTES or sent[key] < before[key]:
        return None  # it sent before the stop: a pre-copy that was given up
    last = max(t.end_ns for t in source.streams[SEND, key] if t.tid == found.stopper)
    if last < found.first_start:
        return None  # it was done when the guest ran again
    return Snapshot(frozenset({key}), key, background=True)


def _into_a_disk(source: Process, found: Switchover) -> Snapshot | None:
    """What any thread wrote to files while the guest was stopped, if it then ran on.

    savevm stops its guest before it sets dirty logging up (QEMU: `save_snapshot`, migration/savevm.c, 7.2 to 11.1). A
    migration that failed, and whose carrier is not seen, sets it up while the guest runs.
    """
    logged = dirty_log.switched_on(source, None)
    if found.kind != SwitchoverKind.ABORTED or found.first_start is None or logged is None or logged < found.dark:
        return None
    written: Counter[int] = Counter()
    for (direction, key), transfers in source.streams.items():
        if direction == SEND and family_of(source, key) == FILE:
            written[key] += sum(t.bytes for t in transfers if found.stop <= t.begin_ns < found.first_start)
    if sum(written.values()) < SAVED_BYTES:
        return None
    memory = max(written, key=lambda key: (written[key], -key))
    return Snapshot(frozenset({memory}), memory, disk=True)


def syncs(process: Process, since: int, until: int) -> list[Span]:
    """When it waited in fsync(2) or a call like it."""
    return [(c.begin_ns, c.end_ns) for c in process.calls if c.call in SYNCS and since <= c.begin_ns < until]


def work(source: Process, snapshot: Snapshot, bursts: Sequence[Burst], stop: int, until: int) -> Work:
    """What the source did in [stop, until), by kind."""
    fetches = [(i.begin_ns, i.end_ns) for b in bursts for i in b.ioctls if stop <= i.begin_ns < until]
    fetches += [
        (c.begin_ns, c.end_ns) for c in source.calls if c.call == FileCall.MINCORE and stop <= c.begin_ns < until
    ]
    sends = [
        t
        for key in (() if snapshot.background else snapshot.files)
        for t in begun(source.streams.get((SEND, key), []), stop)
        if t.begin_ns < until and t.bytes
    ]
    ioctls = [i for i in begun(source.other_ioctls, stop) if i.begin_ns < until and not kvm.is_dirty_log(i.cmd)]
    first = next((i.begin_ns for i in ioctls if source_work.is_vcpu_read(i)), FOREVER)
    first = min([first, *(begin for begin, _ in fetches), *(t.begin_ns for t in sends)])
    saves = [i for i in ioctls if i.begin_ns >= first]
    memory, state = _told_apart(snapshot, sends, [i.end_ns for i in saves if source_work.is_vcpu_read(i)])
    intervals: list[Interval] = [(begin, end, FETCH) for begin, end in fetches]
    intervals += [(i.begin_ns, i.end_ns, SAVE) for i in saves]
    intervals += [(t.begin_ns, t.end_ns, MEMORY) for t in memory]
    intervals += [(t.begin_ns, t.end_ns, STATE) for t in state]
    return Work(
        intervals=intervals,
        state_from=min((t.begin_ns for t in state), default=None),
        memory=memory,
        quiet_until=max((i.end_ns for i in ioctls if i.begin_ns < first), default=stop),
        fetched=min((begin for begin, _ in fetches), default=None),
        coalesced=0,
    )


def _told_apart(
    snapshot: Snapshot, sends: Sequence[Transfer], read: Sequence[int]
) -> tuple[list[Transfer], list[Transfer]]:
    """The writes of memory and those of state. In a single file, state follows the last read of registers."""
    if len(snapshot.files) > 1:
        return [t for t in sends if t.socket == snapshot.memory], [t for t in sends if t.socket != snapshot.memory]
    since = max(read, default=FOREVER)
    return [t for t in sends if t.begin_ns < since], [t for t in sends if t.begin_ns >= since]


def acts(source: Process, found: Work, stop: int, until: int) -> list[Span]:
    """Everything that shows that the VMM worked in [stop, until).

    Not io_uring_enter(2), with which QEMU 11 also waits for its monitor (util/fdmon-io_uring.c).
    """
    spans = [(begin, end) for begin, end, _ in found.intervals]
    spans += [(i.begin_ns, i.end_ns) for i in begun(source.ioctls, stop) if i.begin_ns < until]
    calls = [c for c in source.calls if c.call != FileCall.IO_URING_ENTER]
    return spans + [(c.begin_ns, c.end_ns) for c in calls if stop <= c.begin_ns < until]


def assign(partition: Partition, stop: int, until: int, found: Work, managed: Sequence[Span]) -> None:
    """Assigns [stop, until) to phases. `managed`: when the VMM waited for its next request; they stay as they are.

    Time between two acts belongs to the first of them, since that is finished then. After a wait it belongs to what
    follows.
    """
    phase = PhaseName.QUIESCE
    for begin, end, label in flatten(stop, min(until, partition.end), found.intervals):
        resumed = next((at for _, at in managed if partition.cursor <= at <= begin), None)
        if resumed is not None:
            partition.until(resumed, phase)
            phase = _INSIDE[label]
        partition.until(begin, phase)
        partition.until(end, _INSIDE[label])
        if label != FETCH or phase != PhaseName.MEMORY_SEND:  # a fetch behind the memory only resets the log
            phase = _AFTER[label]
    partition.until(until, phase)
