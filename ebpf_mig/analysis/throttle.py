# SPDX-License-Identifier: Apache-2.0
"""Throttling: time before the pause request in which the VMM held its vCPUs outside the guest to slow it down.

In: the source's vCPUs, kicks and ioctls. Out: the stretches, and a row of the breakdown.

Two mechanisms are known. With auto-converge, a timer kicks each vCPU and its thread then sleeps (QEMU:
system/cpu-throttle.c, `cpu_throttle_thread`). The timer runs in the main loop; the migration thread requests the pause.
With the dirty limit, the vCPU's ring is full, and its thread resets the rings and sleeps (system/dirtylimit.c,
`dirtylimit_vcpu_execute`).
"""

from __future__ import annotations

from bisect import bisect_left

from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.vcpu import Timeline
from ebpf_mig.breakdown import Span, Throttled
from ebpf_mig.recording.events import Ioctl, Kick

LEAST_NS = 1_000_000
"""A shorter stretch outside the guest is an ordinary long exit."""
ALONE_NS = 20_000_000
"""Throttling repeats. A single stretch counts as throttling only if it is this long."""


def stretches(source: Process, until: int, stopping: int | None) -> list[Span]:
    """Stretches before `until` in which throttling held all vCPUs outside the guest. The last one is cut at `until`.

    `until` is the pause request, made by thread `stopping`. The vCPU that left the guest last decides whether a gap is
    throttling.
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
    """Whether a thread other than `stopping` kicked the vCPU out, or the vCPU slept after a reset of its ring.

    A kick also counts if the vCPU had just left by itself, for an exit to user space: it sleeps before it goes back.
    """
    gap = line.covering(stretch[0])
    kicks = source.kicks_by_tid.get(line.tid, [])
    begin = bisect_left(kicks, gap.entry or 0 if gap else 0, key=_at)
    late = min(stretch[0] + LEAST_NS, stretch[1] - LEAST_NS + 1)
    if any(kick.tid != stopping for kick in kicks[begin : bisect_left(kicks, late, lo=begin, key=_at)]):
        return True
    resets = source.ring_resets.get(line.tid, [])
    at = bisect_left(resets, stretch[0], key=_begin)
    return at < len(resets) and resets[at].end_ns + LEAST_NS <= stretch[1]


def _at(kick: Kick) -> int:
    return kick.at_ns


def _begin(ioctl: Ioctl) -> int:
    return ioctl.begin_ns


def observe(source: Process | None, since: int, requested: int, stopping: int | None) -> Throttled | None:
    """The time that throttling took from the guest between `since` and the pause request; None if none was seen."""
    found = [s for s in stretches(source, requested, stopping) if s[0] >= since] if source else []
    if not found:
        return None
    took = [end - begin for begin, end in found]
    last = took[-1] if found[-1][1] == requested else 0
    return Throttled(dark_ns=sum(took), stretches=len(took), longest_ns=max(took), before_request_ns=last)
