# SPDX-License-Identifier: Apache-2.0
"""Pairs of instants on two hosts whose order is known: bytes are sent before they are received.

In: the sends of one host and the receives of the other on a connection, as batches of calls with their position in the
stream. Out: points of `clock.Hull`s. A batch of many calls still bounds its first and its last byte. The first byte was
received when the first call ended, and that call took no longer than the longest. The last byte was not sent before the
last call began.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from ebpf_mig.analysis.wire import PEEKED_BYTES
from ebpf_mig.joining.clock import Hull
from ebpf_mig.recording.events import Segment, Transfer

_WRAP = 1 << 32

Mark = tuple[int, int]
"""A position in the stream and an instant: not sent before then, or received by then."""


@dataclass
class Direction:
    """One direction of one connection."""

    sends: Sequence[Transfer]
    receives: Sequence[Transfer]
    from_start: bool = False
    """Whether the sender was traced since the first byte of the connection."""


def sent_bytes(transfers: Iterable[Transfer]) -> int:
    """The position up to which the stream was traced."""
    return max([t.position + t.bytes for t in transfers], default=0)


def follows(direction: Direction, hull: Hull, receiver_is_other: bool) -> bool:
    """Adds the pairs of one direction to a hull. False if the positions of the two ends cannot be compared.

    `receiver_is_other`: the receives are on the other clock (the source sends), which bounds the offset from above;
    else from below, and negated.
    """
    sent, received = sent_bytes(direction.sends), sent_bytes(direction.receives)
    ahead = max(0, received - sent)
    if not sent or not received or (abs(received - sent) > PEEKED_BYTES and not direction.from_start):
        return False
    # Receiver positions that are too small make pairs looser, never wrong.
    receives = [(place - ahead, at) for place, at in _received(_blocks(direction.receives))]
    index, sends, latest = 0, _sent(_blocks(direction.sends)), None
    used: int | None = None
    for place, arrived in receives:
        while index < len(sends) and sends[index][0] <= place:
            latest = sends[index][1]
            index += 1
        if latest is None or latest == used:
            continue  # an earlier receive gave a tighter bound
        used = latest
        _add(hull, latest, arrived, receiver_is_other)
    return True


def _add(hull: Hull, before: int, after: int, after_is_other: bool) -> None:
    """Adds a pair at its instant on this clock. `after_is_other`: the later one of the two is on the other clock."""
    hull.add(before if after_is_other else after, after - before)


Block = tuple[int, int, int, int, int]
"""Position of the first byte, position after the last, begin, end, duration of the longest call (or of all)."""


def _blocks(transfers: Sequence[Transfer]) -> list[Block]:
    """Batches in stream order. Threads that share a connection report their positions late: such batches are merged."""
    blocks: list[Block] = []
    reached = ended = 0
    """The position after the last block, and its end."""
    for t in sorted(transfers, key=attrgetter("position", "end_ns")):
        size = t.bytes
        if size <= 0:
            continue
        first, begin, end = t.position, t.begin_ns if not t.hidden else 0, t.end_ns
        block = first, first + size, begin, end, t.max_call_ns
        if first < reached or 0 < begin < ended:
            block = _as_one(blocks, block)
        reached, ended = block[1], block[3]
        blocks.append(block)
    return blocks


def _as_one(blocks: list[Block], block: Block) -> Block:
    """Removes blocks from the end of `blocks` that are not known to come before `block`."""
    while blocks and (block[0] < blocks[-1][1] or 0 < block[2] < blocks[-1][3]):
        last = blocks.pop()
        begin, end = min(last[2], block[2]), max(last[3], block[3])
        reach = max(last[1], block[1], last[0] + (last[1] - last[0]) + (block[1] - block[0]))
        block = min(last[0], block[0]), reach, begin, end, end - begin
    return block


def _sent(blocks: Sequence[Block]) -> list[Mark]:
    """Positions, and the instant before which bytes from there on were not sent. Both grow."""
    marks: list[Mark] = []
    for first, after, begin, end, longest in blocks:
        if begin > 0:
            marks.append((first, begin))
            if after - 1 > first and end - longest > begin:
                marks.append((after - 1, end - longest))
    return marks


def _received(blocks: Sequence[Block]) -> list[Mark]:
    """Positions, and the instant by which all bytes up to there were received. Both grow."""
    marks: list[Mark] = []
    for first, after, begin, end, longest in blocks:
        if begin > 0 and after - 1 > first and begin + longest < end:
            marks.append((first, begin + longest))
        marks.append((after - 1, end))
    return marks


def acknowledged(receiver: Sequence[Segment], acks: Sequence[Segment], hull: Hull, receiver_is_other: bool) -> None:
    """Adds pairs from TCP: bytes that had not arrived yet were acknowledged later.

    `receiver` are the segments that arrived at one end; they show which bytes it had not received before. `acks` are
    the segments that arrived at the other end, in order of time. `receiver_is_other`: the receiver has the other clock,
    which bounds the offset from below.
    """
    lacking = [segment for segment in receiver if segment.received >= 0]
    if not lacking:
        return
    place, index = lacking[0].received, 0
    latest: int | None = None
    used: int | None = None
    for ack in acks:
        if ack.ack < 0:
            continue
        reached = _after(place, ack.ack)
        while index < len(lacking) and (before := _after(place, lacking[index].received)) < reached:
            place, latest = max(place, before), lacking[index].at_ns
            index += 1
        if latest is None or latest == used:
            continue
        used = latest
        _add(hull, latest, ack.at_ns, not receiver_is_other)


def released(sender: Sequence[Segment], data: Sequence[Segment], hull: Hull, data_is_other: bool) -> None:
    """Adds pairs from TCP: bytes that the sender had not sent yet when a segment arrived there, arrived later.

    `sender` are the segments that arrived at one end; they show up to where it had sent. `data` are the segments that
    arrived at the other end, in order of time. `data_is_other`: the data arrived on the other clock, which bounds the
    offset from above.
    """
    known = [segment for segment in sender if segment.ack >= 0]
    if not known:
        return
    place, index = _next(known[0]), 0
    latest: int | None = None
    used: int | None = None
    for segment in data:
        if segment.seq < 0 or not segment.payload:
            continue
        reached = _after(place, (segment.seq + segment.payload) % _WRAP)
        while index < len(known) and (before := _after(place, _next(known[index]))) < reached:
            place, latest = max(place, before), known[index].at_ns
            index += 1
        if latest is None or latest == used:
            continue
        used = latest
        _add(hull, latest, segment.at_ns, data_is_other)


def _next(segment: Segment) -> int:
    """The sequence number that the socket would send next (snd_nxt)."""
    return (segment.ack - segment.acked + segment.in_flight) % _WRAP


def arrived(
    sends: Sequence[Transfer], acks: Sequence[Segment], data: Sequence[Segment], hull: Hull, data_is_other: bool
) -> None:
    """Adds pairs of one end's sends and the segments in which the bytes arrived at the other end.

    `acks` are segments that arrived at the sender; they map its stream positions to sequence numbers. `acks` and `data`
    are in order of time. `data_is_other`: the data arrived on the other clock, which bounds the offset from above.
    """
    if not acks or not data:
        return
    blocks = _blocks(sends)
    origin = _origin(blocks, acks)
    if origin is None:
        return
    marks, index, latest, place = _sent(blocks), 0, None, 0
    used: int | None = None
    for segment in data:
        if segment.seq < 0 or not segment.payload:
            continue
        place = max(place, _after(place, (segment.seq + segment.payload - origin) % _WRAP))
        while index < len(marks) and marks[index][0] < place:
            latest = marks[index][1]
            index += 1
        if latest is None or latest == used:
            continue
        used = latest
        _add(hull, latest, segment.at_ns, data_is_other)


def _origin(blocks: Sequence[Block], acks: Sequence[Segment]) -> int | None:
    """The sequence number of stream position 0, or a larger one: positions derived from it are never too large.

    TCP reports up to which number the process has written. The bytes written by calls that had ended are known.
    """
    found: int | None = None
    index = written = 0
    for ack in acks:
        if ack.ack < 0:
            continue
        while index < len(blocks) and blocks[index][3] <= ack.at_ns:
            written = blocks[index][1]
            index += 1
        number = (ack.ack - ack.acked + ack.in_flight + ack.unsent - written) % _WRAP
        if found is None or _after(found, number) < found:
            found = number
    return found


def _after(near: int, number: int) -> int:
    """The unwrapped sequence number that is nearest to `near`."""
    return near + (number - near + (_WRAP >> 1)) % _WRAP - (_WRAP >> 1)
