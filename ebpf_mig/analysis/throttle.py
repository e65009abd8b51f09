# SPDX-License-Identifier: Apache-2.0
"""The time that a VMM kept its vCPUs out of the guest on purpose, to slow it down, before it asked them to stop.

In: the source's vCPUs, kicks and ioctls. Out: the stretches, and a row of the breakdown.

Two ways are known. Auto-converge: a timer kicks each vCPU, whose thread then sleeps (QEMU: system/cpu-throttle.c,
`cpu_throttle_thread`; the timer runs in the main loop, the stop is asked for by the migration thread). Dirty limit: the
vCPU's ring is full, its thread resets the rings and sleeps (system/dirtylimit.c, `dirtylimit_vcpu_execute`).
"""

from __future__ import annotations

from bisect import bisect_left

from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.vcpu import Timeline
from ebpf_mig.breakdown import Span, Throttled
from ebpf_mig.recording.events import Ioctl, Kick

LEAST_NS = 1_000_000
"""A shorter stretch without guest is an ordinary exit that took its time."""
ALONE_NS = 20_000_000
"""A throttle acts again and again; a single stretch is taken for one only if it is this long."""


def stretches(source: Process, until: int, stopping: int | None) -> list[Span]:
    """Stretches before `until`, a pause request of thread `stopping`, in which the VMM kept all vCPUs out.

    Judged by the vCPU that left the guest last. The last stretch is cut at `until`.
    """
    by_begin = {gap.begin: line for line in source.vcpus.values() for gap in line.gaps if gap.begin is not None}
    found: list[Span] = []
    for begin, end in source.gaps:
        if begin >= until:
            break
        closed = until if end is None else min(end, until)
        if closed - begin >= LEAST_NS and _kept_out(source, by_begin[begin], (begin, closed), stopping):
            found.append((begin, closed))
    return found if len(found) > 1 or any(end - begin >= ALONE_NS for begin, end in found) else []


def _kept_out(source: Process, line: Timeline, stretch: Span, stopping: int | None) -> bool:
    """Did somebody else than the thread that stops vCPUs send it out, or did it sleep after a reset of its ring?"""
    gap = line.covering(stretch[0])
    kicks = source.kicks_by_tid.get(line.tid, [])
    begin = bisect_left(kicks, gap.entry or 0 if gap else 0, key=_at)
    if any(kick.tid != stopping for kick in kicks[begin : bisect_left(kicks, stretch[0], lo=begin, key=_at)]):
        return True
    resets = source.ring_resets.get(line.tid, [])
    at = bisect_left(resets, stretch[0], key=_begin)
    return at < len(resets) and resets[at].end_ns + LEAST_NS <= stretch[1]


def _at(kick: Kick) -> int:
    return kick.at_ns


def _begin(ioctl: Ioctl) -> int:
    return ioctl.begin_ns


def observe(source: Process | None, since: int, requested: int, stopping: int | None) -> Throttled | None:
    """What throttling took from the guest from `since` to the pause request; None if nothing was seen."""
    found = [s for s in stretches(source, requested, stopping) if s[0] >= since] if source else []
    if not found:
        return None
    took = [end - begin for begin, end in found]
    last = took[-1] if found[-1][1] == requested else 0
    return Throttled(dark_ns=sum(took), stretches=len(took), longest_ns=max(took), before_request_ns=last)
