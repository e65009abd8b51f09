# SPDX-License-Identifier: Apache-2.0
"""The ways in which QEMU saves a guest by itself, driven by QMP without any code of ours.

In: a running VM. Out: the guest runs again, and its files are in a directory.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.vmm.qemu.lab import QemuVm, find_binary
from tests.conftest import FEATURES, RINGS
from tests.integration.migrations import QUICK
from tests.integration.test_results import Qmp
from tests.loop_device import loop_device

MS = 1_000_000
APART_S = 0.3
"""How long the script waits before it sets a guest going that was saved."""
AGREES_NS = 20 * MS
"""QEMU's STOP and RESUME lie this close to the guest's stop and start, on a machine that is not busy."""
METADATA_BYTES = 2 << 20
"""What qcow2 writes into a new image beside the state."""
SAVED = replace(QUICK, working_set_bytes=1 << 20, pages_per_s=2000)
SLOWLY = {"max-bandwidth": 1 << 20, "downtime-limit": 6000}
"""So that the command that writes the file is met."""


def write(q: Qmp, uri: str) -> None:
    """`migrate`, and `cont` if the guest then stays stopped."""
    q("migrate", uri=uri)
    assert q.reaches("completed", "failed") == "completed", q("query-migrate")
    time.sleep(APART_S)
    if not q.runs():
        q("cont")


def job(q: Qmp, name: str, command: str, **more: Any) -> None:
    """Runs a job to its end."""
    q(command, **{"job-id": name, **more})
    deadline = time.monotonic() + 30
    while not (over := [one for one in q("query-jobs") if one["id"] == name and one["status"] == "concluded"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "error" not in over[0], over
    q("job-dismiss", id=name)


THREADS: dict[str, Any] = {"aio": "threads"}
URING = {"aio": "io_uring", "cache": {"direct": True}}
"""As Proxmox opens its disks."""
URING_CACHED = {"aio": "io_uring"}
NATIVE = {"aio": "native", "cache": {"direct": True}}
"""As libvirt opens block devices for io='native'."""


def disk(q: Qmp, path: Path, how: dict[str, Any]) -> None:
    """A disk that belongs to no device, and can take a state: in a new file, or on a block device."""
    place = {"filename": str(path)}
    if not path.exists():
        job(q, "file", "blockdev-create", options={"driver": "file", "size": 0, **place})
    driver = "host_device" if path.is_block_device() else "file"
    assert "error" not in q("blockdev-add", **{"driver": driver, "node-name": "file", **place, **how})
    job(q, "qcow2", "blockdev-create", options={"driver": "qcow2", "size": 1 << 20, "file": "file"})
    assert "error" not in q("blockdev-add", **{"driver": "qcow2", "node-name": "qcow2", "file": "file"})


def save_into_disk(q: Qmp, directory: Path, how: dict[str, Any] = THREADS) -> None:
    disk(q, directory / "disk", how)
    job(q, "save", "snapshot-save", tag="one", vmstate="qcow2", devices=["qcow2"])


def savevm(q: Qmp, directory: Path, how: dict[str, Any] = THREADS) -> None:
    """The monitor's command for people."""
    disk(q, directory / "disk", how)
    assert q("human-monitor-command", **{"command-line": "savevm one"}) == ""


def into_a_device(act: Callable[[Qmp, Path], None]) -> Callable[[Qmp, Path], None]:
    """The same with a block device, as a volume of LVM."""

    def run(q: Qmp, directory: Path) -> None:
        with loop_device(directory / "volume", 256 << 20) as device:
            (directory / "disk").symlink_to(device)
            act(q, directory)

    return run


def state_bytes(q: Qmp) -> int:
    """What QEMU says of the size of the state that it saved in a disk."""
    node = next(one for one in q("query-named-block-nodes") if one["node-name"] == "qcow2")
    return int(node["image"]["snapshots"][0]["vm-state-size"])


def loadvm(q: Qmp) -> None:
    """In place of the guest that runs, the one that `savevm` saved."""
    assert q("human-monitor-command", **{"command-line": "loadvm one"}) == ""


def stop_and_load(q: Qmp) -> None:
    """A script that stops the guest itself, and waits before each further command."""
    for act in (
        lambda: q("stop"),
        lambda: job(q, "load", "snapshot-load", tag="one", vmstate="qcow2", devices=["qcow2"]),
    ):
        act()
        time.sleep(APART_S)
    q("cont")


