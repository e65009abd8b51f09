# SPDX-License-Identifier: Apache-2.0
"""The other host of a migration: its recorder, and its VMM's API socket forwarded to this host, over one ssh
connection.

In: a host, or a command that runs commands there, and the socket's path on that host. Out: a path here that leads to
the socket, and a `Recorder`. There is no daemon, port or authentication of our own. The remote commands read
our standard input and end on its EOF, also when we or the connection fail.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ebpf_mig.linux.process import end_group, private_directory
from ebpf_mig.recording.events import Header
from ebpf_mig.text import printable
from ebpf_mig.tracing.recorder import Recorder, RemoteError
from ebpf_mig.vmm.adapter import FarEnd
from ebpf_mig.vmm.base import RemoteEnd

CONNECT_S = 20.0
_MOST_READ = 1 << 20
_SSH = (
    "ssh", "-T", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-o", "StreamLocalBindUnlink=yes",
    "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", "-o", "ConnectTimeout=15",
)  # fmt: skip
"""ssh must not prompt, and detects within 15 s that the other host is gone."""


@dataclass(frozen=True)
class RemoteHost:
    """How to reach the other host."""

    host: str
    command: str | None = None
    """Runs a command on the other host in place of ssh: `kubectl exec -i POD --`."""
    tool: str = "ebpf-mig"
    """Starts ebpf-mig on the other host: `sudo ebpf-mig`."""

    def line(self, arguments: Sequence[str], forward: tuple[str, str] | None = None) -> list[str]:
        """The local command line that runs ebpf-mig on the other host."""
        return self.command_line([*shlex.split(self.tool), *arguments], forward)

    def command_line(self, command: Sequence[str], forward: tuple[str, str] | None = None) -> list[str]:
        """The local command line that runs any command on the other host."""
        if self.command is not None:
            return [*shlex.split(self.command), *command]
        forwarding = ["-L", f"{forward[0]}:{forward[1]}"] if forward else []
        return [*_SSH, *forwarding, "--", self.host, shlex.join(command)]


@dataclass
class Remote:
    """The connection; use as a context manager. Start with `record`."""

    host: RemoteHost
    role: str
    far: FarEnd
    """What the migration needs on the other host."""
    tier: str = "auto"
    user_stacks: bool = False
    recorder: Recorder | None = None
    header: Header | None = None
    problem: str = ""
    """Why the other host records nothing; one line."""
    api: str = ""
    """Local path of the VMM's forwarded control socket; empty if none is needed."""
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Remote:
        with contextlib.ExitStack() as guard:
            if self.far.socket:
                self.api = str(guard.enter_context(private_directory()) / "api")
            self._start(guard)
            self._stack = guard.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def end(self) -> RemoteEnd:
        """The process on the other host, as its recorder reports it."""
        if self.header is None or not self.header.targets:
            return RemoteEnd(run=self._run)
        return RemoteEnd(self.header.targets[0].pid, self.header.clock, self._run)

    def _run(self, command: list[str]) -> str:
        """A command's output on the other host, up to a limit; empty if it cannot be run."""
        line = self.host.command_line(command)
        try:
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0
            )
        except OSError:
            return ""
        patience = threading.Timer(CONNECT_S, os.killpg, (process.pid, signal.SIGKILL))
        patience.start()
        try:
            assert process.stdout is not None  # noqa: S101 - asked for above
            with process.stdout:
                output = process.stdout.read(_MOST_READ)
        finally:
            patience.cancel()
            patience.join()
            end_group(process)
        return output.decode(errors="replace")

    def _start(self, guard: contextlib.ExitStack) -> None:
        """Starts the recorder and forwards the socket, if one is needed. If recording fails, only the socket is
        forwarded.
        """
        name = f"the {self.role}'s host {printable(self.host.host)}"
        options = ["record", *self.far.record, "--tier", self.tier, "--until-eof", "--output", "-"]
        options += ["--user-stacks"] if self.user_stacks else []
        if self.api and self.host.command is not None:
            guard.enter_context(_Relay(self.host, self.far.socket, self.api))
        forward = (self.api, self.far.socket) if self.api else None
        self.recorder = Recorder(name, self.host.line(options, forward))
        guard.callback(self.recorder.close)
        try:
            self.header = self.recorder.armed()
        except RemoteError as error:
            if self.recorder.status == _SSH_FAILED and self.host.command is None:
                raise
            self.problem = "; ".join(filter(None, (str(error), error.remedy)))
            self.recorder.close()
            self.recorder = None
            if self.api and self.host.command is None:
                self._forward_only(guard, name)

    def _forward_only(self, guard: contextlib.ExitStack, name: str) -> None:
        """Forwards the API socket without a recorder. The remote command reads our standard input, so it ends with
        us.
        """
        Path(self.api).unlink(missing_ok=True)
        command = [*_SSH, "-L", f"{self.api}:{self.far.socket}", "--", self.host.host, "cat"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0
        )
        guard.callback(_end, process)
        until = time.monotonic() + CONNECT_S
        while not Path(self.api).exists():
            if process.poll() is not None or time.monotonic() > until:
                raise RemoteError(f"{name}: {self.problem}")
            time.sleep(0.02)


_SSH_FAILED = 255
"""ssh(1), EXIT STATUS: an error occurred in ssh itself."""


class _Relay:
    """A local UNIX socket. A remote command carries each connection to the socket on the other host."""

    def __init__(self, host: RemoteHost, path: str, here: str) -> None:
        self._command = host.line(["relay", path])
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(here)
        self._listener.listen(8)
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> _Relay:
        threading.Thread(target=self._serve, name="relay", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for process in self._running:
            _end(process)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:  # the command has its own copies
                end = connection.fileno()
                process = subprocess.Popen(
                    self._command, stdin=end, stdout=end, stderr=subprocess.DEVNULL, process_group=0
                )
                self._running.append(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    end_group(process, 1)
