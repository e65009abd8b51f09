# SPDX-License-Identifier: Apache-2.0
"""A hand-over between two Firecrackers: the source pauses and writes a snapshot, the destination loads and resumes it.

In: two API sockets and `FcOptions`. Out: see `vmm.base.Migration`.

The guest must neither be lost nor run twice. Until the load was asked for, a failure resumes the source. After that
the source is resumed only when the destination cannot have the guest: it refused the load, it says that it has no VM,
or its process has ended. Otherwise the source stays paused. After success the source stays paused, too: its process is
the user's to end. Firecracker cannot cancel a call; a call that is waited for no longer goes on in the VMM.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebpf_mig.errors import VmmError
from ebpf_mig.recording.events import AnyEvent, Target
from ebpf_mig.vmm.base import Outcome, mark
from ebpf_mig.vmm.call import Call, readable
from ebpf_mig.vmm.firecracker.api import NOT_STARTED, RUNNING, Api
from ebpf_mig.vmm.firecracker.files import SnapshotFiles, check_socket
from ebpf_mig.vmm.firecracker.log import LogPlace
from ebpf_mig.vmm.unix_http import RefusedError

RESUME_S = 5.0
"""How long the source may take to resume; s."""
PATIENCE_S = 10.0
"""How long a call may still take after the time-out or an interruption; s."""
DEATH_S = 1.0
"""A process that ends closes its sockets a little before."""
AFTER_NS = 1_000_000_000


@dataclass(frozen=True)
class FcOptions:
    """Settings of the snapshot and of its load."""

    directory: str
    """Where the files are written, as both VMMs name it."""
    diff: str | None = None
    """The memory file of the VM's last snapshot: only what has changed since is written, into that file."""
    uffd: str | None = None
    """The socket of a process that serves page faults; None: the memory file is mapped."""
    track_dirty_pages: bool = False
    """The restored VM logs dirty pages, as its next diff snapshot needs."""
    after_ns: int = AFTER_NS
    """How long to go on tracing the restored guest: its memory comes page by page."""
    source_log: str | None = None
    destination_log: str | None = None


class _Stopped(Exception):  # noqa: N818 - not an error of its own
    """The time is over, or the user interrupted."""

    def __init__(self, result: str, words: str) -> None:
        super().__init__(words)
        self.result = result


