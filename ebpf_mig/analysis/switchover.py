# SPDX-License-Identifier: Apache-2.0
"""The switchover: when the guest stopped on the source, when it started on the destination.

In: the two processes, the source's sends and the VMM's stop marks. Out: a `Switchover`, or None.

After a completed migration the source's guest never runs again. If it does, the migration failed or was cancelled.
The blackout is then the gap around the attempt. That need not be the longest gap, because throttling makes gaps too.

A guest that was paused when the migration began was stopped by somebody else: the migration has no switchover.

Throttling can already hold all vCPUs outside KVM_RUN when the pause is requested. The switchover then begins with the
request, not when throttling stopped the last vCPU: see `throttle.py`. The same holds for a vCPU that left by itself
and waited long for a lock of the VMM or for a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from ebpf_mig.analysis import source_work, throttle
from ebpf_mig.analysis import stopper as stoppers
from ebpf_mig.analysis.process import Process, begun
from ebpf_mig.analysis.spans import FOREVER, any_in
from ebpf_mig.analysis.stopper import Workers
from ebpf_mig.analysis.vcpu import Timeline
from ebpf_mig.breakdown import SwitchoverKind
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import Transfer

Gap = tuple[int, int | None]
"""From the last stop to the first entry; None: none was seen."""
LONG_GONE_NS = 1_000_000_000
"""A vCPU that left KVM_RUN more than this before the last one did not leave because of the pause."""
WAITED_NS = 10_000_000
"""A vCPU that is outside for longer than this before the pause request, and is then run again, did not leave for it."""
VOLLEY_NS = 1_000_000
"""Kicks this close together belong to one request, also those to vCPUs that had already left KVM_RUN."""


@dataclass(frozen=True, slots=True)
class Switchover:
    """Instants are absolute, in ns."""

    kind: SwitchoverKind
    requested: int
    """The pause request."""
    stop: int
    """When the last vCPU stopped. The request, if throttling already held all vCPUs outside KVM_RUN."""
    first_start: int | None
    last_start: int | None
    stops: dict[int, int]
    """By vCPU index."""
    starts: dict[int, int]
    kicks: dict[int, int]
    """The pause request's kicks, by vCPU index."""
    stopper: int | None
    """Tid of the thread that requested the pause."""
    dark: int
    """When the last vCPU left the guest. It is before `requested` only if throttling held all vCPUs outside."""


def find(
    source: Process,
    destination: Process | None,
    sends: Sequence[Transfer],
    stop_marks: Sequence[int],
    paused: Gap | None = None,
) -> Switchover | None:
    """The switchover of `source`. `sends` are its sends on the migration's sockets; `paused` is what `paused` gave."""
    gaps = [gap for gap in source.gaps if gap != paused]
    if not gaps:
        return None
    workers = Workers(source.fetchers, frozenset(send.tid for send in sends))
    started = _first_start(destination)
    if started is not None:
        for begin, end in gaps:
            if begin <= started and (end is None or started < end):
                starts = {
                    index: at
                    for index, line in (destination.vcpus if destination else {}).items()
                    if (at := line.start_after(begin)) is not None
                }
                return _at(source, SwitchoverKind.COMPLETED, begin, starts, workers)
    begin, end = gaps[-1]
    if end is None:
        if _active_after(source, begin, sends):
            return _at(source, SwitchoverKind.STOPPED, begin, {}, workers)
        gaps = gaps[:-1]  # The recording or the process ended while the vCPU was outside, as in any exit.
    chosen = _attempt(source, gaps, sends, stop_marks)
    if chosen is None:
        return None
    begin, end = chosen
    starts = {
        index: gap.end
        for index, line in source.vcpus.items()
        if (gap := line.covering(begin)) is not None and gap.end is not None
    }
    return _at(source, SwitchoverKind.ABORTED, begin, starts, workers)


def paused(source: Process, began: int | None, sends: Sequence[Transfer]) -> Gap | None:
    """The stretch without guest in which the migration began; None if the guest ran then.

    A snapshot stops the guest first: the thread that asked for the stop then switches logging on, and sends nothing
    (QEMU: migration/savevm.c, `save_snapshot`).
    """
    if began is None:
        return None
    found = next((gap for gap in source.gaps if gap[0] < began and (gap[1] is None or gap[1] > began)), None)
    if found is None or any(was_to_run(source, line, found[0], began) for line in source.vcpus.values()):
        return None
    if sends:
        return found
    loggers = {i.tid for i in source.memslots if i.begin_ns == began}
    return None if stoppers.find(source, found[0], Workers(frozenset(), frozenset())).tid in loggers else found


def stopped_early(source: Process, destination: Process | None, found: Switchover, sends: Sequence[Transfer]) -> bool:
    """Whether the guest of a `STOPPED` switchover had stopped before, and not for it: it shut down, or was paused.

    Another thread asked for that stop than those that fetch and send, these went on fetching, and the destination,
    which was traced, never started.
    """
    if found.kind != SwitchoverKind.STOPPED or destination is None or found.stopper is None:
        return False
    if found.stopper in source.fetchers or any(send.tid == found.stopper for send in sends):
        return False
    return any(i.begin_ns > found.stop and i.tid in source.fetchers for i in source.dirty_log)


