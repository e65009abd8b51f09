# SPDX-License-Identifier: Apache-2.0
"""Whether the report of a condensed recording is that of the whole one, to the byte.

In: an `Analysis`, and the stretches whose events were summed up when the recording was read (`recording/condense.py`).
Out: yes or no. If no, the recording has to be read again as a whole.

What a process received is compared with five kinds of instants: those of its own KVM calls and vCPUs, the first arrival
of data at each of its sockets, the begin of the migration, those of the window, and the reading of our own cost before
it. If all sums lie before the window, and no
instant lies in one of them, then each sum is on the same side of each instant as all events that it stands for. Single
calls far from the window matter only for a pairing by the flow of bytes, and for snapshots and restores.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.result import Analysis
from ebpf_mig.analysis.spans import merged
from ebpf_mig.breakdown import PairedBy, Span, Transport
from ebpf_mig.recording.condense import Condensed
from ebpf_mig.recording.kinds import BY_TYPE

SHOWN_BEFORE_NS = 20_000_000
"""Calls this long before the window can be shown with it."""


def is_exact(analysis: Analysis, found: Condensed) -> bool:
    """Whether nothing in the report can depend on what the sums hide. `analysis` is that of the condensed recording."""
    sums = found.sums
    if not sums:
        return True
    migration, traced = analysis.breakdown.migration, analysis.traced
    if migration.transport not in (Transport.TCP, Transport.UNIX) or traced.snapshot or traced.restored:
        return False
    if migration.pairing is not None and migration.pairing.by != PairedBy.CONNECTION:
        return False
    needed = _needed_from(analysis)
    together = merged(span for spans in sums.values() for span in spans)
    if needed is None or together[-1][1] >= needed - SHOWN_BEFORE_NS:
        return False
    began = traced.began
    if began is not None and _inside(together, began):
        return False
    processes = traced.material.processes.values()
    if not all(_in_turn(process, found.left_out) for process in processes):
        return False
    return not any(_inside(own, at) for p in processes if (own := merged(sums.get(p.pid, ()))) for at in _instants(p))


def _in_turn(process: Process, left_out: Mapping[tuple[int, int], Sequence[Span]]) -> bool:
    """Whether no other data of its socket arrived while segments with sequence numbers were left out."""
    arrived: dict[int, list[int]] = defaultdict(list)
    for segment in process.segments:
        if segment.payload and (process.pid, segment.socket) in left_out:
            arrived[segment.socket].append(segment.at_ns)
    return all(
        bisect_right(at, end) - bisect_left(at, begin) == 1  # the last of them stayed
        for socket, at in arrived.items()
        for begin, end in left_out[process.pid, socket]
    )


def _needed_from(analysis: Analysis) -> int | None:
    """From when on single calls can matter; None: always."""
    attribution, material = analysis.attribution, analysis.traced.material
    if attribution.window is None:
        return None
    begin, switchover = attribution.window[0], analysis.traced.switchover
    found = [begin]
    if switchover is not None:
        found.append(switchover.dark)
    if attribution.load is not None:
        found.append(attribution.load.begin)
    if material.costs:
        for remote in (False, True) if material.header.remote is not None else (False,):
            found.append(max((c.at_ns for c in material.costs if c.remote is remote and c.at_ns <= begin), default=0))
    return min(found)


def _instants(process: Process) -> Iterator[int]:
    """When the process acted, and when the first data arrived at each of its sockets."""
    first = {s.socket: s.at_ns for s in reversed(process.segments) if s.payload}
    yield from first.values()
    lists = (process.ioctls, process.enters, process.exits, process.states, process.spans, process.execs)
    for events in lists:
        for event in events:
            yield from (getattr(event, name) for name in BY_TYPE[type(event)].instants)


def _inside(spans: Sequence[Span], at: int) -> bool:
    """Whether an instant lies in one of the spans, which are in order and apart."""
    index = bisect_left(spans, at, key=lambda span: span[1])
    return index < len(spans) and spans[index][0] <= at
