# SPDX-License-Identifier: Apache-2.0
"""Dirty-log fetches: which ioctls belong to the migration, the passes they make, the final fetch.

In: the source's ioctls and its sends on the migration's sockets. Out: fetches, slots, the mode.

A fetch is a burst of GET_DIRTY_LOG over the memslots. CLEAR_DIRTY_LOG belongs to the fetch before it: QEMU
issues it lazily, just before it sends the first page of a chunk (migration/ram.c,
`migration_clear_memory_region_dirty_bitmap`). A VGA slot is dirty-logged even without a migration; the main thread
fetches it alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from operator import attrgetter

import msgspec

from ebpf_mig import breakdown
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.spans import any_in
from ebpf_mig.breakdown import DirtyLogMode
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import Ioctl, Transfer
from ebpf_mig.recording.thresholds import FETCH_GAP_NS

LOGGING_GAP_NS = 20_000_000
"""Longest gap between two slots when logging is switched on over all slots."""


class Burst(msgspec.Struct, frozen=True, gc=False):
    """One fetch with its ioctls. A long pre-copy has tens of thousands, so the garbage collector does not track
    them.
    """

    ioctls: tuple[Ioctl, ...]
    begin: int
    end: int
    """End of the burst itself, without the CLEARs that came later."""
    fetched: bool
    """False if it only has CLEARs."""

    @property
    def kernel_ns(self) -> int:
        """Time inside its ioctls."""
        return sum([i.end_ns - i.begin_ns for i in self.ioctls])


def is_dirty_log(ioctl: Ioctl) -> bool:
    """Whether the ioctl fetches or clears the dirty log."""
    return kvm.is_dirty_log(ioctl.cmd)


def is_clear(ioctl: Ioctl) -> bool:
    """Whether the ioctl re-arms the log of a range of pages."""
    return kvm.name_of(ioctl.cmd) == "CLEAR_DIRTY_LOG"


def switched_on(process: Process, before: int | None) -> int | None:
    """When dirty logging was last switched on before `before`; None if that was not seen.

    The largest slot that was switched on decides, because a VGA slot always has the flag. A slot that is deleted (size
    0) and set again while logging is on does not count.
    """
    on: dict[int, bool] = {}
    turned: list[Ioctl] = []
    for ioctl in process.memslots:
        if ioctl.size == 0 or (before is not None and ioctl.begin_ns >= before):
            continue
        flag = bool(ioctl.flags & kvm.MEM_LOG_DIRTY_PAGES)
        if flag and not on.get(ioctl.slot, False):
            turned.append(ioctl)
        on[ioctl.slot] = flag
    if not turned:
        return None
    largest = max(i.size for i in turned)
    at = max(index for index, i in enumerate(turned) if i.size == largest)
    while at > 0 and turned[at].begin_ns - turned[at - 1].end_ns < LOGGING_GAP_NS:
        at -= 1
    return turned[at].begin_ns


def bursts(process: Process, since: int, stop: int | None, sends: Sequence[Transfer]) -> list[Burst]:
    """The migration's fetches from `since` on. A fetch that begins before the last stop ends there."""
    tids = process.fetchers
    begins = list(map(_begin, sends))
    result: list[Burst] = []
    ioctls: list[Ioctl] = []
    end = 0
    fetched_slots: set[tuple[int, int]] = set()
    last = 0
    for ioctl in process.dirty_log[bisect_left(process.dirty_log, since, key=_begin) :]:
        begin, name = ioctl.begin_ns, kvm.name_of(ioctl.cmd)
        stopped = stop is not None and begin >= stop
        if ioctl.tid not in tids and not (stopped and name == "RESET_DIRTY_RINGS"):
            continue
        apart = begin - last >= FETCH_GAP_NS or any_in(begins, last, begin)
        again = name == "GET_DIRTY_LOG" and (ioctl.cmd, ioctl.slot) in fetched_slots
        clear = name == "CLEAR_DIRTY_LOG"
        crosses = bool(ioctls) and stopped and stop is not None and ioctls[0].begin_ns < stop
        if not ioctls or crosses or (not clear and (apart or again or is_clear(ioctls[0]))):
            if ioctls:
                result.append(_burst(ioctls, end))
            ioctls, end, last = [ioctl], ioctl.end_ns, 0
            fetched_slots.clear()
        else:
            if not clear or not apart:
                end = max(end, ioctl.end_ns)
            ioctls.append(ioctl)
        fetched_slots.add((ioctl.cmd, ioctl.slot))
        last = max(last, ioctl.end_ns)
    return [*result, _burst(ioctls, end)] if ioctls else result


def _burst(ioctls: list[Ioctl], end: int) -> Burst:
    return Burst(tuple(ioctls), ioctls[0].begin_ns, end, not is_clear(ioctls[0]))


_begin = attrgetter("begin_ns")


def lock_waits(ioctl: Ioctl) -> dict[str, int] | None:
    """Waiting time by lock, in ns; None if none was measured."""
    waits = {"slots_lock": ioctl.slots_lock_ns, "mmu_lock": ioctl.mmu_lock_ns, "other": ioctl.other_lock_ns}
    known = {lock: waited for lock, waited in waits.items() if waited >= 0}
    return known or None


def slots(process: Process, found: Sequence[Burst]) -> list[breakdown.Slot]:
    """The slots that were fetched and have a known place."""
    known = process.places
    used = sorted({i.slot for burst in found for i in burst.ioctls if kvm.name_of(i.cmd) != "RESET_DIRTY_RINGS"})
    if not used:
        used = sorted({i.slot for i in process.memslots if i.flags & kvm.MEM_LOG_DIRTY_PAGES and i.size})
    return [breakdown.Slot(slot=slot, base=known[slot][0], size_bytes=known[slot][1]) for slot in used if slot in known]


def mode(found: Sequence[Burst], logging: bool, stop: int | None) -> DirtyLogMode:
    """The mode. A dirty ring that is already drained may need no ioctl at all."""
    names = {kvm.name_of(cmd) for cmd in {i.cmd for burst in found for i in burst.ioctls}}
    before = {i.cmd for burst in found for i in burst.ioctls if stop is None or i.begin_ns < stop}
    running = {kvm.name_of(cmd) for cmd in before}
    if "CLEAR_DIRTY_LOG" in names:
        return DirtyLogMode.MANUAL
    if "RESET_DIRTY_RINGS" in names and "GET_DIRTY_LOG" not in running:
        # On arm64 the rings have a backup bitmap, which is fetched once after the stop.
        return DirtyLogMode.RING
    if "GET_DIRTY_LOG" in names:
        return DirtyLogMode.LEGACY
    return DirtyLogMode.RING if logging and stop is not None else DirtyLogMode.NONE
