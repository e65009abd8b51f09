# SPDX-License-Identifier: Apache-2.0
"""A migration of QEMU over AF_VSOCK between two processes of one host, seen by each tool.

The witnesses are QEMU's: its trace of the stop and the start, the bytes that it counts, and the address that it got.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.breakdown import Breakdown, SocketUse
from ebpf_mig.recording.events import RECURSION_MISSES
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import TRACING, requires
from tests.integration.exporters import PROGRAM, report
from tests.integration.migrations import LASTING
from tests.integration.shapes import OPTIONS, Tool, as_qemu_saw, completed, joined, recorded, start, watched
from tests.integration.stop_and_start import StopAndStart
from tests.integration.test_results import Qmp
from tests.truth.parts import SLOWNESS

pytestmark = requires(*TRACING, "vsock loopback")
everywhere = pytest.mark.everywhere("tiers")
HOOKED = requires("vsock loopback", "BTF of vsock")
"""Without it, only `--tier tracepoint` sees a vsock."""
EMULATED = 1.5
"""A CPU that is slower by this factor than a slow real one."""
SLOW_BYTES, ARMED_S = 1 << 20, 40
"""A watch on an emulated CPU needs so long to arm its programs after the first pages; they are sent slowly."""
PORT = 1024 + os.getpid()
URI = f"vsock:1:{PORT}"


def used(b: Breakdown, role: str) -> list[SocketUse]:
    return [row for row in b.sockets if row.role == role]


def left_ns(b: Breakdown) -> int:
    """What no rule explains. On an emulated CPU without QEMU's work between its last page and its first state: up to
    1 ms of it is explained, and it takes longer there.
    """
    sent = {end for phase in b.phases if phase.phase == "memory.send" for _, end in phase.spans}
    slow = sent if SLOWNESS >= EMULATED else set()
    left = [span for phase in b.phases if phase.phase == "unattributed" for span in phase.spans]
    return sum(end - begin for begin, end in left if begin not in slow)


def over_vsock(b: Breakdown, said: dict[str, Any], *, connections: int = 1) -> None:
    """Both ends of each connection, and its bytes and times. `said`: the source's `query-migrate`."""
    assert (b.migration.transport, b.migration.connections) == ("vsock", connections)
    assert b.migration.pairing is not None and b.migration.pairing.by == "connection"
    sent, received = used(b, "source migration"), used(b, "destination migration")
    assert {(row.remote, row.local) for row in sent} == {(row.local, row.remote) for row in received}
    for row in sent:
        assert row.remote == f"1:{PORT}" and row.local.startswith("1:") and row.local != row.remote
        assert row.bytes and row.calls and row.between_ns is not None
        assert row.copy_ns is not None and row.copy_ns > 0 and row.blocked_ns is not None
        assert row.copy_ns + row.blocked_ns == row.in_call_ns
    moved = sum(p.bytes or 0 for p in b.dirty_log.passes) + sum(row.bytes for row in sent)
    if b.migration.total_ns is None:  # a watch that was armed later than the first pages were sent
        assert 0 < moved <= 1.1 * said["ram"]["transferred"]
    else:
        assert moved == pytest.approx(said["ram"]["transferred"], rel=0.1)


Seen = tuple[Breakdown, StopAndStart, dict[str, Any]]


def checked(attempt: Callable[[Path], Seen], directory: Path, *, connections: int = 1) -> Breakdown:
    """Migrates, at most three times: on an emulated CPU our programs are slow, and while one is preempted, the kernel
    skips its runs of other threads.
    """
    for number in range(3):
        (place := directory / str(number)).mkdir()
        b, truth, said = attempt(place)
        if RECURSION_MISSES not in (b.completeness.lost or {}):
            break
    as_qemu_saw(b, truth)
    assert left_ns(b) <= 0.02 * (b.window_ns or 0)
    over_vsock(b, said, connections=connections)
    return b


def through(tool: Tool) -> Callable[[Path], Seen]:
    def attempt(directory: Path) -> Seen:
        with QemuPair(LASTING, extra=OPTIONS) as pair, tool(pair, directory) as found:
            source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
            start(source, destination, URI)
            if tool is watched and SLOWNESS >= EMULATED:
                source("migrate-set-parameters", **{"max-bandwidth": SLOW_BYTES})
                time.sleep(ARMED_S)
                source("migrate-set-parameters", **{"max-bandwidth": LASTING.bandwidth_bytes})
            truth, said = completed(pair, source, destination), source("query-migrate")
            return found(), truth, said

    return attempt


def driven(directory: Path) -> Seen:
    with QemuPair(LASTING, extra=OPTIONS) as pair:
        ends = ["--source", pair.source.qmp, "--destination", pair.destination.qmp, "--uri", URI, "--multifd", "2"]
        command = [*PROGRAM, "migrate", "qemu", *ends, "-o", str(directory / "driven.rec"), "--format", "json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
        truth, said = completed(pair, source, destination), source("query-migrate")
    b = report(directory / "driven.rec")
    assert json.loads(done.stdout)["blackout_ns"] == b.blackout_ns
    return b, truth, said


@HOOKED
@pytest.mark.timeout(600)  # an emulated CPU needs three minutes for one attempt
@pytest.mark.parametrize(
    "tool",
    [
        pytest.param(recorded, id="record", marks=everywhere),
        pytest.param(joined, id="join", marks=everywhere),
        pytest.param(watched, id="watch"),
    ],
)
def test_each_tool_sees_it(tool: Tool, tmp_path: Path) -> None:
    checked(through(tool), tmp_path)


@everywhere
def test_system_calls_show_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a kernel that has no BTF of vsock."""
    monkeypatch.setenv("EBPF_MIG_TIER", "tracepoint")
    assert checked(through(recorded), tmp_path).completeness.attach["vsock"] == "tracepoint"


@HOOKED
@everywhere
def test_migrate_drives_it_over_several_connections(tmp_path: Path) -> None:
    checked(driven, tmp_path, connections=3)
