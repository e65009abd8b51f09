# SPDX-License-Identifier: Apache-2.0
"""A control group whose memory runs out: the kernel sends SIGKILL to a process in it. No VM is in the group."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_mig.lab.scenario import MIB
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.companion import Companion
from tests.conftest import TRACING, requires
from tests.faults.kernel import held_by_others, programs
from tests.integration.control_group import Group
from tests.integration.exporters import children, exporter, gone, is_ready, migrate, until, value
from tests.integration.migrations import LASTING
from tests.integration.test_injected_faults import PROGRAM, SCENARIO, completes, recorder, reported

pytestmark = requires(*TRACING, "control groups that limit memory")
LARGE = 512 * MIB
EATS = """
eaten = []
while True:
    eaten.append(b"x" * (1 << 20))
"""
"""Uses up the memory of its group."""
VICTIM = ("sh", "-c", 'echo 1000 > /proc/self/oom_score_adj; exec "$@"', "sh")
"""Before a command: it is killed before others."""


@pytest.fixture
def group() -> Iterator[Group]:
    before = programs()
    with Group("memory") as made:
        made.limit_memory(LARGE)
        yield made
    until(lambda: not (programs() - before) or not (programs() - before - held_by_others()), 10)


def test_a_group_that_is_too_small_is_one_line_before_anything_is_loaded(group: Group, tmp_path: Path) -> None:
    group.limit_memory(100 * MIB)
    words = [*PROGRAM, "record", "--pid", "1", "-o", str(tmp_path / "x.rec")]
    with recorder([*group.inside(), *words], tmp_path / "log") as process:
        assert process.wait(30) == 3
    said = (tmp_path / "log").read_text()
    assert said.count("\n") == 1 and "may use 100 MiB of memory only, and tracing takes 128 MiB" in said
    assert "memory.max" in said and not (tmp_path / "x.rec").exists()


def test_a_recorder_that_is_killed_for_memory_leaves_nothing_and_its_vms_go_on(group: Group, tmp_path: Path) -> None:
    path = tmp_path / "x.rec"
    with QemuPair(SCENARIO) as pair:
        pids = ["--pid", str(pair.source.pid), "--pid", str(pair.destination.pid)]
        command = [*group.inside(), *VICTIM, *PROGRAM, "record", *pids, "-o", str(path)]
        with recorder(command, tmp_path / "log") as process:
            with Companion([*group.inside(), sys.executable, "-c", EATS]) as eater:
                assert process.wait(60) == -9
                eater.kill()
            completes(pair)
    assert reported(path)["completeness"]["verdict"] == "incomplete"  # type: ignore[index]


def test_the_analyst_is_killed_for_memory_first_and_its_work_is_done_again(group: Group, tmp_path: Path) -> None:
    """Memory gets short as it starts. All processes of an exporter are in one group, in a service as in a container."""

    def limited() -> bool:
        """Version 1 refuses a limit below what is in use, and that may grow."""
        with contextlib.suppress(OSError):
            group.limit_memory(group.unreclaimable_bytes() + MIB // 2)
            return True
        return False

    def shorten(pid: int) -> None:
        while not (analyst := children(pid).get("analysis_worker")):
            time.sleep(0.01)
        os.kill(analyst, signal.SIGSTOP)
        until(limited)
        os.kill(analyst, signal.SIGCONT)
        with contextlib.suppress(AssertionError):
            until(group.killed)
        group.limit_memory(LARGE)

    with exporter(tmp_path / "state", before=group.inside()) as (process, port):
        before = children(process.pid)
        shortening = threading.Thread(target=shorten, args=(process.pid,))
        shortening.start()
        migrate(LASTING)
        shortening.join()
        until(lambda: value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 1)
        now = children(process.pid)
        assert all(now[name] == pid and not gone(pid) for name, pid in before.items()), "the others went on"
        assert value(port, "ebpf_mig_exporter_restarts_total", process="analyst") > 0
        assert is_ready(port) and value(port, "ebpf_mig_errors_total") == 0
