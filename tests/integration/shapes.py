# SPDX-License-Identifier: Apache-2.0
"""A migration that QMP drives, seen by `record` of both VMMs, by `watch` on the node, or by two `record` and `join`.

In: a pair of VMMs. Out: the breakdown, and the check that it is right. The witness is QEMU's own trace.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.vmm.qemu.lab import QemuPair, QemuVm
from tests.integration.exporters import NAMED, OURS, PROGRAM, SETTLED_S, report, running, until
from tests.integration.migrations import LASTING
from tests.integration.stop_and_start import SLACK_NS, TRACED, StopAndStart, stop_and_start
from tests.integration.test_results import Qmp

MS = 1_000_000
OPTIONS = [*NAMED, *TRACED]
"""Of each VMM: a name by which `watch` knows that it is ours, and QEMU's trace, which is the witness."""
FULL = {"max-bandwidth": LASTING.bandwidth_bytes, "downtime-limit": 2000}
"""Much is left for the blackout."""
PATIENCE_S = 120
"""An emulated machine takes long to analyse a recording."""
Tool = Callable[[QemuPair, Path], contextlib.AbstractContextManager[Callable[[], Breakdown]]]


def pids(pair: QemuPair) -> tuple[int, int]:
    """The process ids of both QEMUs here, whatever started them."""
    return qemu(pair.source), qemu(pair.destination)


def qemu(vm: QemuVm) -> int:
    """Who listens at a VM's monitor."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(vm.qmp)
        return int(struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


@contextlib.contextmanager
def recorded(pair: QemuPair, directory: Path) -> Iterator[Callable[[], Breakdown]]:
    """`record` of both processes; the breakdown once it has ended."""
    path = directory / "seen.rec"
    named = [word for pid in pids(pair) for word in ("--pid", str(pid))]
    with running(*PROGRAM, "record", *named, "-o", str(path), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None and "tracing" in process.stderr.readline()

        def found() -> Breakdown:
            assert process.wait(PATIENCE_S) == 0, process.stderr and process.stderr.read()
            return report(path)

        yield found


@contextlib.contextmanager
def watched(_pair: QemuPair, directory: Path) -> Iterator[Callable[[], Breakdown]]:
    """`watch` on the node; the breakdown of the one migration that it reports."""
    command = [*PROGRAM, "watch", "--format", "json", "--vm", f"{OURS}*", "--state-directory", str(directory / "state")]
    with running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert "watching" in (line := process.stderr.readline()), line
        time.sleep(SETTLED_S)

        def found() -> Breakdown:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            time.sleep(2)
            process.terminate()
            assert process.communicate(timeout=PATIENCE_S)[0] == ""
            seen = report(directory / "state" / said["recording"])
            assert (said["result"], said["blackout_ns"]) == (seen.migration.result, seen.blackout_ns)
            return seen

        yield found


@contextlib.contextmanager
def joined(pair: QemuPair, directory: Path) -> Iterator[Callable[[], Breakdown]]:
    """`record` of each VMM by itself, as on two hosts, and `join`; the breakdown once both have ended."""
    with contextlib.ExitStack() as stack:
        recorders, paths = [], [directory / "a.rec", directory / "b.rec"]
        for path, pid in zip(paths, pids(pair), strict=True):
            command = [*PROGRAM, "record", "--pid", str(pid), "-o", str(path)]
            recorders.append(stack.enter_context(running(*command, stderr=subprocess.PIPE)))
            said = recorders[-1].stderr
            assert said is not None
            while "tracing" not in (line := said.readline()):  # first, that the destination's guest does not run
                assert line, "the recorder ended"

        def found() -> Breakdown:
            for recorder in recorders:
                assert recorder.wait(PATIENCE_S) == 0
            both = directory / "both.rec"
            command = [*PROGRAM, "join", *map(str, paths), "--recording", str(both)]
            subprocess.run(command, check=True, capture_output=True)
            return report(both)

        yield found


ALL = os.environ.get("EBPF_MIG_SHAPES") == "all"
"""Each shape by each tool, which takes some ten minutes more."""
TOOLS = pytest.mark.parametrize(
    "tool", [recorded, pytest.param(watched, marks=pytest.mark.long)], ids=["record", "watch"]
)
TOOL = TOOLS if ALL else pytest.mark.parametrize("tool", [recorded], ids=["record"])


def start(source: Qmp, destination: Qmp, uri: str, to: str = "") -> None:
    """Begins the migration, to another address than the destination's if `to` is given."""
    destination("migrate-incoming", uri=uri)
    source("migrate-set-parameters", **FULL)
    source("migrate", uri=to or uri)


def completed(pair: QemuPair, source: Qmp, destination: Qmp, to: QemuPair | None = None) -> StopAndStart:
    """When the guest stopped and started, once it runs at the destination, which is that of `to` if given."""
    assert source.reaches("completed", "failed") == "completed"
    until(destination.runs)
    near, far = pair.directory / "source.trace", (to or pair).directory / "destination.trace"
    return stop_and_start(near, far, qemu((to or pair).destination))


def whole(seen: Breakdown, truth: StopAndStart) -> None:
    """One completed migration with the blackout that QEMU saw, nothing in doubt, and nothing left over."""
    as_qemu_saw(seen, truth)
    assert (seen.phase_ns("unattributed") or 0) <= 0.02 * (seen.window_ns or 0)


def as_qemu_saw(seen: Breakdown, truth: StopAndStart) -> None:
    """One completed migration with the blackout that QEMU saw, and nothing in doubt.

    Where all bytes go one way, `join` gives the blackout as a limit: it is off by how far its offset is, and the true
    offset of two recordings of one kernel is 0.
    """
    assert seen.migration.result == "completed"
    assert (seen.completeness.verdict, seen.completeness.reasons) == ("complete", [])
    assert seen.blackout_ns is not None and seen.window_ns is not None
    doubt_ns = SLACK_NS + (seen.clock.bound_ns or 0)
    off_ns = seen.clock.offset_ns if seen.clock.bound_ns is None else 0
    least_ns, most_ns = truth.least_ns - doubt_ns, truth.most_ns + doubt_ns
    assert least_ns <= seen.blackout_ns + off_ns <= most_ns, (seen.blackout_ns, seen.clock, truth)
    assert sum(phase.duration_ns or 0 for phase in seen.phases) == seen.window_ns


def migrated_unix(tool: Tool, pair: QemuPair, directory: Path) -> None:
    """Migrates the VM over a UNIX socket, and checks that `tool` sees all of it."""
    source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
    with tool(pair, directory) as found:
        start(source, destination, pair.uri)
        took = completed(pair, source, destination)
        seen = found()
    whole(seen, took)
    assert seen.migration.transport == "unix"
