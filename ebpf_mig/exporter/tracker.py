# SPDX-License-Identifier: Apache-2.0
"""Sorts the events of all VMs that are being traced into migrations, and says when each is over.

In: pids that showed a sign, batches of events, the time. Out: `Ended`: the processes of one migration, their events
and why it ended; or that a sign meant nothing. Pure: it opens nothing.

A process is on probation at first. It is kept while it logs dirty memory, or waits and receives. Two
processes are one migration once a socket of one is the other end of a socket of the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import AnyEvent, Ioctl, Socket, Transfer, VcpuEnter, VcpuExit
from ebpf_mig.recording.kinds import pid_of
from ebpf_mig.tracing.lifecycle import LARGE_BYTES, MigrationWatch

PROBATION_NS = 2_000_000_000
"""How long a sign is given the benefit of the doubt; a destination may wait this long between two bursts."""
SILENCE_NS = 60_000_000_000
"""A migration that does nothing at all for this long is not awaited any more."""
LOADED_BYTES = 16 << 10
"""A VM that was loaded received at least its device state; one that boots receives its monitor's commands."""
FILLED_BYTES = 1 << 20
"""A VM that was sent this much by another VM is its destination."""
UNPROVEN_NS = 600_000_000_000
"""A VM that sends in bursts is kept this long at most: its first pass may be long, or it merely has a busy disk."""
BURST_BYTES = 64 << 10
"""A VM that moves this much at a time may be migrating."""
SLOTS = 3
"""Dirty logs fetched of this many memslots are a migration's, though its beginning was missed; a display has fewer."""
STATE_BYTES = 4096
"""A source that sent this much after its vCPUs stopped, and then died, has handed over."""
KEPT_EVENTS = 300_000
"""Events held of one migration; beyond, the earliest transfers go first: they only make the totals of pre-copy."""


@dataclass
class Track:
    """What one migration, or one suspicion, has shown so far."""

    pids: list[int]
    trigger: str
    begin_ns: int
    until_ns: int
    fresh: set[int]
    watch: MigrationWatch
    events: list[AnyEvent] = field(default_factory=list)
    logging: set[int] = field(default_factory=set)
    fetched: set[tuple[int, int]] = field(default_factory=set)
    restored: set[int] = field(default_factory=set)
    ran: set[int] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)
    saved: set[int] = field(default_factory=set)
    received: dict[int, int] = field(default_factory=dict)
    fetchers: set[tuple[int, int]] = field(default_factory=set)
    handed: dict[int, int] = field(default_factory=dict)
    """Bytes sent by the threads that fetch dirty logs, while the VM was stopped; by pid."""
    sent_stopped: int = 0
    last_ns: int = 0
    thinned: int = 0

    @property
    def proven(self) -> bool:
        """Dirty logging of RAM, or a VM that was loaded and then ran: this is a migration."""
        if self.logging or self.between_vms:
            return True
        loaded = self.fresh & self.restored & self.ran
        return any(self.received.get(pid, 0) >= LOADED_BYTES for pid in loaded)

    @property
    def between_vms(self) -> bool:
        """One VM fills another that has not run: that is so even where the beginning was missed."""
        return len(self.pids) > 1 and any(self.received.get(pid, 0) >= FILLED_BYTES for pid in self.fresh)


