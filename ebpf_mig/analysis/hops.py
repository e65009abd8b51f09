# SPDX-License-Identifier: Apache-2.0
"""The delay that each process on the way added to the migration's last byte.

In: a `TracedMigration` of one host, and the calls of the processes that hold the other ends of its carriers
(`Material.hops`). Out: a `Hop` for each process on the way, from the source on.

A process that passes the stream on (a proxy, socat, ssh, libvirtd) receives its last byte with its last receive on one
carrier, and has passed it on when its last send on the next one has returned. This also holds if it changes the number
of bytes, as ssh does. A way is followed carrier by carrier: the other end of a UNIX socket, of a TCP connection on this
host, or of a pipe. It ends where no end is known, for example because the next process is on another host.
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
    here, found = source, []
    left = [hop for _, hop in sorted(material.hops.items())]
    while (step := _next(here, key, left)) is not None:
        hop, into = step
        left.remove(hop)
        out = _way_out(hop, into, left, traced.destination)
        read = _last(hop, RECEIVE, into)
        passed = _last(hop, SEND, out) if out is not None else None
        if out is None or read is None or passed is None or passed < read:
            break
        sent = min(ends[key], read)  # the send may return after the byte was read
        found.append(_hop(material.hop_names[hop.pid], hop.pid, sent, read, passed, origin))
        ends, key, here = {out: passed}, out, hop
    return found


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


def _last(process: Process, direction: int, key: int) -> int | None:
    """When the last call that moved bytes there returned."""
    return max((t.end_ns for t in process.streams.get((direction, key), ()) if t.bytes), default=None)
