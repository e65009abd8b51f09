# SPDX-License-Identifier: Apache-2.0
"""Reads from /proc what no probe reports: which VMMs ended, closed their carrier, and who is at its other end.

In: the traced pids, a `MigrationWatch`, the time. Out: marks for the recording. The watch also gets each closed
connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ebpf_mig.linux import descriptors, procfs
from ebpf_mig.linux.descriptors import carrier_descriptor
from ebpf_mig.linux.procfs import is_ending
from ebpf_mig.recording.events import CLOSED, ENDED, FORWARDER, HOP, KEEPER, NEIGHBOUR, AnyEvent, Mark, Socket
from ebpf_mig.recording.kinds import pid_of
from ebpf_mig.text import printable
from ebpf_mig.tracing import neighbours
from ebpf_mig.tracing.lifecycle import MigrationWatch

INTERVAL_NS = 50_000_000
MOST_HOPS = 16
"""Processes that are followed because they pass a migration's bytes on."""
SURE_NS = 200_000_000
"""A VMM that still lives this long after it closed its connection is not exiting."""


class Witness:
    """Observes the processes of one migration. Call `look` repeatedly, and `marks` at the end."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = set(pids)
        self._met: set[tuple[int, int]] = set()
        """Carriers whose other end was looked for: (pid, key)."""
        self._descriptors: dict[tuple[int, int], int] = {}
        self._missing: dict[tuple[int, int], int] = {}
        self._ended: set[int] = set()
        self._marks: list[Mark] = []
        self._due_ns = 0
        self.hops: set[int] = set()
        """Processes that hold the other ends of carriers, and pass on what goes through them."""
        self._between = [MigrationWatch([])]
        """The carriers of `hops`, also of those of merged witnesses."""

    def passed(self, events: Iterable[AnyEvent]) -> None:
        """Takes the next events of `hops`; those of others are left out."""
        own = [event for event in events if pid_of(event) in self.hops]
        for between in self._between:
            between.saw(own)

    def look(self, watch: MigrationWatch, now_ns: int) -> None:
        """Looks for the other ends of new carriers, and checks every process, at most once in `INTERVAL_NS`."""
        self.meet(watch, now_ns)
        if now_ns < self._due_ns:
            return
        self._due_ns = now_ns + INTERVAL_NS
        for pid in self._pids - self._ended:
            if is_ending(pid):
                self._ended.add(pid)
                self._marks.append(Mark(now_ns, pid, ENDED, doubt_ns=INTERVAL_NS))
        for pid, inode in watch.connections.items():
            if pid not in self._ended and self._closed(pid, inode, now_ns):
                since = self._missing[pid, inode]
                self._marks.append(Mark(since, pid, CLOSED, value=inode, doubt_ns=INTERVAL_NS))
                watch.closed(pid, since)

    def meet(self, watch: MigrationWatch, now_ns: int) -> None:
        """Looks once for the other end of each carrier that leads out of the traced processes, or from one process on
        the way to the next.
        """
        found, hops = neighbours.marks(self._new(watch), self._pids, now_ns)
        between = [carrier for one in self._between for carrier in self._new(one)]
        hops |= neighbours.marks(between, self._pids | self.hops, now_ns)[1]
        for pid in sorted(hops - self.hops)[: MOST_HOPS - len(self.hops)]:
            self.hops.add(pid)
            found.append(Mark(now_ns, pid, HOP, printable(procfs.comm(pid)) or "a process"))
        self._marks += found

    def _new(self, watch: MigrationWatch) -> list[Socket]:
        new = [carrier for carrier in watch.carriers.opaque if (carrier.pid, carrier.socket) not in self._met]
        self._met |= {(carrier.pid, carrier.socket) for carrier in new}
        return new

    def joined(self, pid: int) -> None:
        """Adds a process that is traced from now on."""
        self._pids.add(pid)

    def merge(self, other: Witness) -> None:
        """Takes over the state of another witness."""
        self._pids |= other._pids
        self.hops |= other.hops
        self._between += other._between
        self._met |= other._met
        self._descriptors |= other._descriptors
        self._missing |= other._missing
        self._ended |= other._ended
        self._marks += other._marks

    def marks(self) -> Sequence[AnyEvent]:
        """The marks so far. A process that was met before it was traced itself is an end of the way, not on it."""
        return [mark for mark in self._marks if _met(mark) not in self._pids]

    def _closed(self, pid: int, inode: int, now_ns: int) -> bool:
        """Whether the process lives, and has not had the carrier open for `SURE_NS`."""
        key = (pid, inode)
        known = self._descriptors.get(key)
        if known is not None and _points_to(pid, known, inode):
            return False
        found = carrier_descriptor(pid, inode)
        if found is not None:
            self._missing.pop(key, None)
            if found >= 0:
                self._descriptors[key] = found
            return False
        since = self._missing.setdefault(key, now_ns)
        return now_ns - since >= SURE_NS and not is_ending(pid)


def _met(mark: Mark) -> int | None:
    """The process at the end of the way that the mark names; no VMM is followed by another one."""
    if mark.name == HOP:
        return mark.pid
    return int(mark.detail.rpartition(" ")[2]) if mark.name in (NEIGHBOUR, FORWARDER, KEEPER) else None


def _points_to(pid: int, descriptor: int, inode: int) -> bool:
    try:
        return descriptors.carrier_key(pid, descriptor) == inode
    except OSError:
        return False
