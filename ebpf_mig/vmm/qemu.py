# SPDX-License-Identifier: Apache-2.0
"""A QEMU migration through QMP: set up both ends, trigger, wait for the end on both sides, collect QEMU's own figures.

In: QMP sockets, the URI and `QemuOptions`. Out: see `vmm.base.Migration`. Waits for events and never polls while the
migration runs: `query-migrate` needs the lock that the migration thread holds for the whole switchover.
Facts: qapi/migration.json, qapi/run-state.json (QEMU 7.2 to 11.1).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ebpf_mig.errors import VmmError
from ebpf_mig.events import AnyEvent, Target
from ebpf_mig.vmm.base import Outcome, mark
from ebpf_mig.vmm.qmp import Monitor

_FINAL = {"completed", "failed", "cancelled"}
_SAFETY_S = 10.0
"""After this long without any event the status is asked for, once each time: an event can have been missed."""
_DESTINATION_S = 30.0
"""The destination starts its vCPUs after the source has said `completed`."""
_VERDICT_S = 5.0
"""How long a source may take to notice that its destination is gone."""
_FIGURES = ("downtime", "total-time", "setup-time", "expected-downtime")
_RAM_FIGURES = ("downtime-bytes", "dirty-sync-count", "precopy-bytes", "postcopy-bytes", "multifd-bytes", "normal")

_T = TypeVar("_T")


@dataclass(frozen=True)
class QemuOptions:
    """What to ask of QEMU; None leaves QEMU's own setting alone."""

    bandwidth_bytes: int | None = None
    """max-bandwidth in bytes/s, 0 for unlimited."""
    downtime_ms: int | None = None
    multifd_channels: int | None = None
    postcopy: bool = False
    capabilities: dict[str, bool] = field(default_factory=dict)

    def capability_list(self) -> list[dict[str, Any]]:
        wanted = {"events": True, "return-path": True}
        if self.multifd_channels:
            wanted["multifd"] = True
        if self.postcopy:
            wanted["postcopy-ram"] = True
        return [{"capability": k, "state": v} for k, v in (wanted | self.capabilities).items()]

    def parameters(self) -> dict[str, int]:
        values = {
            "max-bandwidth": self.bandwidth_bytes,
            "downtime-limit": self.downtime_ms,
            "multifd-channels": self.multifd_channels or None,
        }
        return {k: v for k, v in values.items() if v is not None}


class _Side:
    """One end while the migration runs: what it said, and whether it is done."""

    def __init__(self, monitor: Monitor, pid: int) -> None:
        self.monitor = monitor
        self.pid = pid
        self.marks: list[AnyEvent] = []
        self.status = ""
        self.running = False
        self.gone = False
        self.passes = 0
        self.changed = asyncio.Event()

    async def listen(self) -> None:
        """Takes events until the connection ends."""
        while True:
            event = await self.monitor.next_event()
            if event is None:
                self.gone = True
                self.changed.set()
                return
            self._note(event)

    def _note(self, event: dict[str, Any]) -> None:
        name, data = str(event.get("event", "")), event.get("data") or {}
        stamp = event.get("timestamp") or {}
        wall_ns = int(stamp.get("seconds", 0)) * 10**9 + int(stamp.get("microseconds", 0)) * 1000
        label, value = f"qmp.{name}", 0
        if name == "MIGRATION":
            self.status = str(data.get("status", ""))
            label += f".{self.status}"
        elif name == "MIGRATION_PASS":
            self.passes = value = int(data.get("pass", 0))
        elif name == "RESUME":
            self.running = True
        elif name == "STOP":
            self.running = False
        self.marks.append(mark(self.pid, label, value=value, wall_ns=wall_ns or None))
        self.changed.set()


