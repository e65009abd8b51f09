# SPDX-License-Identifier: Apache-2.0
"""Two hosts simulated by two network namespaces, with a VMM and a recorder in each; one breakdown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.cloud_hypervisor.lab import ENVIRONMENT
from tests.conftest import TRACING, requires

pytestmark = requires(*TRACING, "tc with tbf and veth")

GUEST = ("--memory", "128MiB", "--working-set", "2MiB", "--dirty-rate", "20000")


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "ebpf_mig.cli", *more]


def namespaces(pids: set[int]) -> set[str]:
    """The network namespaces of these processes, except ours."""
    found = set()
    for pid in pids:
        try:
            found.add(str(Path(f"/proc/{pid}/ns/net").readlink()))
        except OSError:
            continue
    return found - {str(Path("/proc/self/ns/net").readlink())}


def ours(parent: int) -> set[int]:
    """A process and all its descendants."""
    found = {parent}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) in found:
            found.add(int(entry.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def gone(pids: set[int], within_s: float = 20) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not any(map(alive, pids)):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.timeout(180)
@pytest.mark.parametrize("vmm", ["qemu", "cloud-hypervisor"])
def test_two_recorders_make_one_breakdown_and_the_bound_holds_the_truth(tmp_path: Path, vmm: str) -> None:
    if vmm != "qemu" and not os.environ.get(ENVIRONMENT):
        pytest.skip(f"missing feature: {ENVIRONMENT}")
    run = [*command("demo", "--two-hosts", "--bandwidth", "1Gbit", "--vmm", vmm, *GUEST), "--format", "json"]
    done = subprocess.run([*run, "-o", "x.rec"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["migration"]["result"] == "completed"
    assert document["migration"]["transport"] == "tcp"
    assert document["sockets"][0]["local"].startswith("10.77.0.1:")
    clock = document["clock"]
    # Both hosts share one kernel and so one clock: the true offset is 0.
    assert abs(clock["offset_ns"]) <= clock["bound_ns"] < 1_000_000
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["x.destination.rec", "x.source.rec"]
    assert all(read_recording(tmp_path / name).header.remote is None for name in files)
    again = subprocess.run(
        command("join", "x.destination.rec", "x.source.rec", "--format", "json"),
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(again.stdout) == document


@pytest.mark.timeout(120)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_nothing_is_left_however_it_ends(tmp_path: Path, sent: signal.Signals) -> None:
    place = Path(tempfile.mkdtemp(prefix="t-"))  # pytest's paths are too long for sockets
    environment = os.environ | {"TMPDIR": str(place)}
    run = [*command("demo", "--two-hosts", "--bandwidth", "20Mbit", "--downtime-limit", "1ms", *GUEST), "-o", "x.rec"]
    process = subprocess.Popen(run, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(ours(process.pid)) < 5 and time.monotonic() < until:
        time.sleep(0.05)  # two VMs, two recorders
    time.sleep(1)
    children = ours(process.pid)
    assert len(children) >= 5
    assert len(namespaces(children)) == 2
    process.send_signal(sent)
    assert process.wait(60) == (130 if sent is signal.SIGINT else -signal.SIGKILL)
    # The namespaces have no name, so they end with their last process.
    assert gone(children)
    left = [path.name for path in place.iterdir()]
    assert len(left) == (1 if sent is signal.SIGKILL else 0)
    if left:  # a directory with sockets and the guest, which the next start removes
        again = [*command("demo", "--two-hosts", *GUEST), "-o", "y.rec"]
        subprocess.run(again, cwd=tmp_path, env=environment, check=True, capture_output=True)
        assert list(place.iterdir()) == []
    place.rmdir()
