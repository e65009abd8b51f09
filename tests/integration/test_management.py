# SPDX-License-Identifier: Apache-2.0
"""A manager that takes its time, at pre-switchover and before `cont`, as libvirt has to. The witness is its own clock.

EBPF_MIG_MANAGED is the number of rounds. `-rP` shows each wait beside the manager's own figure.

The wait ends with the first byte of the command that the VMM reads, and the manager can only stamp when it sent it. On
a busy machine the VMM's monitor thread was late for a CPU by up to 6 ms, as its schedstat says. So the manager and
this thread have a real-time priority: neither waits for a CPU, and both stamp the same instant.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.companion import Companion
from tests.conftest import TRACING, requires
from tests.integration.migrations import QUICK

pytestmark = requires(*TRACING)

ROUNDS = int(os.environ.get("EBPF_MIG_MANAGED", "1"))
MS = 1_000_000
AWAKE = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while True: pass
"""
"""Runs on its CPU whenever nothing else does."""


@pytest.fixture(autouse=True)
def real_time() -> Iterator[None]:
    """Nor does the garbage collector run in between, and no CPU halts: waking a virtual one takes up to 0.3 ms."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    awake = [subprocess.Popen([sys.executable, "-c", AWAKE, str(cpu)]) for cpu in os.sched_getaffinity(0)]
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(10))
    gc.disable()
    yield
    gc.enable()
    os.sched_setscheduler(0, *before)
    for process in awake:
        process.kill()
        process.wait()


def prefer(pid: int) -> None:
    """Gives the manager's priority to the thread of the VMM that reads its commands."""
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    (monitor,) = [int(task.name) for task in tasks if (task / "comm").read_text() == "IO mon_iothread\n"]
    os.sched_setscheduler(monitor, os.SCHED_FIFO, os.sched_param(10))


class HeldPair(QemuPair):
    """The destination waits for `cont`."""

    def _command(self, role: str, qmp: Path) -> list[str]:
        return super()._command(role, qmp) + (["-S"] if role == "destination" else [])


class Manager:
    """A monitor's client without any code of ours, which stamps what it hears and says."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._file = self._socket.makefile()
        self._heard: list[tuple[int, dict[str, Any]]] = []
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> int:
        """Sends a command and waits for its answer. When it was sent, monotonic ns."""
        text = json.dumps({"execute": command, "arguments": arguments})
        at = time.monotonic_ns()
        self._socket.sendall(text.encode())
        while True:
            line = self._file.readline()
            heard = time.monotonic_ns()
            if "return" in (said := json.loads(line)):
                return at
            assert "error" not in said, said
            self._heard.append((heard, said))

    def hears(self, status: str) -> int:
        """When the MIGRATION event with this status came, monotonic ns."""
        while True:
            for at, said in self._heard:
                if said["event"] == "MIGRATION" and said["data"]["status"] == status:
                    return at
            line = self._file.readline()
            self._heard.append((time.monotonic_ns(), json.loads(line)))

    def capabilities(self, *names: str) -> None:
        self("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in names])


@dataclass
class Managed:
    """A migration, and how long its manager took at each place by its own clock, ns."""

    breakdown: Breakdown
    took: dict[str, int]


def managed(directory: Path, source_ms: float, destination_ms: float | None, *, asks: int = 0) -> Managed:
    """`destination_ms` None: it cancels at pre-switchover. `asks`: how often it asks for the status meanwhile."""
    path = directory / "x.rec"
    with HeldPair(QUICK) as pair:
        source, destination = Manager(pair.source.qmp), Manager(pair.destination.qmp)
        pids = ["--pid", str(pair.source.pid), "--pid", str(pair.destination.pid)]
        command = [sys.executable, "-m", "ebpf_mig.cli", "record", *pids, "-o", str(path)]
        source.capabilities("events", "pause-before-switchover")
        destination.capabilities("events")
        destination("migrate-incoming", uri=pair.uri)
        for vm in (pair.source, pair.destination):
            prefer(vm.pid)
        with Companion(command, stderr=subprocess.PIPE, text=True) as recorder:
            assert recorder.stderr is not None
            while "tracing" not in (line := recorder.stderr.readline()):
                assert line, "the recorder ended"
            time.sleep(0.3)
            source("migrate", uri=pair.uri)
            took = {"source": -source.hears("pre-switchover")}
            wait(source, source_ms, asks)
            if destination_ms is None:
                took["source"] += source("migrate_cancel")
            else:
                took["source"] += source("migrate-continue", state="pre-switchover")
                took["destination"] = -destination.hears("completed")
                wait(destination, destination_ms, asks)
                took["destination"] += destination("cont")
            time.sleep(0.3)
            recorder.send_signal(signal.SIGINT)
            recorder.communicate(timeout=30)
    return Managed(analyse(read_recording(str(path))).breakdown, took)


def wait(manager: Manager, ms: float, asks: int) -> None:
    for _ in range(asks):
        time.sleep(ms / 1000 / (asks + 1))
        manager("query-status")
    time.sleep(ms / 1000 / (asks + 1))


def check(run: Managed) -> None:
    """Each wait is there, within 5 % or 200 us, and the phases add up."""
    b = run.breakdown
    assert b.management is not None
    assert {w.side: w.duration_ns for w in b.management}.keys() == run.took.keys()
    for one in b.management:
        took = run.took[one.side]
        off = one.duration_ns - took
        sys.stdout.write(f"{one.side} waited {took} ns, reported {one.duration_ns} ns, difference {off} ns\n")
        assert abs(one.duration_ns - took) <= max(took // 20, 200_000), (one, took)
    assert sum(p.duration_ns or 0 for p in b.phases) == b.window_ns
    assert b.phase_ns("management") == sum(w.duration_ns for w in b.management)
    assert b.phase_ns("unattributed") <= b.window_ns * 0.02  # type: ignore[operator]


@pytest.mark.parametrize("number", range(ROUNDS))
@pytest.mark.parametrize(("source_ms", "destination_ms"), [(5, 50), (50, 500), (500, 5)])
def test_each_delay_shows(source_ms: float, destination_ms: float, number: int, tmp_path: Path) -> None:
    run = managed(tmp_path, source_ms, destination_ms)
    check(run)
    assert run.breakdown.migration.result == "completed"
    assert run.breakdown.management is not None
    assert [w.commands for w in run.breakdown.management] == [1, 1]


def test_questions_meanwhile_do_not_hide_it(tmp_path: Path) -> None:
    run = managed(tmp_path, 50, 50, asks=5)
    check(run)
    assert run.breakdown.management is not None
    assert [w.commands for w in run.breakdown.management] == [6, 6]


def test_a_cancel_after_a_wait(tmp_path: Path) -> None:
    run = managed(tmp_path, 50, None)
    check(run)
    assert run.breakdown.came_back
