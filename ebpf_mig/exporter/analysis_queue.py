# SPDX-License-Identifier: Apache-2.0
"""Keeps recordings and has breakdowns made of them, beside the loop, which must not wait while others migrate.

In: ended migrations. Out: their recordings in the store, and an `Answer` for each, made by a process without privilege
(`analysis_worker.py`).
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
"""A little more than the process that analyses has patience for."""
QUEUED, QUEUED_EVENTS = 256, 1_000_000
"""Migrations that wait for their analysis, and their events in all: some 300 MB. Those beyond are left out."""


@dataclass(frozen=True)
class Case:
    """A migration that is over."""

    header: Header
    events: list[AnyEvent]
    vms: list[Vm]
    trigger: str


class Analysis:
    """Takes cases in the loop's thread, tells answers in one of its own. To be made before privilege is given up."""

    def __init__(self, store: Store, tell: Callable[[Answer], None], troubles: Troubles) -> None:
        self._store = store
        self._tell = tell
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
        """Waits until the process that analyses has given up its privilege; PreflightError if it cannot."""
        try:
            said = self._answers.readline()
        except OSError as error:  # it did not say so in time
            raise PreflightError(f"the process that analyses does not start: {error}") from error
        if said != READY:
            raise PreflightError(f"the process that analyses ended with status {self._process.wait()}")

    def check(self) -> None:
        """Once a second: PreflightError if the process that analyses has ended, or was stopped and so had to be ended.

        This process may not start another: it has given up what that takes. It ends, and whoever runs it starts it
        again; until then nobody is told that all is well.
        """
        if self._process.poll() is None and is_stopped(self._process.pid):
            self._leash.let_go()
            raise PreflightError("the process that analyses was stopped")
        if self._process.poll() is not None:
            raise PreflightError(f"the process that analyses ended with status {self._process.returncode}")

    def put(self, case: Case) -> None:
        """Takes over an ended migration. The thread begins here: one that began earlier would keep capabilities."""
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
        """Waits until everything that was put is done."""
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
            raise EOFError("the process that analyses is gone")
        answer = msgspec.json.decode(line, type=Answer)
        if answer.observation is None:
            raise ValueError(answer.error)
        self._tell(answer)

    def _keep(self, case: Case) -> tuple[str, int]:
        """The recording's name, empty if the store has no room, and a descriptor to read it from."""
        try:
            return self._store.keep(case.header, case.events, case.vms[0].pid)
        except (EbpfMigError, OSError) as error:
            self._troubles.error("recording", "a recording could not be kept", error)
        fd = os.memfd_create("recording")
        with os.fdopen(os.dup(fd), "wb") as stream, RecordingWriter(stream, case.header) as writer:
            writer.write_many(case.events)
        os.lseek(fd, 0, os.SEEK_SET)
        return "", fd