def _first_start(destination: Process | None) -> int | None:
    lines = destination.vcpus.values() if destination else ()
    return min((line.first_run for line in lines if line.first_run is not None), default=None)


def _at(source: Process, kind: SwitchoverKind, dark: int, starts: dict[int, int], workers: Workers) -> Switchover:
    gaps = {index: gap for index, line in source.vcpus.items() if (gap := line.covering(dark)) is not None}
    stops = {index: gap.begin for index, gap in gaps.items() if gap.begin is not None}
    stopper = stoppers.find(source, dark, workers)
    requested = _requested(dark, stops, stopper.kicks)
    asked = min(stopper.kicks.values(), default=dark)
    first_start = min(starts.values(), default=None)
    in_time = first_start is None or asked <= first_start  # a later kick did not pause this guest
    if requested == dark < asked and in_time and _held(source, dark, asked, stopper.tid):
        requested = asked
    return Switchover(
        kind=kind,
        requested=requested,
        stop=max(dark, requested),
        first_start=first_start,
        last_start=max(starts.values(), default=None),
        stops=stops,
        starts=starts,
        kicks=stopper.kicks,
        stopper=stopper.tid,
        dark=dark,
    )


def _held(source: Process, dark: int, asked: int, stopper: int | None) -> bool:
    """Whether the last vCPU had not left the guest for the pause: it was throttled, or waited in the VMM for long."""
    if (dark, asked) in throttle.stretches(source, asked, stopper):
        return True
    if asked - dark < WAITED_NS:
        return False
    last = [line for line in source.vcpus.values() if (gap := line.covering(dark)) is not None and gap.begin == dark]
    return any(was_to_run(source, line, dark, asked) for line in last)


def was_to_run(source: Process, line: Timeline, dark: int, after: int) -> bool:
    """Whether the VMM called KVM_RUN after that instant, in the gap around `dark`, and the guest's stop followed.

    The vCPU had waited for a lock or a CPU: a VMM does not run a vCPU that is paused. It does so when it sets a paused
    guest going again, and that KVM_RUN can return at once, too (QEMU: accel/kvm/kvm-all.c, `kvm_cpu_kick_self`). So
    before the vCPU runs, the clock or registers must be read.
    """
    gap = line.covering(dark)
    if gap is None:
        return False
    end = gap.end if gap.end is not None else FOREVER
    entry = next((at for at, _ in line.immediate if after <= at < end), None)
    if entry is None or gap.end is None:
        return entry is not None
    later = takewhile(lambda ioctl: ioctl.begin_ns < end, begun(source.ioctls, entry))
    return any(source_work.is_vcpu_read(i) or kvm.name_of(i.cmd) == "GET_CLOCK" for i in later)


def _requested(stop: int, stops: dict[int, int], kicks: dict[int, int]) -> int:
    """The pause request: the first kick that stopped a vCPU, or the first stop if there are no kicks."""
    if not kicks:
        near = [at for at in stops.values() if stop - at <= LONG_GONE_NS]
        return min(near, default=stop)
    hit = [at for index, at in kicks.items() if index in stops and at <= stops[index]]
    if not hit:
        return stop
    first = min(hit)
    volley = [at for at in kicks.values() if first - VOLLEY_NS <= at <= first]
    return min(volley)


def _active_after(source: Process, stop: int, sends: Sequence[Transfer]) -> bool:
    """Whether the source continued the migration after the stop. If not, the recording or the process ended."""
    after = any(send.begin_ns >= stop for send in sends)
    return after or any(i.begin_ns >= stop and _is_save(i.cmd) for i in source.ioctls)


def _is_save(cmd: int) -> bool:
    name = kvm.name_of(cmd)
    return name in kvm.VCPU_STATE_GET or name in ("GET_DIRTY_LOG", "GET_CLOCK", "KVMCLOCK_CTRL")


def _attempt(
    source: Process,
    gaps: Sequence[tuple[int, int | None]],
    sends: Sequence[Transfer],
    stop_marks: Sequence[int],
) -> tuple[int, int | None] | None:
    """The gap in which the source tried to hand over: the one with the strongest evidence, the latest of equals."""
    clocks = [i.begin_ns for i in source.ioctls if kvm.name_of(i.cmd) in ("GET_CLOCK", "KVMCLOCK_CTRL")]
    reads = [i.begin_ns for i in source.ioctls if source_work.is_vcpu_read(i)]
    fetched = [i.begin_ns for i in source.ioctls if kvm.name_of(i.cmd) == "GET_DIRTY_LOG"]
    sent = [send.begin_ns for send in sends]
    best: tuple[tuple[bool, bool, bool, bool, int], tuple[int, int | None]] | None = None
    for begin, end in gaps:
        # Only a pause reads the clock or notifies the guest of it; other stops of vCPUs do neither.
        paused = any_in(clocks, begin, end) or any_in(stop_marks, begin, end)
        saved = any_in(reads, begin, end)
        moved = any_in(fetched, begin, end) or any_in(sent, begin, end)
        if not (paused or (saved and moved)):
            continue
        score = (paused and saved and moved, paused and (saved or moved), paused, moved, begin)
        if best is None or score > best[0]:
            best = (score, (begin, end))
    return best[1] if best else None
