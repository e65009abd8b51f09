# SPDX-License-Identifier: Apache-2.0
"""Does the guest run? A VMM can be busy without it. Most are our own, so what they do is known."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebpf_mig.exporter.discovery import BUSY_TICKS, is_fresh
from ebpf_mig.linux import procfs
from ebpf_mig.recording.events import VcpuState
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import TRACING, requires
from tests.integration.migrations import QUICK
from tests.integration.test_results import Qmp
from tests.truth.beside import HALTS, PAUSED, SPINS, vmm


def record(pid: int, path: Path) -> tuple[bool, list[int]]:
    """Whether we say that the guest is paused; and the threads that the recording has as vCPUs that ran."""
    command = [sys.executable, "-m", "ebpf_mig", "record", "--pid", str(pid), "--duration", "1s", "-o", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    states = [event.tid for event in read_recording(path).events if isinstance(event, VcpuState)]
    return "is paused" in done.stderr, states


@pytest.mark.everywhere("tiers")
@requires("root", "/dev/kvm", "bcc", "kernel BTF")
@pytest.mark.parametrize("guest", [PAUSED, SPINS, HALTS])
def test_a_busy_thread_is_no_guest(guest: str, tmp_path: Path) -> None:
    """Of a guest that is busy all the time there is no event either."""
    with vmm(guest) as (pid, (_, *vcpus)):
        assert record(pid, tmp_path / "x.rec") == (guest == PAUSED, vcpus)


@requires(*TRACING)
def test_a_busy_monitor_makes_no_guest_run() -> None:
    """libvirt asks a new QEMU so much that the monitor's thread uses more CPU time than a vCPU that boots. The watch
    then has to know that it may be a destination.
    """
    with QemuPair(QUICK) as pair:
        pid, monitor = pair.destination.pid, Qmp(pair.destination.qmp)
        deadline = time.monotonic() + 60
        while max(procfs.cpu_ticks(pid, tid) for tid in procfs.threads_of(pid) if tid != pid) < 2 * BUSY_TICKS:
            monitor("query-status", unknown="x" * (1 << 20))
            assert time.monotonic() < deadline
        assert is_fresh(pid) and not is_fresh(pair.source.pid)
