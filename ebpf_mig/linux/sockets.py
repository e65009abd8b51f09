# SPDX-License-Identifier: Apache-2.0
"""Sockets of other processes: listening sockets, and the process at the other end of a UNIX socket.

In: a pid, or a connected socket. Out: rows of the socket tables in the network namespace of the process, and pids. A
table or a process that cannot be read has no rows.
Tables: net/ipv4/tcp_ipv4.c (`get_tcp4_sock`), net/unix/af_unix.c (`unix_seq_show`), Linux 6.12.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator

from ebpf_mig.linux import descriptors, procfs

_LISTEN = b"0A"
_ACCEPTS = 0x10000
"""__SO_ACCEPTCON, include/uapi/linux/net.h."""
_INODE = re.compile(r"socket:\[(\d+)\]")
_UNIX_ROW = re.compile(
    rb"[0-9a-f]+: [0-9A-F]{8} [0-9A-F]{8} ([0-9A-F]{8}) [0-9A-F]{4} [0-9A-F]{2} +(\d+) (.*)", re.DOTALL
)


def peer_pid(connection: socket.socket) -> int:
    """The pid that created the socket at the other end (SO_PEERCRED); 0: in an invisible pid namespace."""
    return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def inodes(pid: int) -> set[int]:
    """Inode numbers of the sockets that the process has open."""
    matches = (_INODE.fullmatch(target) for _, target in descriptors.links(pid))
    return {int(match[1]) for match in matches if match}


def tcp_listeners(table: bytes) -> Iterator[tuple[int, int]]:
    """(port, inode) of the listening sockets in the text of a `net/tcp` or `net/tcp6`."""
    for line in table.splitlines():
        row = line.split()
        if len(row) > 9 and row[3] == _LISTEN and row[9].isdigit():
            yield int(row[1].rpartition(b":")[2], 16), int(row[9])


def unix_listeners(table: bytes) -> Iterator[tuple[bytes, int]]:
    """(path, inode) of the listening sockets in the text of a `net/unix`.

    A path can contain any bytes, including line feeds, and the kernel does not escape them. So a path can imitate rows,
    and these are returned, too.
    """
    for line in table.split(b"\n"):
        row = _UNIX_ROW.fullmatch(line)
        if row and int(row[1], 16) & _ACCEPTS:
            yield row[3], int(row[2])


def listening_ports(pid: int) -> set[int]:
    """TCP ports on which the process listens, in its own network namespace."""
    own = inodes(pid)
    return {port for name in ("tcp", "tcp6") for port, inode in tcp_listeners(_table(pid, name)) if inode in own}


def listens_at(pid: int, where: str) -> bool:
    """Whether the process listens on the UNIX socket at that path."""
    wanted = {
        inode for name, inode in unix_listeners(_table(pid, "unix")) if name == where.encode(errors="surrogateescape")
    }
    return bool(wanted) and bool(wanted & inodes(pid))


def _table(pid: int, name: str) -> bytes:
    """A node may have a hundred thousand sockets, which is about 20 MB."""
    try:
        return b"".join(procfs.lines(pid, "net", name))
    except OSError:
        return b""
