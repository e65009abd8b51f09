# SPDX-License-Identifier: Apache-2.0
"""Runs the truth machine as Cloud Hypervisor under the real command, and compares the result with the truth.

In: a `ChPlan`. Out: a `ChRun`: the output of `ebpf-mig migrate cloud-hypervisor`, and a `harness.Run` if the migration
completed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ebpf_mig.breakdown import Breakdown, Witness
from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import read_recording
from tests.truth.ch_parts import ChPlan
from tests.truth.cloud_hypervisor import encode
from tests.truth.harness import ROOT, Helper, Run, durations, free_port, helpers

_TRUTH_S = 5.0


@dataclass
class ChRun:
    """One run of the command."""

    status: int
    stderr: str
    breakdown: Breakdown | None
    """None if the command failed before it made a recording."""
    truth: Run | None
    """None if the migration did not complete."""
    source_alive: bool

    def witness(self, name: str) -> Witness:
        assert self.breakdown is not None
        found = [w for w in self.breakdown.witnesses if w.name == f"ch.{name}"]
        assert found, (name, self.breakdown.witnesses, self.breakdown.notes, self.breakdown.phases)
        return found[0]


Act = Callable[[list[Helper], ChPlan], None]


@contextmanager
def pair(plan: ChPlan, destination_manner: str = "") -> Iterator[tuple[ChPlan, list[Helper]]]:
    """Both VMMs, ready, in their own directory; source first."""
    with tempfile.TemporaryDirectory() as directory:
        plan = replace(plan, directory=directory)
        other = replace(plan, manner=destination_manner or plan.manner)
        module = "tests.truth.cloud_hypervisor"
        with helpers((module, "source", encode(plan)), (module, "destination", encode(other))) as started:
            yield plan, started


def migrate(plan: ChPlan, *more: str, tcp: bool = False, act: Act | None = None, destination_manner: str = "") -> ChRun:
    """Runs one migration by the command line. `act` runs right after the command has been started."""
    with pair(plan, destination_manner) as (placed, started):
        recording = Path(placed.path("run.rec"))
        url = f"tcp:127.0.0.1:{free_port()}" if tcp else f"unix:{placed.path('migration')}"
        command = [sys.executable, "-m", "ebpf_mig.cli", "migrate", "cloud-hypervisor", "--url", url]
        for side in ("source", "destination"):
            command += [f"--{side}", placed.path(f"{side}.api"), f"--{side}-log", placed.path(f"{side}.log")]
            command += [f"--{side}-events", placed.path(f"{side}.events")]
        command += ["-o", str(recording), "--format", "json", "--timeout", "15s", *more]
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if act:
            act(started, placed)
        try:
            _, stderr = run.communicate(timeout=60)
        finally:
            run.kill()
        alive = started[0].process.poll() is None
        breakdown = truth = None
        if recording.exists():
            found = read_recording(str(recording))
            breakdown = analyse(found).breakdown
            if run.returncode == 0:
                truth = _truth(placed, breakdown, list(found.events))
        return ChRun(run.returncode, stderr, breakdown, truth, alive)


def _truth(plan: ChPlan, breakdown: Breakdown, events: list) -> Run:  # type: ignore[type-arg]
    left, right = (_left_by(plan, side) for side in ("source", "destination"))
    return Run(
        plan,
        breakdown,
        events,
        durations([*left["marks"], *right["marks"]]),
        {**left["injected"], **right["injected"]},
        left["fetched"],
        left["checksum"] == right["checksum"],
    )


def _left_by(plan: ChPlan, side: str) -> dict:  # type: ignore[type-arg]
    path, until = Path(plan.path(f"{side}.truth")), time.monotonic() + _TRUTH_S
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    truth: dict = json.loads(path.read_text())  # type: ignore[type-arg]
    return truth


def undisturbed(plan: ChPlan, *, tcp: bool = False, tries: int = 5) -> ChRun:
    """The first of several runs in which the machine knows the truth well enough, or the last."""
    for _ in range(tries):
        run = migrate(plan, tcp=tcp)
        if run.truth is None or not run.truth.doubtful():
            break
    return run
