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
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ebpf_mig.errors import VmmError
from ebpf_mig.recording.events import Mark, Target
from ebpf_mig.vmm.base import Outcome, RemoteEnd, mark
from ebpf_mig.vmm.qemu.endpoint import ENDED, Side
from ebpf_mig.vmm.qemu.monitor import Monitor, UnansweredError
from ebpf_mig.vmm.qemu.turns import Turns

_SILENCE_S = 10.0
"""After this long without an event, query the status once: an event may have been lost."""
DESTINATION_S = 30.0
"""How long the destination may take to start its vCPUs after the source has reported `completed`."""
_CANCEL_S = 10.0
"""A cancellation takes about 10 ms, but waits for the big lock during the switchover."""
_CONTRADICTION_S = 5.0
"""How long the source may take to notice that its destination has died."""

_DESTINATION_DIED = "the destination QEMU ended during the migration"

_T = TypeVar("_T")


@dataclass(frozen=True)
class QemuOptions:
    """Settings of the migration. None keeps QEMU's setting."""

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


class QemuMigration:
    """One migration between two QEMUs on this host, or with the destination on another host (`destination` None)."""

    def __init__(
        self,
        source: str,
        destination: str | None,
        uri: str,
        options: QemuOptions | None = None,
        remote: tuple[str, RemoteEnd] | None = None,
    ) -> None:
        """`remote`: role and facts of the end on another host."""
        self.uri = uri
        self._remote = dict([remote]) if remote else {}
        self.options = options or QemuOptions()
        self._turns = Turns()
        self._loop = asyncio.SelectorEventLoop(self._turns)
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        self._src: Side | None = None
        self._dst: Side | None = None
        self._listeners: list[asyncio.Task[None]] = []
        self._cancelled = False
        self._postcopy_asked = False
        try:
            self._call(self._connect(source, destination))
        except BaseException:
            self.close()
            raise

    def targets(self) -> list[Target]:
        """Roles, pids and versions from QMP, the source first."""
        roles = ("source", "destination")
        return [
            Target(pid=side.pid, role=role, vmm="qemu", vmm_version=side.monitor.version)
            for role, side in zip(roles, self._sides, strict=False)
            if side.remote is None
        ]

    grows = False

    @property
    def _may_rest(self) -> bool:
        """Whether events can be handled late: we do nothing because of them until the migration is over."""
        return not self.options.postcopy

    def appeared(self) -> list[Target]:
        """Nothing: both processes already run."""
        return []

    def version(self, role: str) -> str:
        """The version that QMP reported for that end."""
        side = self._src if role == "source" else self._dst
        return side.monitor.version if side else ""

    def prepare(self) -> None:
        """Capabilities and parameters on both sides; lets a destination in `-incoming defer` listen."""
        self._call(self._prepare())

    def run(self, timeout_s: float) -> Outcome:
        """Migrates; see `Migration.run`. A failed migration does not raise: the outcome reports it."""
        return self._call(self._run(timeout_s))

    def cancel(self) -> None:
        """Sends `migrate_cancel` to the source, or prevents a later `run`. `run` reports errors."""
        self._cancelled = True
        self._turns.rests = False
        if self._src is not None and not self._loop.is_closed():
            with contextlib.suppress(VmmError, concurrent.futures.CancelledError):
                self._call(self._src.monitor.execute("migrate_cancel", timeout_s=_CANCEL_S))

    def close(self) -> None:
        """Disconnects from both monitors; idempotent."""
        if self._loop.is_closed():
            return
        self._call(self._disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    @property
    def _source(self) -> Side:
        assert self._src is not None  # noqa: S101 - __init__ has connected
        return self._src

    @property
    def _sides(self) -> list[Side]:
        return [side for side in (self._src, self._dst) if side is not None]

    async def _connect(self, source: str, destination: str | None) -> None:
        self._src = await Side.open(source, "source", self._remote.get("source"))
        if destination is not None:
            self._dst = await Side.open(destination, "destination", self._remote.get("destination"))
            if self._dst.pid == self._src.pid:
                raise VmmError("source and destination are the same QEMU", "give each VM's own QMP socket")

    async def _disconnect(self) -> None:
        for side in self._sides:
            await side.monitor.close()
            side.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}  # an interrupted connect, or a pending cancel
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _prepare(self) -> None:
        await self._check_states()
        for side in self._sides:
            wanted = {"capabilities": self.options.capability_list()}
            await side.monitor.execute("migrate-set-capabilities", wanted)
            parameters = self.options.parameters()
            if parameters:
                await side.monitor.execute("migrate-set-parameters", parameters)
        if self._dst is not None and not await self._is_listening(self._dst.monitor):
            await self._dst.monitor.execute("migrate-incoming", {"uri": self.uri})

    async def _check_states(self) -> None:
        state = await self._source.monitor.status("query-status")
        if state in {"postmigrate", "inmigrate"}:
            raise VmmError(f"the source VM is in state {state}: it has no guest to migrate")
        if self._dst is not None:
            state = await self._dst.monitor.status("query-status")
            if state != "inmigrate":
                raise VmmError(
                    f"the destination VM is in state {state}, not waiting for a migration",
                    "start it with -incoming defer",
                )

    @staticmethod
    async def _is_listening(monitor: Monitor) -> bool:
        """A destination started with -incoming URI, not defer, is in status `setup` or reports its address."""
        answer = await monitor.query("query-migrate")
        return bool(answer.get("socket-address")) or str(answer.get("status")) in {"setup", "active"}

    async def _run(self, timeout_s: float) -> Outcome:
        if self._cancelled:
            return Outcome("cancelled", "before it began")
        for side in self._sides:
            self._listen(side)
        away = self._source.remote is not None  # and our clock differs from its host's
        triggers = [] if away else [mark(self._source.pid, "session.trigger", self.uri)]
        self._turns.rests = self._may_rest
        problem = await self._migrate(timeout_s)
        await self._arrival()
        self._turns.rests = False
        figures, reason = await self._source.figures()
        for listener in self._listeners:
            listener.cancel()
        await asyncio.gather(*self._listeners, return_exceptions=True)
        result, error = self._judge(problem, reason)
        marks = [*triggers, *(event for side in self._sides for event in side.marks), *figures]
        return Outcome(result, error, tuple(marks), self._remark(result))

    def _listen(self, side: Side) -> None:
        side.clocks = lambda: self._turns.woken
        self._listeners.append(asyncio.ensure_future(side.listen()))

    async def _trigger(self) -> None:
        await self._source.monitor.execute("migrate", {"uri": self.uri})

    async def _arrival(self) -> None:
        """The source is done; waits for the destination."""
        sent = self._source.status == "completed" or self._source.gone  # as far as this end can tell
        patience = DESTINATION_S if sent else 1.0
        await self._until(self._destination_done, patience)

    def _remark(self, result: str) -> str:
        if result == "completed" and self._source.status != "completed":
            return "the source QEMU ended before it reported the end of the migration; the destination has completed it"
        switched = any(isinstance(m, Mark) and m.name == "qmp.MIGRATION.postcopy-active" for m in self._source.marks)
        if result != "completed" or not self.options.postcopy or switched:
            return ""
        return "--postcopy was without effect: the pre-copy converged before the switch"

    async def _migrate(self, timeout_s: float) -> str:
        """Waits until the source is done, or has not ended although we cancelled. Returns the error on our side."""
        source = self._source
        try:
            await self._trigger()
        except UnansweredError as error:
            await self._cancel_and_wait()
            return str(error)
        except VmmError as error:
            return str(error)
        if self._cancelled:  # the cancellation may have arrived before the migration began
            await self._cancel_and_wait()
        if not await self._until(lambda: source.ended or self._destination_dead(), timeout_s):
            await self._cancel_and_wait()
            return f"not done within {timeout_s:g} s"
        if not await self._until(lambda: source.ended, _CONTRADICTION_S):
            await self._cancel_and_wait()
            return _DESTINATION_DIED
        return ""

    async def _until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Waits for events until `done`; False after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not done():
                    await self._next_change()
        except TimeoutError:
            return done()
        return True

    async def _next_change(self) -> None:
        """Waits for any event; after a long silence asks both ends once."""
        waits = [asyncio.ensure_future(side.changed.wait()) for side in self._sides]
        try:
            done, _ = await asyncio.wait(waits, timeout=_SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        for side in self._sides:
            side.changed.clear()
        if not done:
            await asyncio.gather(*(side.ask_status() for side in self._sides if not side.gone))
        await self._postcopy_if_due()

    async def _postcopy_if_due(self) -> None:
        due = self.options.postcopy and self._source.passes >= 2 and self._source.status == "active"
        if due and not self._postcopy_asked:
            self._postcopy_asked = True
            with contextlib.suppress(VmmError):  # too late, pre-copy has just ended: the migration goes on
                await self._source.monitor.execute("migrate-start-postcopy")

    def _destination_dead(self) -> bool:
        return self._dst is not None and self._dst.dead

    def _destination_done(self) -> bool:
        return self._dst is None or self._dst.ended

    async def _cancel_and_wait(self) -> None:
        self._cancelled = True
        with contextlib.suppress(VmmError):
            await self._source.monitor.execute("migrate_cancel", timeout_s=_CANCEL_S)
            await self._until(lambda: self._source.ended, _CANCEL_S)

    def _judge(self, problem: str, reason: str) -> tuple[str, str]:
        """(result, error) from the reports of both ends and whether they live."""
        source = self._source
        died = "; the destination QEMU has ended" if self._destination_dead() else ""
        if source.dead and self._dst is not None and self._dst.status == "completed":
            return "completed", ""  # it was ended after the last byte, and may have reported anything
        match source.status:
            case "completed":
                return self._judge_destination()
            case "cancelled" | "failed" if problem == _DESTINATION_DIED:
                return "failed", problem
            case "cancelled":
                return "cancelled", problem or "on request"  # QEMU's own text is about the socket that it shut down
            case "failed" if self._cancelled:
                # QEMU shuts the return path before it sets `cancelling` (migration_cancel() in migration/migration.c,
                # migrate_fd_cancel() in older ones), so the error of the return path can come first; seen on 10.0.
                return "cancelled", problem or "on request"
            case "failed":
                return "failed", (reason or problem or "QEMU gives no reason") + died
            case "postcopy-paused":
                return "failed", (reason or "the connection broke after the switch to postcopy") + died
        if source.dead:
            return "failed", "the source QEMU ended during the migration"
        if source.gone:
            return "unknown", "the connection to the source QEMU's monitor broke; the migration may go on"
        if not source.status and problem:
            return "failed", problem
        return "unknown", f"{problem or 'QEMU did not report how the migration ended'}; it may go on"

    def _judge_destination(self) -> tuple[str, str]:
        """(result, error) of the destination, after the source is done."""
        destination = self._dst
        if destination is None or destination.status == "completed":
            return "completed", ""
        if destination.dead or destination.status in ENDED:
            return "failed", "the destination QEMU ended or failed after the source was done"
        why = "its monitor's connection broke" if destination.gone else f"it sent no event for {DESTINATION_S:g} s"
        return "unknown", f"the source is done; whether the destination runs is not known: {why}"
