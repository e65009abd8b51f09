# SPDX-License-Identifier: Apache-2.0
"""Tells from the events alone when a migration is over, for tracing that does not drive the VMM.

In: batches of events and the time. Out: the reason to stop, once one holds. Pure: it opens nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import AnyEvent, Ioctl, Transfer, VcpuEnter, VcpuExit

QUIET_NS = 300_000_000
"""How long the last act must lie back: the destination starts after the source is done, and its late work counts."""
STOPPED_NS = 2_000_000_000
"""A source alone shows its end only by staying stopped this long, with nothing sent."""
LARGE_BYTES = 1 << 20
"""Logging is switched on for the VGA slot without any migration; RAM slots are larger."""


class MigrationWatch:
    """Feed it with `saw`, ask it with `verdict`."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = tuple(pids)
        self._logged: set[tuple[int, int]] = set()
        self._fetched: set[int] = set()
        self._missed: set[int] = set()
        self._loaded: set[int] = set()
        self._stopped_at: dict[int, int] = {}
        self._started: dict[int, int] = {}
        self._unlogged_at = 0
        self._last_ns = 0

    def saw(self, events: Iterable[AnyEvent]) -> None:
        """Takes the next events of the recording."""
        for event in events:
            if isinstance(event, Ioctl):
                self._ioctl(event)
            elif isinstance(event, VcpuEnter):
                if not self._runs_again(event.pid):
                    self._last_ns = max(self._last_ns, event.at_ns)
                self._stopped_at.pop(event.pid, None)
                if event.pid in self._loaded and event.pid not in self._fetched:
                    self._started.setdefault(event.pid, event.at_ns)
            elif isinstance(event, VcpuExit):
                if not self._runs_again(event.pid):
                    self._last_ns = max(self._last_ns, event.at_ns)
                self._stopped_at[event.pid] = event.at_ns
            elif isinstance(event, Transfer) and event.direction == 0 and event.pid in self._fetched:
                self._last_ns = max(self._last_ns, event.end_ns)

    def missed_beginning(self, pid: int) -> None:
        """`pid` is a source: it fetches dirty logs, but tracing began after logging was switched on."""
        self._fetched.add(pid)
        self._missed.add(pid)

    def verdict(self, now_ns: int, alive: Sequence[int]) -> str | None:
        """The reason to stop tracing, or None while the migration is under way or has not begun."""
        if not alive:
            return "target-died"
        if now_ns - self._last_ns < QUIET_NS:
            return None
        if self._unlogged_at and now_ns - self._unlogged_at >= QUIET_NS:
            return "logging-ended"
        if self._destination_started():
            return "migrated"
        if len(self._pids) == 1 and self._stopped_for_good(now_ns):
            return "migrated"
        return None

    def _runs_again(self, pid: int) -> bool:
        """Its guest runs as any guest does: the interruptions of a busy one are no acts of the migration."""
        return pid in self._started or (bool(self._unlogged_at) and pid in self._fetched)

    def _ioctl(self, event: Ioctl) -> None:
        self._last_ns = max(self._last_ns, event.end_ns)
        if event.cmd == kvm.GET_DIRTY_LOG and self._logged:
            self._fetched.add(event.pid)
        if kvm.name_of(event.cmd) in kvm.VCPU_STATE_SET:
            self._loaded.add(event.pid)
        if event.cmd not in kvm.MEMSLOT or event.size < LARGE_BYTES:
            return
        key = (event.pid, event.slot)
        if event.flags & kvm.MEM_LOG_DIRTY_PAGES:
            self._logged.add(key)
            self._fetched.add(event.pid)
            self._unlogged_at = 0
        elif key in self._logged or event.pid in self._missed:
            self._logged.discard(key)
            if not self._logged:
                self._unlogged_at = event.end_ns

    def _destination_started(self) -> bool:
        """A process whose vCPU state was loaded, and that fetched nothing, entered KVM_RUN."""
        return any(pid not in self._fetched for pid in self._started)

    def _stopped_for_good(self, now_ns: int) -> bool:
        stops = [self._stopped_at[pid] for pid in self._fetched if pid in self._stopped_at]
        return bool(stops) and now_ns - max(*stops, self._last_ns) >= STOPPED_NS