class QemuMigration:
    """One migration between two QEMUs on this host, or of one whose destination is elsewhere (`destination` None)."""

    def __init__(self, source: str, destination: str | None, uri: str, options: QemuOptions | None = None) -> None:
        self.uri = uri
        self.options = options or QemuOptions()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        self._src: _Side | None = None
        self._dst: _Side | None = None
        try:
            self._call(self._connect(source, destination))
        except BaseException:
            self.close()
            raise

    def targets(self) -> list[Target]:
        """Source first; roles, pids and versions as QMP tells them."""
        sides = [("source", self._src), ("destination", self._dst)]
        return [
            Target(pid=side.pid, role=role, vmm="qemu", vmm_version=side.monitor.version)
            for role, side in sides
            if side is not None
        ]

    def prepare(self) -> None:
        """Capabilities and parameters on both sides; a destination in `-incoming defer` is told to listen."""
        self._call(self._prepare())

    def run(self, timeout_s: float) -> Outcome:
        """Migrates; see `Migration.run`. Never raises for what the migration does: that is the outcome."""
        return self._call(self._run(timeout_s))

    def cancel(self) -> None:
        """`migrate_cancel` on the source; errors are left for `run` to meet."""
        if self._src is not None:
            with contextlib.suppress(VmmError, concurrent.futures.TimeoutError):
                self._call(self._src.monitor.execute("migrate_cancel"), 10)

    def close(self) -> None:
        """Disconnects from both monitors; idempotent."""
        if self._loop.is_closed():
            return
        for side in (self._src, self._dst):
            if side is not None:
                self._call(side.monitor.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if not self._thread.is_alive():
            self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, _T], timeout: float | None = None) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    @property
    def _source(self) -> _Side:
        assert self._src is not None  # noqa: S101 - __init__ has connected
        return self._src

    async def _connect(self, source: str, destination: str | None) -> None:
        monitor = await Monitor.open(source, "source")
        self._src = _Side(monitor, await monitor.pid())
        if destination is not None:
            monitor = await Monitor.open(destination, "destination")
            self._dst = _Side(monitor, await monitor.pid())
            if self._dst.pid == self._src.pid:
                raise VmmError("source and destination are the same QEMU", "give each VM's own QMP socket")

    async def _prepare(self) -> None:
        await self._check_states()
        for side in (self._src, self._dst):
            if side is None:
                continue
            wanted = {"capabilities": self.options.capability_list()}
            await side.monitor.execute("migrate-set-capabilities", wanted)
            parameters = self.options.parameters()
            if parameters:
                await side.monitor.execute("migrate-set-parameters", parameters)
        if self._dst is not None and not await self._is_listening(self._dst.monitor):
            await self._dst.monitor.execute("migrate-incoming", {"uri": self.uri})

    async def _check_states(self) -> None:
        state = (await self._source.monitor.execute("query-status"))["status"]
        if state in {"postmigrate", "inmigrate"}:
            raise VmmError(f"the source VM is in state {state}: it has no guest to migrate")
        if self._dst is not None:
            state = (await self._dst.monitor.execute("query-status"))["status"]
            if state != "inmigrate":
                raise VmmError(
                    f"the destination VM is in state {state}, not waiting for a migration",
                    "start it with -incoming defer",
                )

    @staticmethod
    async def _is_listening(monitor: Monitor) -> bool:
        """A destination started with -incoming URI, not defer, is in status `setup` or tells its address."""
        answer = await monitor.execute("query-migrate")
        return bool(answer.get("socket-address")) or answer.get("status") in {"setup", "active"}

    async def _run(self, timeout_s: float) -> Outcome:
        listeners = [asyncio.ensure_future(side.listen()) for side in (self._src, self._dst) if side is not None]
        trigger = mark(self._source.pid, "session.trigger", self.uri)
        error = ""
        try:
            await self._source.monitor.execute("migrate", {"uri": self.uri})
            async with asyncio.timeout(timeout_s):
                await self._wait()
        except TimeoutError:
            error = f"not done within {timeout_s:g} s; cancelled"
            await self._cancel_and_wait()
        except VmmError as refused:
            error = str(refused)
        figures = await self._figures()
        for listener in listeners:
            listener.cancel()
        result, error = self._judge(error, figures)
        marks = [trigger, *self._source.marks, *(self._dst.marks if self._dst else []), *figures]
        return Outcome(result, error, tuple(marks))

    async def _wait(self) -> None:
        source = self._source
        while source.status not in _FINAL and not source.gone and not self._destination_lost():
            await self._next_change()
            if self.options.postcopy and source.passes >= 2 and source.status == "active":
                source.passes = 0
                await source.monitor.execute("migrate-start-postcopy")
        if self._destination_lost() and source.status not in _FINAL:
            # A cancelled destination ends at once, often before the source has said why.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_VERDICT_S):
                    while source.status not in _FINAL and not source.gone:
                        await self._next_change()
        if source.status not in {"failed", "cancelled"} and self._dst is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DESTINATION_S):
                    while not self._destination_done():
                        await self._next_change()

    async def _next_change(self) -> None:
        """Waits for any event; after a long silence asks the source once, in case an event was missed."""
        sides = [side for side in (self._src, self._dst) if side is not None]
        waits = [asyncio.ensure_future(side.changed.wait()) for side in sides]
        done, _ = await asyncio.wait(waits, timeout=_SAFETY_S, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        for side in sides:
            side.changed.clear()
        if not done and not self._source.gone:
            status = (await self._source.monitor.execute("query-migrate")).get("status", "")
            if status in _FINAL:
                self._source.status = status

    def _destination_lost(self) -> bool:
        return self._dst is not None and self._dst.gone

    def _destination_done(self) -> bool:
        side = self._dst
        return side is None or side.gone or side.status in _FINAL or self._source.status in {"failed", "cancelled"}

    async def _cancel_and_wait(self) -> None:
        with contextlib.suppress(VmmError, TimeoutError):
            await self._source.monitor.execute("migrate_cancel")
            async with asyncio.timeout(10):
                while self._source.status not in _FINAL and not self._source.gone:
                    await self._next_change()

    async def _figures(self) -> list[AnyEvent]:
        """`query-migrate` of the source after the end; some versions say 0 at first (seen on 7.2), so ask twice."""
        source, answer = self._source, {}
        for _ in range(3):
            if source.gone:
                return []
            try:
                answer = await source.monitor.execute("query-migrate")
            except VmmError:
                return []
            if answer.get("status") != "completed" or answer.get("total-time"):
                break
            await asyncio.sleep(0.1)
        found: list[AnyEvent] = []
        for key in _FIGURES:
            if key in answer:
                found.append(mark(source.pid, f"qmp.{key.replace('-', '_')}_ms", value=int(answer[key])))
        for key in _RAM_FIGURES:
            if key in answer.get("ram", {}):
                found.append(mark(source.pid, f"qmp.{key.replace('-', '_')}", value=int(answer["ram"][key])))
        if answer.get("error-desc"):
            found.append(mark(source.pid, "qmp.error", str(answer["error-desc"])[:1000]))
        return found

    def _judge(self, error: str, figures: list[AnyEvent]) -> tuple[str, str]:
        source = self._source
        said = next((getattr(e, "detail", "") for e in figures if getattr(e, "name", "") == "qmp.error"), "")
        if source.status == "cancelled":
            return "cancelled", error or said or "cancelled"
        if source.status == "completed":
            if self._dst is not None and self._dst.gone:
                return "failed", "the destination QEMU ended after the source was done"
            return "completed", ""
        if source.gone:
            return "failed", "the source QEMU ended during the migration"
        if self._destination_lost():
            return "failed", said or "the destination QEMU ended during the migration"
        if source.status == "failed" or error:
            return "failed", said or error or "QEMU gives no reason"
        return "unknown", "QEMU did not say how the migration ended"
