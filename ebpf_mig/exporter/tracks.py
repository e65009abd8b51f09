# SPDX-License-Identifier: Apache-2.0
"""Sorts the events of all VMs that are being traced into migrations, and says when each is over.

In: pids that showed a sign, batches of events, the time. Out: `Ended`: the processes of one migration, their events
and why it ended; or that a sign meant nothing. Pure: it opens nothing.

A process is on probation at first. It is kept while it logs dirty memory, receives a lot, or was loaded. Two
processes are one migration once a socket of one is the other end of a socket of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ebpf_mig import kvm
from ebpf_mig.events import AnyEvent, Ioctl, Kick, OffCpu, Socket, Thread, Transfer, VcpuEnter, VcpuExit, VcpuState
from ebpf_mig.watch import MigrationWatch

PROBATION_NS = 2_000_000_000
"""How long a sign is given the benefit of the doubt; a destination may wait this long between two bursts."""
SILENCE_NS = 60_000_000_000
"""A migration that does nothing at all for this long is not awaited any more."""
RECEIVED_BYTES = 1 << 20
"""A process that receives this much while on probation may be a destination: it stays on."""
KEPT_EVENTS = 300_000
"""Events held of one migration; beyond, the earliest transfers go first: they only make the totals of pre-copy."""

_OF_ONE_PROCESS = Ioctl | VcpuEnter | VcpuExit | VcpuState | Kick | Transfer | Socket | Thread | OffCpu


@dataclass
class Track:
    """What one migration, or one suspicion, has shown so far."""

    pids: list[int]
    trigger: str
    until_ns: int
    watch: MigrationWatch
    events: list[AnyEvent] = field(default_factory=list)
    logged_slots: set[tuple[int, int]] = field(default_factory=set)
    restored: set[int] = field(default_factory=set)
    ran: set[int] = field(default_factory=set)
    received: int = 0
    last_ns: int = 0
    thinned: int = 0

    @property
    def proven(self) -> bool:
        """Dirty logging, or vCPU state set into a VM that later ran: this is a migration."""
        return bool(self.logged_slots) or bool(self.restored & self.ran)


@dataclass(frozen=True)
class Ended:
    """A track that is over. `reason` is one of `Ending.reason`, or `nothing` for a sign that meant nothing."""

    pids: tuple[int, ...]
    trigger: str
    reason: str
    events: list[AnyEvent]
    thinned: int


class Tracks:
    """All that is being traced now."""

    def __init__(self) -> None:
        self._by_pid: dict[int, Track] = {}
        self._ends: dict[tuple[str, str], int] = {}
        self._inodes: dict[int, int] = {}

    def __contains__(self, pid: int) -> bool:
        return pid in self._by_pid

    def __bool__(self) -> bool:
        return bool(self._by_pid)

    @property
    def pids(self) -> list[int]:
        """Every process that is being traced."""
        return list(self._by_pid)

    def begin(self, pid: int, trigger: str, now_ns: int) -> None:
        """`pid` is traced from now on; again: it gets another probation."""
        track = self._by_pid.get(pid)
        if track is None:
            self._by_pid[pid] = Track([pid], trigger, now_ns + PROBATION_NS, MigrationWatch([pid]), last_ns=now_ns)
        else:
            track.until_ns = max(track.until_ns, now_ns + PROBATION_NS)

    def saw(self, events: Iterable[AnyEvent], now_ns: int) -> None:
        """Takes the next events."""
        batches: dict[int, list[AnyEvent]] = {}
        for event in events:
            if isinstance(event, _OF_ONE_PROCESS) and event.pid in self._by_pid:
                batches.setdefault(event.pid, []).append(event)
                if isinstance(event, Socket):
                    self._link(event)
        for pid, batch in batches.items():
            self._take(self._by_pid[pid], batch, now_ns)

    def over(self, now_ns: int, is_alive: Callable[[int], bool]) -> list[Ended]:
        """The tracks that ended; their processes are traced no more."""
        ended = []
        for track in {id(track): track for track in self._by_pid.values()}.values():
            alive = [pid for pid in track.pids if is_alive(pid)]
            reason = self._verdict(track, now_ns, alive)
            if reason is not None:
                ended.append(Ended(tuple(track.pids), track.trigger, reason, track.events, track.thinned))
                self._forget(track)
        return ended

    def _verdict(self, track: Track, now_ns: int, alive: Sequence[int]) -> str | None:
        if track.proven or track.received >= RECEIVED_BYTES:
            reason = track.watch.verdict(now_ns, alive)
            if reason is not None and track.proven:
                return reason
        if not alive:
            return "target-died" if track.proven else "nothing"
        if track.proven:
            return "lost-sight" if now_ns - track.last_ns >= SILENCE_NS else None
        return "nothing" if now_ns >= track.until_ns else None

    def _take(self, track: Track, batch: list[AnyEvent], now_ns: int) -> None:
        track.last_ns = now_ns
        track.events += batch
        track.watch.saw(batch)
        received = 0
        for event in batch:
            if isinstance(event, Ioctl):
                self._ioctl(track, event)
            elif isinstance(event, VcpuEnter):
                track.ran.add(event.pid)
            elif isinstance(event, Transfer) and event.direction == 1:
                received += event.bytes
        track.received += received
        if received >= RECEIVED_BYTES >> 4 or track.restored:
            track.until_ns = max(track.until_ns, now_ns + PROBATION_NS)
        if len(track.events) > KEPT_EVENTS:
            self._thin(track)

    def _ioctl(self, track: Track, event: Ioctl) -> None:
        """Logging is also switched on for a display's memory: that is one small slot, a migration's are all slots."""
        if event.cmd == kvm.GET_DIRTY_LOG and event.ret == 0:
            slots = {slot for pid, slot in track.logged_slots if pid == event.pid}
            track.logged_slots.add((event.pid, event.slot)) if slots else None
        if kvm.name_of(event.cmd) in kvm.VCPU_STATE_SET:
            track.restored.add(event.pid)

    def _thin(self, track: Track) -> None:
        """Drops the earlier half of the transfers."""
        transfers = sum(isinstance(event, Transfer) for event in track.events)
        left = transfers // 2
        kept: list[AnyEvent] = []
        for event in track.events:
            if left and isinstance(event, Transfer):
                left -= 1
            else:
                kept.append(event)
        track.thinned += len(track.events) - len(kept)
        track.events = kept

    def _link(self, event: Socket) -> None:
        """Joins two tracks of which each has one end of a connection."""
        other = self._inodes.get(event.peer) if event.peer else None
        self._inodes[event.socket] = event.pid
        if event.local and event.remote:
            other = self._ends.get((event.remote, event.local), other)
            self._ends[event.local, event.remote] = event.pid
        if other is None or other not in self._by_pid:
            return
        first, second = self._by_pid[other], self._by_pid[event.pid]
        if first is not second:
            self._merge(first, second)

    def _merge(self, first: Track, second: Track) -> None:
        first.pids += second.pids
        first.events += second.events
        first.watch = MigrationWatch(first.pids)
        first.watch.saw(first.events)
        first.logged_slots |= second.logged_slots
        first.restored |= second.restored
        first.ran |= second.ran
        first.received += second.received
        first.thinned += second.thinned
        first.until_ns = max(first.until_ns, second.until_ns)
        for pid in second.pids:
            self._by_pid[pid] = first

    def _forget(self, track: Track) -> None:
        for pid in track.pids:
            del self._by_pid[pid]
        gone = set(track.pids)
        self._ends = {ends: pid for ends, pid in self._ends.items() if pid not in gone}
        self._inodes = {inode: pid for inode, pid in self._inodes.items() if pid not in gone}
