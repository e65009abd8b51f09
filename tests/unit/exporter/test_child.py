# SPDX-License-Identifier: Apache-2.0
"""A real process is kept running, whatever becomes of it."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebpf_mig.exporter import child as module
from ebpf_mig.exporter.child import LATE_S, Child

GOOD = "import os, sys, time; fd = int(sys.argv[1])\nwhile True: os.write(fd, b'.'); time.sleep(0.02)\n"


@pytest.fixture
def of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Child]]:
    """Makes a child that runs a script."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "STOPPED_S", 0.3)
    monkeypatch.setattr(module, "SOON_S", 0.05)
    made: list[Child] = []

    def make(script: str, *, beats: bool = False) -> Child:
        (tmp_path / "scripted.py").write_text(script)
        made.append(Child("scripted", "scripted", str, [], beats=beats))
        return made[-1]

    yield make
    for child in made:
        child.kill()
        child.wait(5)


def until(child: Child, what: Callable[[], bool], seconds: float = 10) -> None:
    """Does what a supervisor does, until it is so."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, child.missing
        child.look()
        child.start()
        time.sleep(0.01)


def pid_of(child: Child) -> int:
    assert child._process is not None
    return child._process.pid


def test_one_that_ends_is_started_again(of: Callable[..., Child]) -> None:
    child = of(GOOD)
    until(child, lambda: child.runs)
    assert child.missing == "is starting" and child.pipe >= 0
    until(child, lambda: child.missing == "")
    assert child.pipe == -1
    first = pid_of(child)
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while not child.look():
        assert time.monotonic() < deadline
    assert child.missing == "was killed by signal 9" and child.status == -9
    until(child, lambda: child.missing == "")
    assert pid_of(child) != first


def test_one_that_is_stopped_is_replaced_and_one_that_goes_on_is_not(of: Callable[..., Child]) -> None:
    child = of(GOOD)
    until(child, lambda: child.runs and child.missing == "")
    first = pid_of(child)
    os.kill(first, signal.SIGSTOP)
    until(child, lambda: child.missing == "is stopped")
    os.kill(first, signal.SIGCONT)
    until(child, lambda: child.missing == "")
    assert pid_of(child) == first
    os.kill(first, signal.SIGSTOP)
    until(child, lambda: child.runs and pid_of(child) != first and child.missing == "")


def test_one_that_hangs_is_replaced(of: Callable[..., Child], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT_S", 0.3)
    child = of("import os, sys, time; os.write(int(sys.argv[1]), b'.'); time.sleep(60)\n", beats=True)
    until(child, lambda: child.runs and child.missing == "")
    first = pid_of(child)
    until(child, lambda: child.runs and pid_of(child) != first)


def test_one_that_does_not_get_ready_is_replaced(of: Callable[..., Child], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "START_S", 0.5)
    child = of("import time; time.sleep(60)\n")
    until(child, lambda: child.runs)
    first = pid_of(child)
    until(child, lambda: child.runs and pid_of(child) != first)
    assert not child.was_ready


def test_one_that_cannot_run_is_tried_later_and_later(of: Callable[..., Child]) -> None:
    child = of("raise SystemExit(7)\n")
    delays = []
    for _ in range(10):
        child.start()
        assert child.runs
        child.wait(10)
        assert child.status == 7 and child.missing == "ended with status 7"
        delays.append(child.due_in())
        child._due = 0.0
    assert delays[0] < 0.3 and all(a <= b + 0.01 for a, b in itertools.pairwise(delays))
    assert LATE_S - 0.1 < delays[-1] <= LATE_S


def test_one_that_cannot_even_be_started_is_tried_later(
    of: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    child = of(GOOD)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(module, "start", refuse)
        child.start()
        assert not child.runs and child.status == 1
    until(child, lambda: child.runs and child.missing == "")
