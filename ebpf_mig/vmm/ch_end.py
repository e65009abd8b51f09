# SPDX-License-Identifier: Apache-2.0
"""How a Cloud Hypervisor migration ended, for which there is no call.

In: the send and the receive call, each in a thread of its own, and the two processes. Out: a result and a reason. All
is waited for in one poll(2), with no time-out that wakes us before something has happened:

- the source's process exits after success, and only then;
- the receive call answers when the destination has the VM, or has given up. Up to v52 it answers success to an
  aborted migration, too;
- the send call answers at the end up to v52, at once from v53 on. From then on a thread of the source migrates, and
  its end without an exit is a failure, which nothing else may tell.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ebpf_mig.errors import VmmError
from ebpf_mig.vmm.ch_api import RefusedError

AFTER_S = 5.0
"""How long one end may take to show what the other has shown."""
REASON_S = 1.0
"""How long its log may take to have the reason."""
_LOST = "the connection to its host broke"
_WORKER = "migration-worke"
"""Comm of the sending thread, cut to 15 characters (vmm/src/migration/worker.rs, v53)."""
LOOK_S = 0.5
"""How often a thread's /proc is looked at, where the kernel has no descriptors of threads (before Linux 6.9)."""


class Call:
    """A blocking call in a thread of its own; `fd` becomes readable when it has returned."""

    def __init__(self) -> None:
        self.error: VmmError | None = None
        self.begun = False
        self.done = threading.Event()
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)

    def start(self, name: str, act: Callable[[], object]) -> None:
        """Begins `act`; a VmmError of it is kept."""

        def work() -> None:
            try:
                act()
            except VmmError as error:
                self.error = error
            self.finish()

        self.begun = True
        threading.Thread(target=work, name=name, daemon=True).start()

    def finish(self) -> None:
        """Says that it is over."""
        self.done.set()
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Gives the descriptor back, unless the call may yet return."""
        if self.fd >= 0 and (self.done.is_set() or not self.begun):
            os.close(self.fd)
            self.fd = -1


@dataclass
class Ending:
    """Waits for the end of one migration."""

    send: Call
    receive: Call
    cancelled: Call
    source_pid: int
    source: int
    """pidfds of the two processes."""
    destination: int
    """-1: on another host."""
    long: bool
    """The source may live long after the destination runs: it serves pages (postcopy)."""
    why_failed: Callable[[], str]
    """The source's own reason, where its log is known."""
    destination_has_vm: Callable[[], bool]

    def wait(self, deadline: float) -> tuple[str, str]:
        """(result, reason): completed, failed, or unknown at the deadline or when cancelled."""
        with _worker_of(self.source_pid, self.send) as worker:
            while True:
                if self.send.error is not None:
                    return "failed", str(self.send.error)
                if self.receive.done.is_set() and not self._lost():
                    return self._received(deadline, worker)
                if self.cancelled.done.is_set():
                    return "unknown", "interrupted; Cloud Hypervisor has no call to cancel, the migration goes on"
                if _gone(self.source):
                    if self._lost():
                        return "unknown", f"the source is done; whether the destination runs is not known: {_LOST}"
                    if self._soon(self.receive.fd):
                        continue
                    return "failed", (
                        "the source ended, and the destination does not say that it has the VM; it may wait for "
                        "its sender for ever"
                    )
                if worker.ended():
                    if self._soon(self.receive.fd, self.source):
                        continue
                    why = self._sources_reason(worker) or "its migration thread ended, the reason is in its log"
                    return "failed", f"the source goes on with the VM: {why}"
                left = deadline - time.monotonic()
                if left <= 0:
                    return "unknown", "not done in time; Cloud Hypervisor has no call to cancel, it may go on"
                fds = [self.cancelled.fd, self.source, *worker.fds()]
                if not self._lost():
                    fds.append(self.receive.fd)
                if not self.send.done.is_set():
                    fds.append(self.send.fd)
                _readable(fds, min(left, worker.patience()))

    def _lost(self) -> bool:
        """Whether the receive call ended only because the other host is out of reach; the migration may go on."""
        error = self.receive.error
        return self.destination < 0 and error is not None and not isinstance(error, RefusedError)

    def _received(self, deadline: float, worker: _Worker) -> tuple[str, str]:
        """The receive call has returned."""
        if self.receive.error is not None:
            return "failed", str(self._sources_reason(worker) or self.receive.error)
        limit = max(AFTER_S, deadline - time.monotonic()) if self.long else AFTER_S
        self._soon(self.source, *([] if self.send.done.is_set() else [self.send.fd]), limit=limit)
        if self.send.error is not None:
            return "failed", str(self.send.error)
        if not _gone(self.source):
            self._soon(self.source, limit=limit)
        if self.destination >= 0 and _gone(self.destination):
            return "failed", "the destination ended"
        if self.destination_has_vm():
            return "completed", ""
        if _gone(self.source):
            return "failed", "the source ended, and the destination has no VM although it answers success"
        return "failed", self._sources_reason(worker) or "the destination has no VM and the source goes on"

    def _sources_reason(self, worker: _Worker) -> str:
        """What its send call, or its log, says after the other end has failed; the switchover is over by then.

        Also waits until the source has noticed: only then does it take its guest back, which is to be traced.
        """
        until = time.monotonic() + AFTER_S
        if not self.send.done.is_set():
            self._soon(self.send.fd)
        while self.send.done.is_set() and self.send.error is None and time.monotonic() < until:
            if worker.ended() or _gone(self.source):
                break
            _readable([*worker.fds(), self.source], LOOK_S)
        until = time.monotonic() + REASON_S
        while not (why := str(self.send.error or "") or self.why_failed()) and time.monotonic() < until:
            time.sleep(0.05)
        return why

    def _soon(self, *fds: int, limit: float | None = None) -> bool:
        limit = AFTER_S if limit is None else limit
        return bool(_readable([*fds, self.cancelled.fd], limit) - {self.cancelled.fd})


