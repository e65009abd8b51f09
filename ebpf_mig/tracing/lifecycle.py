# SPDX-License-Identifier: Apache-2.0
"""Decides from the events alone when a migration is over, for tracing that does not drive the VMM.

In: batches of events, closed connections, the time. Out: the reason to stop, or None. Pure: it opens nothing.

A pause in the events does not end a migration. A source that is traced alone has handed over when its guest stays
stopped and either the other end has answered its last bytes or its VMM has closed the connection. Otherwise tracing
goes on until the source ends or its guest runs again.

A guest that runs for the first time does not end a migration either, since it may have booted. Its state must have
arrived over a connection, or a traced source must have stopped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ebpf_mig.analysis.reception import Reception
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import (
    SEND,
    AnyEvent,
    Exec,
    Ioctl,
    Kick,
    Socket,
    Transfer,
    VcpuEnter,
    VcpuExit,
)  # fmt: skip
from ebpf_mig.tracing.carriers import Carriers
from ebpf_mig.tracing.file_watch import FileWatch

QUIET_NS = 300_000_000
"""A migration is over only this long after its last activity. The destination starts after the source is done, and its
late work belongs to the migration."""
STOPPED_NS = 2_000_000_000
"""How long a source that has handed over may take to resume its guest: the destination may have refused it."""
SILENCE_NS = 60_000_000_000
"""Stop waiting for a migration after this long without activity."""
LARGE_BYTES = 1 << 20
"""Smallest memslot that counts as RAM. The VGA slot is smaller, and is logged without a migration, too."""


class MigrationWatch:
    """Pass events to `saw` and closed connections to `closed`. `verdict` returns the result."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = tuple(pids)
        self._logged: set[tuple[int, int]] = set()
        self._fetched: set[int] = set()
        self._missed: set[int] = set()
        self._unlogged: set[tuple[int, int]] = set()
        """Slots that were seen to be set without logging, or to be deleted."""
        self._loaded: set[int] = set()
        self._receptions: defaultdict[int, Reception] = defaultdict(Reception)
        self._stopped_at: dict[int, int] = {}
        self._ran: set[int] = set()
        self._started: dict[int, int] = {}
        self._executed: set[int] = set()
        """Processes that called execve(2), and are their own destination."""
        self._files = FileWatch()
        self._paused: set[int] = set()
        """Sources whose guest did not run when their migration began, or stopped later, but not for the migration."""
        self._kicked_by: dict[int, int] = {}
        """By pid: the thread that last kicked a vCPU."""
        self.carriers = Carriers()
        self._closed_at: dict[int, int] = {}
        self._unlogged_at = 0
        self._gone_at = 0
        """When all sources were first known to have ended."""
        self._last_ns = 0
        self._moved_ns = 0
        """Time of the last transfer on any socket. It counts as activity once a process is known to be a source."""

    def joined(self, pid: int) -> None:
        """Adds a process that is traced from now on."""
        self._pids = (*self._pids, pid)

    def saw(self, events: Iterable[AnyEvent]) -> None:
        """Takes the next events of the recording."""
        for event in events:
            if isinstance(event, Ioctl):
                self._ioctl(event)
            elif isinstance(event, VcpuEnter):
                self._enter(event)
            elif isinstance(event, VcpuExit):
                self._ran.add(event.pid)
                self._paused.discard(event.pid)
                if not self._runs_again(event.pid):
                    self._last_ns = max(self._last_ns, event.at_ns)
                self._stopped_at[event.pid] = event.at_ns
                self._files.left(event.pid)
            elif isinstance(event, Transfer):
                self._transfer(event)
                self._moved_ns = max(self._moved_ns, event.end_ns)
            elif isinstance(event, Socket):
                self.carriers.known[event.pid, event.socket] = event
            elif isinstance(event, Kick):
                self._kicked_by[event.pid] = event.tid
                self._files.kicked(event.pid, event.tid)
            elif isinstance(event, Exec):
                self._replaced(event)

    def missed_beginning(self, pid: int) -> None:
        """`pid` is a source: it fetches dirty logs, but tracing began after logging was switched on."""
        self._fetched.add(pid)
        self._missed.add(pid)
        self._last_ns = max(self._last_ns, self._moved_ns)

    @property
    def sources(self) -> frozenset[int]:
        """The processes that were seen to log dirty memory."""
        return frozenset(self._fetched)

    @property
    def last_ns(self) -> int:
        """The migration's last activity."""
        return self._last_ns

    def closed(self, pid: int, at_ns: int) -> None:
        """The VMM `pid` still lives, and has closed the connection that `connections` lists."""
        self._closed_at.setdefault(pid, at_ns)

    @property
    def connections(self) -> dict[int, int]:
        """The sources whose guest may have stopped for good, with the inode of the socket that sent most."""
        sources = [pid for pid in self._fetched if pid not in self._closed_at]
        stopped = [pid for pid in sources if pid not in self._ran or not self._runs(pid)]
        return {pid: socket for pid in stopped if (socket := self.carriers.busiest(pid))}

    @property
    def executed(self) -> frozenset[int]:
        """The processes that replaced themselves by another program."""
        return frozenset(self._executed)

    @property
    def source_stopped(self) -> bool:
        """Whether a source's guest has stopped: its vCPUs were interrupted or their state was read, and none ran
        since.
        """
        return any(pid in self._stopped_at for pid in self._fetched)

    @property
    def arrived(self) -> frozenset[int]:
        """The destinations whose guest has run."""
        return frozenset(pid for pid in self._started if self._took_over(pid))

    def _took_over(self, pid: int) -> bool:
        """Whether its vCPUs have the state of a guest that ran elsewhere."""
        if pid not in self._loaded or pid in self._fetched:
            return False
        loaded = self._receptions[pid].loaded or self._files.restored(pid)
        return self.source_stopped or pid in self._executed or loaded

    def passed(self, pid: int) -> str | None:
        """Why the migration of `pid` is over, now that `pid` begins another one; None if it is not over.

        A destination may begin the next one before its guest has run: its manager does not wait for that.
        """
        if (pid in self._started or pid not in self._ran) and self._took_over(pid):
            return "migrated"
        if pid in self._fetched and self._unlogged_at:
            return "logging-ended"
        return None

    def was_over(self, pid: int, at_ns: int) -> bool:
        """Whether the migration of `pid` was over by then: its guest had started there, or logging had ended."""
        if pid in self._started and self._took_over(pid):
            return at_ns > self._started[pid]
        return pid in self._fetched and 0 < self._unlogged_at < at_ns

    @property
    def under_way(self) -> bool:
        """Whether a source has begun to migrate and no end was seen."""
        return bool(self._fetched or self._executed) and not self._unlogged_at and not self.arrived

    def verdict(self, now_ns: int, alive: Sequence[int]) -> str | None:
        """The reason to stop tracing, or None while the migration is under way or has not begun."""
        if not alive:
            return "target-died"
        if self._runs_without_source(now_ns, alive):
            return "handed-over"
        if now_ns - self._last_ns < QUIET_NS:
            return None
        if self._unlogged_at and now_ns - self._unlogged_at >= QUIET_NS:
            return "logging-ended"
        if self.arrived or self._files.run_anew(now_ns - QUIET_NS) - self._fetched:
            return "migrated"
        if self._handed_over(now_ns):
            return "handed-over"
        if self._was_saved(now_ns):
            return "saved"
        if self.under_way and now_ns - self._last_ns >= SILENCE_NS:
            return "lost-sight"
        return None

    def _runs_without_source(self, now_ns: int, alive: Sequence[int]) -> bool:
        """Whether the sources have ended, and a guest runs elsewhere. A destination that was traced too late to see it
        loaded never arrives, and its running guest is no silence.
        """
        if not self._fetched or not self._fetched.isdisjoint(alive):
            self._gone_at = 0
            return False
        self._gone_at = self._gone_at or now_ns
        runs = any(pid in self._ran and self._runs(pid) for pid in alive)
        return runs and now_ns - self._gone_at >= STOPPED_NS

    @property
    def saved(self) -> frozenset[int]:
        """The processes whose guest was written to files without dirty logging."""
        return frozenset(self._files.saved) - self._fetched

    def _was_saved(self, now_ns: int) -> bool:
        """Whether a guest was written to files and runs again, or stays stopped while nobody else could load it."""
        for pid in self.saved:
            again = self._files.resumed.get(pid)
            quiet = STOPPED_NS if pid in self._files.in_background else QUIET_NS  # a disk may keep its thread waiting
            if again is not None and now_ns - again >= quiet:
                return True
            waits = STOPPED_NS if len(self._pids) == 1 else SILENCE_NS
            if again is None and now_ns - max(self._files.saved[pid], self._last_ns) >= waits:
                return True
        return False

    def _runs(self, pid: int) -> bool:
        """Whether its guest runs. Call it only for a process that was seen to run its guest."""
        return pid not in self._stopped_at

    def _runs_again(self, pid: int) -> bool:
        """Whether its guest runs outside of a migration. The interruptions of a busy guest are no activity then."""
        if pid in self._fetched:
            return bool(self._unlogged_at)
        return pid in self._started or pid in self._files.resumed or pid in self._files.loaded_again

    def _enter(self, event: VcpuEnter) -> None:
        first = event.pid not in self._ran
        self._files.entered(event.pid, event.tid, event.at_ns)
        self._ran.add(event.pid)
        self._paused.discard(event.pid)
        if not self._runs_again(event.pid):
            self._last_ns = max(self._last_ns, event.at_ns)
        for known in (self._stopped_at, self.carriers.answered_at, self._closed_at):
            known.pop(event.pid, None)
        if first and event.pid in self._loaded and event.pid not in self._fetched:
            self._started[event.pid] = event.at_ns

    def _replaced(self, event: Exec) -> None:
        """The process continues with another program: nothing that was known of its VM holds any more."""
        for pids in (self._fetched, self._missed, self._loaded, self._ran, self._paused):
            pids.discard(event.pid)
        for known in (self._stopped_at, self._started, self.carriers.sent_at, self._closed_at):
            known.pop(event.pid, None)
        self.carriers.start_anew(event.pid)
        self._receptions.pop(event.pid, None)
        self._logged = {(pid, slot) for pid, slot in self._logged if pid != event.pid}
        self._unlogged = {(pid, slot) for pid, slot in self._unlogged if pid != event.pid}
        self._unlogged_at = 0
        self._executed.add(event.pid)
        self._last_ns = max(self._last_ns, event.at_ns)

    def _ioctl(self, event: Ioctl) -> None:
        if not self._runs_again(event.pid):
            self._last_ns = max(self._last_ns, event.end_ns)
        name = kvm.name_of(event.cmd)
        self._files.ioctl(event)
        if event.cmd in kvm.DIRTY_LOG:
            self.carriers.fetchers.add((event.pid, event.tid))
        if event.pid not in self._ran:
            self._receptions[event.pid].ioctl(event)
        if event.cmd == kvm.GET_DIRTY_LOG and any(pid == event.pid for pid, _ in self._logged):
            self._fetched.add(event.pid)
            self._fetched_without_guest(event)
        if name in kvm.VCPU_STATE_SET:
            self._loaded.add(event.pid)
        if name in kvm.VCPU_STATE_GET and event.pid in self._fetched:
            self._stopped_at.setdefault(event.pid, event.begin_ns)
        if event.cmd in kvm.MEMSLOT:
            self._memslot(event)

    def _fetched_without_guest(self, event: Ioctl) -> None:
        """A migration that goes on after another thread has stopped the guest is not why it stopped: it shut down, or
        somebody paused it. The thread that fetches asks for the migration's own stop, and fetches after that."""
        kicker = self._kicked_by.get(event.pid)
        stopped = self._stopped_at.get(event.pid)
        if (
            stopped is not None
            and stopped < event.begin_ns
            and kicker
            and (event.pid, kicker) not in self.carriers.fetchers
        ):
            self._paused.add(event.pid)

    def _memslot(self, event: Ioctl) -> None:
        key = (event.pid, event.slot)
        if not event.size:
            self._unlogged.add(key)
        if event.size < LARGE_BYTES:
            return
        if event.flags & kvm.MEM_LOG_DIRTY_PAGES:
            if event.pid not in self._fetched or self._unlogged_at:
                self.carriers.start_anew(event.pid)
                self._closed_at.pop(event.pid, None)
                running = event.pid in self._ran and self._runs(event.pid)
                (self._paused.discard if running else self._paused.add)(event.pid)
            self._logged.add(key)
            self._unlogged.discard(key)
            self._fetched.add(event.pid)
            self._unlogged_at = 0
            return
        made = key in self._unlogged or event.pid in self._executed  # a new program makes all its slots
        self._unlogged.add(key)
        if not made and event.pid not in self._fetched and self.carriers.busiest(event.pid):
            self.missed_beginning(event.pid)  # an existing slot loses the flag after much was sent
        if key in self._logged or event.pid in self._missed:
            self._logged.discard(key)
            if not self._logged:
                self._unlogged_at = event.end_ns

    def _transfer(self, event: Transfer) -> None:
        """Only transfers on the migration's carrier count as activity: a monitor may answer at any time."""
        of_a_file = self.carriers.is_of_a_file(event)
        if event.direction == SEND and event.pid not in self._fetched and self._files.sent(event):
            self._last_ns = max(self._last_ns, event.end_ns)
        if of_a_file:
            self._files.transfer(event)
        elif event.direction != SEND and self.carriers.is_unix(event):
            self._files.received(event.pid)
        if not of_a_file and (event.pid not in self._ran or event.begin_ns < self._started.get(event.pid, 0)):
            self._receptions[event.pid].transfer(event)
        if self.carriers.carried(event) and event.pid in self._fetched:
            self._last_ns = max(self._last_ns, event.end_ns)

    def _handed_over(self, now_ns: int) -> bool:
        """Whether a source's last bytes were answered or its VMM closed the connection, and its guest stays stopped.

        If the destination is also traced, its start is the end instead, unless the guest had stopped before.
        """
        for pid in self._fetched:
            if len(self._pids) > 1 and pid in self._ran and pid not in self._paused:
                continue
            if pid in self._ran and self._runs(pid):
                continue
            answered = self.carriers.answered_at.get(pid, 0)
            known = [answered] if answered > self.carriers.sent_at.get(pid, 0) else []
            known += [self._closed_at[pid]] if pid in self._closed_at else []
            if known and now_ns - max(min(known), self._last_ns) >= STOPPED_NS:
                return True
        return False
