# SPDX-License-Identifier: Apache-2.0
"""A migration through libvirt.

In: a domain and a `Request`. Out: see `vmm.base.Migration`. libvirt starts the destination's QEMU during the migration;
where that happens on this host, its process is found by the domain's UUID in its command line (qemu_command.c,
`-uuid`). Reports of libvirt, and of QEMU through it, become marks.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass

from ebpf_mig.errors import VmmError
from ebpf_mig.linux import clock
from ebpf_mig.recording.events import AnyEvent, Mark, Target
from ebpf_mig.vmm import processes
from ebpf_mig.vmm.base import Outcome, RemoteEnd, mark
from ebpf_mig.vmm.libvirt.client import CancelledError, Client, Event, Request, connect
from ebpf_mig.vmm.libvirt.witness import FIGURES

_MOST_EVENTS = 10_000
_LATE_S = 1.0
"""How long events and the completed job's statistics may take to reach us after the call has returned."""
_ABORT_S = 10.0
_QMP_GRAIN_NS = 1000


@dataclass(frozen=True)
class _Received:
    role: str
    event: Event
    at_ns: int
    """When we received it, CLOCK_MONOTONIC."""


class LibvirtMigration:
    """One migration of a domain, to this host or another one."""

    grows = True

    def __init__(
        self,
        domain: str,
        request: Request,
        uri: str | None = None,
        destination_uri: str | None = None,
        remote: tuple[str, RemoteEnd] | None = None,
    ) -> None:
        """`uri`: the source's libvirt, None for its default. `destination_uri`: how we reach the destination's, for
        its events; None: not at all. `remote`: the role of the end that is on another host, and what is known of it.
        """
        self.request = request
        self._away = dict([remote]) if remote else {}
        self._received: list[_Received] = []
        self._pids: dict[str, int] = {}
        self._passes = threading.Event()
        self._cancelled = threading.Event()
        self._client: Client = connect(uri)
        try:
            self.domain = self._client.domain(domain)
            self._version = self._client.version()
            self._client.listen(self.domain, request.to if request.direct else destination_uri, self._on_event)
        except BaseException:
            self._client.close()
            raise
        if "source" not in self._away and (found := processes.find(self.domain.uuid)):
            self._pids["source"] = found[0]
        self._arrivals = processes.Arrivals(self.domain.uuid, self._pids.values())

    def targets(self) -> list[Target]:
        """The source's QEMU, if it is on this host."""
        if "source" in self._away:
            return []
        if "source" not in self._pids:
            raise VmmError(
                f"the QEMU of {self.domain.name} is not on this host", "run ebpf-mig there, or give --source-host"
            )
        return [self._target("source", self._pids["source"])]

    def appeared(self) -> list[Target]:
        """The destination's QEMU, after it started on this host."""
        if "destination" in self._pids or "destination" in self._away:
            return []
        found = self._arrivals.new()
        if not found:
            return []
        self._pids["destination"] = found[0]
        return [self._target("destination", found[0])]

    def version(self, role: str) -> str:
        """The source's; libvirt does not know the other one."""
        return self._version if role == "source" else ""

    def prepare(self) -> None:
        """Sets the downtime limit, which is no part of the request."""
        self._client.prepare(self.domain, self.request)

    def run(self, timeout_s: float) -> Outcome:
        """Migrates; see `Migration.run`. The job is aborted at the time-out."""
        if self._cancelled.is_set():
            return Outcome("cancelled", "before it began")
        source = self._pids.get("source")
        triggers: list[AnyEvent] = [mark(source, "session.trigger", self.request.to)] if source else []
        over = threading.Event()
        late = threading.Event()
        guard = threading.Thread(target=self._guard, args=(over, late, timeout_s), name="libvirt-guard", daemon=True)
        guard.start()
        result, error = "completed", ""
        try:
            self._client.migrate(self.domain, self.request)
        except CancelledError as problem:
            result, error = "cancelled", f"not done within {timeout_s:g} s" if late.is_set() else str(problem)
        except VmmError as problem:
            result, error = "cancelled" if self._cancelled.is_set() or late.is_set() else "failed", str(problem)
        finally:
            over.set()
        guard.join()
        self._wait_for_the_last(result)
        return Outcome(result, error, (*triggers, *self._marks()))

    def _wait_for_the_last(self, result: str) -> None:
        """Waits for the events and figures, which arrive shortly after the call returns. virsh passes on no events."""
        deadline = time.monotonic() + _LATE_S
        while time.monotonic() < deadline:
            ended = any(one.event.name == f"qmp.MIGRATION.{result}" for one in self._received)
            if self._client.figures() if result == "completed" else ended or not self._received:
                return
            time.sleep(0.02)

    def cancel(self) -> None:
        """Aborts the job, or, if `run` comes later, prevents it."""
        self._cancelled.set()

    def close(self) -> None:
        """Disconnects."""
        self._client.close()

    def _target(self, role: str, pid: int) -> Target:
        return Target(pid=pid, role=role, vmm="qemu", vmm_version=self.version(role))

    def _guard(self, over: threading.Event, late: threading.Event, timeout_s: float) -> None:
        """Runs during the blocking call. Aborts the job on request or at the time-out; switches to postcopy when
        due.
        """
        deadline = time.monotonic() + timeout_s
        asked = not self.request.postcopy
        while not over.wait(0.02):
            if not asked and self._passes.is_set():
                asked = True
                with contextlib.suppress(VmmError):  # too late: pre-copy has just ended, the migration goes on
                    self._client.postcopy(self.domain)
            if time.monotonic() >= deadline:
                late.set()
            if self._cancelled.is_set() or late.is_set():
                self._client.abort(self.domain)  # repeated, since the job may not have begun
                over.wait(0.1)

    def _on_event(self, role: str, event: Event) -> None:
        """Runs in libvirt's event thread."""
        if len(self._received) < _MOST_EVENTS:
            self._received.append(_Received(role, event, clock.monotonic_ns()))
        passes = ("libvirt.MIGRATION_ITERATION", "qmp.MIGRATION_PASS")
        if event.name in passes and role == "source" and event.value >= 2:
            self._passes.set()

    def _marks(self) -> list[AnyEvent]:
        found: list[AnyEvent] = []
        for received in list(self._received):
            pid, away = self._pids.get(received.role), self._away.get(received.role)
            event = received.event
            if away is not None and (away.clock is None or event.wall_ns is None):
                continue
            if away is not None and away.clock is not None and event.wall_ns is not None:
                at = event.wall_ns - away.clock.realtime_ns + away.clock.monotonic_ns + _QMP_GRAIN_NS // 2
                found.append(Mark(at, away.key, event.name, "", event.value, away.clock.doubt_ns + _QMP_GRAIN_NS))
            elif pid is not None and event.wall_ns is not None:
                found.append(mark(pid, event.name, "", event.value, event.wall_ns, _QMP_GRAIN_NS))
            elif pid is not None:
                found.append(Mark(received.at_ns, pid, event.name, "", event.value, 0))
        figures = self._client.figures()
        if source := self._pids.get("source"):
            found += [mark(source, FIGURES[key], "", value) for key, value in figures.items() if key in FIGURES]
        return found
