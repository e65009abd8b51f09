# SPDX-License-Identifier: Apache-2.0
"""Assigns each instant of the window to a phase.

In: the switchover's instants, the source's work after the stop, the destination's loading. Out: the phases of
the breakdown, which partition the window to the nanosecond.

A `Partition` only moves a cursor forward. So spans cannot overlap, leave a hole or be negative, whatever the events
contain. The critical path decides between the sides: until the last byte that the destination needs has left the
source, time belongs to the source. After that it belongs to the destination.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ebpf_mig import breakdown
from ebpf_mig.analysis import source_work
from ebpf_mig.analysis.source_work import CLEAR, FETCH, MEMORY, REPLY, SAVE, STATE, Work
from ebpf_mig.analysis.spans import any_in, covered, total
from ebpf_mig.breakdown import PhaseName
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import Ioctl, Transfer

SHORT_NS = 1_000_000
"""The longest wait that `_BETWEEN_SHORT` attributes. Time in which the thread was preempted does not count as
waiting.
"""

SETUP_GAP_NS = 20_000_000
"""If the source was not traced, a longer rest between two restore ioctls separates two stretches of restore work."""

LATE_STATE_BYTES = 128 << 10
"""If the destination received something in such a rest, but less than this, it waited for state, not for memory."""

_CREATION = frozenset({"CREATE_VM", "SET_TSS_ADDR", "SET_IDENTITY_MAP_ADDR", "ENABLE_CAP"})
"""Ioctls that create a VM. Cloud Hypervisor creates it as soon as it has received the configuration."""
_CLOCK = frozenset({"SET_CLOCK", "GET_CLOCK", "KVMCLOCK_CTRL"})
"""Ioctls on the guest's clock. They are part of resuming."""
_READS = ("GET_", "HAS_", "CHECK_")


