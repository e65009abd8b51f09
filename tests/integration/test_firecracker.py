# SPDX-License-Identifier: Apache-2.0
"""Hand-overs of real Firecrackers, with each binary found. Witnesses: the guest's beats, and their own times."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.commands import run
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording.events import Mark
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.vmm.base import Outcome
from ebpf_mig.vmm.firecracker.lab import DEFAULT_BINARY, ENVIRONMENT, FcPair
from ebpf_mig.vmm.firecracker.migration import FcMigration
from tests.companion import Companion
from tests.conftest import TRACING, requires

SEVERAL = "EBPF_MIG_TEST_FIRECRACKERS"
"""Paths of binaries, separated by `:`. Unset: the binary that the demo would use."""
QUICK = Scenario(memory_bytes=128 * MIB, working_set_bytes=2 * MIB)
MS = 1_000_000


def binaries() -> list[str]:
    """The binaries that exist."""
    named = os.environ.get(SEVERAL)
    wanted = named.split(":") if named else [os.environ.get(ENVIRONMENT) or DEFAULT_BINARY]
    return [path for name in wanted if (path := shutil.which(name))]


FOUND = binaries()
pytestmark = [
    requires(*(name for name in TRACING if not name.startswith("qemu"))),
    pytest.mark.skipif(not FOUND, reason=f"missing feature: firecracker (in PATH, {ENVIRONMENT} or {SEVERAL})"),
    pytest.mark.parametrize(
        "binary",
        FOUND or ["none"],
        ids=lambda path: os.path.basename(os.path.dirname(path)) or path,  # noqa: PTH119,PTH120
    ),
]


@dataclass
class Traced:
    """One hand-over as recorded, and what happened to the guest."""

    outcome: Outcome
    recording: Recording
    breakdown: Breakdown
    source_beats: list[int]
    destination_beats: list[int]
    destination_alive: bool
    memory_blocks: int
    """Blocks of 512 bytes that the memory file occupies."""

    def own(self, name: str) -> int:
        """Firecracker's own time; ns."""
        marks = [e for e in self.recording.events if isinstance(e, Mark) and e.name == f"firecracker.{name}_us"]
        assert len(marks) == 1, name
        return marks[0].value * 1000

    def between(self, first: str, last: str) -> int:
        """Ns between two marks."""
        at = {e.name: e.at_ns for e in self.recording.events if isinstance(e, Mark)}
        return at[f"firecracker.API.{last}"] - at[f"firecracker.API.{first}"]


Act = Callable[[FcPair], None]


def hand_over(directory: Path, pair: FcPair, act: Act | None = None, *, timeout_s: float = 30) -> Traced:
    """One hand-over of the pair. `act` runs in parallel, starting just before the trigger."""
    path = directory / "snapshot.rec"
    with pair:
        time.sleep(0.3)
        options = pair.options()
        with contextlib.closing(FcMigration(pair.source.api, pair.destination.api, options)) as migration:
            beside = threading.Thread(target=act, args=(pair,)) if act else None
            if beside:
                beside.start()
            writer = functools.partial(run.open_recording, str(path), "test", force=True)
            outcome, _ = run.trace_migration(migration, timeout_s, writer, pair.notes)
            if beside:
                beside.join()
        alive = pair.destination.process.poll() is None
        memory = Path(options.diff or f"{options.directory}/vm.memory")
        blocks = memory.stat().st_blocks if memory.exists() else 0
        time.sleep(0.3)
    recording = read_recording(str(path))
    beats = [[at for at, _ in vm.heartbeat.beats] for vm in (pair.source, pair.destination)]
    return Traced(outcome, recording, analyse(recording).breakdown, *beats, alive, blocks)


