# SPDX-License-Identifier: Apache-2.0
"""A Cloud Hypervisor migration through its HTTP API.

In: two API sockets, a URL and `ChOptions`. Out: see `vmm.base.Migration`. The receive call is made first, in a thread
of its own, and known to listen before the send call. Features are probed through the API, not derived from the version.
The API is not used while the migration runs; `completion` finds out how it ended.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from ebpf_mig.errors import UsageError, VmmError
from ebpf_mig.linux import clock
from ebpf_mig.linux.listening import listens
from ebpf_mig.recording.events import AnyEvent, Target
from ebpf_mig.vmm.base import Outcome, RemoteEnd, mark
from ebpf_mig.vmm.call import Call
from ebpf_mig.vmm.cloud_hypervisor import event_monitor
from ebpf_mig.vmm.cloud_hypervisor.api import Api
from ebpf_mig.vmm.cloud_hypervisor.completion import Ending
from ebpf_mig.vmm.cloud_hypervisor.log import LogPlace
from ebpf_mig.vmm.cloud_hypervisor.source import FarSource, NearSource

_LISTEN_S = 10.0
_SEND, _RECEIVE = "vm.send-migration", "vm.receive-migration"


@dataclass(frozen=True)
class ChOptions:
    """Settings of the migration. None and False keep Cloud Hypervisor's own setting."""

    local: bool = False
    downtime_ms: int | None = None
    timeout_s: int | None = None
    connections: int | None = None
    tls_dir: str | None = None
    postcopy: bool = False
    source_log: str | None = None
    destination_log: str | None = None
    source_events: str | None = None
    destination_events: str | None = None

    def send(self, url: str) -> dict[str, Any]:
        """The body of vm.send-migration. It has only the requested fields, since older versions know fewer."""
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

    def check(self, url: str) -> None:
        """UsageError for settings that no version accepts (vmm/src/api/mod.rs, `VmSendMigrationData::validate`)."""
        kind, _, rest = url.partition(":")
        port = rest.rpartition(":")[2]
        if kind not in {"tcp", "unix"} or not rest or (kind == "tcp" and not (port.isdigit() and port != rest)):
            raise UsageError(f"{url!r} is no place to migrate to", "use tcp:HOST:PORT or unix:PATH")
        if self.local and kind != "unix":
            raise UsageError("memory can be handed over through a UNIX socket only", "use --url unix:PATH with --local")
        if kind != "tcp" and (self.tls_dir or (self.connections or 1) > 1):
            raise UsageError("several connections and TLS need TCP", "use --url tcp:HOST:PORT")
        if self.postcopy and (self.local or (self.connections or 1) > 1):
            raise UsageError("postcopy goes with neither --local nor several connections", "leave one of them out")