@dataclass(frozen=True)
class Kind:
    """One of the ways."""

    name: str
    since: tuple[int, int] = (0, 0)
    """The first QEMU that has it."""
    capabilities: Sequence[str] = ()
    parameters: dict[str, Any] = field(default_factory=dict)
    uri: str = ""
    act: Callable[[Qmp, Path], None] | None = None
    transport: str = "file"
    stays: bool = False
    """The guest stays stopped until it is set going."""
    extra: Sequence[str] = ()
    """Arguments for QEMU."""
    rings: bool = False
    """By io_uring."""

    def run(self, q: Qmp, directory: Path) -> None:
        """Saves the guest, and waits until it runs again."""
        q.capability(*self.capabilities)
        if self.parameters:
            assert "error" not in q("migrate-set-parameters", **self.parameters)
        if self.act is not None:
            self.act(q, directory)
        else:
            write(q, self.uri.format(directory / "state"))
        assert q.runs()

    def needed(self) -> None:
        """Skips the test if QEMU is older, or the kernel does not show what it does."""
        if self.rings and not FEATURES[RINGS]():
            pytest.skip(f"missing feature: {RINGS}")
        if version() < self.since:
            pytest.skip(f"missing feature: QEMU {'.'.join(map(str, self.since))} (in PATH or EBPF_MIG_QEMU)")


FILE, EXEC = "file:{}", "exec:cat > {}"
DIRECT = {"direct-io": True}
BACKGROUND = ("background-snapshot",)
KINDS = (
    Kind("file", (8, 2), uri=FILE, stays=True),
    Kind("mapped-ram", (9, 0), ("mapped-ram",), uri=FILE, stays=True),
    Kind("mapped-ram-direct", (9, 1), ("mapped-ram",), DIRECT, FILE, stays=True),
    Kind("mapped-ram-multifd", (9, 0), ("mapped-ram", "multifd"), uri=FILE, stays=True),
    Kind("mapped-ram-multifd-direct", (9, 1), ("mapped-ram", "multifd"), DIRECT, FILE, stays=True),
    Kind("exec", (0, 0), (), SLOWLY, EXEC, transport="pipe", stays=True),
    Kind("snapshot-save", act=save_into_disk),
    Kind("savevm", act=savevm),
    Kind("snapshot-save-uring", act=partial(save_into_disk, how=URING), rings=True),
    Kind("savevm-uring", act=partial(savevm, how=URING), rings=True),
    Kind("savevm-uring-cached", act=partial(savevm, how=URING_CACHED), rings=True),
    Kind("savevm-native", act=partial(savevm, how=NATIVE)),
    Kind("savevm-uring-device", act=into_a_device(partial(savevm, how=URING)), rings=True),
    Kind("savevm-native-device", act=into_a_device(partial(savevm, how=NATIVE))),
    Kind("background-exec", (0, 0), BACKGROUND, uri=EXEC, transport="pipe"),
    Kind("background-file", (8, 2), BACKGROUND, uri=FILE),
)


def version() -> tuple[int, int]:
    """That of the tests' QEMU."""
    said = subprocess.run([find_binary(None), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    assert found is not None
    return int(found[1]), int(found[2])


def holds(
    b: Breakdown, origin_ns: int, kind: Kind, q: Qmp, vm: QemuVm, wall_minus_monotonic_ns: int, *, late: bool = False
) -> None:
    """Whether the breakdown is right. The witnesses: QEMU's STOP and RESUME, and the guest's heartbeat. `late`: tracing
    began when it saw a sign of the snapshot."""
    m = b.migration
    assert (m.mode, m.result, m.transport) == ("snapshot", "saved", kind.transport)
    # A watch may be armed later than QEMU switches logging on, as docs/exporter.md says.
    assert m.paused_before is False or (late and m.paused_before is None and m.total_ns is None)
    assert m.paused_after is False
    assert (b.completeness.verdict, b.completeness.reasons) == ("complete", [])
    assert b.window_ns and b.blackout and sum(p.duration_ns or 0 for p in b.phases) == b.window_ns
    assert b.phase_ns("unattributed") <= 0.02 * b.window_ns
    stop, start = (origin_ns + at for at in b.blackout)
    beats = [at for at, _ in vm.heartbeat.beats]
    assert not [at for at in beats if stop + MS < at < start], "a beat in the blackout"
    assert any(at <= stop + MS for at in beats) and any(at >= start for at in beats)
    stopped, resumed = (q.at(event) - wall_minus_monotonic_ns for event in ("STOP", "RESUME"))
    assert abs(stopped - stop) <= AGREES_NS and abs(resumed - start) <= AGREES_NS, (stopped - stop, resumed - start)
    if kind.act is not None:
        assert b.phase_ns("memory.send") and b.phase_ns("sync")
        written, size = sum(row.bytes for row in b.sockets if row.role == "source migration"), state_bytes(q)
        assert size <= written <= size + METADATA_BYTES, "what QEMU says of the state, and tables of clusters"
    if kind.stays:
        assert b.phase_ns("management") >= 0.95 * APART_S * 1e9, "the script waited"
    else:
        assert b.phase_ns("management") == 0
