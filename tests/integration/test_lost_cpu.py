# SPDX-License-Identifier: Apache-2.0
"""Why the source had no CPU in the blackout, next to other threads; and the stolen time of the host.

The cause is set up between the pre-copy and the switchover. Witness: the run delay that the scheduler counts for each
thread. A stolen CPU cannot be provoked here; /proc/stat is compared.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.linux import procfs
from ebpf_mig.recording.events import CpuSteal, OffCpu, RunDelay
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.companion import Companion
from tests.conftest import TRACING, requires
from tests.integration.exporters import PROGRAM
from tests.integration.migrations import QUICK
from tests.integration.test_results import Qmp

pytestmark = requires(*TRACING)

MS = 1_000_000
NEIGHBOUR = """
import os, time
os.sched_setaffinity(0, [{cpu}])
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
print(flush=True)
while True:
    until = time.monotonic() + 0.004
    while time.monotonic() < until:
        pass
    time.sleep(0.001)
"""
CONTENDED = {"(preempted)", "(waits for a CPU)"}
Cause = Callable[[int], AbstractContextManager[None]]


@dataclass(frozen=True)
class Seen:
    """What `record` saw while a cause held the source."""

    recording: Recording
    begin_ns: int
    end_ns: int
    """When the run delays were read."""
    grown: dict[int, int]
    """How far each thread's run delay grew in between, ns."""

    @property
    def breakdown(self) -> Breakdown:
        return analyse(self.recording).breakdown


def switched_over(path: Path, cause: Cause) -> Seen:
    with QemuPair(QUICK) as pair:
        source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
        for one in (source, destination):
            one.capability("pause-before-switchover")
        pids = ["--pid", str(pair.source.pid), "--pid", str(pair.destination.pid)]
        command = [*PROGRAM, "record", *pids, "-o", str(path)]
        with Companion(command, stderr=subprocess.PIPE, text=True) as recorder:
            assert recorder.stderr is not None and "tracing" in recorder.stderr.readline()
            destination("migrate-incoming", uri=pair.uri)
            source("migrate", uri=pair.uri)
            source.reaches("pre-switchover")
            before, begin = run_delays(pair.source.pid), time.monotonic_ns()
            with cause(pair.source.pid):
                source("migrate-continue", state="pre-switchover")
                assert source.reaches("completed", "failed") == "completed"
                end = time.monotonic_ns()
                grown = {tid: ns - before.get(tid, 0) for tid, ns in run_delays(pair.source.pid).items()}
            said = recorder.communicate(timeout=30)[1]
        assert recorder.returncode == 0, said
    return Seen(read_recording(path), begin, end, grown)


def run_delays(pid: int) -> dict[int, int]:
    """The time for which each thread could run and had no CPU, in ns (Documentation/scheduler/sched-stats.rst)."""
    return {tid: int(procfs.text(pid, "task", tid, "schedstat").split()[1]) for tid in procfs.threads_of(pid)}


@contextlib.contextmanager
def neighbours(pid: int) -> Iterator[None]:
    """A thread with real-time priority that takes 4 of each 5 ms of the source's only CPU.

    With threads of equal priority, the scheduler may give the CPU to each thread of QEMU as soon as it wakes up.
    """
    cpu = max(os.sched_getaffinity(0))
    for tid in procfs.threads_of(pid):
        os.sched_setaffinity(tid, [cpu])
    command = [sys.executable, "-c", NEIGHBOUR.format(cpu=cpu)]
    with Companion(command, stdout=subprocess.PIPE, text=True) as neighbour:
        try:
            assert neighbour.stdout is not None and neighbour.stdout.readline(), "it did not begin"
            yield
        finally:
            neighbour.kill()


def reasons(b: Breakdown) -> dict[str, int]:
    """The waits of threads that could run, in ns by their reason."""
    found: dict[str, int] = {}
    for wait in b.waits or []:
        if wait.stack and wait.stack[0].startswith("("):
            found[wait.stack[0]] = found.get(wait.stack[0], 0) + wait.duration_ns
    return found


def test_other_threads(tmp_path: Path) -> None:
    seen = switched_over(tmp_path / "x.rec", neighbours)
    found = reasons(seen.breakdown)
    assert sum(found.get(word, 0) for word in CONTENDED) > MS and "(CPU quota)" not in found, found
    waited: dict[int, int] = {}
    for event in seen.recording.events:
        if isinstance(event, OffCpu) and event.preempted and seen.begin_ns <= event.begin_ns:
            took = event.end_ns - event.begin_ns
            assert event.next_tid >= 0 and not event.rt_throttled, event
        elif isinstance(event, RunDelay) and seen.begin_ns <= event.at_ns - event.delay_ns:
            took = event.delay_ns
        else:
            continue
        if event.tid in seen.grown and (event.at_ns if isinstance(event, RunDelay) else event.end_ns) <= seen.end_ns:
            waited[event.tid] = waited.get(event.tid, 0) + took
    assert waited and all(ns <= seen.grown[tid] + MS for tid, ns in waited.items()), (waited, seen.grown)


def test_stolen_time_is_that_of_the_kernel(tmp_path: Path) -> None:
    before = procfs.stolen_ns()
    seen = switched_over(tmp_path / "x.rec", lambda _pid: contextlib.nullcontext())
    after = procfs.stolen_ns()
    for event in seen.recording.events:
        if isinstance(event, CpuSteal) and event.cpu >= 0:
            assert before[event.cpu] <= event.stolen_ns <= after[event.cpu]
    assert seen.breakdown.stolen is not None, "nothing was read on one side of the window"
    for row in seen.breakdown.stolen:
        assert 0 < row.stolen_ns <= after[row.cpu] - before[row.cpu]
