# SPDX-License-Identifier: Apache-2.0
"""Whether a process listens where a migration shall go to, told by its own /proc.

In: a pid and `tcp:HOST:PORT` or `unix:PATH`. Out: yes or no. A trial connection would be taken for the migration; a
socket's path exists before it listens, and a port of the same number may be another network namespace's.
Tables: net/ipv4/tcp_ipv4.c (`get_tcp4_sock`), net/unix/af_unix.c (`unix_seq_show`), Linux 6.12.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"
_ACCEPTS = 0x10000
"""__SO_ACCEPTCON, include/uapi/linux/net.h."""
_SOCKET = re.compile(r"socket:\[(\d+)\]")


def listens(pid: int, url: str) -> bool:
    """Whether a socket of the process listens there; False as well if its /proc cannot be read."""
    kind, _, rest = url.partition(":")
    found = _unix(pid, rest) if kind == "unix" else _tcp(pid, rest.rpartition(":")[2])
    wanted = set(found)
    return bool(wanted) and bool(wanted & set(_sockets(pid)))


def _rows(pid: int, table: str) -> Iterator[list[str]]:
    """Lines of the process's own network namespace, without the heading."""
    try:
        lines = Path(f"/proc/{pid}/net/{table}").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    yield from (line.split(None, 7) if table == "unix" else line.split() for line in lines[1:])


def _tcp(pid: int, port: str) -> Iterator[str]:
    if not port.isdigit():
        return
    end = f":{int(port):04X}"
    for table in ("tcp", "tcp6"):
        yield from (row[9] for row in _rows(pid, table) if len(row) > 9 and row[1].endswith(end) and row[3] == _LISTEN)


def _unix(pid: int, path: str) -> Iterator[str]:
    for row in _rows(pid, "unix"):
        if len(row) == 8 and row[7] == path and int(row[3], 16) & _ACCEPTS:
            yield row[6]


def _sockets(pid: int) -> Iterator[str]:
    """Inode numbers of the sockets it has open."""
    try:
        entries = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return
    for entry in entries:
        try:
            match = _SOCKET.match(str(entry.readlink()))
        except OSError:
            continue
        if match:
            yield match[1]
