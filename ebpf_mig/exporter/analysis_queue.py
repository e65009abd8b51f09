# SPDX-License-Identifier: Apache-2.0
"""Keeps recordings and has them analysed in a thread, because the watch's loop must not wait.

In: ended migrations. Out: their recordings in the store, and an `Answer` for each. The analyst, a process without
privilege (`analysis_worker.py`), makes the answers.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ebpf_mig.errors import EbpfMigError
from ebpf_mig.exporter.analyst import Analyst
from ebpf_mig.exporter.discovery import Vm
from ebpf_mig.exporter.messages import TASK_BYTES, Answer, Task
from ebpf_mig.exporter.spawn import give_back
from ebpf_mig.exporter.store import Store
from ebpf_mig.exporter.troubles import Troubles
from ebpf_mig.linux import procfs
from ebpf_mig.recording.events import AnyEvent, Header
from ebpf_mig.recording.file import RecordingWriter

ANSWER_S = 120.0
"""A little more than the analyst's own time-out, `analysis_worker.PATIENCE_S`."""
LOOK_S = 0.1
"""How often the state of an analyst of our own is checked."""
ATTEMPTS = 3
"""An analysis is tried again when the analyst was killed. A recording may be what kills it."""
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
    """Takes cases in the loop's thread, and passes answers on in its own."""

    def __init__(self, store: Store, report: Callable[[Answer], None], troubles: Troubles, run_id: str,
                 tasks: socket.socket | None) -> None:  # fmt: skip
        """`tasks`: where somebody else keeps an analyst running. None: it is done here, and takes privilege."""
        self._store = store
        self._report = report
        self._troubles = troubles
        self._run_id, self._number = run_id, 0
        self._queue: queue.Queue[Case | None] = queue.Queue()
        self._events = 0
        self._events_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._analyst: Analyst | None = None
        if tasks is None:
            self._analyst = Analyst()
            tasks = self._analyst.tasks
        self._tasks = tasks

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
        if self._analyst is not None:
            self._analyst.close()

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
        self._number += 1
        task = Task(f"{self._run_id}-{self._number}", name, case.vms, case.trigger, time.time())
        case.events.clear()
        try:
            answer = self._ask(task, fd)
        finally:
            os.close(fd)
        if answer.observation is None:
            raise ValueError(answer.error)
        self._report(answer)

    def _ask(self, task: Task, recording: int) -> Answer:
        """Has a recording analysed. EOFError or TimeoutError if that cannot be done."""
        deadline = time.monotonic() + ANSWER_S
        self._discard_old()
        for _ in range(ATTEMPTS):
            # Each analyst needs a file offset of its own.
            again = os.open(procfs.path("self", "fd", str(recording)), os.O_RDONLY | os.O_CLOEXEC)
            try:
                socket.send_fds(self._tasks, [msgspec.json.encode(task)], [again])
            finally:
                os.close(again)
            while time.monotonic() < deadline:
                answer = self._answer(LOOK_S)
                if answer is not None and answer.gone:
                    break
                if answer is not None and answer.id == task.id:
                    return answer
            else:
                raise TimeoutError(f"the analyst process gave no answer within {ANSWER_S:.0f} s")
        raise EOFError(f"the analyst process ended {ATTEMPTS} times during this analysis")

    def _discard_old(self) -> None:
        """Drops answers to a watch that was killed. An old `gone` would count as the loss of the next task."""
        answer = self._answer(0)
        while answer is not None:
            answer = self._answer(0)

    def _answer(self, seconds: float) -> Answer | None:
        """The next answer, if one comes within this time."""
        if self._analyst is not None:
            self._analyst.look()
        if not select.select([self._tasks], [], [], seconds)[0]:
            return None
        data = self._tasks.recv(TASK_BYTES)
        if not data:
            raise EOFError("the analyst process is gone")
        return msgspec.json.decode(data, type=Answer)

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