class FcMigration:
    """One hand-over between two Firecrackers on this host."""

    grows = False

    def __init__(self, source: str, destination: str, options: FcOptions) -> None:
        self.options = options
        self.files = SnapshotFiles.of(options.directory, options.diff)
        self._src, self._dst = Api(source, "source"), Api(destination, "destination")
        self._versions = {"source": self._src.instance().vmm_version, "destination": self._dst.instance().vmm_version}
        self._src_pid, self._dst_pid = self._src.pid(), self._dst.pid()
        if self._src_pid == self._dst_pid:
            raise VmmError("source and destination are the same Firecracker", "give each its own API socket")
        self._uffd = Path(options.uffd).absolute() if options.uffd is not None else None
        self._cancelled = Call()
        self._calls: list[Call] = []
        self._logs: dict[int, LogPlace] = {}
        self._marks: list[AnyEvent] = []

    def targets(self) -> list[Target]:
        """Source first."""
        pids = (("source", self._src_pid), ("destination", self._dst_pid))
        return [Target(pid=pid, role=role, vmm="firecracker", vmm_version=self.version(role)) for role, pid in pids]

    def appeared(self) -> list[Target]:
        """Nothing: both processes already run."""
        return []

    def version(self, role: str) -> str:
        """The version that the API reported for that end."""
        return self._versions[role][:64]

    def prepare(self) -> None:
        """VmmError if an end is in the wrong state, or the files cannot be written and read. Changes nothing."""
        if (state := self._src.instance().state) != RUNNING:
            raise VmmError(f"the source has no running VM (state {state})", "start its VM, or resume it")
        if (state := self._dst.instance().state) != NOT_STARTED:
            raise VmmError(f"the destination has a VM already (state {state})", "start it with --api-sock alone")
        self.files.check(self._src_pid, self._dst_pid, self._src.memory_bytes())
        if self._uffd is not None:
            check_socket(self._dst_pid, self._uffd)
        logs = ((self._src_pid, self.options.source_log), (self._dst_pid, self.options.destination_log))
        self._logs = {pid: LogPlace.now(path) for pid, path in logs if path}

    def run(self, timeout_s: float) -> Outcome:
        """Pauses, snapshots, loads; see `Migration.run`. The module docstring tells what becomes of the guest."""
        deadline = time.monotonic() + timeout_s
        try:
            pidfd = os.pidfd_open(self._dst_pid)
        except OSError:
            return Outcome("failed", "the destination ended before the snapshot began")
        self._marks = [mark(self._src_pid, "session.trigger", str(self.files.memory))]
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, pidfd)
            result, error = self._hand_over(deadline, pidfd)
        if result == "completed":
            readable([self._cancelled.fd], self.options.after_ns / 10**9)
        if result != "unknown":
            self._marks.append(mark(self._src_pid, f"firecracker.MIGRATION.{result}"))
        return Outcome(result, error, (*self._marks, *self._figures()))

    def cancel(self) -> None:
        """Makes `run` give up: before the load, the source gets its guest back."""
        self._cancelled.finish()

    def close(self) -> None:
        """The VMs stay as they are."""
        for call in (self._cancelled, *self._calls):
            call.close()

    def _hand_over(self, deadline: float, pidfd: int) -> tuple[str, str]:
        """(result, reason)."""
        try:
            self._go_on(deadline)
            self._waited("pause", self._src, lambda: self._src.pause(None), deadline)
            self._go_on(deadline)
            self._waited("create", self._src, lambda: self._src.create(self._create_body(), None), deadline)
            self._go_on(deadline)
        except _Stopped as stop:
            return self._given_back(stop.result, str(stop))
        except VmmError as error:
            return self._given_back("failed", str(error))
        try:
            self._waited("load", self._dst, lambda: self._dst.load(self._load_body(), None), deadline)
        except (_Stopped, VmmError) as error:
            return self._after_bad_load(error, pidfd)
        return self._confirmed(pidfd)

    def _create_body(self) -> dict[str, Any]:
        return {
            "snapshot_type": "Diff" if self.files.base else "Full",
            "snapshot_path": str(self.files.state),
            "mem_file_path": str(self.files.memory),
        }

    def _load_body(self) -> dict[str, Any]:
        backend = {"backend_type": "File", "backend_path": str(self.files.memory)}
        if self._uffd is not None:
            backend = {"backend_type": "Uffd", "backend_path": str(self._uffd)}
        body: dict[str, Any] = {"snapshot_path": str(self.files.state), "mem_backend": backend, "resume_vm": True}
        if self.options.track_dirty_pages:
            body["enable_diff_snapshots" if _is_old(self.version("destination")) else "track_dirty_pages"] = True
        return body

    def _waited(self, name: str, api: Api, act: Callable[[], None], deadline: float) -> None:
        """Makes a blocking call with a mark at both ends. _Stopped if it was waited for in vain."""
        pid = self._src_pid if api is self._src else self._dst_pid
        call = Call()
        self._calls.append(call)
        self._marks.append(mark(pid, f"firecracker.API.{name}.begin"))
        call.start(name, act)
        readable([call.fd, self._cancelled.fd], max(0.0, deadline - time.monotonic()))
        if not call.done.is_set():
            readable([call.fd], PATIENCE_S)
        if not call.done.is_set():
            why = "was interrupted" if self._cancelled.done.is_set() else "is not done in time"
            raise _Stopped("unknown", f"{name} {why} and goes on: Firecracker cannot cancel it")
        self._marks.append(mark(pid, f"firecracker.API.{name}.end"))
        if call.error is not None:
            raise call.error

    def _go_on(self, deadline: float) -> None:
        """_Stopped if the next call should not be made."""
        if self._cancelled.done.is_set():
            raise _Stopped("cancelled", "interrupted")
        if time.monotonic() >= deadline:
            raise _Stopped("failed", "not done in time")

    def _given_back(self, result: str, why: str) -> tuple[str, str]:
        """The destination does not have the guest: resumes the source, and says whether it runs."""
        try:
            self._src.resume(RESUME_S)
        except VmmError as error:
            if not isinstance(error, RefusedError) and _ends(self._src_pid):
                return "failed", f"{why}; the source has ended, and its guest with it"
            return result, f"{why}; the guest may be paused on the source, which does not resume it: {error}"
        if result == "unknown":
            result = "cancelled" if self._cancelled.done.is_set() else "failed"
        return result, f"{why}; the guest runs on the source again"

    def _after_bad_load(self, error: Exception, pidfd: int) -> tuple[str, str]:
        """The load failed or was waited for in vain. Resumes the source only if the destination has no guest."""
        result = error.result if isinstance(error, _Stopped) else "failed"
        if isinstance(error, RefusedError) or readable([pidfd], DEATH_S):
            return self._given_back(result, str(error))
        state = ""
        with contextlib.suppress(VmmError):
            state = self._dst.instance().state
        if state == NOT_STARTED and not isinstance(error, _Stopped):
            return self._given_back(result, str(error))
        if state == RUNNING:
            return "completed", ""
        return "unknown", (
            f"{error}; the guest may be on the destination, so the source stays paused. If it is not there, resume the "
            'source with PATCH /vm {"state": "Resumed"}'
        )

    def _confirmed(self, pidfd: int) -> tuple[str, str]:
        """The load reported success."""
        if readable([pidfd], 0):
            return self._given_back("failed", "the destination ended")
        try:
            state = self._dst.instance().state
        except VmmError as error:
            return "unknown", f"the destination loaded the snapshot, but then: {error}; the source stays paused"
        if state == RUNNING:
            return "completed", ""
        return "unknown", f"the destination loaded the snapshot and is {state}; the source stays paused"

    def _figures(self) -> list[AnyEvent]:
        """Marks of both VMMs' own times."""
        return [
            mark(pid, f"firecracker.{name}_us", value=us)
            for pid, place in self._logs.items()
            for name, us in sorted(place.figures().items())
        ]


def _ends(pid: int) -> bool:
    """Whether a process has ended, or does within DEATH_S: it closes its sockets a moment earlier (do_exit,
    kernel/exit.c).
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        return bool(readable([pidfd], DEATH_S))
    finally:
        os.close(pidfd)


def _is_old(version: str) -> bool:
    """Before v1.13 the field had its old name. A version that is not a number is taken for a new one."""
    parts = version.lstrip("v").split(".")
    return len(parts) > 1 and all(part.isdecimal() for part in parts[:2]) and (int(parts[0]), int(parts[1])) < (1, 13)
