# SPDX-License-Identifier: Apache-2.0
"""One QMP monitor of one QEMU, with clear errors.

In: the path of a UNIX socket. Out: commands as coroutines, events as they come. Speaks through `qemu.qmp`, which
QEMU's own tests use; all calls must come from one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Mapping
from typing import Any

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError, Runstate

from ebpf_mig.errors import VmmError
from ebpf_mig.vmm.base import process_of

GREETING_S = 5.0
_REMEDY = "start QEMU with -qmp unix:PATH,server=on,wait=off and give that PATH"

logging.getLogger("qemu").setLevel(logging.CRITICAL + 1)  # its complaints reach the user as our errors


class Monitor:
    """A connected monitor; make it with `Monitor.open`."""

    def __init__(self, path: str, role: str) -> None:
        self.path = path
        self.role = role
        self.version = ""
        self._client = QMPClient(f"ebpf-mig-{role}")

    @classmethod
    async def open(cls, path: str, role: str) -> Monitor:
        """Connects and negotiates; VmmError if there is no QEMU with a free QMP monitor at `path`."""
        monitor = cls(path, role)
        try:
            await asyncio.wait_for(monitor._client.connect(path), GREETING_S)
        except TimeoutError as error:
            raise VmmError(
                f"no QMP greeting from {path} within {GREETING_S:.0f} s: another client may hold the monitor",
                "give QEMU a second -qmp socket for ebpf-mig",
            ) from error
        except (ConnectError, QMPError, OSError) as error:
            raise VmmError(f"cannot use {path} as the {role}'s QMP socket: {_reason(error)}", _REMEDY) from error
        monitor.version = await monitor._version()
        return monitor

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """The command's return value; VmmError with QEMU's own words if it refuses or is gone."""
        try:
            return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            raise VmmError(f"the {self.role} QEMU refuses {command}: {error}") from error
        except (QMPError, OSError, asyncio.IncompleteReadError) as error:
            raise VmmError(f"the {self.role} QEMU went away during {command}") from error

    async def next_event(self) -> dict[str, Any] | None:
        """The next event, or None once the connection is gone and no event is left."""
        getter = asyncio.ensure_future(self._client.events.get())
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({getter, gone}, return_when=asyncio.FIRST_COMPLETED)
            return dict(getter.result()) if getter.done() else None
        finally:
            getter.cancel()
            gone.cancel()

    async def pid(self) -> int:
        """The QEMU process: by a vCPU thread's id, else by the peer of the socket (libvirt may own that)."""
        for cpu in await self.execute("query-cpus-fast"):
            try:
                return process_of(int(cpu["thread-id"]))
            except (OSError, KeyError):
                continue
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(self.path)
                return int(struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
            except OSError as error:
                raise VmmError(f"cannot tell the pid of the QEMU behind {self.path}") from error

    async def close(self) -> None:
        """Disconnects, quietly."""
        try:
            await asyncio.wait_for(self._client.disconnect(), 2)
        except (QMPError, OSError, EOFError, TimeoutError):
            return

    async def _gone(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def _version(self) -> str:
        qemu = (await self.execute("query-version"))["qemu"]
        return f"{qemu['major']}.{qemu['minor']}.{qemu['micro']}"


def _reason(error: BaseException) -> str:
    """The innermost cause in a few words."""
    while True:
        inner = getattr(error, "exc", None) or error.__cause__
        if inner is None or inner is error:
            break
        error = inner
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, EOFError):
        return "it closes the connection without a greeting"
    if isinstance(error, ValueError):
        return "it does not speak QMP"
    return (str(error) or type(error).__name__).splitlines()[0][:200]
