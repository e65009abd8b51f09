# SPDX-License-Identifier: Apache-2.0
"""Sorts the events of all traced VMs into migrations, and decides when each is over.

In: pids that showed a sign, batches of events, the time. Out: `Ended`: the processes of one migration, their events
and why it ended, or that a sign led to nothing. Pure: only a `Witness` reads /proc.

A process is on probation at first. It stays traced while it logs dirty memory, or waits and receives. Two processes
belong to one migration once a socket of one is the other end of a socket of the other, or once one is over and its
stream fits the other's only (`halves.py`). A process that begins to
migrate again, or migrates on, starts a new track. The track before ends at that instant, or once its guest has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from ebpf_mig.exporter.halves import other_half
from ebpf_mig.exporter.taking import switches_on, take
from ebpf_mig.exporter.track import KEPT_EVENTS, PROBATION_NS, Track, has_run
from ebpf_mig.recording.events import PIPE, AnyEvent, Exec, Ioctl, Socket, Transfer, VcpuEnter
from ebpf_mig.recording.kinds import pid_of
from ebpf_mig.tracing.lifecycle import QUIET_NS, SILENCE_NS, MigrationWatch
from ebpf_mig.tracing.witness import Witness


@dataclass
class _Passed:
    """A track that ended because `pid` began to migrate again."""

    track: Track
    reason: str
    pid: int
    at_ns: int
    """When it began."""
    until_ns: int
    """Its guest's first run is awaited until then; 0: it has run, or that does not matter."""


@dataclass(frozen=True)
class Ended:
    """A track that is over. `reason` is one of `Ending.reason`, or `nothing` if the sign led to nothing."""

    pids: tuple[int, ...]
    trigger: str
    begin_ns: int
    reason: str
    events: list[AnyEvent]
    thinned: int
    doubtful: bool = False
    hops: tuple[int, ...] = ()
    """Processes that were followed because they pass the migration's bytes on."""
    end_ns: int | None = None
    """When one of its processes began the next migration, which has all that they did later; None: none did."""
    last_ns: int = 0
    """Its last activity."""

    @property
    def over(self) -> bool:
        """Whether it was a migration that came to its end."""
        return self.reason not in ("nothing", "interrupted", "target-died")


