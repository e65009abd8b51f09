# SPDX-License-Identifier: Apache-2.0
"""Does the guest run? A VMM can be busy without it. This one is our own, so what it does is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ebpf_mig.recording.events import VcpuState
from ebpf_mig.recording.file import read_recording
from tests.conftest import requires
from tests.truth.beside import HALTS, PAUSED, SPINS, vmm


def record(pid: int, path: Path) -> tuple[bool, list[int]]:
    """Whether we say that the guest is paused; and the threads that the recording has as vCPUs that ran."""
    command = [sys.executable, "-m", "ebpf_mig", "record", "--pid", str(pid), "--duration", "1s", "-o", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    states = [event.tid for event in read_recording(path).events if isinstance(event, VcpuState)]
    return "is paused" in done.stderr, states


@pytest.mark.everywhere("tiers")
@requires("root", "/dev/kvm", "bcc", "kernel BTF", "x86-64")
@pytest.mark.parametrize("guest", [PAUSED, SPINS, HALTS])
def test_a_busy_thread_is_no_guest(guest: str, tmp_path: Path) -> None:
    """Of a guest that is busy all the time there is no event either."""
    with vmm(guest) as (pid, (_, *vcpus)):
        assert record(pid, tmp_path / "x.rec") == (guest == PAUSED, vcpus)