@dataclass
class Partition:
    """Spans of one phase each, without holes, from `begin` on."""

    begin: int
    end: int
    cursor: int = field(init=False)
    spans: list[tuple[int, int, PhaseName]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cursor = self.begin

    def until(self, at: int, phase: PhaseName) -> None:
        """Assigns the time from the cursor to `at` to `phase`; it stops at the window's end."""
        at = min(at, self.end)
        if at <= self.cursor:
            return
        if self.spans and self.spans[-1][2] == phase:
            self.spans[-1] = (self.spans[-1][0], at, phase)
        else:
            self.spans.append((self.cursor, at, phase))
        self.cursor = at

    def give(self, spans: Iterable[tuple[int, int]], phase: PhaseName) -> None:
        """Assigns these spans to `phase` instead of their phase so far. Time that has no phase yet is unchanged."""
        for begin, end in spans:
            rest: list[tuple[int, int, PhaseName]] = []
            for since, until, owner in self.spans:
                cut = max(since, begin), min(until, end)
                if cut[0] >= cut[1]:
                    rest.append((since, until, owner))
                    continue
                parts = [(since, cut[0], owner), (*cut, phase), (cut[1], until, owner)]
                rest += [part for part in parts if part[0] < part[1]]
            self.spans = rest

    def phases(self, unmeasured: Collection[PhaseName] = (), *, aborted: bool = False) -> list[breakdown.Phase]:
        """Every phase, with instants relative to `begin`. `aborted`: the source resumed.

        A phase without spans has the duration 0, or None if it is one of the `unmeasured`.
        """
        self.until(self.end, PhaseName.UNATTRIBUTED)
        result = []
        for name, side in breakdown.sides_of(aborted, {phase for _, _, phase in self.spans}):
            spans = [(b - self.begin, e - self.begin) for b, e, phase in self.spans if phase == name]
            took = total(spans) if spans or name not in unmeasured else None
            result.append(breakdown.Phase(phase=name, side=side, duration_ns=took, spans=spans))
        assert sum(phase.duration_ns or 0 for phase in result) == self.end - self.begin  # noqa: S101
        return result


def unseen() -> list[breakdown.Phase]:
    """Every phase with the duration None, for a migration without a window."""
    return [
        breakdown.Phase(phase=name, side=side, duration_ns=None, spans=[]) for name, side in breakdown.sides_of(False)
    ]


_INSIDE = {
    FETCH: PhaseName.FETCH_KERNEL,
    CLEAR: PhaseName.FETCH_KERNEL,
    MEMORY: PhaseName.MEMORY_SEND,
    STATE: PhaseName.STATE_SEND,
    SAVE: PhaseName.STATE_SAVE,
}
_BETWEEN = {
    (FETCH, FETCH): PhaseName.FETCH_USER,
    (FETCH, CLEAR): PhaseName.FETCH_USER,
    (FETCH, MEMORY): PhaseName.FETCH_USER,
    # The fetch found no dirty page; the state is being saved.
    (FETCH, STATE): PhaseName.STATE_SAVE,
    (MEMORY, MEMORY): PhaseName.MEMORY_SEND,
    (MEMORY, CLEAR): PhaseName.MEMORY_SEND,
    (MEMORY, FETCH): PhaseName.MEMORY_SEND,
    (MEMORY, REPLY): PhaseName.MEMORY_SEND,
    (MEMORY, STATE): PhaseName.STATE_SAVE,
    (SAVE, SAVE): PhaseName.STATE_SAVE,
    (SAVE, FETCH): PhaseName.STATE_SAVE,
    (SAVE, STATE): PhaseName.STATE_SAVE,
    (STATE, STATE): PhaseName.STATE_SEND,
    (STATE, SAVE): PhaseName.STATE_SAVE,
    (STATE, REPLY): PhaseName.HANDOVER,
    (REPLY, STATE): PhaseName.HANDOVER,
    (REPLY, REPLY): PhaseName.HANDOVER,
}
"""The phase of the time between two kinds of work. The time between any other pair is unattributed."""
_BETWEEN_SHORT = {
    (FETCH, SAVE): PhaseName.FETCH_USER,
    (MEMORY, SAVE): PhaseName.MEMORY_SEND,
    (SAVE, MEMORY): PhaseName.STATE_SAVE,
}
"""The same, but only up to SHORT_NS."""


def source(partition: Partition, stop: int, until: int, work: Work, managed: Sequence[tuple[int, int]] = ()) -> None:
    """Assigns [stop, until) to the source's phases. `managed`: when it waited for its manager."""
    idle = [*work.preempted, *managed]
    previous: int | None = None
    for begin, end, label in flatten(stop, min(until, partition.end), work.intervals):
        if label == REPLY and previous not in (MEMORY, STATE, REPLY):
            continue
        waited = begin - partition.cursor - covered(idle, (partition.cursor, begin))
        partition.until(begin, _between(previous, label, waited, work.fetched is not None))
        if label == REPLY:
            # Waiting for a reply to pages is part of sending them. A reply to state means that the destination works.
            partition.until(end, PhaseName.MEMORY_SEND if previous == MEMORY else PhaseName.HANDOVER)
        else:
            partition.until(end, _INSIDE[label])
        if label == MEMORY and previous is None and work.fetched is not None and end <= work.fetched:
            # The tail of the last pass. The VM's devices are still being stopped.
            continue
        previous = _after(previous, label)
    if previous is None:
        # What a manager had to allow came after the quiescing.
        quiet = max([work.quiet_until, *(begin for begin, _ in managed)])
        partition.until(min(quiet, until), PhaseName.QUIESCE)
    elif previous in (STATE, REPLY):
        partition.until(until, PhaseName.HANDOVER)
    partition.until(until, PhaseName.UNATTRIBUTED)


def _after(previous: int | None, label: int) -> int:
    """The kind of work that goes on after `label`. A CLEAR or a reply while pages are sent does not end the sending."""
    if label == CLEAR:
        return MEMORY if previous == MEMORY else FETCH
    return MEMORY if label == REPLY and previous == MEMORY else label


def _between(previous: int | None, following: int, gap: int, fetched: bool) -> PhaseName:
    """The phase of the `gap` between two kinds of work. `fetched`: there was a fetch after the stop."""
    if previous is None:
        return PhaseName.QUIESCE
    pair = previous, following
    if pair == (SAVE, MEMORY) and not fetched:
        # Dirty rings are read without an ioctl.
        return PhaseName.FETCH_USER
    if pair in _BETWEEN:
        return _BETWEEN[pair]
    return _BETWEEN_SHORT.get(pair, PhaseName.UNATTRIBUTED) if gap <= SHORT_NS else PhaseName.UNATTRIBUTED


def flatten(begin: int, end: int, intervals: Sequence[source_work.Interval]) -> list[source_work.Interval]:
    """The intervals cut to [begin, end) and made disjoint. Where they overlap, the lowest label wins."""
    changes: list[tuple[int, int, int]] = []
    for opened, closed, label in intervals:
        first, last = max(opened, begin), min(closed, end)
        if first < last:
            changes += [(first, 1, label), (last, -1, label)]
    changes.sort()
    active = [0] * 6
    result: list[source_work.Interval] = []
    since, current = begin, None
    for at, step, label in changes:
        active[label] += step
        top = next((index for index, count in enumerate(active) if count), None)
        if top != current:
            if current is not None and since < at:
                if result and result[-1][1] == since and result[-1][2] == current:
                    result[-1] = (result[-1][0], at, current)
                else:
                    result.append((since, at, current))
            since, current = at, top
    return result


@dataclass(frozen=True, slots=True)
class Loading:
    """When the destination restored the state."""

    begin: int
    end: int


def is_clock(ioctl: Ioctl) -> bool:
    """Works on the guest's clock, which is part of resuming."""
    return kvm.name_of(ioctl.cmd) in _CLOCK


def is_restore(ioctl: Ioctl) -> bool:
    """Whether the ioctl builds up the VM: it sets state, memslots or routing, or creates vCPUs."""
    name = kvm.name_of(ioctl.cmd)
    dirty_log = name in ("CLEAR_DIRTY_LOG", "RESET_DIRTY_RINGS")
    return not (name in _CLOCK or dirty_log or name.startswith(_READS))


def loading(ioctls: Sequence[Ioctl], since: int, start: int | None, sent_at: Sequence[int]) -> Loading | None:
    """The restore work between `since` and `start`. `since` is the source's first send of state, or the stop.

    It ends with the last setter of vCPU state before the clock is set. If the source sent something after that
    (`sent_at`: when it sent), it ends with the last restore ioctl before that send. Cloud Hypervisor restores its
    devices after the vCPUs, replies, and then gets the request to resume.
    """
    work = [i for i in ioctls if i.begin_ns >= since and (start is None or i.begin_ns < start)]
    restores = [i for i in work if is_restore(i)]
    if not restores:
        return None
    begin = restores[0].begin_ns
    setters = [i for i in restores if kvm.name_of(i.cmd) in kvm.VCPU_STATE_SET]
    clock = next((i.begin_ns for i in work if i.begin_ns > begin and kvm.name_of(i.cmd) in _CLOCK), None)
    before = [i for i in setters if clock is None or i.begin_ns < clock] or setters or restores
    end = max(i.end_ns for i in before)
    request = next((at for at in sent_at if at >= end and (start is None or at < start)), None)
    if request is not None:
        end = max([end, *(i.end_ns for i in restores if i.begin_ns < request)])
    return Loading(begin, end)


def arrivals(receives: Sequence[Transfer], restores: Sequence[Ioctl], since: int, until: int) -> list[tuple[int, int]]:
    """Stretches of [since, until) in which the destination stopped loading to wait for bytes that had been sent.

    Each ends with a receive, and is the time since the destination's previous ioctl or receive if that is more than
    SHORT_NS. A batch of calls with restore work in between is left out: it does not show when the bytes arrived.
    """
    begins = [i.begin_ns for i in restores]
    late = [t for t in receives if t.end_ns > since]
    single = [t for t in late if t.calls <= 1 or not any_in(begins, t.begin_ns + 1, t.end_ns)]
    acts = [(t.begin_ns, t.end_ns, True) for t in single]
    acts += [(i.begin_ns, i.end_ns, False) for i in restores if i.end_ns > since]
    acts.sort()
    found: list[tuple[int, int]] = []
    idle_from = since
    for begin, end, is_receive in acts:
        if begin >= until:
            break
        if is_receive and max(begin, end - 1) - idle_from > SHORT_NS:
            found.append((idle_from, end))
        idle_from = max(idle_from, end)
    return found


def destination(
    partition: Partition,
    handed: int,
    load: Loading | None,
    received: int | None,
    start: int,
    waits: Sequence[tuple[int, int]] = (),
) -> None:
    """Assigns the time from `handed` on to the destination's phases.

    `waits` are the stretches of the loading in which it waited for bytes on the wire. They belong to the handover.
    """
    if load is None:
        partition.until(max(handed, received or handed), PhaseName.HANDOVER)
        partition.until(start, PhaseName.UNATTRIBUTED)
    else:
        partition.until(max(handed, load.begin), PhaseName.HANDOVER)
        for begin, end in waits:
            partition.until(min(begin, load.end), PhaseName.STATE_LOAD)
            partition.until(min(end, load.end), PhaseName.HANDOVER)
        partition.until(load.end, PhaseName.STATE_LOAD)
        partition.until(start, PhaseName.RESUME)
    partition.until(partition.end, PhaseName.RESUME)


def reloading(ioctls: Sequence[Ioctl], start: int | None) -> Loading | None:
    """The restoring of the state by a program that has just set its VM up itself, before `start`.

    vCPU registers are written several times: for new vCPUs, after a reset, and with the state. Devices are loaded
    before the last time. So loading begins with the first device after they were written before (QEMU:
    `qemu_system_reset`, then `qemu_loadvm_state`, which ends with `cpu_synchronize_all_post_init`).
    """
    work = [i for i in ioctls if start is None or i.begin_ns < start]
    clock = max((i.begin_ns for i in work if kvm.name_of(i.cmd) == "SET_CLOCK"), default=None)
    restores = [i for i in work if is_restore(i) and (clock is None or i.begin_ns < clock)]
    setters = [i for i in restores if kvm.name_of(i.cmd) in kvm.VCPU_STATE_SET]
    if not setters:
        return None
    end = max(i.end_ns for i in setters)
    vcpus = {i.tid for i in setters}
    devices = [i for i in restores if i.tid not in vcpus and i.end_ns <= end]
    last = max((i.begin_ns for i in devices), default=end)
    before = [i.end_ns for i in setters if i.end_ns <= last]
    since = max(before, default=min(i.begin_ns for i in setters))
    begin = min(i.begin_ns for i in restores if i.begin_ns >= since)
    return Loading(begin, end)


def is_resume(ioctl: Ioctl) -> bool:
    """Whether the ioctl resumes a guest on the source after an abort: it sets the clock or writes registers back."""
    return kvm.name_of(ioctl.cmd) in (kvm.VCPU_STATE_SET | {"SET_CLOCK"})


def last_loading(
    ioctls: Sequence[Ioctl], start: int, receives: Sequence[Transfer] = (), lost: Sequence[tuple[int, int]] = ()
) -> Loading | None:
    """The restore work that loaded the vCPUs, without the VM's set-up before the migration.

    A VM that was started with `-S` then waits for its manager, for any length of time. Setting the clock and restarting
    the devices after that wait is not loading. So the result is the last stretch that sets vCPU state before the clock
    is set. A rest in which only a little was received (`receives`: for the migration) does not end a stretch: the rest
    of the state was late, e.g. because of Nagle's algorithm. Nor does one without a CPU (`lost`, without overlaps).
    """
    work = [i for i in ioctls if is_restore(i) and i.begin_ns < start]
    if not work:
        return None
    clock = max((i.begin_ns for i in ioctls if i.begin_ns < start and kvm.name_of(i.cmd) == "SET_CLOCK"), default=start)
    setters = [at for at, i in enumerate(work) if i.begin_ns < clock and kvm.name_of(i.cmd) in kvm.VCPU_STATE_SET]
    first = max(setters, default=len(work) - 1)
    while first > 0 and kvm.name_of(work[first - 1].cmd) not in _CREATION:
        end, begin = work[first - 1].end_ns, work[first].begin_ns
        if not _goes_on(end, begin - covered(lost, (end, begin)), begin, receives):
            break
        first -= 1
    return loading(ioctls, work[first].begin_ns, start, [t.end_ns for t in receives if t.bytes])


def _goes_on(end: int, rested: int, begin: int, receives: Sequence[Transfer]) -> bool:
    """Whether a rest between two restore ioctls of a destination alone is part of one stretch of loading.

    `rested`: where it would have ended if the thread had always had a CPU.
    """
    if rested - end < SETUP_GAP_NS:
        return True
    came = sum(t.bytes for t in receives if end < t.end_ns <= begin)
    return any(t.bytes and t.end_ns <= end for t in receives) and 0 < came < LATE_STATE_BYTES
