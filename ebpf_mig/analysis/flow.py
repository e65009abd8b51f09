# SPDX-License-Identifier: Apache-2.0
"""Whether what one process sent is what another one received, where no address shows it.

In: the transfers of two processes. Out: a `Fit`, or None.

Forwarders (a proxy, ssh, socat, libvirtd) change addresses and the size of calls, but not the number of bytes, and they
can pass nothing on before they have it. Both ends count the bytes since tracing began, so the counts differ by what
only one of them saw. The end of the stream shows by how much. With that difference, nothing may have been received
before it was sent, and everything soon after. No content is looked at, so this also holds for TLS and compression.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.reception import LOADED_BYTES, STREAM_BYTES
from ebpf_mig.analysis.wire import PEEKED_BYTES
from ebpf_mig.recording.events import RECEIVE, Transfer

LATE_NS = 1_000_000_000
"""Forwarders pass bytes on within this time."""
MAGIC_BYTES = 4
"""What QEMU's destination reads first with MSG_PEEK (`migration_channel_read_peek`, migration/channel.c)."""
WHOLE_BYTES = 64 << 10
"""Two streams of at least this length that are equal to the byte are the same one."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The two streams can be the same one."""

    bytes: int
    """What both ends counted."""
    whole: bool
    """The counts are equal to the byte."""
    late_ns: int
    """The longest time in which a byte was on its way, as far as the calls show, ns."""


@dataclass(frozen=True, slots=True)
class Flow:
    """One direction of one socket over time. All lists have the same length, in order of time."""

    pid: int
    socket: int
    since: list[int]
    """The number of bytes so far before each batch of calls. It is more than after the one before if calls between them
    are not in the recording."""
    until: list[int]
    """The same after each batch."""
    begin: list[int]
    end: list[int]

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.until[-1]


def flows(transfers: Iterable[Transfer], direction: int) -> list[Flow]:
    """The flows that can be a migration's: large calls, and enough bytes for a VM's state."""
    by_socket: dict[tuple[int, int], list[Transfer]] = {}
    for transfer in transfers:
        if transfer.direction == direction and transfer.bytes and transfer.socket:
            by_socket.setdefault((transfer.pid, transfer.socket), []).append(transfer)
    found = []
    for (pid, socket), calls in by_socket.items():
        calls.sort(key=lambda t: (t.position, t.end_ns))
        since, until = [t.position for t in calls], [t.position + t.bytes for t in calls]
        if until[-1] >= LOADED_BYTES and sum(t.bytes for t in calls) >= STREAM_BYTES * sum(t.calls for t in calls):
            end = [t.end_ns for t in calls]
            # The begin of a hidden send is not known, only that it is not before the end of the one before.
            begin = [t.begin_ns if not t.hidden else before for t, before in zip(calls, [0, *end], strict=False)]
            found.append(Flow(pid, socket, since, until, begin, end))
    return found


def fits(sent: Flow, received: Flow) -> Fit | None:
    """Whether `received` can be the other end of `sent`; both streams have ended. Both clocks are the same."""
    unseen = sent.bytes - received.bytes
    if received.end[-1] < sent.begin[-1] or received.end[-1] - sent.end[-1] > LATE_NS:
        return None
    late = _late(sent, received, unseen)
    if late is None or late > LATE_NS:
        return None
    counted = min(sent.bytes, received.bytes)
    return Fit(counted, -PEEKED_BYTES <= unseen <= 0 and counted >= WHOLE_BYTES, late)


def _late(sent: Flow, received: Flow, unseen: int) -> int | None:
    """The longest time on the way, ns; None if something was received before it was sent."""
    most = [*sent.since, sent.bytes]  # that can have been sent before each batch began, with what is not recorded
    for until, end in zip(received.until, received.end, strict=True):
        if until + unseen > most[bisect_right(sent.begin, end)] + PEEKED_BYTES and until + unseen > 0:
            return None
    late = 0
    for until, end in zip(sent.until, sent.end, strict=True):
        at = bisect_left(received.until, until - unseen)
        if at < len(received.until) and until - unseen > 0 and received.begin[0] <= end:
            late = max(late, received.end[at] - end)
    return late


def length(process: Process, direction: int, keys: Collection[int]) -> int | None:
    """The number of bytes that one side counted on the migration's carriers, and so the other one, too.

    None if there are fewer than `WHOLE_BYTES`. A destination that looks at the first bytes before it reads them (QEMU:
    MSG_PEEK) counts these twice; here they count once.
    """
    counted = 0
    for key in keys:
        calls = process.streams.get((direction, key), ())
        counted += sum(t.bytes for t in calls)
        first = next((t for t in calls if t.bytes), None)
        if direction == RECEIVE and first is not None and (first.calls, first.bytes) == (1, MAGIC_BYTES):
            counted -= MAGIC_BYTES
    return counted if counted >= WHOLE_BYTES else None


def best(sources: Sequence[Flow], destinations: Sequence[Flow]) -> tuple[Flow, Flow, Fit] | None:
    """The pair of flows of two processes that fits best: whole ones first, then the one with most bytes."""
    return max(
        _fitting(sources, destinations), key=lambda one: (one[2].whole, one[2].bytes, -one[2].late_ns), default=None
    )


def likeness(sources: Sequence[Flow], destinations: Sequence[Flow]) -> tuple[int, int]:
    """How many connections of two processes can be the same: equal to the byte, and all. (0, 0): the processes can be
    no pair. With multifd, one connection may fit another migration's by chance; all of them hardly do."""
    found = _fitting(sources, destinations)
    equal = [one for one in found if one[2].whole]
    return _counterparts(equal), _counterparts(found)


def _counterparts(fitting: Sequence[tuple[Flow, Flow, Fit]]) -> int:
    """The number of flows that have a counterpart, on the side that has fewer of them."""
    return min(len({id(one[0]) for one in fitting}), len({id(one[1]) for one in fitting}))


def _fitting(sources: Sequence[Flow], destinations: Sequence[Flow]) -> list[tuple[Flow, Flow, Fit]]:
    return [(s, d, fit) for s in sources for d in destinations if (fit := fits(s, d)) is not None]
