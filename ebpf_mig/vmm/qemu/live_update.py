# SPDX-License-Identifier: Apache-2.0
"""A live update of QEMU (CPR) through QMP: a new program on the same host takes the guest over, its memory stays.

In: the source's QMP socket, and what the mode needs. Out: see `vmm.base.Migration`. `CprTransfer`: a second QEMU waits
for the descriptors on a UNIX socket, and opens its monitor only when it has them. `CprExec`: the source saves its
state, calls execve(2), and the new program opens a monitor at the same path.

The new QEMU's monitor is not used while the guest is stopped: a command would take its main loop's time. Only with
`-incoming defer` it has to be, and then, in cpr-transfer, the guest still runs.
Facts: docs/devel/migration/CPR.rst, migration/cpr*.c, qapi/migration.json (QEMU 10.0 to 11.1).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from ebpf_mig.errors import UsageError, VmmError
from ebpf_mig.linux import procfs
from ebpf_mig.linux.sockets import listens_at
from ebpf_mig.recording.events import Target
from ebpf_mig.text import printable
from ebpf_mig.vmm.qemu.adapter import ADAPTER, LIVE_UPDATES, incoming
from ebpf_mig.vmm.qemu.endpoint import Side
from ebpf_mig.vmm.qemu.migration import DESTINATION_S, QemuMigration, QemuOptions
from ebpf_mig.vmm.qemu.monitor import Monitor

TRANSFER, EXEC = LIVE_UPDATES
SINCE = {TRANSFER: "10.0", EXEC: "10.2"}
"""The version of QEMU that brought the mode (MigMode in qapi/migration.json)."""
_REST_S = 0.5
"""How long a QEMU that was just started is left alone before its monitor is used."""
_RETRY_S = 0.02


class LiveUpdate(QemuMigration):
    """What both modes share: the mode of the migration, and a monitor that appears later."""

    mode: ClassVar[str]

    def __init__(self, source: str, uri: str) -> None:
        self._completed = False
        self._mode_before = ""
        super().__init__(source, None, uri, QemuOptions(capabilities=self._capabilities()))

    @property
    def _may_rest(self) -> bool:
        """Not here: the guest may be stopped until the new QEMU's monitor is told to listen."""
        return False

    @staticmethod
    def _capabilities() -> dict[str, bool]:
        return {"multifd": False, "postcopy-ram": False}

    def _parameters(self) -> dict[str, Any]:
        return {}

    async def _prepare(self) -> None:
        await self._check_states()
        monitor = self._source.monitor
        before = (await monitor.query("query-migrate-parameters")).get("mode", "")
        try:
            await monitor.execute("migrate-set-parameters", {"mode": self.mode})
        except VmmError as error:
            words = str(error).partition(": ")[2].partition(";")[0] or str(error)
            raise VmmError(
                f"QEMU {monitor.version} cannot do {self.mode}: {words}", f"use QEMU {SINCE[self.mode]} or newer"
            ) from error
        self._mode_before = before if isinstance(before, str) else ""
        await monitor.execute("migrate-set-capabilities", {"capabilities": self.options.capability_list()})
        if parameters := self._parameters():
            await monitor.execute("migrate-set-parameters", parameters)

    async def _disconnect(self) -> None:
        """A source that keeps its guest also keeps its mode: the next migration would be another live update."""
        source = self._src
        if source is not None and self._mode_before and not self._completed and not source.gone:
            with contextlib.suppress(VmmError):
                await source.monitor.execute("migrate-set-parameters", {"mode": self._mode_before}, timeout_s=2)
        await super()._disconnect()

    async def _open_successor(self, path: str, pid: int) -> Monitor:
        """The monitor of the new QEMU, which is `pid`; waits until it exists. VmmError."""
        deadline = time.monotonic() + DESTINATION_S
        while True:
            try:
                monitor = await Monitor.open(path, "destination")
                break
            except VmmError as error:
                if not procfs.is_alive(pid):
                    raise VmmError("the new QEMU ended") from error
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_RETRY_S)
        try:
            found = await monitor.pid()
            if found != pid:
                raise VmmError(f"{path} belongs to process {found}, not to the new QEMU, which is {pid}")
        except BaseException:
            await monitor.close()
            raise
        self._dst = Side(monitor, pid)
        self._listen(self._dst)
        return monitor

    async def _let_listen(self, monitor: Monitor) -> None:
        """For a QEMU that was started with `-incoming defer`."""
        events = [{"capability": "events", "state": True}]
        await monitor.execute("migrate-set-capabilities", {"capabilities": events})
        await monitor.execute("migrate-incoming", {"uri": self.uri})

    def _judge(self, problem: str, reason: str) -> tuple[str, str]:
        result = super()._judge(problem, reason)
        self._completed = result[0] == "completed"
        return result


