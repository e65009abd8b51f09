# SPDX-License-Identifier: Apache-2.0
"""Matches the connections of two recordings: by addresses and ports, otherwise by the bytes that were transferred.

In: the sends and receives of each process of two hosts on each socket. Out: the pair of processes of one migration,
with its connections; or a JoinError with the reason why there is none. NAT and proxies change addresses and ports, but
not the number of bytes in each direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ebpf_mig.analysis.sockets import LEAST_BYTES, normal, spellings
from ebpf_mig.analysis.wire import PEEKED_BYTES
from ebpf_mig.errors import RecordingError
from ebpf_mig.joining.happens_before import sent_bytes
from ebpf_mig.recording.events import SEND, Socket, Transfer
from ebpf_mig.text import printable, size

MOST_SOCKETS = 256
"""The number of sockets compared per recording, those with the most bytes. The work grows with its square."""
CLOSE = 100
"""Two counts of one stream may differ by 1/100: tracing may have ended earlier on one side."""


class JoinError(RecordingError):
    """The two recordings are not the two sides of one migration."""


@dataclass
class End:
    """One end of a connection, from the recording of its host."""

    pid: int
    inode: int
    socket: Socket | None = None
    sends: list[Transfer] = field(default_factory=list)
    receives: list[Transfer] = field(default_factory=list)
    sent: int = 0
    received: int = 0

    def count(self) -> None:
        """Sets `sent` and `received` from the transfers."""
        self.sent, self.received = sent_bytes(self.sends), sent_bytes(self.receives)

    @property
    def name(self) -> str:
        """Its name in messages."""
        known = self.socket
        ends = f"{known.local} - {known.remote}" if known and known.local else f"socket {self.inode}"
        return f"{printable(ends)} ({size(self.sent)} out, {size(self.received)} in)"


@dataclass
class Match:
    """Two processes and the connections between them."""

    near: int
    """The pid in the first recording."""
    far: int
    """The pid in the second recording."""
    ends: list[tuple[End, End]]
    nat: bool = False
    """Addresses or ports differ between the two ends."""

    @property
    def bytes(self) -> int:
        """Bytes in both directions."""
        return sum(near.sent + near.received for near, _ in self.ends)

    @property
    def outward(self) -> int:
        """Bytes that the first recording's process sent minus those it received."""
        return sum(near.sent - near.received for near, _ in self.ends)


def ends_of(transfers: Sequence[Transfer], sockets: Sequence[Socket]) -> list[End]:
    """The sockets of a recording, those with the most bytes first."""
    found: dict[tuple[int, int], End] = {}
    for transfer in transfers:
        if transfer.socket:
            key = transfer.pid, transfer.socket
            end = found.get(key)
            if end is None:
                end = found[key] = End(*key)
            (end.sends if transfer.direction == SEND else end.receives).append(transfer)
    for socket in sockets:
        if (known := found.get((socket.pid, socket.socket))) is not None:
            known.socket = socket
    for end in found.values():
        end.count()
    return sorted(found.values(), key=lambda e: (-e.sent - e.received, e.pid, e.inode))


def matches(near: Sequence[End], far: Sequence[End], names: tuple[str, str]) -> list[Match]:
    """Pairs of processes with common connections, the pair with the most bytes first. JoinError if there is none."""
    pairs = sorted(
        (-score, -near[i].sent - near[i].received, i, j)
        for i, j in _candidates(near, far)
        if (score := _score(near[i], far[j]))
    )
    taken: tuple[set[int], set[int]] = set(), set()
    found: dict[tuple[int, int], Match] = {}
    for score, _, i, j in pairs:
        if i in taken[0] or j in taken[1]:
            continue
        taken[0].add(i)
        taken[1].add(j)
        match = found.setdefault((near[i].pid, far[j].pid), Match(near[i].pid, far[j].pid, []))
        match.ends.append((near[i], far[j]))
        match.nat = match.nat or -score < _SAME
    if not found:
        raise JoinError(_why_none(near, far, names), "check that both were made during the same migration")
    return sorted(found.values(), key=lambda m: (-m.bytes, m.near, m.far))


