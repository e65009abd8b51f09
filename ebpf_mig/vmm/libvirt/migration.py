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
from ebpf_mig.vmm.base import Elsewhere, Outcome, mark
from ebpf_mig.vmm.libvirt.client import CancelledError, Client, Request, Said, connect
from ebpf_mig.vmm.libvirt.witness import FIGURES

_MOST_EVENTS = 10_000
_LATE_S = 1.0
"""How long events and the completed job's statistics may take to reach us after the call has returned."""
_ABORT_S = 10.0
_QMP_GRAIN_NS = 1000


@dataclass(frozen=True)
class _Heard:
    role: str
    said: Said
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
        remote: tuple[str, Elsewhere] | None = None,
    ) -> None:
        """`uri`: the source's libvirt, None for its default. `destination_uri`: how we reach the destination's, for
        its events; None: not at all. `remote`: the role of the end that is on another host, and what is known of it.
        """
        self.request = request
        self._away = dict([remote]) if remote else {}
        self._heard: list[_Heard] = []
        self._pids: dict[str, int] = {}
        self._passes = threading.Event()
        self._cancelled = threading.Event()
        self._client: Client = connect(uri)
        try:
            self.domain = self._client.domain(domain)
            self._version = self._client.version()
            self._client.listen(self.domain, request.to if request.direct else destination_uri, self._hear)
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
            heard = any(one.said.name == f"qmp.MIGRATION.{result}" for one in self._heard)
            if self._client.figures() if result == "completed" else heard or not self._heard:
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

    def _hear(self, role: str, said: Said) -> None:
        """Runs in libvirt's event thread."""
        if len(self._heard) < _MOST_EVENTS:
            self._heard.append(_Heard(role, said, clock.monotonic_ns()))
        if said.name in ("libvirt.MIGRATION_ITERATION", "qmp.MIGRATION_PASS") and role == "source" and said.value >= 2:
            self._passes.set()

    def _marks(self) -> list[AnyEvent]:
        found: list[AnyEvent] = []
        for heard in list(self._heard):
            pid, away = self._pids.get(heard.role), self._away.get(heard.role)
            said = heard.said
            if away is not None and (away.clock is None or said.wall_ns is None):
                continue
            if away is not None and away.clock is not None and said.wall_ns is not None:
                at = said.wall_ns - away.clock.realtime_ns + away.clock.monotonic_ns + _QMP_GRAIN_NS // 2
                found.append(Mark(at, away.key, said.name, "", said.value, away.clock.doubt_ns + _QMP_GRAIN_NS))
            elif pid is not None and said.wall_ns is not None:
                found.append(mark(pid, said.name, "", said.value, said.wall_ns, _QMP_GRAIN_NS))
            elif pid is not None:
                found.append(Mark(heard.at_ns, pid, said.name, "", said.value, 0))
        figures = self._client.figures()
        if source := self._pids.get("source"):
            found += [mark(source, FIGURES[key], "", value) for key, value in figures.items() if key in FIGURES]
        return found
