# SPDX-License-Identifier: Apache-2.0
"""The delay that each process on the way added to the migration's last byte.

In: a `TracedMigration` of one host, and the calls of the processes that hold the other ends of its carriers
(`Material.hops`). Out: a `Hop` for each process on the way, from the source on.

A way is followed carrier by carrier: the other end of a UNIX socket, of a TCP connection on this host, or of a pipe. It
ends where no end is known, for example because the next process is on another host.

The instants of the last byte are then found from the end on. The destination has it with its last receive. A process
that passes the stream on (a proxy, socat, ssh, libvirtd) has done so when its last send before that has returned, and
had received it with its last receive before that. This also holds if it changes the number of bytes, and if it says
more on the same connection afterwards: ssh closes its channel, libvirtd's next calls follow the tunnelled stream.
"""

from __future__ import annotations

from collections.abc import Sequence

from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.sockets import mirrors
from ebpf_mig.breakdown import Hop
from ebpf_mig.recording.events import RECEIVE, SEND


def observe(traced: TracedMigration, origin: int) -> list[Hop] | None:
    """None if no process was followed; empty if the way through those that were is not known.

    Not in postcopy, where pages follow the state, nor across hosts, whose clocks differ by too much.
    """
    source, material = traced.source, traced.material
    if source is None or not material.hops or traced.postcopy or material.header.remote is not None:
        return None
    ends = {key: at for key in traced.channels.source if (at := _last(source, SEND, key)) is not None}
    if not ends:
        return []
    key = max(ends, key=lambda one: (ends[one], one))
    way = _way(traced, key)
    arrived = _arrived(traced)
    passages: list[tuple[int, int]] = []
    for hop, into, out in reversed(way):
        passed = _last(hop, SEND, out, arrived)
        read = _last(hop, RECEIVE, into, passed) if passed is not None else None
        if passed is None or read is None:
            return []
        passages.insert(0, (read, passed))
        arrived = read
    found, sent = [], ends[key]
    for (hop, _, _), (read, passed) in zip(way, passages, strict=True):
        sent = min(sent, read)  # the send may return after the byte was read
        found.append(_hop(material.hop_names[hop.pid], hop.pid, sent, read, passed, origin))
        sent = passed
    return found


def _way(traced: TracedMigration, key: int) -> list[tuple[Process, int, int]]:
    """The processes on the way from the source's carrier on, each with the carriers that it reads and writes."""
    assert traced.source is not None  # noqa: S101 - `observe` asked
    here, found = traced.source, []
    left = [hop for _, hop in sorted(traced.material.hops.items())]
    while (step := _next(here, key, left)) is not None:
        hop, into = step
        left.remove(hop)
        out = _way_out(hop, into, left, traced.destination)
        if out is None:
            break
        found.append((hop, into, out))
        here, key = hop, out
    return found


def _arrived(traced: TracedMigration) -> int | None:
    """When the destination had the last byte; None if it was not traced."""
    if traced.destination is None:
        return None
    ends = [_last(traced.destination, RECEIVE, key) for key in traced.channels.destination]
    return max((end for end in ends if end is not None), default=None)


def _hop(name: str, pid: int, sent: int, read: int, passed: int, origin: int) -> Hop:
    return Hop(
        process=name,
        pid=pid,
        sent=sent - origin,
        unread_ns=read - sent,
        held_ns=passed - read,
        delay_ns=passed - sent,
    )


def _next(here: Process, key: int, left: Sequence[Process]) -> tuple[Process, int] | None:
    """The process at the other end of a carrier, and its key there."""
    for hop in left:
        into = mirrors(here, hop).get(key)
        if into is not None and (RECEIVE, into) in hop.streams:
            return hop, into
    return None


def _way_out(hop: Process, into: int, left: Sequence[Process], destination: Process | None) -> int | None:
    """The carrier on which it passes on what it receives at `into`: the one to the destination or to a process that is
    followed, else the one with most bytes."""
    sent = {key: sum(t.bytes for t in calls) for (way, key), calls in hop.streams.items() if way == SEND}
    sent.pop(into, None)
    known = [mirrors(hop, other).keys() for other in (destination, *left) if other is not None]
    for keys in (*known, sent.keys()):
        ways = [key for key in sent if key in keys]
        if ways:
            return max(ways, key=lambda key: (sent[key], key))
    return None


def _last(process: Process, direction: int, key: int, until: int | None = None) -> int | None:
    """When the last call that moved bytes there returned, of those that began by `until`; not later than that."""
    calls = (t for t in process.streams.get((direction, key), ()) if t.bytes)
    if until is None:
        return max((t.end_ns for t in calls), default=None)
    return max((min(t.end_ns, until) for t in calls if t.begin_ns <= until), default=None)