class Tracks:
    """All tracks that are open now."""

    def __init__(
        self,
        witness: Callable[[Sequence[int]], Witness] | None = None,
        pending: Callable[[int], Sequence[Transfer]] = lambda _pid: (),
    ) -> None:
        """`witness` makes one for the pids of a track. Without it, closed connections and ends are not marked.
        `pending`: see `other_half`."""
        self._witness, self._pending = witness, pending
        self._by_pid: dict[int, Track] = {}
        self._passed: list[_Passed] = []
        self._ends: dict[tuple[str, str], tuple[int, int]] = {}
        """By address: whose socket it is, and when that was first used."""
        self._inodes: dict[int, tuple[int, int]] = {}

    def __contains__(self, pid: int) -> bool:
        return pid in self._by_pid

    def __bool__(self) -> bool:
        return bool(self._by_pid or self._passed)

    @property
    def pids(self) -> list[int]:
        """All traced processes."""
        return list(self._by_pid)

    @property
    def hops(self) -> set[int]:
        """The processes that pass the bytes of a traced migration on, or of what may be one."""
        tracks = (track for track in self._open() if track.proven or track.fresh or track.fetched)
        found = [track.witness.hops for track in tracks if track.witness is not None]
        return set().union(*found) - self._by_pid.keys()

    def begin(self, pid: int, trigger: str, now_ns: int, *, fresh: bool) -> None:
        """Traces `pid` from now on, or extends its probation. `fresh`: its guest has not run yet."""
        track = self._by_pid.get(pid)
        if track is None:
            self._by_pid[pid] = self._new(pid, trigger, now_ns, fresh=fresh)
        else:
            track.until_ns = max(track.until_ns, now_ns + PROBATION_NS)

    def extend(self, pid: int, until_ns: int) -> None:
        """Keeps `pid` on probation until then, if it is traced."""
        if pid in self._by_pid:
            self._by_pid[pid].until_ns = max(self._by_pid[pid].until_ns, until_ns)

    def replaced(self, pid: int, at_ns: int) -> None:
        """`pid` called execve(2), as the standing probe saw. If its events are traced only since then, `Exec` is added
        before them."""
        track = self._by_pid.get(pid)
        if track is None or at_ns >= track.begin_ns or any(isinstance(e, Exec) and e.pid == pid for e in track.events):
            return
        track.events.insert(0, Exec(at_ns, pid, had_vm=1))
        track.watch_again()

    def _new(self, pid: int, trigger: str, now_ns: int, *, fresh: bool) -> Track:
        news, witness = {pid} if fresh else set(), self._witness([pid]) if self._witness else None
        watch, until = MigrationWatch([pid]), now_ns + PROBATION_NS
        return Track([pid], trigger, now_ns, until, news, watch, witness, last_ns=now_ns)

    def saw(self, events: Iterable[AnyEvent], now_ns: int) -> None:
        """Sorts the next events, which are in the order in which the kernel half made them.

        What came before a connection or the begin of a migration decides which migration that belongs to.
        """
        batches: dict[int, list[AnyEvent]] = {}
        for event in events:
            pid = pid_of(event)
            if isinstance(event, Transfer | Socket) and pid not in self._by_pid:
                for track in self._open():
                    if track.witness is not None and pid in track.witness.hops:
                        track.passed_on.append(event)
                        track.witness.passed([event])
            if pid is None or not (pid in self._by_pid or self._passed_with(pid)):
                continue
            if isinstance(event, Exec) and pid in self._by_pid and pid not in self._by_pid[pid].fresh:
                event = replace(event, had_vm=1)  # noqa: PLW2901 - all that is seen may be the new program's
            if isinstance(event, Socket) or (isinstance(event, Ioctl) and switches_on(event)):
                self._sort(batches, now_ns)
                batches = {}
            if isinstance(event, Socket) and pid in self._by_pid:
                self._link(event)
            batches.setdefault(pid, []).append(event)
        self._sort(batches, now_ns)

    def _sort(self, batches: dict[int, list[AnyEvent]], now_ns: int) -> None:
        for pid, batch in batches.items():
            if pid in self._by_pid:
                self._take_in_turns(pid, batch, now_ns)
            elif passed := self._passed_with(pid):  # the other side of its migration has just begun a new one
                passed.track.events.extend(batch)

    def _passed_with(self, pid: int) -> _Passed | None:
        return next((passed for passed in reversed(self._passed) if pid in passed.track.pids), None)

    def over(self, now_ns: int, is_alive: Callable[[int], bool]) -> list[Ended]:
        """The tracks that ended. Their processes are no longer traced."""
        ended = [self._ended(p.track, p.reason, p.at_ns) for p in self._passed if now_ns >= p.until_ns]
        self._passed = [passed for passed in self._passed if now_ns < passed.until_ns]
        for track in self._open():
            if self._by_pid.get(track.pids[0]) is not track:
                continue  # it is the other half of one before
            if track.witness is not None and track.proven:
                track.witness.look(track.watch, now_ns)
            elif track.witness is not None:
                track.witness.meet(track.watch, now_ns)  # it may be one side; who is beside it ends with the stream
            reason = self._verdict(track, now_ns, [pid for pid in track.pids if is_alive(pid)])
            if reason not in (None, "nothing") and (other := self._other_half(track)) is not None:
                first, second = (track, other) if track.logging else (other, track)
                self._merge(first, second)
                track = first  # noqa: PLW2901
                reason = self._verdict(track, now_ns, [pid for pid in track.pids if is_alive(pid)])
            if reason is not None:
                ended.append(self._ended(track, reason))
                self._forget(track)
        return ended

    def _other_half(self, track: Track) -> Track | None:
        return other_half(track, self._open(), self._pending)

    def _open(self) -> list[Track]:
        return list({id(track): track for track in self._by_pid.values()}.values())

    def abandon(self) -> list[Ended]:
        """Ends all tracks because the watch ends: `interrupted` if a migration was under way."""
        ended = [self._ended(passed.track, passed.reason, passed.at_ns) for passed in self._passed]
        self._passed.clear()
        tracks = self._open()
        for track in tracks:
            self._forget(track)
        return ended + [self._ended(track, "interrupted" if track.proven else "nothing") for track in tracks]

    def _take_in_turns(self, pid: int, batch: list[AnyEvent], now_ns: int) -> None:
        """Sorts a process's events. If it begins another migration, the events before that belong to the old track."""
        begin = 0
        for at, event in enumerate(batch):
            if isinstance(event, Ioctl) and switches_on(event):
                self._await(pid, batch[begin:at])
                take(self._by_pid[pid], batch[begin:at], now_ns)
                begin = at
                reason = self._by_pid[pid].watch.passed(pid)
                if reason is not None:
                    self._begin_again(pid, reason, event.begin_ns, now_ns)
        self._await(pid, batch[begin:])
        take(self._by_pid[pid], batch[begin:], now_ns)

    def _await(self, pid: int, batch: list[AnyEvent]) -> None:
        """The first run of its guest belongs to the migration before, too."""
        for passed in self._passed:
            if passed.pid == pid and passed.until_ns:
                entry = next((event for event in batch if isinstance(event, VcpuEnter)), None)
                if entry is not None:
                    passed.track.events.append(entry)
                    passed.until_ns = 0

    def _begin_again(self, pid: int, reason: str, at_ns: int, now_ns: int) -> None:
        """Ends the track of `pid`. Starts a new one for it, and one for each possible destination."""
        track = self._by_pid[pid]
        until = now_ns + QUIET_NS if reason == "migrated" and not has_run(track, pid) else 0
        self._passed.append(_Passed(track, reason, pid, at_ns, until))
        waiting = [other for other in track.pids if other != pid and other in track.fresh - track.ran]
        for again in (pid, *waiting):
            self._go_on(again, track.trigger, now_ns, track.events, fresh=again in waiting)
            self._by_pid[again].begin_ns = at_ns
        for other in [other for other in track.pids if self._by_pid.get(other) is track]:
            del self._by_pid[other]
        self._forget_ends(set(track.pids) - {pid, *waiting})
        # Where the next connection was seen before logging, both its ends were in the old track. The connection of the
        # try before does not make its destination a part of this one.
        for event in [e for e in self._by_pid[pid].events if isinstance(e, Socket)]:
            if reason == "migrated" or track.watch.was_over(pid, event.at_ns):
                self._link(event)

    def _go_on(self, pid: int, trigger: str, now_ns: int, before: Sequence[AnyEvent], *, fresh: bool) -> None:
        """A new track for `pid`, which was traced until now. `before`: the events of its track before.

        Each socket is reported once, and the next connection is opened before logging begins.
        """
        track = self._by_pid[pid] = self._new(pid, trigger, now_ns, fresh=fresh)
        sockets = [e for e in before if isinstance(e, Socket) and e.pid == pid]
        track.events += sockets
        track.watch.saw(sockets)

    def keep(self, pid: int, ended: Ended, trigger: str, now_ns: int) -> None:
        """Goes on with a process of a track that is over, because of a sign that came after its last activity."""
        self._go_on(pid, trigger, now_ns, ended.events, fresh=False)
        for event in list(self._by_pid[pid].events):
            if isinstance(event, Socket):
                self._link(event)

    def _verdict(self, track: Track, now_ns: int, alive: Sequence[int]) -> str | None:
        if not track.proven:
            return "nothing" if not alive or now_ns >= track.until_ns else None
        if not alive:
            return "target-died"
        reason = track.watch.verdict(now_ns, alive)
        if reason is None and now_ns - track.last_ns >= SILENCE_NS:
            return "lost-sight"
        return reason

    def _link(self, event: Socket) -> None:
        """Merges two tracks that have one end of a connection each, unless it was made for the next migration."""
        own = event.pid, event.at_ns
        other = self._inodes.get(event.socket if event.family == PIPE else event.peer or -1)
        self._inodes[event.socket] = own
        if event.local and event.remote:
            other = self._ends.get((event.remote, event.local), other)
            self._ends[event.local, event.remote] = own
        if other is None or other[0] not in self._by_pid:
            return
        first, second = self._by_pid[other[0]], self._by_pid[event.pid]
        if first is not second and not any(self._by_pid[pid].watch.was_over(pid, at_ns) for pid, at_ns in (own, other)):
            self._merge(first, second)

    def _merge(self, first: Track, second: Track) -> None:
        first.merge(second)
        for pid in second.pids:
            self._by_pid[pid] = first

    def _forget(self, track: Track) -> None:
        for pid in track.pids:
            del self._by_pid[pid]
        self._forget_ends(set(track.pids))

    def _forget_ends(self, gone: set[int]) -> None:
        self._ends = {ends: own for ends, own in self._ends.items() if own[0] not in gone}
        self._inodes = {inode: own for inode, own in self._inodes.items() if own[0] not in gone}

    @staticmethod
    def _ended(track: Track, reason: str, end_ns: int | None = None) -> Ended:
        marks = track.witness.marks() if track.witness is not None else ()
        events = [*track.events, *track.passed_on[-KEPT_EVENTS:], *marks]
        hops = tuple(track.witness.hops) if track.witness is not None else ()
        pids, last_ns = tuple(track.pids), track.watch.last_ns
        return Ended(
            pids,
            track.trigger,
            track.begin_ns,
            reason,
            events,
            track.thinned,
            track.doubtful,
            hops,
            end_ns,
            last_ns,
        )
