# SPDX-License-Identifier: Apache-2.0
"""One QMP monitor of one QEMU, with clear errors and a time-out for every wait.

In: the path of a UNIX socket. Out: commands as coroutines, events as they come. It uses the library
`qemu.qmp`, which QEMU's own tests use and which limits a reply to 10 MiB. All calls must come from one event loop.
Replies are checked, because the other end may not be QEMU.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Mapping
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecuteError, Message, QMPClient, QMPError, Runstate

from ebpf_mig.errors import VmmError
from ebpf_mig.linux import descriptors, procfs
from ebpf_mig.linux.sockets import peer_pid

GREETING_S = 5.0
COMMAND_S = 30.0
"""A QEMU answers in a millisecond, but not while its migration thread holds the big lock: in the whole switchover."""
_REMEDY = "start QEMU with -qmp unix:PATH,server=on,wait=off and give that PATH"
_BUSY_REMEDY = "give QEMU a second -qmp socket for ebpf-mig"

logging.getLogger("qemu").setLevel(logging.CRITICAL + 1)  # its messages reach the user as our errors


MOST_EVENTS = 4096
"""Largest number of queued events. A migration has a few dozen. Further events are dropped."""
_MOST_TID = 1 << 30


class _Events(EventListener):
    """A bounded queue of events. It keeps no event that was taken."""

    async def put(self, event: Message) -> None:
        """Queues an event, or drops it if the queue is full."""
        if self._queue.qsize() < MOST_EVENTS:
            await self._queue.put(event)


class UnansweredError(VmmError):
    """A command was sent and no reply came in time; QEMU may still carry it out."""


class Monitor:
    """A connected monitor; make it with `Monitor.open`."""

    def __init__(self, path: str, role: str) -> None:
        self.path = path
        self.role = role
        self.version = ""
        self._client = QMPClient(f"ebpf-mig-{role}")
        self._events = _Events()
        self._client.events.event_filter = lambda _event: False  # the client's own queue has no end
        self._client.register_listener(self._events)
        self._socket: socket.socket | None = None
        self._peer = 0

    @classmethod
    async def open(cls, path: str, role: str) -> Monitor:
        """Connects and negotiates; VmmError if there is no QEMU with a free QMP monitor at `path`."""
        monitor = cls(path, role)
        try:
            await monitor._connect()
            monitor.version = await monitor._version()
        except BaseException:
            await monitor.close()
            raise
        return monitor

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, timeout_s: float | None = None
    ) -> Any:
        """The command's return value; VmmError with QEMU's own words if it refuses, has ended or sends an invalid
        reply.

        UnansweredError after `timeout_s` (default COMMAND_S).
        """
        limit = COMMAND_S if timeout_s is None else timeout_s
        try:
            pending = self._client.execute(command, dict(arguments) if arguments else None)
            return await asyncio.wait_for(pending, limit)
        except TimeoutError as error:
            raise UnansweredError(
                f"the {self.role} QEMU does not answer {command} within {limit:g} s",
                "see whether the process is stopped (SIGSTOP, a debugger) or busy",
            ) from error
        except ExecuteError as error:
            raise VmmError(f"the {self.role} QEMU refuses {command}: {str(error)[:1000]}") from error
        except (QMPError, OSError, EOFError, ValueError) as error:
            if self._client.runstate is Runstate.RUNNING:
                raise self._invalid_reply(command) from error
            raise VmmError(f"the {self.role} QEMU went away during {command}") from error

    async def query(self, command: str) -> dict[str, Any]:
        """The object that a command without arguments returns; as `execute`."""
        answer = await self.execute(command)
        if not isinstance(answer, dict):
            raise self._invalid_reply(command)
        return answer

    async def status(self, command: str) -> str:
        """The state in the reply of `query-status` or `query-migrate`; empty if it has none. As `execute`."""
        status = (await self.query(command)).get("status", "")
        if not isinstance(status, str):
            raise self._invalid_reply(command)
        return status[:64]

    async def next_event(self) -> dict[str, Any] | None:
        """The next event, or None once the connection is gone and no event is left."""
        getter = asyncio.ensure_future(self._events.get())
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({getter, gone}, return_when=asyncio.FIRST_COMPLETED)
            return dict(getter.result()) if getter.done() else None
        finally:
            getter.cancel()
            gone.cancel()

    async def pid(self) -> int:
        """The QEMU process, found by a vCPU thread's id or by the peer of the socket.

        Neither is always right. Thread ids belong to QEMU's own pid namespace (containers). The peer is the process
        that created the listening socket (libvirt creates it for QEMU). The one that holds a KVM VM is QEMU.
        """
        candidates = []
        cpus = await self.execute("query-cpus-fast")
        for cpu in cpus if isinstance(cpus, list) else ():
            tid = cpu.get("thread-id") if isinstance(cpu, dict) else None
            if type(tid) is int and 0 < tid < _MOST_TID:
                with contextlib.suppress(OSError):
                    candidates.append(procfs.process_of(tid))
                    break
        if self._peer > 0:  # 0: a process of a pid namespace that we cannot see
            candidates.append(self._peer)
        if not candidates:
            raise VmmError(
                f"cannot find the pid of the QEMU behind {self.path}", "run ebpf-mig in the host's pid namespace"
            )
        return next((pid for pid in candidates if descriptors.holds_vm(pid)), candidates[0])

    async def close(self) -> None:
        """Disconnects, quietly; idempotent."""
        try:
            # The reason was reported before. ValueError: the other end sent invalid UTF-8.
            with contextlib.suppress(QMPError, OSError, EOFError, ValueError, TimeoutError):
                await asyncio.wait_for(self._client.disconnect(), 2)
        finally:
            if self._socket is not None:
                self._socket.close()

    async def _connect(self) -> None:
        self._socket = sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            sock.connect(self.path)  # a UNIX socket connects at once or not at all
            self._peer = peer_pid(sock)
            await asyncio.wait_for(self._client.connect(sock), GREETING_S)
        except BlockingIOError as error:
            raise VmmError(f"too many clients wait for the QMP socket {self.path}", _BUSY_REMEDY) from error
        except TimeoutError as error:
            raise VmmError(
                f"no QMP greeting from {self.path} within {GREETING_S:.0f} s: another client may hold the monitor",
                _BUSY_REMEDY,
            ) from error
        except (ConnectError, QMPError, OSError, ValueError, AssertionError) as error:
            # ValueError: a NUL in the path. AssertionError: qemu.qmp's, where the other end goes right after greeting.
            raise VmmError(
                f"cannot use {self.path} as the {self.role}'s QMP socket: {_reason(error)}", _REMEDY
            ) from error

    async def _gone(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def _version(self) -> str:
        answer = await self.query("query-version")
        qemu = answer.get("qemu")
        parts = [qemu.get(part) for part in ("major", "minor", "micro")] if isinstance(qemu, dict) else [None]
        if not all(type(part) is int and 0 <= part < 10**6 for part in parts):
            raise self._invalid_reply("query-version")
        return ".".join(map(str, parts))

    def _invalid_reply(self, command: str) -> VmmError:
        return VmmError(f"what listens at {self.path} does not answer {command} as a QEMU does", _REMEDY)


async def pid_behind(path: str) -> int:
    """The pid of the QEMU whose monitor listens there. Uses a connection of its own. VmmError."""
    monitor = await Monitor.open(path, "traced")
    try:
        return await monitor.pid()
    finally:
        await monitor.close()


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
