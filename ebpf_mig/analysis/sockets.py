# SPDX-License-Identifier: Apache-2.0
"""Which sockets carry the migration, and how they were used in the window.

In: the two processes and the threads that fetch the dirty log. Out: the set of sockets on each side, and the
report's rows about them.

A VMM's threads also write to monitors, consoles, backends and displays. QEMU's migration thread even writes QMP events
during the blackout. So a socket needs evidence. The best is that the other process has its other end. The next is that
the thread that fetches the dirty log sends on it. The last is the traffic's shape: large calls and, if a fetching
thread is known, all in one direction. A thread's name or a large number of bytes is no evidence. Without evidence the
carrier is unknown.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ebpf_mig.analysis import tcp_info
from ebpf_mig.analysis.process import Process, begun, key_of
from ebpf_mig.analysis.reception import STREAM_BYTES
from ebpf_mig.breakdown import Side, SocketUse, Transport
from ebpf_mig.recording.events import RECEIVE, SEND, Socket, Transfer

AF_UNIX = 1
LEAST_BYTES = 4096
"""Without other evidence, a socket that carried less is not a migration socket. Nor are its bytes enough to recognise
it in another host's recording."""
EXTRA_SHARE = 100
"""UNIX sockets have no address. One with at least 1/100 of the main socket's bytes is a further connection."""


@dataclass(frozen=True, slots=True)
class Channels:
    """The migration's sockets, as keys made by `process.key_of`."""

    source: frozenset[int] = frozenset()
    destination: frozenset[int] = frozenset()
    transport: Transport = Transport.UNKNOWN

    @property
    def connections(self) -> int:
        """How many connections carry the migration."""
        return max(len(self.source), len(self.destination))


def choose(source: Process | None, destination: Process | None, since: int, fetchers: Collection[int]) -> Channels:
    """The migration's sockets, of all sockets that the two processes used from `since` on."""
    if source is None:
        keys = _busiest(destination, RECEIVE, since, ()) if destination else frozenset()
        return Channels(frozenset(), keys, _transport(destination, keys))
    mirrored = mirrors(source, destination) if destination else {}
    keys = _busiest(source, SEND, since, fetchers, mirrored)
    if destination is None:
        return Channels(keys, frozenset(), _transport(source, keys))
    other = frozenset(mirrored[key] for key in keys if key in mirrored)
    if not other:
        other = _busiest(destination, RECEIVE, since, ())
    return Channels(keys, other, _transport(source, keys))


def _busiest(
    process: Process | None,
    direction: int,
    since: int,
    tids: Collection[int],
    mirrors: Collection[int] = (),
) -> frozenset[int]:
    """The socket with the most bytes, and the further connections of the same migration."""
    if process is None:
        return frozenset()
    total: Counter[int] = Counter()
    by_tids: Counter[int] = Counter()
    calls: Counter[int] = Counter()
    for (way, key), transfers in process.streams.items():
        late = [t for t in transfers if t.end_ns >= since] if way == direction else ()
        if late:
            total[key] = sum([t.bytes for t in late])
            calls[key] = sum([t.calls for t in late])
            by_tids[key] = sum([t.bytes for t in late if t.tid in tids])
    crossing = {key: total[key] for key in total if key in mirrors}
    candidates = crossing or {k: size for k, size in total.items() if size >= max(LEAST_BYTES, STREAM_BYTES * calls[k])}
    # Multifd: the bulk leaves through further sockets, but the fetching thread keeps the main one.
    fetching = {key: by_tids[key] for key in candidates if by_tids[key] >= LEAST_BYTES}
    if tids and not crossing and not fetching:
        # No send of the fetching thread was seen. Only the migration's stream goes all in one direction.
        candidates = {key: size for key, size in candidates.items() if _one_way(process, direction, key)}
    if not candidates:
        return frozenset()
    main = max(fetching or candidates, key=lambda key: (fetching.get(key, 0), total[key], -key))
    return frozenset({main}) | _company(process, direction, main, candidates, crossing)


