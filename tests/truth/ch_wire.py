# SPDX-License-Identifier: Apache-2.0
"""Cloud Hypervisor's migration protocol, both sides: 16 bytes of request or response, then a payload.

In: a stream socket. Out: messages. Layout: vm-migration/src/protocol.rs (v52 to v54), little-endian.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

START, CONFIG, STATE, MEMORY, COMPLETE, ABANDON = 1, 2, 3, 4, 5, 6
OK, ERROR = 1, 2
_MESSAGE = struct.Struct("<H6xQ")
_RANGE = struct.Struct("<QQ")


class AnsweredNoError(Exception):
    """The other end answered with an error, or closed the connection."""


@dataclass(frozen=True)
class Request:
    """A command and the length of its payload."""

    command: int
    length: int


def connect(url: str) -> socket.socket:
    """Connects to `tcp:HOST:PORT` or `unix:PATH`. Nagle's algorithm stays on, as in Cloud Hypervisor."""
    if url.startswith("unix:"):
        made = socket.socket(socket.AF_UNIX)
        made.connect(url[5:])
        return made
    host, _, port = url[4:].rpartition(":")
    return socket.create_connection((host, int(port)))


def listen(url: str) -> socket.socket:
    """A socket that listens at the URL. The path of a UNIX socket must not exist."""
    if url.startswith("unix:"):
        made = socket.socket(socket.AF_UNIX)
        made.bind(url[5:])
        made.listen(1)
        return made
    host, _, port = url[4:].rpartition(":")
    return socket.create_server((host, int(port)))


def request(connection: socket.socket, command: int, length: int = 0) -> None:
    """Sends the 16 bytes of a request."""
    connection.sendall(_MESSAGE.pack(command, length))


def respond(connection: socket.socket, status: int = OK) -> None:
    """Sends the 16 bytes of a response."""
    connection.sendall(_MESSAGE.pack(status, 0))


def expect_ok(connection: socket.socket) -> None:
    """Waits for a response; AnsweredNoError if it is not OK."""
    status, _ = _MESSAGE.unpack(exactly(connection, _MESSAGE.size))
    if status != OK:
        raise AnsweredNoError(f"response {status}")


def next_request(connection: socket.socket) -> Request:
    """The next request; EOFError if the sender closed the connection."""
    return Request(*_MESSAGE.unpack(exactly(connection, _MESSAGE.size)))


def exactly(connection: socket.socket, size: int) -> bytearray:
    """Reads that many bytes; EOFError if the stream ends earlier."""
    buffer = bytearray(size)
    view, got = memoryview(buffer), 0
    while got < size:
        count = connection.recv_into(view[got:])
        if not count:
            raise EOFError(f"{got} of {size} bytes")
        got += count
    return buffer


def table(ranges: list[tuple[int, int]]) -> bytes:
    """Encodes a memory table: guest physical address and length of each range."""
    return b"".join(_RANGE.pack(*pair) for pair in ranges)


def ranges_of(raw: bytes | bytearray) -> list[tuple[int, int]]:
    """Decodes a memory table."""
    return [(address, size) for address, size in _RANGE.iter_unpack(bytes(raw))]


def ranges(pages: list[int], page: int) -> list[tuple[int, int]]:
    """Byte ranges of sorted page numbers; adjacent pages are merged."""
    found: list[tuple[int, int]] = []
    for number in pages:
        if found and found[-1][0] + found[-1][1] == number * page:
            found[-1] = found[-1][0], found[-1][1] + page
        else:
            found.append((number * page, page))
    return found
