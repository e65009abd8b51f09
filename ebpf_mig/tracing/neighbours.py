# SPDX-License-Identifier: Apache-2.0
"""Who holds the other end of a pipe or a UNIX socket: the next process on the way of a migration, and those behind it.

In: carriers that a traced process uses. Out: for each, a mark. One walk over the descriptors of all processes answers
for all of them. The way is followed from a process without sockets of its own through the pipe at its standard output
or input (`exec:gzip | nc`). It ends at a process with sockets, since which of them it passes bytes to is not known.
"""

from __future__ import annotations

import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable

from ebpf_mig.linux import descriptors, procfs
from ebpf_mig.recording.events import FORWARDER, KEEPER, NEIGHBOUR, PIPE, Mark, Socket
from ebpf_mig.text import printable

MOST_HOPS = 8
_STDIN, _STDOUT, _STDERR = range(3)
_SOCKET = re.compile(r"socket:\[\d+\]", re.ASCII)


def marks(carriers: Iterable[Socket], traced: Iterable[int], now_ns: int) -> tuple[list[Mark], set[int]]:
    """One for each carrier whose other end is held by a process that can be seen; and the pids of those processes."""
    wanted, own = list(carriers), set(traced)
    if not wanted:
        return [], set()
    walk = _Walk(own)
    found: list[Mark] = []
    hops: set[int] = set()
    for carrier in wanted:
        way = walk.way(_link(carrier))
        if way:
            named = ", ".join(f"{printable(procfs.comm(pid)) or 'a process'} {pid}" for pid in way)
            name = FORWARDER if walk.forwards(way[-1]) else KEEPER if walk.keeps(way[-1]) else NEIGHBOUR
            found.append(Mark(now_ns, carrier.pid, name, named, carrier.socket))
            hops.update(way)
    return found, hops


def _link(carrier: Socket) -> str:
    """The text of the link to its other end; a named pipe has a path, which is not known here."""
    return f"pipe:[{carrier.socket}]" if carrier.family == PIPE else f"socket:[{carrier.peer}]"


class _Walk:
    """The descriptors of all processes but the traced ones."""

    def __init__(self, traced: set[int]) -> None:
        self._holders: dict[str, list[int]] = defaultdict(list)
        self._targets: dict[int, dict[int, str]] = {}
        for pid in procfs.processes():
            if pid in traced:
                continue
            self._targets[pid] = targets = dict(descriptors.links(pid))
            for target in set(targets.values()):
                if target.startswith(("pipe:", "socket:")):
                    self._holders[target].append(pid)

    def forwards(self, pid: int) -> bool:
        """Whether it has sockets, other than where it writes its complaints."""
        return any(_SOCKET.fullmatch(target) for fd, target in self._targets[pid].items() if fd != _STDERR)

    def keeps(self, pid: int) -> bool:
        """Whether its standard output is a regular file (`exec:cat > FILE`), and not a device or a named pipe."""
        if not self._targets[pid].get(_STDOUT, "").startswith("/"):
            return False
        try:
            return stat.S_ISREG(os.stat(procfs.path(pid, "fd", _STDOUT)).st_mode)  # noqa: PTH116
        except OSError:
            return False

    def way(self, link: str) -> list[int]:
        """The processes from the holder of that end on; of a shell and its command, the one that started last.

        A holder whose standard output is that end feeds the VMM: what comes before it is at its standard input.
        """
        holders = self._holders.get(link, [])
        way: list[int] = []
        while holders and len(way) < MOST_HOPS:
            way.append(max(holders))
            targets = self._targets[way[-1]]
            feeds = targets.get(_STDOUT) == link
            link = targets.get(_STDIN if feeds else _STDOUT, "")
            if self.forwards(way[-1]) or not link.startswith("pipe:"):
                break
            there = _STDOUT if feeds else _STDIN
            holders = [p for p in self._holders[link] if p not in way and self._targets[p].get(there) == link]
        return way