def _company(
    process: Process, direction: int, main: int, candidates: dict[int, int], crossing: Collection[int]
) -> frozenset[int]:
    """Further connections of the same migration."""
    known = process.sockets.get(main)
    if known is None:
        return frozenset()
    if known.family == AF_UNIX:
        enough = max(LEAST_BYTES, candidates[main] // EXTRA_SHARE)
        return frozenset(
            key
            for key, size in candidates.items()
            if _family(process, key) == AF_UNIX
            and (key in crossing or (not crossing and size >= enough and not _answered(process, direction, key)))
        )
    # All connections share the port on which the destination listened.
    address = _end(known, direction)
    return frozenset(
        key
        for key in candidates
        if (s := process.sockets.get(key)) and s.family != AF_UNIX and _end(s, direction) == address
    )


def _one_way(process: Process, direction: int, key: int) -> bool:
    """Whether the socket's threads use it in this direction only. Disk, display and network threads use both."""
    other = SEND if direction == RECEIVE else RECEIVE
    here = {t.tid for t in process.streams[direction, key]}
    return not any(t.tid in here and t.bytes for t in process.streams.get((other, key), ()))


def _answered(process: Process, direction: int, key: int) -> bool:
    """Whether bytes also went the other way. A migration's further connections carry pages one way (QEMU's multifd)."""
    other = SEND if direction == RECEIVE else RECEIVE
    return sum(t.bytes for t in process.streams.get((other, key), ())) >= LEAST_BYTES


def _end(socket: Socket, direction: int) -> str:
    return normal(socket.remote if direction == SEND else socket.local)


def _family(process: Process, key: int) -> int:
    socket = process.sockets.get(key)
    return socket.family if socket else 0


def mirrors(source: Process, destination: Process) -> dict[int, int]:
    """The destination's end of each connection between the two: source inode to destination inode."""
    by_ends: dict[tuple[str, str], int] = {}
    by_peer: dict[int, int] = {}
    for inode, socket in sorted(destination.sockets.items()):
        if socket.peer:
            by_peer[socket.peer] = inode
        elif socket.family != AF_UNIX and socket.local and socket.remote:
            by_ends[(normal(socket.remote), normal(socket.local))] = inode
    result: dict[int, int] = {}
    for inode, socket in sorted(source.sockets.items()):
        if inode in by_peer:
            result[inode] = by_peer[inode]
        elif socket.family == AF_UNIX:
            if socket.peer in destination.sockets:
                result[inode] = socket.peer
        elif (ends := (normal(socket.local), normal(socket.remote))) in by_ends:
            result[inode] = by_ends[ends]
    return result


def connection(source: Process | None, destination: Process | None, channels: Channels) -> str:
    """The migration's TCP connection as text that is the same from either end's recording; empty if there is none.

    If there are several, one with bytes both ways comes first (QEMU's main channel with its return path), then the
    first in alphabetical order.
    """
    process, keys = (source, channels.source) if source else (destination, channels.destination)
    if process is None:
        return ""
    ways: dict[int, set[int]] = defaultdict(set)
    for (direction, key), transfers in process.streams.items():
        if key in keys and any(t.bytes for t in transfers):
            ways[key].add(direction)
    found: list[tuple[bool, str]] = []
    for key, directions in ways.items():
        known = process.sockets.get(key)
        if known and known.local and known.remote:
            text = " ".join(sorted((normal(known.local), normal(known.remote))))
            found.append((len(directions) < 2, text))
    return min(found)[1] if found else ""


def normal(address: str) -> str:
    """One spelling for an IPv4 address and its IPv6-mapped form, with or without brackets."""
    host, _, port = address.rpartition(":")
    return f"{host.strip('[]').removeprefix('::ffff:')}:{port}"


def _transport(process: Process | None, keys: Collection[int]) -> Transport:
    if process is None or not process.transfers:
        return Transport.UNKNOWN
    if not keys:
        return Transport.NONE
    families = {_family(process, key) for key in keys} - {0}
    if not families:
        return Transport.UNKNOWN
    return Transport.UNIX if families == {AF_UNIX} else Transport.TCP


def usage(
    channels: Channels, source: Process | None, destination: Process | None, window: tuple[int, int]
) -> list[SocketUse]:
    """One row for each side, migration socket and direction used in the window."""
    rows: list[SocketUse] = []
    for side, process, keys, main in (
        (Side.SOURCE, source, channels.source, SEND),
        (Side.DESTINATION, destination, channels.destination, RECEIVE),
    ):
        if process is None:
            continue
        for (direction, key), transfers in sorted(process.streams.items(), key=lambda i: (i[0][0] != main, i[0][1])):
            used = _in_window(process, transfers, direction, window) if key in keys else ()
            if used:
                role = "migration" if direction == main else "control"
                rows.append(_row(process, f"{side} {role}", used, window))
    return rows


def _in_window(process: Process, transfers: list[Transfer], direction: int, window: tuple[int, int]) -> list[Transfer]:
    """The transfers that moved bytes in the window: a send moves them at its begin, a receive at its end."""
    if direction == SEND:
        return [t for t in begun(transfers, window[0]) if t.begin_ns <= window[1]]
    return [t for t in process.ended(transfers, window[0]) if t.end_ns <= window[1]]


def _row(process: Process, role: str, transfers: list[Transfer], window: tuple[int, int]) -> SocketUse:
    socket = process.sockets.get(key_of(transfers[0]))
    first = max(window[0], min(t.begin_ns for t in transfers))
    last = min(window[1], max(t.end_ns for t in transfers))
    in_call = sum(in_call_within(t, window) for t in transfers)
    blocked = off_cpu_within(transfers, window)
    return SocketUse(
        role=role,
        bytes=sum(t.bytes for t in transfers),
        calls=sum(t.calls for t in transfers),
        copy_ns=None if blocked is None else in_call - blocked,
        blocked_ns=blocked,
        between_ns=max(0, last - first - in_call),
        in_call_ns=in_call,
        local=socket.local if socket else "",
        remote=socket.remote if socket else "",
        tcp_info=tcp_info.verdict(process, key_of(transfers[0]), window, window[0])
        if role == "source migration"
        else None,
    )


def in_call_within(transfer: Transfer, window: tuple[int, int]) -> int:
    """Time inside the calls, in ns, cut to the window."""
    overlap = min(window[1], transfer.end_ns) - max(window[0], transfer.begin_ns)
    return max(0, min(transfer.in_call_ns, overlap))


def off_cpu_within(transfers: Iterable[Transfer], window: tuple[int, int]) -> int | None:
    """Time off the CPU inside the calls, in ns, cut to the window; None if unknown for one of them."""
    total = 0
    for transfer in transfers:
        if not transfer.off_cpu_ns:
            continue
        if transfer.off_cpu_ns < 0:
            return None
        total += min(transfer.off_cpu_ns, in_call_within(transfer, window))
    return total