class ChMigration:
    """One migration between two Cloud Hypervisors on this host, or with one of them on another host."""

    def __init__(
        self,
        source: str,
        destination: str,
        url: str,
        options: ChOptions | None = None,
        remote: tuple[str, RemoteEnd] | None = None,
    ) -> None:
        """`remote`: role and facts of the end on another host."""
        self._away = dict([remote]) if remote else {}
        self.url = url
        self.options = options or ChOptions()
        self.options.check(url)
        if remote and not url.startswith("tcp:"):
            raise UsageError("two hosts share only a network", "use --url tcp:HOST:PORT")
        self._src, self._dst = Api(source, "source"), Api(destination, "destination")
        self._src_pid, self._src_version = self._src.ping()
        self._dst_pid, self._dst_version = self._dst.ping()
        if "source" in self._away:  # the peer here is ssh
            self._src_pid = self._away["source"].key
        if "destination" in self._away:
            self._dst_pid = self._away["destination"].key
        if self._src_pid == self._dst_pid:
            raise VmmError("source and destination are the same Cloud Hypervisor", "give each its own API socket")
        o = self.options
        self._logs = [(self._src_pid, o.source_log), (self._dst_pid, o.destination_log)]
        self._events = [(self._src_pid, o.source_events), (self._dst_pid, o.destination_events)]
        self._places: dict[int, LogPlace] = {}
        self._watched: dict[int, event_monitor.EventFile] = {}
        self._asked = [0, 0]
        self._receive, self._send, self._cancelled = Call(), Call(), Call()

    def targets(self) -> list[Target]:
        """Source first."""
        vmm = "cloud-hypervisor"
        pids = {"source": self._src_pid, "destination": self._dst_pid}
        return [
            Target(pid=pid, role=role, vmm=vmm, vmm_version=self.version(role))
            for role, pid in pids.items()
            if role not in self._away
        ]

    grows = False

    def appeared(self) -> list[Target]:
        """Nothing: both processes already run."""
        return []

    def version(self, role: str) -> str:
        """The version that the API reported for that end."""
        return self._src_version if role == "source" else self._dst_version

    def _listens(self) -> bool:
        away = self._away.get("destination")
        if away is not None:
            return away.listens(self.url)
        return listens(self._dst_pid, self.url)

    def prepare(self) -> None:
        """Makes the destination listen. VmmError if an end is in the wrong state or does not support a setting."""
        state = self._src.state()
        if state not in {"Running", "Paused"}:
            raise VmmError(f"the source has no running VM to migrate (state {state or 'none'})")
        if self._dst.state():
            raise VmmError("the destination has a VM already", "start it with --api-socket alone")
        if self.url.startswith("unix:") and Path(self.url[5:]).exists():
            raise VmmError(f"{self.url[5:]} exists already, the destination cannot listen there", "remove it first")
        receive = self._receive_body()
        sides = zip(self._logs, ("source", "destination"), strict=True)
        self._places = {pid: LogPlace.now(path, self._away.get(role)) for (pid, path), role in sides if path}
        for pid, path in self._events:
            if path:
                self._watched[pid] = event_monitor.EventFile(path)
                self._watched[pid].start()
        self._asked[event_monitor.RECEIVE_ASKED] = clock.monotonic_ns()
        self._receive.start(_RECEIVE, lambda: self._dst.call("PUT", _RECEIVE, receive, None))
        deadline = time.monotonic() + _LISTEN_S
        while not self._listens():
            if self._receive.error is not None:
                raise self._receive.error
            if time.monotonic() > deadline:
                raise VmmError(f"the destination does not listen at {self.url} within {_LISTEN_S:.0f} s")
            time.sleep(0.01)

    def _receive_body(self) -> dict[str, Any]:
        """Checks the fields: the VMM ignores unknown ones, and a different migration would run."""
        sends, receive = self.options.send(self.url), self.options.receive(self.url)
        for field in sends.keys() - {"destination_url"}:
            if self._src.knows(_SEND, field) is False:
                raise VmmError(f"the source (version {self._src_version}) does not know {field!r}", _remedy(field))
        for field in receive.keys() - {"receiver_url"}:
            if self._dst.knows(_RECEIVE, field) is False:
                if field == "memory_mode" and self._dst.knows(_SEND, field):
                    del receive[field]  # the sender announces the mode
                    continue
                version = self._dst_version
                raise VmmError(f"the destination (version {version}) does not know {field!r}", _remedy(field))
        return receive

    def run(self, timeout_s: float) -> Outcome:
        """Sends; see `Migration.run`. There is no call to cancel, so the migration goes on after the time-out."""
        away = "source" in self._away  # and our clock differs from its host's
        triggers = [] if away else [mark(self._src_pid, "session.trigger", self.url)]
        with contextlib.ExitStack() as stack:
            pidfds = {"source": -1, "destination": -1}
            try:
                for target in self.targets():
                    pidfds[target.role] = os.pidfd_open(target.pid)
                    stack.callback(os.close, pidfds[target.role])
            except OSError:
                return Outcome("failed", "a VMM ended before the migration began", tuple(triggers))
            self._asked[event_monitor.SEND_ASKED] = clock.monotonic_ns()
            body = self.options.send(self.url)
            self._send.start(_SEND, lambda: self._src.call("PUT", _SEND, body, None))
            result, error = Ending(
                send=self._send,
                receive=self._receive,
                cancelled=self._cancelled,
                source=FarSource(self._away["source"]) if away else NearSource(self._src_pid, pidfds["source"]),
                destination=pidfds["destination"],
                long=self.options.postcopy,
                why_failed=self._why_failed,
                destination_has_vm=self._destination_has_vm,
            ).wait(time.monotonic() + timeout_s)
        return Outcome(result, error, (*triggers, *self._figures()))

    def cancel(self) -> None:
        """Makes `run` return; Cloud Hypervisor has no call that cancels, so the migration itself goes on."""
        self._cancelled.finish()

    def close(self) -> None:
        """Stops reading events; a receive call that has not returned goes on in the VMM."""
        for file in self._watched.values():
            file.stop()
        for call in (self._receive, self._send, self._cancelled):
            call.close()

    def _why_failed(self) -> str:
        place = self._places.get(self._src_pid)
        return place.failure() if place else ""

    def _destination_has_vm(self) -> bool:
        try:
            return bool(self._dst.state())
        except VmmError:
            return False

    def _figures(self) -> list[AnyEvent]:
        """Marks of both VMMs: `ch.NAME_ms` from their logs and `ch.event.NAME` from their event monitors."""
        found: list[AnyEvent] = []
        for pid, place in self._places.items():
            figures = [mark(pid, f"ch.{name}_ms", value=ms) for name, ms in sorted(place.figures().items())]
            if place.there is not None:  # our reading time and its process's events use different clocks
                figures = [replace(one, at_ns=0) for one in figures]
            found += figures
        for pid, file in self._watched.items():
            found += event_monitor.marks(pid, file.stop(), (self._asked[0], self._asked[1]))
        return found


def _remedy(field: str) -> str:
    since = {"tls_dir": "v53", "memory_mode": "v53", "local": "v21"}.get(field, "v52")
    return f"Cloud Hypervisor has it since {since}; leave the option out or use a newer one"
