# SPDX-License-Identifier: Apache-2.0
"""The migration's carriers (sockets, pipes, files), their two ends, and what they did in the window.

In: the two processes, and the carriers that `carrier.py` chose. Out: which end belongs to which, and the rows of the
report.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from ebpf_mig.analysis import tcp_info
from ebpf_mig.analysis.process import Process, begun, key_of
from ebpf_mig.breakdown import Side, SocketUse, Transport
from ebpf_mig.recording.events import AF_UNIX, AF_VSOCK, FILE, PIPE, RECEIVE, SEND, Socket, Transfer

LEAST_BYTES = 4096
"""Without other evidence, a socket that carried less is not a migration socket. Nor are its bytes enough to recognise
it in another host's recording."""


@dataclass(frozen=True, slots=True)
class Channels:
    """The migration's carriers, as keys made by `process.key_of`."""

    source: frozenset[int] = frozenset()
    destination: frozenset[int] = frozenset()
    transport: Transport = Transport.UNKNOWN
    ends: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    """(source's, destination's) of each carrier of which both are known."""

    @property
    def connections(self) -> int:
        """How many connections carry the migration."""
        return max(len(self.source), len(self.destination))


def end_of(socket: Socket, direction: int) -> str:
    """The address of the side that receives."""
    return normal(socket.remote if direction == SEND else socket.local)


def family_of(process: Process, key: int) -> int:
    """AF_UNIX, AF_INET, PIPE...; 0: not known."""
    socket = process.sockets.get(key)
    return socket.family if socket else 0


def mirrors(source: Process, destination: Process) -> dict[int, int]:
    """The destination's end of each connection between the two: source inode to destination inode.

    A pipe has one inode. A file that both use is a connection only if one writes it and the other reads it.
    """
    by_ends: dict[tuple[str, str], int] = {}
    by_peer: dict[int, int] = {}
    for inode, socket in sorted(destination.sockets.items()):
        if socket.peer:
            by_peer[socket.peer] = inode
        elif socket.local and socket.remote:
            by_ends |= {(remote, local): inode for local, remote in spellings(socket)}
    result: dict[int, int] = {}
    for inode, socket in sorted(source.sockets.items()):
        if socket.family in (PIPE, FILE):
            if (SEND, inode) in source.streams and (RECEIVE, inode) in destination.streams:
                result[inode] = inode
        elif inode in by_peer:
            result[inode] = by_peer[inode]
        elif socket.family == AF_UNIX:
            if socket.peer in destination.sockets:
                result[inode] = socket.peer
        elif known := [by_ends[ends] for ends in spellings(socket) if ends in by_ends]:
            result[inode] = known[0]
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
        if known and known.local and known.remote and known.family != AF_VSOCK:
            text = " ".join(sorted((normal(known.local), normal(known.remote))))
            found.append((len(directions) < 2, text))
    return min(found)[1] if found else ""


def spellings(socket: Socket) -> list[tuple[str, str]]:
    """Its local and remote address, in each way in which they can be those of the other end.

    Of a vsock that connects, only the other end knows the CID. And the other end knows another one, if somebody
    connects to its own host by a CID that is not 1 (VMADDR_CID_LOCAL).
    """
    local, remote = normal(socket.local), normal(socket.remote)
    if socket.family != AF_VSOCK:
        return [(local, remote)]
    return [(local, remote), (_any_cid(local), remote), (local, _any_cid(remote))]


def _any_cid(address: str) -> str:
    return f"*:{address.rpartition(':')[2]}"


def normal(address: str) -> str:
    """One spelling for an IPv4 address and its IPv6-mapped form, with or without brackets."""
    host, _, port = address.rpartition(":")
    return f"{host.strip('[]').removeprefix('::ffff:')}:{port}"


_TRANSPORTS = {AF_UNIX: Transport.UNIX, AF_VSOCK: Transport.VSOCK, PIPE: Transport.PIPE, FILE: Transport.FILE}


def transport_of(process: Process | None, keys: Collection[int]) -> Transport:
    """What the carriers of a process are."""
    if process is None or not process.transfers:
        return Transport.UNKNOWN
    if not keys:
        return Transport.NONE
    found = {_TRANSPORTS.get(family, Transport.TCP) for key in keys if (family := family_of(process, key))}
    return min(found, key=list(Transport).index, default=Transport.UNKNOWN)


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
