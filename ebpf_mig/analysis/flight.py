# SPDX-License-Identifier: Apache-2.0
"""What was in flight in the window over all of a migration's connections, whatever limits each.

In: a `Case`, the window and what the source did in it. Out: rows of the breakdown; `wire.py` has one connection's.
"""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter

import msgspec

from ebpf_mig.analysis import postcopy as served
from ebpf_mig.analysis import sockets, wire
from ebpf_mig.analysis.migration import Case, postcopy
from ebpf_mig.analysis.process import RECEIVE, SEND
from ebpf_mig.analysis.source_work import Work
from ebpf_mig.breakdown import Wire
from ebpf_mig.recording.events import Segment

BOTH = "state and pages"


def observe(case: Case, window: tuple[int, int] | None, work: Work | None) -> list[Wire] | None:
    """What was in flight in the window, over all connections; None unless both ends were traced."""
    source, destination = case.source, case.destination
    if window is None or source is None or destination is None:
        return None
    found: list[Wire] = []
    state_from, answering = work.state_from if work else None, served.answering(case)
    for near, far in sorted(sockets.mirrors(source, destination).items()):
        if near in case.channels.source:
            sends = source.streams.get((SEND, near), [])
            receives = destination.ended(destination.streams.get((RECEIVE, far), []), window[0])
            segments = [
                s for p in (source, destination) for s in _since(p.segments, window[0]) if s.socket in (near, far)
            ]
            segments.sort(key=attrgetter("at_ns", "pid"))
            again = [r for r in source.retransmits if r.socket == near]
            state = None if state_from is None else 1 << 63 if near in answering else state_from
            rows = wire.gather(sends, receives, segments, window, again, state)
            if postcopy(case) and not answering:
                rows = [msgspec.structs.replace(row, message=row.message.replace("state", BOTH)) for row in rows]
            found += rows if case.channels.transport != "unix" else map(wire.without_wire, rows)
    return sorted(found, key=lambda w: (-w.in_flight_ns, w.sent))[: wire.MOST]


def _since(segments: list[Segment], begin: int) -> list[Segment]:
    """Those from `begin` on, and one before, which tells that they were traced at all."""
    return segments[max(0, bisect_left(segments, begin, key=attrgetter("at_ns")) - 1) :]