def _candidates(near: Sequence[End], far: Sequence[End]) -> set[tuple[int, int]]:
    """Pairs of connections to compare: all with mirrored addresses, and of the others those with the most bytes."""
    by_ends = {ends: j for j, end in enumerate(far) if (ends := _ends(end.socket)) is not None}
    mirrored = {
        (i, by_ends[ends[::-1]]) for i, a in enumerate(near) if (ends := _ends(a.socket)) and ends[::-1] in by_ends
    }
    return mirrored | {(i, j) for i in range(len(near[:MOST_SOCKETS])) for j in range(len(far[:MOST_SOCKETS]))}


def _ends(socket: Socket | None) -> tuple[str, str] | None:
    """Both addresses, normalized; None if one is unknown."""
    if socket is None or not socket.local or not socket.remote:
        return None
    return normal(socket.local), normal(socket.remote)


_SAME = 3
"""Both addresses and ports mirror each other."""


def _score(near: End, far: End) -> int:
    """How well two ends match; 0: not the same connection."""
    known = _addresses(near, far)
    if not (_agree(near.sent, far.received) and _agree(near.received, far.sent)):
        return 0
    if known == _SAME:
        return _SAME
    exact = _exact(near.sent, far.received) and _exact(near.received, far.sent)
    enough = max(near.sent, near.received) >= LEAST_BYTES
    return 1 + (known > 0) if exact and enough else 0


def _addresses(near: End, far: End) -> int:
    """3: addresses and ports mirror each other. 2: both ports do. 1: one port does. 0: none, or unknown."""
    a, b = _ends(near.socket), _ends(far.socket)
    if near.socket is None or far.socket is None or a is None or b is None:
        return 0
    if any(ends[::-1] in spellings(far.socket) for ends in spellings(near.socket)):
        return _SAME
    return (_port(a[0]) == _port(b[1])) + (_port(a[1]) == _port(b[0]))


def _port(address: str) -> str:
    return address.rpartition(":")[2]


def _exact(sent: int, received: int) -> bool:
    return abs(sent - received) <= PEEKED_BYTES


def _agree(sent: int, received: int) -> bool:
    return abs(sent - received) <= PEEKED_BYTES + max(sent, received) // CLOSE


def _why_none(near: Sequence[End], far: Sequence[End], names: tuple[str, str]) -> str:
    """The message about why no connection matches."""
    for i, j in sorted(_candidates(near, far)):
        if _addresses(near[i], far[j]) == _SAME:
            both = f"{names[0]} and {names[1]} have {near[i].name} in common"
            return f"{both}, but not its bytes: {names[1]} has {far[j].name}"
    busiest = {side: _busiest(ends) for side, ends in zip(names, (near, far), strict=True)}
    for side, end in busiest.items():
        if end is None:
            return f"{side} has no connection with enough bytes for a migration"
    (one, a_end), (other, b_end) = busiest.items()
    assert a_end is not None  # noqa: S101 - checked above
    assert b_end is not None  # noqa: S101
    if (a_end.sent > a_end.received) == (b_end.sent > b_end.received):
        role = "source" if a_end.sent > a_end.received else "destination"
        return f"{one} and {other} were both recorded on a {role}: {a_end.name}, and {b_end.name}"
    return f"{one} and {other} have no connection in common: the largest are {a_end.name}, and {b_end.name}"


def _busiest(ends: Sequence[End]) -> End | None:
    return next((end for end in ends if end.sent + end.received >= LEAST_BYTES), None)


def matches_within(ends: Sequence[End]) -> bool:
    """Whether two processes of one recording are the two ends of a connection with much data."""
    by_ends = {known: end for end in ends if (known := _ends(end.socket)) is not None}
    for end in ends:
        known = _ends(end.socket)
        other = by_ends.get(known[::-1]) if known is not None and end.sent >= LEAST_BYTES else None
        if other is not None and other.pid != end.pid and _agree(end.sent, other.received):
            return True
    return False
