# SPDX-License-Identifier: Apache-2.0
"""A Cloud Hypervisor migration through its HTTP API.

In: two API sockets, a URL and `ChOptions`. Out: see `vmm.base.Migration`. The receive call is made first, in a thread
of its own, and known to listen before the send call. Up to v52 the send call returns at the end, from v53 at once;
there is no call that tells the end, so it is taken from what both ends do: the source's process exits after
success, the receive call answers. Nothing is polled over the API while the migration runs.
"""

from __future__ import annotations

import os
import select
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebpf_mig.errors import VmmError
from ebpf_mig.events import AnyEvent, Target
from ebpf_mig.vmm.base import Outcome, mark
from ebpf_mig.vmm.ch_api import Api, log_figures

_LISTEN_S = 10.0
_AFTER_S = 10.0
"""How long one end may take to show what the other has shown."""
_LISTENING = "0A"


@dataclass(frozen=True)
class ChOptions:
    """What to ask of Cloud Hypervisor; None and False leave its own setting alone."""

    local: bool = False
    downtime_ms: int | None = None
    timeout_s: int | None = None
    connections: int | None = None
    tls_dir: str | None = None
    postcopy: bool = False
    source_log: str | None = None
    destination_log: str | None = None

    def send(self, url: str) -> dict[str, Any]:
        """The body of vm.send-migration; only what was asked for, since older versions know less."""
        wanted: dict[str, Any] = {
            "local": self.local or None,
            "downtime_ms": self.downtime_ms,
            "timeout_s": self.timeout_s,
            "connections": self.connections,
            "tls_dir": self.tls_dir,
            "memory_mode": "Postcopy" if self.postcopy else None,
        }
        return {"destination_url": url} | {key: value for key, value in wanted.items() if value is not None}

    def receive(self, url: str) -> dict[str, Any]:
        """The body of vm.receive-migration."""
        wanted = {"tls_dir": self.tls_dir, "memory_mode": "Postcopy" if self.postcopy else None}
        return {"receiver_url": url} | {key: value for key, value in wanted.items() if value is not None}


@dataclass
class _Call:
    """A call in a thread of its own: whether it has returned, and its refusal."""

    done: threading.Event = field(default_factory=threading.Event)
    error: VmmError | None = None


class ChMigration:
    """One migration between two Cloud Hypervisors on this host."""

    def __init__(self, source: str, destination: str, url: str, options: ChOptions | None = None) -> None:
        self.url = url
        self.options = options or ChOptions()
        self._src, self._dst = Api(source, "source"), Api(destination, "destination")
        self._src_pid, self._src_version = self._src.ping()
        self._dst_pid, self._dst_version = self._dst.ping()
        if self._src_pid == self._dst_pid:
            raise VmmError("source and destination are the same Cloud Hypervisor", "give each its own API socket")
        self._receive = _Call()
        self._cancelled = threading.Event()

    def targets(self) -> list[Target]:
        """Source first."""
        vmm = "cloud-hypervisor"
        return [
            Target(pid=self._src_pid, role="source", vmm=vmm, vmm_version=self._src_version),
            Target(pid=self._dst_pid, role="destination", vmm=vmm, vmm_version=self._dst_version),
        ]

    def prepare(self) -> None:
        """The destination is made to listen; VmmError if either end is in no state for it."""
        state = self._src.state()
        if state not in {"Running", "Paused"}:
            raise VmmError(f"the source has no running VM to migrate (state {state or 'none'})")
        if self._dst.state():
            raise VmmError("the destination has a VM already", "start it with --api-socket alone")
        if self.url.startswith("unix:") and Path(self.url[5:]).exists():
            raise VmmError(f"{self.url[5:]} exists already, the destination cannot listen there", "remove it first")
        self._in_thread(self._receive, self._dst, "vm.receive-migration", self.options.receive(self.url))
        deadline = time.monotonic() + _LISTEN_S
        while not self._listens():
            if self._receive.error is not None:
                raise self._receive.error
            if time.monotonic() > deadline:
                raise VmmError(f"the destination does not listen at {self.url} within {_LISTEN_S:.0f} s")
            time.sleep(0.01)

    def run(self, timeout_s: float) -> Outcome:
        """Sends; see `Migration.run`. There is no call to cancel: at the time-out the migration goes on."""
        trigger = mark(self._src_pid, "session.trigger", self.url)
        send = _Call()
        self._in_thread(send, self._src, "vm.send-migration", self.options.send(self.url))
        try:
            exited = os.pidfd_open(self._src_pid)
        except OSError:
            return Outcome("failed", "the source ended before the migration began", (trigger,))
        try:
            result, error = self._wait(send, exited, time.monotonic() + timeout_s)
        finally:
            os.close(exited)
        return Outcome(result, error, (trigger, *self._figures()))

    def cancel(self) -> None:
        """Makes `run` return; Cloud Hypervisor has no call that cancels, so the migration itself goes on."""
        self._cancelled.set()

    def close(self) -> None:
        """Nothing is held open."""

    def _in_thread(self, call: _Call, api: Api, name: str, body: dict[str, Any]) -> None:
        def work() -> None:
            try:
                api.call("PUT", name, body, None)
            except VmmError as error:
                call.error = error
            call.done.set()

        threading.Thread(target=work, name=name, daemon=True).start()

    def _listens(self) -> bool:
        """By the socket's path or /proc/net/tcp: a trial connection would be taken for the migration."""
        if self.url.startswith("unix:"):
            return Path(self.url[5:]).exists()
        port = self.url.rpartition(":")[2]
        wanted = f":{int(port):04X}" if port.isdigit() else ""
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            try:
                rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            except OSError:
                continue
            if any(row[1].endswith(wanted) and row[3] == _LISTENING for row in rows):
                return True
        return False

    def _wait(self, send: _Call, exited: int, deadline: float) -> tuple[str, str]:
        while True:
            if send.error is not None:
                return "failed", str(send.error)
            if self._receive.done.is_set():
                return self._judge(send, exited)
            if self._cancelled.is_set():
                return "unknown", "interrupted; Cloud Hypervisor has no call to cancel, the migration goes on"
            if time.monotonic() > deadline:
                return "unknown", "not done in time; Cloud Hypervisor has no call to cancel, it may go on"
            if _gone(exited, 0.02) and not self._receive.done.wait(_AFTER_S):
                return "unknown", "the source ended, but the destination does not say that it has the VM"

    def _judge(self, send: _Call, exited: int) -> tuple[str, str]:
        """The receive call has returned. Up to v52 it answers success to an aborted migration, too."""
        if self._receive.error is not None:
            send.done.wait(1)
            return "failed", str(send.error or self._receive.error)
        until = time.monotonic() + _AFTER_S
        while time.monotonic() < until:
            if send.error is not None:
                return "failed", str(send.error)
            if _gone(exited, 0.02):
                return "completed", ""
        if self._dst.state():
            return "completed", ""
        return "failed", "the destination has no VM and the source goes on"

    def _figures(self) -> list[AnyEvent]:
        found: list[AnyEvent] = []
        for pid, path in ((self._src_pid, self.options.source_log), (self._dst_pid, self.options.destination_log)):
            if path:
                found += [mark(pid, f"ch.{name}_ms", value=ms) for name, ms in sorted(log_figures(path).items())]
        return found


def _gone(pidfd: int, timeout_s: float) -> bool:
    return bool(select.select([pidfd], [], [], timeout_s)[0])
