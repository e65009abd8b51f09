# SPDX-License-Identifier: Apache-2.0
"""Bytes in flight: each long stretch in which sent bytes had not arrived, and TCP's reason for it.

In: a `TracedMigration`, the window and the source's work in it. Out: rows of the breakdown, over all connections.
Positions in the stream match the two sides: byte n was sent when the send that covers it returned, and received when
the receive that covers it returned.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import msgspec

from ebpf_mig.analysis import sockets
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.source_work import Work
from ebpf_mig.analysis.spans import FOREVER
from ebpf_mig.breakdown import Span, Transport, Wire
from ebpf_mig.recording.events import RECEIVE, SEND, Retransmit, Segment, Transfer

_at, _ended = attrgetter("at_ns"), attrgetter("end_ns")

FLIGHT_NS = 1_000_000
"""Shorter stretches are ordinary network latency and are not reported."""
MOST_STRETCHES = 5
DELAYED_ACK_NS = 35_000_000
"""Linux delays an acknowledgement by 40 ms or more, to send it along with data (TCP_DELACK_MIN, include/net/tcp.h)."""
PROMPT_NS = 1_000_000
"""A segment that arrives this soon after an acknowledgement was released by it."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch in which bytes were in flight while the destination received nothing."""

    sent: int
    """When the first byte had been sent, or the destination's previous receive if that was later."""
    received: int
    size: int
    carried: int = 0
    """Begin of the send that contains the first byte."""
    coalesced: bool = False
    """The receive that ended it was recorded in a batch of calls. Segments were not kept then either."""


PEEKED_BYTES = 64
"""QEMU's destination reads the first 4 bytes with MSG_PEEK, which counts as a receive, so its positions are ahead."""


BOTH = "state and pages"
PASSED_ON = "processes in between had them"
WIRELESS = {
    Transport.UNIX: "a UNIX socket", Transport.VSOCK: "a vsock", Transport.PIPE: "a pipe", Transport.FILE: "a file",
}  # fmt: skip
SOCKETS_WITHOUT_WIRE = frozenset({Transport.UNIX, Transport.VSOCK})
"""Full buffers there are those of the reader."""


def observe(traced: TracedMigration, window: Span | None, work: Work | None) -> list[Wire] | None:
    """The longest stretches in the window, over all connections; None unless both ends were traced."""
    source, destination = traced.source, traced.destination
    if window is None or source is None or destination is None:
        return None
    found: list[Wire] = []
    state_from, answering = work.state_from if work else None, traced.answering
    direct = sockets.mirrors(source, destination)
    for near, far in traced.channels.ends:
        sends = source.streams.get((SEND, near), [])
        receives = destination.ended(destination.streams.get((RECEIVE, far), []), window[0])
        segments = [s for p in (source, destination) for s in _since(p.segments, window[0]) if s.socket in (near, far)]
        segments.sort(key=attrgetter("at_ns", "pid"))
        again = [r for r in source.retransmits if r.socket == near]
        state = None if state_from is None else FOREVER if near in answering else state_from
        rows = gather(sends, receives, segments, window, again, state)
        if traced.postcopy and not answering:
            rows = [msgspec.structs.replace(row, message=row.message.replace("state", BOTH)) for row in rows]
        if near not in direct:
            rows = [msgspec.structs.replace(row, reason="passed on", evidence=PASSED_ON) for row in rows]
        elif traced.channels.transport in WIRELESS:
            rows = [without_wire(row, WIRELESS[traced.channels.transport]) for row in rows]
        found += rows
    return sorted(found, key=lambda w: (-w.in_flight_ns, w.sent))[:MOST_STRETCHES]


def _since(segments: list[Segment], begin: int) -> list[Segment]:
    """The segments from `begin` on, and the one before, which shows that segments were traced at all."""
    return segments[max(0, bisect_left(segments, begin, key=attrgetter("at_ns")) - 1) :]


def gather(
    sends: Sequence[Transfer],
    receives: Sequence[Transfer],
    segments: Sequence[Segment],
    window: tuple[int, int],
    again: Sequence[Retransmit] = (),
    state_from: int | None = None,
) -> list[Wire]:
    """The longest stretches of one connection in the window, with instants relative to the window's begin.

    `sends` and `receives` are those of the two ends of one stream, in order. `segments` arrived at either end. `again`
    are the sender's retransmissions, in order. `state_from` is when it began to send state.
    """
    if not sends or not receives:
        return []
    ahead = receives[-1].position + receives[-1].bytes - sends[-1].position - sends[-1].bytes
    if 0 < ahead <= PEEKED_BYTES:
        near = (r for r in receives if r.end_ns >= window[0])
        receives = [msgspec.structs.replace(r, position=max(0, r.position - ahead)) for r in near]
    origin = window[0]
    found = [(s, *_reason(s, sends, receives, segments, again)) for s in _stretches(sends, receives, window)]
    found.sort(key=lambda item: item[0].sent - item[0].received)
    return [
        Wire(
            bytes=s.size,
            sent=s.sent - origin,
            received=s.received - origin,
            in_flight_ns=s.received - s.sent,
            reason=reason,
            evidence=evidence,
            message="" if state_from is None else "state" if s.carried >= state_from else "pages",
        )
        for s, reason, evidence in found[:MOST_STRETCHES]
    ]


