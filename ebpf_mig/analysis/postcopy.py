# SPDX-License-Identifier: Apache-2.0
"""Postcopy: pages that the destination fetches, while the guest is dark and after its start.

In: a `Case`. Out: which of the source's sockets only answer, and a row of the breakdown. Answers are not on its
way to the handover: the destination asks for pages while it restores, and waits for each by itself.
"""

from __future__ import annotations

from ebpf_mig.analysis import sockets
from ebpf_mig.analysis.migration import Case, postcopy
from ebpf_mig.analysis.process import RECEIVE, SEND, key_of
from ebpf_mig.breakdown import Postcopy, Served
from ebpf_mig.recording.events import Transfer


def answering(case: Case) -> frozenset[int]:
    """The source's migration sockets on which a thread first listened after the stop, and then sent.

    Cloud Hypervisor opens such a connection for postcopy (vmm/src/migration/transport.rs, `open_fault_connection`).
    QEMU has none: its migration thread sends pages, asked for or not, and another thread reads what is asked for.
    """
    source, found = case.source, case.switchover
    if source is None or found is None or not postcopy(case):
        return frozenset()
    first: dict[tuple[int, int], int] = {}
    serving: set[int] = set()
    for transfer in case.transfers(source):
        if transfer.begin_ns < found.stop or not transfer.bytes:
            continue
        talker = transfer.tid, key_of(transfer)
        if first.setdefault(talker, transfer.direction) == RECEIVE and transfer.direction == SEND:
            serving.add(talker[1])
    return frozenset(serving)


def own_work(case: Case) -> list[Transfer]:
    """The source's transfers for the migration without those on sockets that only answer."""
    serving = answering(case)
    found = case.transfers(case.source)
    return [t for t in found if key_of(t) not in serving] if serving else found


def observe(case: Case) -> Postcopy | None:
    """What was fetched when; None in another mode, or where the start or the destination was not seen."""
    found, destination = case.switchover, case.destination
    if found is None or destination is None or found.first_start is None or not postcopy(case):
        return None
    start = found.first_start
    ends = sockets.mirrors(case.source, destination) if case.source else {}
    keys = {ends[key] for key in answering(case) if key in ends}
    mine = [t for t in case.transfers(destination) if t.end_ns > found.stop and (not keys or key_of(t) in keys)]
    received = [t.end_ns for t in mine if t.direction == RECEIVE and t.bytes and t.end_ns > start]
    return Postcopy(
        while_dark=_served(mine, found.stop, start) if keys else None,
        after=_served(mine, start, 1 << 63),
        drained_ns=max(received) - start if received else 0,
    )


def _served(transfers: list[Transfer], begin: int, end: int) -> Served:
    """What lies in [begin, end); of a run of calls across a border, the share of its time."""
    size = asked = waited = 0.0
    known = True
    for transfer in transfers:
        length = transfer.end_ns - transfer.begin_ns
        inside = min(transfer.end_ns, end) - max(transfer.begin_ns, begin)
        if inside < 0 or (not inside and length):
            continue
        share = inside / length if length else 1.0
        if transfer.direction == SEND:
            asked += transfer.calls * share
            continue
        size += transfer.bytes * share
        waited += transfer.off_cpu_ns * share
        known = known and transfer.off_cpu_ns >= 0
    return Served(bytes=round(size), asked=round(asked), waited_ns=round(waited) if known else None)