@dataclass(frozen=True)
class Ended:
    """A track that is over. `reason` is one of `Ending.reason`, or `nothing` for a sign that meant nothing."""

    pids: tuple[int, ...]
    trigger: str
    begin_ns: int
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

    def begin(self, pid: int, trigger: str, now_ns: int, *, fresh: bool) -> None:
        """`pid` is traced from now on; again: it gets another probation. `fresh`: its guest has not run yet."""
        track = self._by_pid.get(pid)
        if track is None:
            news, until = {pid} if fresh else set(), now_ns + PROBATION_NS
            self._by_pid[pid] = Track([pid], trigger, now_ns, until, news, MigrationWatch([pid]), last_ns=now_ns)
        else:
            track.until_ns = max(track.until_ns, now_ns + PROBATION_NS)

    def saw(self, events: Iterable[AnyEvent], now_ns: int) -> None:
        """Takes the next events."""
        batches: dict[int, list[AnyEvent]] = {}
        for event in events:
            pid = pid_of(event)
            if pid in self._by_pid:
                batches.setdefault(pid, []).append(event)
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
                ended.append(_ended(track, reason))
                self._forget(track)
        return ended

    def abandon(self) -> list[Ended]:
        """All tracks, ended because we are: `interrupted` where a migration was under way."""
        tracks = list({id(track): track for track in self._by_pid.values()}.values())
        for track in tracks:
            self._forget(track)
        return [_ended(track, "interrupted" if track.proven else "nothing") for track in tracks]

    def _verdict(self, track: Track, now_ns: int, alive: Sequence[int]) -> str | None:
        if not track.proven:
            return "nothing" if not alive or now_ns >= track.until_ns else None
        if not alive:
            return "migrated" if track.sent_stopped >= STATE_BYTES else "target-died"
        reason = track.watch.verdict(now_ns, alive)
        if reason is None and now_ns - track.last_ns >= SILENCE_NS:
            return "lost-sight"
        return reason

    def _take(self, track: Track, batch: list[AnyEvent], now_ns: int) -> None:
        track.events += batch
        track.watch.saw(batch)
        burst = 0
        for event in batch:
            if isinstance(event, Ioctl):
                track.last_ns = now_ns
                _ioctl(track, event)
            elif isinstance(event, VcpuEnter):
                track.ran.add(event.pid)
                track.stopped.discard(event.pid)
                track.saved.discard(event.pid)
                track.handed.pop(event.pid, None)
                track.sent_stopped = 0
            elif isinstance(event, VcpuExit):
                track.stopped.add(event.pid)
            elif isinstance(event, Transfer):
                burst += event.bytes
                _transfer(track, event)
        if burst >= BURST_BYTES or track.restored & track.fresh - track.ran:
            track.last_ns = now_ns
            track.until_ns = max(track.until_ns, min(now_ns, track.begin_ns + UNPROVEN_NS) + PROBATION_NS)
        for pid in _found_out(track):
            track.logging.add(pid)
            track.watch.missed_beginning(pid)
        if track.between_vms and not track.logging:
            for pid in set(track.pids) - track.fresh:
                track.logging.add(pid)
                track.watch.missed_beginning(pid)
        if len(track.events) > KEPT_EVENTS:
            self._thin(track)

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
        for pid in first.logging | second.logging:
            first.watch.missed_beginning(pid)
        first.begin_ns = min(first.begin_ns, second.begin_ns)
        first.fresh |= second.fresh
        first.logging |= second.logging
        first.restored |= second.restored
        first.ran |= second.ran
        first.stopped |= second.stopped
        first.saved |= second.saved
        first.fetched |= second.fetched
        first.received |= second.received
        first.fetchers |= second.fetchers
        first.handed |= second.handed
        first.sent_stopped += second.sent_stopped
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


def _ended(track: Track, reason: str) -> Ended:
    return Ended(tuple(track.pids), track.trigger, track.begin_ns, reason, track.events, track.thinned)


def _ioctl(track: Track, event: Ioctl) -> None:
    """Logging is also switched on for a display's memory: that is one small slot, a migration's are all slots."""
    if event.cmd in kvm.MEMSLOT and event.size >= LARGE_BYTES and event.flags & kvm.MEM_LOG_DIRTY_PAGES:
        track.logging.add(event.pid)
    if event.cmd in kvm.DIRTY_LOG:
        track.fetched.add((event.pid, event.slot))
        track.fetchers.add((event.pid, event.tid))
    if event.pid in track.stopped and kvm.name_of(event.cmd) in kvm.VCPU_STATE_GET:
        track.saved.add(event.pid)
    if kvm.name_of(event.cmd) in kvm.VCPU_STATE_SET:
        track.restored.add(event.pid)


def _transfer(track: Track, event: Transfer) -> None:
    if event.direction == 1:
        track.received[event.pid] = track.received.get(event.pid, 0) + event.bytes
    elif event.pid in track.stopped - track.fresh:
        track.sent_stopped += event.bytes
        if (event.pid, event.tid) in track.fetchers:
            track.handed[event.pid] = track.handed.get(event.pid, 0) + event.bytes


def _found_out(track: Track) -> set[int]:
    """Sources of which the beginning was missed.

    They fetch more dirty logs than a display does; or, however few their slots, they are stopped, their registers are
    read, and the thread that fetches dirty logs sends.
    """
    fetched = Counter(pid for pid, _ in track.fetched if pid not in track.logging)
    handed = {pid for pid in track.saved if track.handed.get(pid, 0) >= LOADED_BYTES}
    return {pid for pid, slots in fetched.items() if slots >= SLOTS or pid in handed}