class CprTransfer(LiveUpdate):
    """A second QEMU takes over: descriptors through one UNIX socket, then the state over `uri`."""

    mode = TRANSFER

    def __init__(self, source: str, destination: str, uri: str, channel: str) -> None:
        """`destination`: path of its future monitor. `channel`: the UNIX socket on which it waits."""
        self._destination, self._channel = destination, channel
        self._main = main_channel(uri)
        self._trouble = ""
        super().__init__(source, uri)

    def targets(self) -> list[Target]:
        """The source, and the process that waits on the channel."""
        return [*super().targets()[:1], Target(pid=self._waiting, role="destination", vmm="qemu")]

    async def _connect(self, source: str, destination: str | None) -> None:
        self._waiting = who_waits_at(self._channel)
        self._deferred = "defer" in incoming(procfs.command_line(self._waiting))
        await super()._connect(source, destination)

    async def _trigger(self) -> None:
        address = {"transport": "socket", "type": "unix", "path": self._channel}
        channels = [{"channel-type": "main", "addr": self._main}, {"channel-type": "cpr", "addr": address}]
        await self._source.monitor.execute("migrate", {"channels": channels})

    async def _migrate(self, timeout_s: float) -> str:
        """With `-incoming defer` the source waits, its guest running, until the new QEMU listens."""
        opening = asyncio.ensure_future(self._defer()) if self._deferred else None
        problem = await super()._migrate(timeout_s)
        if opening is not None:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
        return self._trouble or problem

    async def _defer(self) -> None:
        try:
            await self._let_listen(await self._open_successor(self._destination, self._waiting))
        except VmmError as error:
            self._trouble = str(error)
            await self._cancel_and_wait()

    async def _arrival(self) -> None:
        if self._dst is None and self._source.status == "completed":
            with contextlib.suppress(VmmError):
                await self._open_successor(self._destination, self._waiting)
        if self._dst is not None and not self._dst.ended:
            await self._dst.ask_status()
        await super()._arrival()

    def _destination_dead(self) -> bool:
        return not procfs.is_alive(self._waiting)

    def _judge_destination(self) -> tuple[str, str]:
        if self._dst is not None:
            return super()._judge_destination()
        if self._destination_dead():
            return "failed", "the new QEMU ended after the source was done"
        return "unknown", f"the source is done; the new QEMU does not answer at {self._destination}"


class CprExec(LiveUpdate):
    """The source replaces itself: it saves its state to `uri`, calls execve(2) and loads it again."""

    mode = EXEC

    def __init__(self, source: str, uri: str, command: Sequence[str] = ()) -> None:
        """`command`: of the new program; empty: as the source was started."""
        self._path, self._command = source, list(command)
        super().__init__(source, uri)

    @staticmethod
    def _capabilities() -> dict[str, bool]:
        """A file has no way back."""
        return LiveUpdate._capabilities() | {"return-path": False}

    def _parameters(self) -> dict[str, Any]:
        return {"cpr-exec-command": self._command}

    async def _connect(self, source: str, destination: str | None) -> None:
        await super()._connect(source, destination)
        self._source.death_s = 0  # the monitor goes, the process stays
        self._command = self._command or successor_command(own_command(self._source.pid), self.uri)

    def _remark(self, result: str) -> str:  # noqa: ARG002 - the source's end is part of it
        return ""

    async def _arrival(self) -> None:
        source = self._source
        await self._until(lambda: source.gone or source.status in {"failed", "cancelled"}, DESTINATION_S)
        if not source.gone or not procfs.is_alive(source.pid):
            return
        deferred = "defer" in incoming(self._command)
        with contextlib.suppress(VmmError):
            await asyncio.sleep(0 if deferred else _REST_S)
            monitor = await self._open_successor(self._path, source.pid)
            if deferred:
                await self._let_listen(monitor)
            elif self._dst is not None:
                await self._dst.ask_status()
        await self._until(self._destination_done, DESTINATION_S)

    def _judge(self, problem: str, reason: str) -> tuple[str, str]:
        if not self._source.gone:
            return super()._judge(problem, reason)
        if self._dst is not None:
            result = self._judge_destination()
        elif procfs.is_alive(self._source.pid):
            result = "unknown", f"the new program does not answer at {self._path}"
        else:
            result = "failed", "the new program ended; the guest is lost"
        self._completed = result[0] == "completed"
        return result


def successor_command(arguments: Sequence[str], uri: str) -> list[str]:
    """The command line for the new program: as before, but its guest comes from `uri` and runs at once.

    `-daemonize` is left out, since the process is in the background already, and its pid must stay.
    """
    left_out = {"-incoming", "--incoming", "-S", "--S", "-daemonize", "--daemonize"}
    kept = [
        one
        for before, one in itertools.pairwise(["", *arguments])
        if one not in left_out and before not in {"-incoming", "--incoming"}
    ]
    return [*kept, "-incoming", uri]


def own_command(pid: int) -> list[str]:
    """How the source was started. VmmError if /proc does not have all of it: a wrong command would lose the guest."""
    *arguments, rest = procfs.command_line(pid) or [""]
    if not arguments or rest or any("\ufffd" in one for one in arguments):
        raise VmmError(f"the command line of process {pid} cannot be read", "give the new one with --exec-command")
    return arguments


def main_channel(uri: str) -> dict[str, str]:
    """`uri` as a MigrationAddress of qapi/migration.json; UsageError if it is not of TCP or a UNIX socket."""
    scheme, _, rest = uri.partition(":")
    host, _, port = rest.rpartition(":")
    if scheme == "unix" and rest:
        return {"transport": "socket", "type": "unix", "path": rest}
    if scheme == "tcp" and host and port:
        return {"transport": "socket", "type": "inet", "host": host.strip("[]"), "port": port}
    raise UsageError(f"--uri {printable(uri, 80)} is no address for {TRANSFER}", "use unix:PATH or tcp:HOST:PORT")


def who_waits_at(channel: str) -> int:
    """The pid of the QEMU that waits for descriptors on that UNIX socket. VmmError if there is none."""
    for pid in procfs.processes():
        with contextlib.suppress(OSError):
            if ADAPTER.awaits_live_update(procfs.command_line(pid)) and listens_at(pid, channel):
                return pid
    raise VmmError(
        f"no QEMU waits for a live update at {channel}",
        "start the new one with -incoming and a channel of type cpr, see docs/live-update.md",
    )
