# SPDX-License-Identifier: Apache-2.0
"""One end of a QEMU migration: its QMP events, and whether its process lives.

In: a connected `Monitor` and the pid behind it. Out: the migration status, marks of every event, and at the end
QEMU's own figures. Facts: qapi/migration.json, qapi/run-state.json (QEMU 7.2 to 11.1).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import Any

from ebpf_mig.errors import VmmError
from ebpf_mig.linux import procfs
from ebpf_mig.recording.events import LATEST, AnyEvent, ClockPair, Mark
from ebpf_mig.vmm.base import RemoteEnd, mark
from ebpf_mig.vmm.qemu.monitor import Monitor

FINAL = frozenset({"completed", "failed", "cancelled"})
ENDED = FINAL | {"postcopy-paused"}
"""`postcopy-paused`: the connection broke after the switch to postcopy; nothing more happens by itself."""
_MAX_MARKS = 10_000
DEATH_S = 2.0
"""A dying QEMU closes its monitor first; how long to wait for the process before calling it alive."""
_FIGURES = ("downtime", "total-time", "setup-time", "expected-downtime")
_RAM_FIGURES = ("downtime-bytes", "dirty-sync-count", "precopy-bytes", "postcopy-bytes", "multifd-bytes", "normal")


class Side:
    """One end while the migration runs: its reports, and whether it is done."""

    def __init__(self, monitor: Monitor, pid: int, remote: RemoteEnd | None = None) -> None:
        self.monitor = monitor
        self.pid = pid
        self.remote = remote
        """Of another host: `pid` is negative, marks are on that host's clock, and whether it lives is not known."""
        self.marks: list[AnyEvent] = []
        self.status = ""
        """The last migration status; empty before the first."""
        self.passes = 0
        self.gone = False
        """Whether the QMP connection has ended."""
        self.dead = False
        """Whether the process has ended, too. Known once `gone` is set."""
        self.changed = asyncio.Event()
        self.death_s = DEATH_S
        self.clocks: Callable[[], ClockPair] | None = None
        """Returns both clocks, read near the events that `listen` takes; None: they are read then."""
        self._pidfd = -1
        if remote is None:
            with contextlib.suppress(OSError):
                self._pidfd = os.pidfd_open(pid)

    @classmethod
    async def open(cls, path: str, role: str, remote: RemoteEnd | None) -> Side:
        """Connects to one end and finds its process; VmmError, with nothing left open."""
        monitor = await Monitor.open(path, role)
        if remote is not None:
            return cls(monitor, remote.key, remote)
        try:
            return cls(monitor, await monitor.pid())
        except BaseException:
            await monitor.close()
            raise

    @property
    def ended(self) -> bool:
        """Whether no more events are expected from this end."""
        return self.gone or self.status in ENDED

    async def listen(self) -> None:
        """Takes events until the connection ends."""
        while (event := await self.monitor.next_event()) is not None:
            self._note(event)
            self.changed.set()
        self.dead = await self._process_ended()
        self.gone = True
        self.changed.set()

    async def ask_status(self) -> None:
        """Asks for the status after a long time without events, since one may have been missed."""
        with contextlib.suppress(VmmError):
            status = await self.monitor.status("query-migrate")
            if status in ENDED:
                self.status = status

    async def figures(self) -> tuple[list[AnyEvent], str]:
        """Marks of `query-migrate` after the end, and its error; nothing if the monitor is gone.

        Some versions report 0 at first after a completion (seen on 7.2), so this asks again.
        """
        answer: dict[str, Any] = {}
        for _ in range(3):
            try:
                answer = await self.monitor.query("query-migrate")
            except VmmError:
                return [], ""
            if answer.get("status") != "completed" or answer.get("total-time"):
                break
            await asyncio.sleep(0.1)
        ram = answer.get("ram")
        wanted = [(key, f"{key}_ms", answer) for key in _FIGURES]
        wanted += [(key, key, ram) for key in _RAM_FIGURES if isinstance(ram, dict)]
        found: list[AnyEvent] = []
        for key, name, values in wanted:
            value = _count(values.get(key))
            if value is not None:
                found += self._marks(f"qmp.{name.replace('-', '_')}", value=value)
        reason = answer.get("error-desc")
        error = reason[:1000] if isinstance(reason, str) else ""
        if error:
            found += self._marks("qmp.error", error)
        return found, error

    def close(self) -> None:
        """Closes the process's descriptor. The monitor is closed separately. Idempotent."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _note(self, event: dict[str, Any]) -> None:
        name, data, stamp = _word(event.get("event")), event.get("data"), event.get("timestamp")
        label, value = f"qmp.{name}", 0
        if name == "MIGRATION" and isinstance(data, dict):
            self.status = _word(data.get("status"))
            label += f".{self.status}"
        elif name == "MIGRATION_PASS" and isinstance(data, dict):
            self.passes = value = _count(data.get("pass")) or 0
        if len(self.marks) < _MAX_MARKS:
            self.marks += self._marks(label, value=value, wall_ns=_wall_ns(stamp), grain_ns=1000)

    def _marks(
        self, name: str, detail: str = "", value: int = 0, wall_ns: int | None = None, grain_ns: int = 0
    ) -> list[AnyEvent]:
        """One mark on the clock of this end's host; none if that clock is not known."""
        if self.remote is None:
            return [mark(self.pid, name, detail, value, wall_ns, grain_ns, self.clocks() if self.clocks else None)]
        clock = self.remote.clock
        if clock is None:
            return []
        # Without a stamp of that host, use the present time: wall clocks of hosts agree to about a second.
        wall, doubt = (wall_ns, grain_ns) if wall_ns is not None else (time.time_ns(), 10**9)
        at = wall - clock.realtime_ns + clock.monotonic_ns + grain_ns // 2
        return [Mark(at, self.pid, name, detail, value, clock.doubt_ns + doubt)]

    async def _process_ended(self) -> bool:
        poll = select.poll()
        if self.remote is not None:
            return False
        if self._pidfd < 0:
            return not procfs.exists(self.pid)
        poll.register(self._pidfd, select.POLLIN)
        for _ in range(int(self.death_s / 0.05)):
            if poll.poll(0):
                return True
            await asyncio.sleep(0.05)
        return False


def _count(value: object) -> int | None:
    """`value` as a number that a recording can hold; None if it is not one. The other end may not be QEMU."""
    return value if type(value) is int and 0 <= value <= LATEST else None


def _word(value: object) -> str:
    """`value` as a name; empty if it is not one."""
    return value[:64] if isinstance(value, str) else ""


def _wall_ns(stamp: object) -> int | None:
    """CLOCK_REALTIME ns of an event's timestamp; None if it has none (QEMU says -1 if its clock fails)."""
    if not isinstance(stamp, dict):
        return None
    seconds, micros = _count(stamp.get("seconds")), _count(stamp.get("microseconds"))
    if not seconds or micros is None or seconds >= 1 << 33 or micros >= 10**6:
        return None
    return seconds * 10**9 + micros * 1000
