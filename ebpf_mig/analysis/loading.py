# SPDX-License-Identifier: Apache-2.0
"""When a process loaded the state of a guest: its restore work, and where that work waited for bytes.

In: the ioctls of one process, and what it received. Out: a `Loading`, or the waits in it.

VMMs restore in different orders. Cloud Hypervisor restores devices after the vCPUs, replies, and waits for the request
to resume. QEMU sets its VM up completely before it loads the state into it, so registers are written more than once.
Setting the guest's clock belongs to resuming, in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ebpf_mig.analysis.spans import any_in, covered
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import Ioctl, Transfer

SHORT_NS = 1_000_000
"""The longest rest between two pieces of work that is part of them. A longer one is a wait for something. Time in which
the thread was preempted does not count.
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


def after(ioctls: Sequence[Ioctl], since: int, start: int | None, sent_at: Sequence[int]) -> Loading | None:
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
    end = max(i.end_ns for i in _before_clock(setters, work, begin) or setters or restores)
    request = next((at for at in sent_at if at >= end and (start is None or at < start)), None)
    if request is not None:
        end = max([end, *(i.end_ns for i in restores if i.begin_ns < request)])
    return Loading(begin, end)


def vcpus_loaded(ioctls: Sequence[Ioctl], since: int, start: int) -> int | None:
    """When the vCPUs had their state, which was loaded between `since` and `start`; None if no such work was seen."""
    work = [i for i in ioctls if since <= i.begin_ns < start]
    setters = [i for i in work if kvm.name_of(i.cmd) in kvm.VCPU_STATE_SET]
    return max((i.end_ns for i in _before_clock(setters, work, since)), default=None)


def _before_clock(setters: Sequence[Ioctl], work: Sequence[Ioctl], begin: int) -> list[Ioctl]:
    """Those before the first work on the clock after `begin`."""
    clock = next((i.begin_ns for i in work if i.begin_ns > begin and kvm.name_of(i.cmd) in _CLOCK), None)
    return [i for i in setters if clock is None or i.begin_ns < clock]


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


def again(ioctls: Sequence[Ioctl], start: int | None) -> Loading | None:
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
    threads, vcpus = {i.tid for i in setters}, {i.fd for i in setters}
    devices = [i for i in restores if (i.tid not in threads or i.fd not in vcpus) and i.end_ns <= end]
    last = max((i.begin_ns for i in devices), default=end)
    before = [i.end_ns for i in setters if i.end_ns <= last]
    since = max(before, default=min(i.begin_ns for i in setters))
    begin = min((i.begin_ns for i in restores if i.begin_ns >= since), default=since)
    return Loading(begin, end)


def is_resume(ioctl: Ioctl) -> bool:
    """Whether the ioctl resumes a guest on the source after an abort: it sets the clock or writes registers back."""
    return kvm.name_of(ioctl.cmd) in (kvm.VCPU_STATE_SET | {"SET_CLOCK"})


def last(
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
    return after(ioctls, work[first].begin_ns, start, [t.end_ns for t in receives if t.bytes])


def _goes_on(end: int, rested: int, begin: int, receives: Sequence[Transfer]) -> bool:
    """Whether a rest between two restore ioctls of a destination alone is part of one stretch of loading.

    `rested`: where it would have ended if the thread had always had a CPU.
    """
    if rested - end < SETUP_GAP_NS:
        return True
    came = sum(t.bytes for t in receives if end < t.end_ns <= begin)
    return any(t.bytes and t.end_ns <= end for t in receives) and 0 < came < LATE_STATE_BYTES
