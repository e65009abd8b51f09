# SPDX-License-Identifier: Apache-2.0
"""When the last byte that a destination needed left the source, as the destination alone can see it.

In: the destination, its receives for the migration, and when it restored the state. Out: an instant, in ns.

Beside the source, the destination's part of the window begins when the source's last send ends. Alone, the arrival of
the bytes shows it: the segments of TCP, or the end of a sleep that the bytes ended. Two things are not known: how long
the bytes were on their way, and when they came to a reader that neither slept nor has a segment (UNIX sockets).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from ebpf_mig.analysis.loading import Loading, is_restore
from ebpf_mig.analysis.management import on_futex
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.wire import DELAYED_ACK_NS, PROMPT_NS
from ebpf_mig.recording.events import Transfer


class Wait(NamedTuple):
    """A wait for bytes, in ns."""

    begin: int
    end: int
    slept: int


def handed(destination: Process, receives: Sequence[Transfer], load: Loading) -> int:
    """The last arrival of bytes during the loading for which it waited less than a delayed acknowledgement takes.

    After a longer wait, the bytes had most likely been sent before, and TCP held them back. The result is the begin of
    the loading if nothing is known to have arrived later. Only receives of the threads that restore count: others may
    still receive memory.
    """
    loaders = {i.tid for i in destination.ioctls if is_restore(i) and load.begin <= i.begin_ns < load.end}
    needed = [t for t in receives if t.tid in loaders and t.bytes and load.begin < t.end_ns <= load.end]
    if not needed:
        return load.begin
    waits = _waits(destination, needed, load)
    found = load.begin
    for at in _arrivals(destination, needed, waits, load.begin):
        held = any(wait.slept >= DELAYED_ACK_NS and wait.begin < at <= wait.end + PROMPT_NS for wait in waits)
        if not held:
            found = max(found, at)
    return found


def _waits(destination: Process, needed: Sequence[Transfer], load: Loading) -> list[Wait]:
    """Waits during the loading that bytes ended: the next call of the thread that ended received them.

    A thread that also serves a monitor wakes up for that, and sleeps on: that is one wait.
    """
    found: dict[tuple[int, int], Wait] = {}
    for tid in sorted({t.tid for t in needed}):
        acts = [(t.end_ns, True) for t in needed if t.tid == tid]
        acts += [(i.end_ns, False) for i in destination.ioctls if i.tid == tid and i.end_ns > load.begin]
        acts.sort()
        for wait in destination.off_cpu:
            if wait.tid != tid or wait.preempted or on_futex(wait) or wait.end_ns <= load.begin:
                continue
            following = bisect_left(acts, (wait.end_ns, False))
            if following < len(acts) and acts[following][1]:
                begin, end, slept = found.get((tid, following), (wait.begin_ns, 0, 0))
                slept += wait.end_ns - wait.begin_ns
                found[tid, following] = Wait(min(begin, wait.begin_ns), max(end, wait.end_ns), slept)
    return list(found.values())


def _arrivals(destination: Process, needed: Sequence[Transfer], waits: Sequence[Wait], since: int) -> list[int]:
    """When bytes arrived, after `since`, that these calls received.

    Data that arrives inside a receive that did not sleep was sent before: the call acknowledged earlier data, or made
    room for more, and that released it.
    """
    last = max(t.end_ns for t in needed)
    sockets = {t.socket for t in needed}
    segments = [s for s in destination.segments if s.socket in sockets and s.payload and since < s.at_ns <= last]
    if not any(s.socket in sockets for s in destination.segments):
        return [wait.end for wait in waits if wait.end <= last]
    awake = [t for t in needed if t.calls <= 1 and not any(t.begin_ns < wait.end <= t.end_ns for wait in waits)]
    return [
        s.at_ns for s in segments if not any(t.socket == s.socket and t.begin_ns < s.at_ns < t.end_ns for t in awake)
    ]