def moved(run: Traced) -> None:
    """The guest is on the destination only, and its beats bound our downtime."""
    assert run.outcome.result == "completed", run.outcome
    b = run.breakdown
    assert b.migration.result == "completed" and b.completeness.verdict == "complete"
    assert b.window_ns == sum(phase.duration_ns for phase in b.phases)
    trigger = next(e.at_ns for e in run.recording.events if isinstance(e, Mark) and e.name == "session.trigger")
    last = [at for at in run.source_beats if at < trigger + run.between("pause.begin", "load.end")]
    assert last == run.source_beats, "the source beats no more"
    assert run.destination_beats, "the guest counts on"
    dark = run.destination_beats[0] - run.source_beats[-1]
    assert b.blackout_ns is not None and 0 < b.blackout_ns <= dark
    assert b.blackout_ns >= run.between("pause.end", "load.begin"), "our calls lie inside of it"


def own_times_agree(run: Traced, kind: str) -> None:
    """Firecracker's times of its calls lie within those that the caller sees."""
    for name, call in (("pause_vm", "pause"), (f"{kind}_create_snapshot", "create"), ("load_snapshot", "load")):
        assert 0 < run.own(name) <= run.between(f"{call}.begin", f"{call}.end"), name
    assert run.own(f"vmm_{kind}_create_snapshot") <= run.own(f"{kind}_create_snapshot")


def test_a_full_snapshot_from_a_file(tmp_path: Path, binary: str) -> None:
    run = hand_over(tmp_path, FcPair(replace(QUICK, vcpus=2), binary))
    moved(run)
    own_times_agree(run, "full")
    assert len(run.breakdown.vcpus) == 2
    assert run.memory_blocks * 512 >= QUICK.memory_bytes


def test_a_diff_through_a_page_fault_handler(tmp_path: Path, binary: str) -> None:
    run = hand_over(tmp_path, FcPair(QUICK, binary, uffd=True, diff=True))
    moved(run)
    own_times_agree(run, "diff")
    assert any("own handler" in note for note in run.breakdown.notes)


def test_a_destination_without_its_handler_gives_the_guest_back(tmp_path: Path, binary: str) -> None:
    def end_it(pair: FcPair) -> None:
        assert pair.handler is not None
        os.kill(pair.handler.pid, signal.SIGKILL)

    run = hand_over(tmp_path, FcPair(QUICK, binary, uffd=True), end_it)
    assert run.outcome.result == "failed" and "runs on the source again" in run.outcome.error
    assert "refuses snapshot/load" in run.outcome.error, "in its own words"
    assert run.breakdown.migration.result == "failed"
    assert not run.destination_beats and run.source_beats[-1] > run.recording.events[-1].at_ns - 2000 * MS
    assert run.breakdown.blackout_ns, "an aborted blackout: the guest came back"


def test_an_interruption_while_the_memory_is_written(tmp_path: Path, binary: str) -> None:
    """By the command, as a user would. The guest runs on the source again, and the files are left."""
    pair = FcPair(replace(QUICK, memory_bytes=1024 * MIB), binary)
    with pair:
        directory = pair.options().directory
        command = [sys.executable, "-m", "ebpf_mig.cli", "migrate", "firecracker", "--source", pair.source.api]
        command += ["--destination", pair.destination.api, "--snapshot-dir", directory, "-o", str(tmp_path / "x.rec")]
        with Companion(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tool:
            until = time.monotonic() + 20
            while not Path(directory, "vm.memory").exists():
                assert time.monotonic() < until and tool.poll() is None
                time.sleep(0.001)
            tool.send_signal(signal.SIGINT)
            _, said = tool.communicate(timeout=30)
        assert tool.returncode == 130, said
        before = len(pair.source.heartbeat.beats)
        time.sleep(0.5)
        assert len(pair.source.heartbeat.beats) > before and not pair.destination.heartbeat.beats


def test_the_demo_by_its_command(tmp_path: Path, binary: str) -> None:
    command = [sys.executable, "-m", "ebpf_mig.cli", "demo", "--vmm", "firecracker", "--vmm-binary", binary]
    command += ["--memory", "128MiB", "--working-set", "2MiB", "-o", str(tmp_path / "f.rec"), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    b = json.loads(done.stdout)
    assert (b["migration"]["result"], b["migration"]["vmm"]) == ("completed", "firecracker")
