# SPDX-License-Identifier: Apache-2.0
"""Postcopy: the pages that the destination fetches during the blackout and after the guest's start.

In: a `TracedMigration`. Out: a row of the breakdown.
"""

from __future__ import annotations

from ebpf_mig.analysis import sockets
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.process import key_of
from ebpf_mig.analysis.spans import FOREVER
from ebpf_mig.breakdown import Postcopy, Served
from ebpf_mig.recording.events import RECEIVE, SEND, Transfer


def observe(traced: TracedMigration) -> Postcopy | None:
    """What was fetched before and after the start; None in another mode, or if there is no start or destination."""
    found, destination = traced.switchover, traced.destination
    if found is None or destination is None or found.first_start is None or not traced.postcopy:
        return None
    start = found.first_start
    ends = sockets.mirrors(traced.source, destination) if traced.source else {}
    keys = {ends[key] for key in traced.answering if key in ends}
    mine = [t for t in traced.transfers(destination) if t.end_ns > found.stop and (not keys or key_of(t) in keys)]
    received = [t.end_ns for t in mine if t.direction == RECEIVE and t.bytes and t.end_ns > start]
    return Postcopy(
        while_dark=_served(mine, found.stop, start) if keys else None,
        after=_served(mine, start, FOREVER),
        drained_ns=max(received) - start if received else 0,
    )


def _served(transfers: list[Transfer], begin: int, end: int) -> Served:
    """The transfers in [begin, end). A batch of calls that is partly inside counts in proportion to its time inside."""
    size = requests = waited = 0.0
    known = True
    for transfer in transfers:
        length = transfer.end_ns - transfer.begin_ns
        inside = min(transfer.end_ns, end) - max(transfer.begin_ns, begin)
        if inside < 0 or (not inside and length):
            continue
        share = inside / length if length else 1.0
        if transfer.direction == SEND:
            requests += transfer.calls * share
            continue
        size += transfer.bytes * share
        waited += transfer.off_cpu_ns * share
        known = known and transfer.off_cpu_ns >= 0
    return Served(bytes=round(size), asked=round(requests), waited_ns=round(waited) if known else None)
