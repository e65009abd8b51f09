# SPDX-License-Identifier: Apache-2.0
"""Real Cloud Hypervisors, where a binary is found (environment or PATH), with their own log as witness."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.lab.cloud_hypervisor import DEFAULT_BINARY, ENVIRONMENT, ChPair
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.vmm.cloud_hypervisor import ChMigration
from tests.conftest import TRACING, requires

FOUND = shutil.which(os.environ.get(ENVIRONMENT) or DEFAULT_BINARY)
pytestmark = [
    requires(*TRACING),
    pytest.mark.skipif(FOUND is None, reason=f"missing feature: cloud-hypervisor (in PATH or {ENVIRONMENT})"),
]


def demo(directory: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "ebpf_mig.cli", "demo", "--vmm", "cloud-hypervisor", "--memory", "128MiB"]
    command += ["--working-set", "4MiB", "-o", str(directory / "ch.rec"), "--format", "json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("arguments", [[], ["--transport", "unix"], ["--multifd", "4", "--vcpus", "2"]])
def test_its_own_downtime_beside_ours(tmp_path: Path, arguments: list[str]) -> None:
    b = demo(tmp_path, *arguments)
    assert b["migration"]["result"] == "completed" and b["completeness"]["verdict"] == "complete"
    assert sum(phase["duration_ns"] for phase in b["phases"]) == b["window_ns"]
    assert b["dirty_log"]["mode"] == "legacy"
    own = next(w for w in b["witnesses"] if w["name"] == "ch.downtime_ms")
    # It counts from before the first vCPU's pause: with several that is the window, not the blackout.
    ours = b["blackout_ns"] if len(b["vcpus"]) == 1 else b["window_ns"]
    # Cut to whole ms, it also has its two looks at the vCPUs' state in it, a millisecond apart each.
    assert abs(own["value_ns"] - ours) <= 3_000_000


def test_a_destination_that_dies(tmp_path: Path) -> None:
    scenario = Scenario(memory_bytes=128 * MIB, working_set_bytes=4 * MIB)
    with ChPair(scenario) as pair:
        migration = ChMigration(pair.source.api, pair.destination.api, pair.uri, pair.options())
        migration.prepare()
        os.kill(pair.destination.pid, signal.SIGKILL)
        outcome = migration.run(30)
        assert outcome.result == "failed" and outcome.error
        assert pair.source.process.poll() is None, "the VM goes on where it was"