def without_wire(row: Wire, carrier: str) -> Wire:
    """The row for a carrier without a wire. Written bytes can be read immediately, so only the reader can be late."""
    return msgspec.structs.replace(row, reason="late reader", evidence=f"{carrier} has no wire")


def _reaches(transfer: Transfer) -> int:
    """The position of the first byte after the transfer."""
    return transfer.position + transfer.bytes


def _stretches(sends: Sequence[Transfer], receives: Sequence[Transfer], window: tuple[int, int]) -> list[Stretch]:
    """One for each receive whose first byte was sent FLIGHT_NS earlier or more, after as long without a receive."""
    found: list[Stretch] = []
    quiet_from = window[0]
    for receive in (r for r in receives if r.end_ns >= window[0]):
        # Positions grow, so the first send that reaches beyond the receive's first byte carried it.
        carrier = bisect_right(sends, receive.position, key=_reaches)
        quiet, quiet_from = quiet_from, max(quiet_from, receive.end_ns)
        if carrier == len(sends) or receive.end_ns > window[1]:
            continue
        sent = max(sends[carrier].end_ns, quiet)
        if receive.end_ns - sent < FLIGHT_NS:
            continue
        done = bisect_right(sends, receive.end_ns, key=_ended)
        outstanding = max(_reaches(sends[done - 1]) if done else 0, receive.position + receive.bytes) - receive.position
        found.append(Stretch(sent, receive.end_ns, outstanding, sends[carrier].begin_ns, receive.calls > 1))
    return found


def _reason(
    stretch: Stretch,
    sends: Sequence[Transfer],
    receives: Sequence[Transfer],
    segments: Sequence[Segment],
    again: Sequence[Retransmit],
) -> tuple[str, str]:
    """(reason, evidence) from the segments within the stretch."""
    sender = sends[0].socket, sends[0].pid
    receiver = receives[0].socket, receives[0].pid
    first = bisect_left(segments, stretch.sent, key=_at)
    within = segments[first : bisect_right(segments, stretch.received, key=_at)]
    data = [s for s in within if (s.socket, s.pid) == receiver and s.payload]
    acks = [s for s in within if (s.socket, s.pid) == sender and s.acked]
    if not segments:
        return "unknown", "no TCP segments were traced"
    if not data and stretch.coalesced:
        return "unknown", "calls and segments were too many to be kept one by one"
    if not data:
        return "late reader", "all had arrived before"
    arrived = data[0].at_ns
    waited = arrived - stretch.sent
    if waited < (stretch.received - stretch.sent) // 2:
        return "late reader", f"they had arrived {(stretch.received - arrived) / 1e6:.3f} ms before they were read"
    ack = next((s for s in reversed(acks) if s.at_ns <= arrived), None)
    repeated = [r for r in again if stretch.sent <= r.at_ns <= arrived]
    if repeated and (ack is None or ack.at_ns < repeated[-1].at_ns):
        return "retransmission", _repeated(stretch, repeated)
    if ack is None or arrived - ack.at_ns > PROMPT_NS:
        return "unknown", f"the first data arrived after {waited / 1e6:.3f} ms, no acknowledgement right before it"
    held = f"{ack.unsent} B behind {ack.in_flight} B not acknowledged"
    if ack.in_flight and ack.window and ack.in_flight + min(ack.unsent, 1) > ack.window:
        return "receive window", f"{held}, all that the window of {ack.window} B allows"
    if ack.unsent and not ack.payload and waited >= DELAYED_ACK_NS:
        late = f"bare ACK after {(ack.at_ns - stretch.sent) / 1e6:.1f} ms"
        return "Nagle, delayed ACK", f"{held}; {late}"
    if ack.unsent:
        return "waiting for an ACK", f"{held} for {waited / 1e6:.3f} ms"
    return (
        "unknown",
        f"an ACK came right before the data, but nothing was held back ({waited / 1e6:.3f} ms)",
    )


def _repeated(stretch: Stretch, repeated: Sequence[Retransmit]) -> str:
    """The evidence for a retransmission as the reason: nothing later than the last one released the data."""
    first, last = (repeated[0].at_ns - stretch.sent) / 1e6, repeated[-1]
    times = "once" if len(repeated) == 1 else f"{len(repeated)} times"
    return f"{last.bytes} B sent again, {times}, first after {first:.1f} ms; no. {last.number} of its socket"
