# SPDX-License-Identifier: Apache-2.0
"""Reads from /proc what no probe reports: which VMMs ended, closed their connection or wrote data.

In: the traced pids, a `MigrationWatch`, the time. Out: marks for the recording. The watch also gets each closed
connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ebpf_mig.linux import procfs
from ebpf_mig.linux.procfs import bytes_written, is_ending, socket_descriptor
from ebpf_mig.recording.events import CLOSED, ENDED, WRITTEN, AnyEvent, Mark
from ebpf_mig.tracing.lifecycle import MigrationWatch

INTERVAL_NS = 50_000_000
SURE_NS = 200_000_000
"""A VMM that still lives this long after it closed its connection is not exiting."""


class Witness:
    """Observes the processes of one migration. Call `look` repeatedly, and `marks` at the end."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = set(pids)
        self._before = {pid: bytes_written(pid) for pid in self._pids}
        self._written: dict[int, int] = {}
        self._descriptors: dict[tuple[int, int], int] = {}
        self._missing: dict[tuple[int, int], int] = {}
        self._ended: set[int] = set()
        self._marks: list[Mark] = []
        self._due_ns = 0

    def look(self, watch: MigrationWatch, now_ns: int) -> None:
        """Checks every process, at most once in `INTERVAL_NS`."""
        if now_ns < self._due_ns:
            return
        self._due_ns = now_ns + INTERVAL_NS
        for pid in self._pids - self._ended:
            if is_ending(pid):
                self._ended.add(pid)
                self._marks.append(Mark(now_ns, pid, ENDED, doubt_ns=INTERVAL_NS))
            elif watch.under_way and (written := bytes_written(pid)) is not None:
                self._written[pid] = written
        for pid, inode in watch.connections.items():
            if pid not in self._ended and self._closed(pid, inode, now_ns):
                since = self._missing[pid, inode]
                self._marks.append(Mark(since, pid, CLOSED, value=inode, doubt_ns=INTERVAL_NS))
                watch.closed(pid, since)

    def joined(self, pid: int) -> None:
        """Adds a process that is traced from now on."""
        self._pids.add(pid)
        self._before[pid] = bytes_written(pid)

    def merge(self, other: Witness) -> None:
        """Takes over the state of another witness."""
        self._pids |= other._pids
        self._before |= other._before
        self._written |= other._written
        self._descriptors |= other._descriptors
        self._missing |= other._missing
        self._ended |= other._ended
        self._marks += other._marks

    def marks(self, now_ns: int) -> Sequence[AnyEvent]:
        """The marks so far, and the bytes that each process wrote."""
        written = [
            Mark(now_ns, pid, WRITTEN, value=after - before)
            for pid, after in self._written.items()
            if (before := self._before.get(pid)) is not None and after > before
        ]
        return [*self._marks, *written]

    def _closed(self, pid: int, inode: int, now_ns: int) -> bool:
        """Whether the process lives, and has not had the socket open for `SURE_NS`."""
        key = (pid, inode)
        known = self._descriptors.get(key)
        if known is not None and _points_to(pid, known, inode):
            return False
        found = socket_descriptor(pid, inode)
        if found is not None:
            self._missing.pop(key, None)
            if found >= 0:
                self._descriptors[key] = found
            return False
        since = self._missing.setdefault(key, now_ns)
        return now_ns - since >= SURE_NS and not is_ending(pid)


def _points_to(pid: int, descriptor: int, inode: int) -> bool:
    try:
        return procfs.link(pid, "fd", descriptor) == f"socket:[{inode}]"
    except OSError:
        return False
