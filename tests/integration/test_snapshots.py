# SPDX-License-Identifier: Apache-2.0
"""Snapshots and restores of real guests, seen by `record`. The witnesses: the guest's heartbeat, sizes of files, and
the clock around the calls. No code of ours makes them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import FILE, Socket
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.vmm.cloud_hypervisor.lab import ChPair
from tests.companion import Companion
from tests.conftest import TRACING, requires
from tests.integration.ch_migrations import QUICK, binaries

pytestmark = requires(*TRACING)

MS = 1_000_000
APART_S = 0.1


def call(path: str, name: str, **body: Any) -> None:
    """One request of Cloud Hypervisor's API, on a connection of its own."""
    text = json.dumps(body) if body else ""
    head = f"PUT /api/v1/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall((head + text).encode())
        answer = client.recv(4096).decode()
    assert answer.split()[1] in ("200", "204"), answer


def recorded(path: Path, pids: list[int], act: Callable[[], None]) -> tuple[Recording, Breakdown]:
    """What `record` says of what `act` does. It has to end by itself."""
    named = [word for pid in pids for word in ("--pid", str(pid))]
    command = [sys.executable, "-m", "ebpf_mig", "record", *named, "-o", str(path)]
    with Companion(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and "tracing" in process.stderr.readline()
        act()
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 0, said
    recording = read_recording(path)
    return recording, analyse(recording).breakdown


@pytest.mark.skipif(not binaries(), reason="missing feature: Cloud Hypervisor")
@pytest.mark.parametrize("second", [True, False], ids=["handed-over", "resumed"])
def test_cloud_hypervisor(second: bool, tmp_path: Path) -> None:
    began: dict[str, int] = {}
    (tmp_path / "state").mkdir()
    with ChPair(QUICK, binaries()[0]) as pair:
        source, destination = pair.source, pair.destination

        def timed(vm: Any, name: str, **body: Any) -> None:
            began[name] = time.monotonic_ns()
            call(vm.api, name, **body)
            began[f"{name} end"] = time.monotonic_ns()

        def act() -> None:
            timed(source, "vm.pause")
            time.sleep(APART_S)
            timed(source, "vm.snapshot", destination_url=f"file://{tmp_path}/state")
            time.sleep(APART_S)
            goes_on = destination if second else source
            if second:
                timed(destination, "vm.restore", source_url=f"file://{tmp_path}/state")
                time.sleep(APART_S)
            timed(goes_on, "vm.resume")
            before = len(goes_on.heartbeat.beats)
            while len(goes_on.heartbeat.beats) < before + 2:
                time.sleep(0.01)

        pids = [source.pid, destination.pid] if second else [source.pid]
        recording, b = recorded(tmp_path / "x.rec", pids, act)
        beats = sorted(at for vm in (source, destination) for at, _ in vm.heartbeat.beats)
    assert (b.migration.mode, b.migration.result) == ("snapshot", "completed" if second else "saved")
    assert (b.migration.transport, b.completeness.verdict) == ("file", "complete")
    assert b.window_ns and b.blackout_ns and b.phase_ns("unattributed") <= 0.02 * b.window_ns
    assert sum(p.duration_ns or 0 for p in b.phases) == b.window_ns

    # The calls bracket the blackout.
    assert b.blackout_ns <= began["vm.resume end"] - began["vm.pause"]
    assert b.blackout_ns >= began["vm.resume"] - began["vm.pause end"]
    # So do the guest's beats: it gives none in the blackout, and one round before and after at most.
    first = max(at for at in beats if at <= began["vm.pause end"])
    last = min(at for at in beats if at > began["vm.resume"])
    assert b.blackout_ns <= last - first
    assert not [at for at in beats if began["vm.pause end"] + MS < at < began["vm.resume"]]

    # Each wait of the script is the caller's, and no more than the client's part of the calls around it.
    waits = b.phase_ns("management")
    sleeps = [
        (began["vm.snapshot"] - began["vm.pause end"]),
        (began["vm.restore" if second else "vm.resume"] - began["vm.snapshot end"]),
    ]
    sleeps += [began["vm.resume"] - began["vm.restore end"]] if second else []
    assert sum(sleeps) - 5 * MS <= waits <= sum(sleeps) + 20 * MS
    snapshot = began["vm.snapshot end"] - began["vm.snapshot"]
    written = b.phase_ns("memory.send") + b.phase_ns("state.send") + b.phase_ns("state.save")
    assert snapshot - 20 * MS <= written <= snapshot
    if second:
        loading = began["vm.restore end"] - began["vm.restore"]
        loaded = b.phase_ns("memory.load") + b.phase_ns("state.load")
        assert loading - 20 * MS <= loaded <= loading
    size = next((tmp_path / "state").glob("memory*")).stat().st_size
    sent = sum(s.bytes for s in b.sockets if s.role == "source migration")
    assert size <= sent <= size + (256 << 10)
    assert any(isinstance(event, Socket) and event.family == FILE for event in recording.events)