class _Worker:
    """The source's sending thread, from v53 on; looked for once, when the send call has returned."""

    def __init__(self, pid: int, send: Call) -> None:
        self._pid, self._send = pid, send
        self._tid: int | None = None
        self._fd = -1

    def _look(self) -> None:
        if self._tid is not None or not self._send.done.is_set() or self._send.error is not None:
            return
        self._tid = next(_named(self._pid, _WORKER), 0)
        if self._tid:
            with contextlib.suppress(OSError):  # PIDFD_THREAD is O_EXCL, include/uapi/linux/pidfd.h (6.9)
                self._fd = os.pidfd_open(self._tid, os.O_EXCL)

    def fds(self) -> list[int]:
        """What becomes readable when it ends."""
        return [self._fd] if self._fd >= 0 else []

    def patience(self) -> float:
        """How long waiting for others may last before it has to be looked at again."""
        return LOOK_S if self._tid and self._fd < 0 else float("inf")

    def ended(self) -> bool:
        """Whether the send call has returned and there is no such thread, or no more."""
        self._look()
        return self._tid is not None and not Path(f"/proc/{self._pid}/task/{self._tid}").exists()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


@contextlib.contextmanager
def _worker_of(pid: int, send: Call) -> Iterator[_Worker]:
    worker = _Worker(pid, send)
    try:
        yield worker
    finally:
        worker.close()


def _named(pid: int, comm: str) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            if (task / "comm").read_text().strip() == comm:
                yield int(task.name)


def _readable(fds: list[int], timeout_s: float) -> set[int]:
    waiter = select.poll()
    for fd in fds:
        waiter.register(fd, select.POLLIN)
    return {fd for fd, _ in waiter.poll(None if timeout_s == float("inf") else max(0, timeout_s) * 1000)}


def _gone(pidfd: int) -> bool:
    return bool(_readable([pidfd], 0))
