# SPDX-License-Identifier: Apache-2.0
"""Keeps recordings and has them analysed in a thread, because the watch's loop must not wait.

In: ended migrations. Out: their recordings in the store, and an `Answer` for each. The analyst, a process without
privilege (`analysis_worker.py`), makes the answers.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ebpf_mig.errors import EbpfMigError, PreflightError
from ebpf_mig.exporter.analysis_worker import READY
from ebpf_mig.exporter.discovery import Vm
from ebpf_mig.exporter.leash import Leash, is_stopped
from ebpf_mig.exporter.messages import Answer, Task
from ebpf_mig.exporter.spawn import give_back, start
from ebpf_mig.exporter.store import Store
from ebpf_mig.exporter.troubles import Troubles
from ebpf_mig.recording.events import AnyEvent, Header
from ebpf_mig.recording.file import RecordingWriter

ANSWER_S = 120.0
"""A little more than the analyst's own time-out, `PATIENCE_S`."""
QUEUED, QUEUED_EVENTS = 256, 1_000_000
"""Migrations that wait for analysis, and the sum of their events (about 300 MB). More are left out."""


@dataclass(frozen=True)
class Case:
    """A migration that is over."""

    header: Header
    events: list[AnyEvent]
    vms: list[Vm]
    trigger: str


class Analysis:
    """Takes cases in the loop's thread, and passes answers on in its own. Create it before privilege is given up."""

    def __init__(self, store: Store, report: Callable[[Answer], None], troubles: Troubles) -> None:
        self._store = store
        self._report = report
        self._troubles = troubles
        self._queue: queue.Queue[Case | None] = queue.Queue()
        self._events = 0
        self._events_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channel.settimeout(ANSWER_S)
        place = theirs.fileno()
        self._leash = Leash()
        given = [place, self._leash.theirs]
        self._process = start("ebpf_mig.exporter.analysis_worker", str(place), str(os.getpid()), fds=given)
        self._leash.tie(self._process.pid)
        theirs.close()
        self._answers = self._channel.makefile("rb")

    def verify(self) -> None:
        """Waits until the analyst has given up its privilege. PreflightError if it cannot."""
        try:
            line = self._answers.readline()
        except OSError as error:  # not in time
            raise PreflightError(f"the analyst process does not start: {error}") from error
        if line != READY:
            raise PreflightError(f"the analyst process ended with status {self._process.wait()}")

    def check(self) -> None:
        """Call it once a second. PreflightError if the analyst has ended, or was stopped and therefore killed.

        The watch cannot start another one: it has given up the privilege for that. It ends, and the service manager
        starts it again.
        """
        if self._process.poll() is None and is_stopped(self._process.pid):
            self._leash.let_go()
            raise PreflightError("the analyst process was stopped")
        if self._process.poll() is not None:
            raise PreflightError(f"the analyst process ended with status {self._process.returncode}")

    def put(self, case: Case) -> None:
        """Queues an ended migration. The thread starts here: a thread that started earlier would keep capabilities."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="analysis", daemon=True)
            self._thread.start()
        with self._events_lock:
            full = self._queue.qsize() >= QUEUED or (self._events and self._events + len(case.events) > QUEUED_EVENTS)
            self._events += 0 if full else len(case.events)
        if full:
            self._troubles.exceeded("queue", QUEUED)
            return
        self._queue.put(case)

    def close(self) -> None:
        """Waits until everything in the queue is done."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        self._answers.close()
        self._channel.close()
        self._process.wait()

    def _work(self) -> None:
        while (case := self._queue.get()) is not None:
            number = len(case.events)
            with self._troubles.of("analysis", f"no breakdown of a migration of process {case.vms[0].pid}"):
                self._one(case)
            with self._events_lock:
                self._events -= number
            del case
            give_back()

    def _one(self, case: Case) -> None:
        name, fd = self._keep(case)
        task = Task(name, case.vms, case.trigger, time.time())
        case.events.clear()
        try:
            socket.send_fds(self._channel, [msgspec.json.encode(task) + b"\n"], [fd])
        finally:
            os.close(fd)
        line = self._answers.readline()
        if not line:
            raise EOFError("the analyst process is gone")
        answer = msgspec.json.decode(line, type=Answer)
        if answer.observation is None:
            raise ValueError(answer.error)
        self._report(answer)

    def _keep(self, case: Case) -> tuple[str, int]:
        """The recording's name, empty if the store could not keep it, and a descriptor to read it from."""
        try:
            return self._store.keep(case.header, case.events, case.vms[0].pid)
        except (EbpfMigError, OSError) as error:
            self._troubles.error("recording", "a recording could not be kept", error)
        fd = os.memfd_create("recording")
        with os.fdopen(os.dup(fd), "wb") as stream, RecordingWriter(stream, case.header) as writer:
            writer.write_many(case.events)
        os.lseek(fd, 0, os.SEEK_SET)
        return "", fd
