# SPDX-License-Identifier: Apache-2.0
"""Helpers for the exporter's tests: real exporters, VMs that they must discover, and a scraper."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.openmetrics.parser import text_string_to_metric_families

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.lab.scenario import Scenario
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.vmm.qemu.migration import QemuMigration

PROGRAM = [sys.executable, "-m", "ebpf_mig.cli"]
OURS = f"test-{os.getpid()}-"
"""Prefix of the names of our VMs; other tests may be migrating theirs at the same time."""
NAMED = ["-name", OURS + "{role}"]
SETTLED_S = 4.0
"""By then a new VM has been found, suspected because it is new, and cleared."""


def until(what: Callable[[], Any], seconds: float = 30) -> Any:
    """Polls until the answer is true and returns it. Fails after a time-out."""
    deadline = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < deadline, "no true answer before the time-out"
        time.sleep(0.05)
    return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(*command: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(list(command), text=True, **more)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()


def fetch(url: str, accept: str = "") -> str:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def is_ready(port: int) -> bool:
    with contextlib.suppress(OSError):
        return fetch(f"http://127.0.0.1:{port}/-/ready") == "ready\n"
    return False


@contextlib.contextmanager
def exporter(
    state: Path, *more: str, vms: str = "*", before: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = free_port()
    options = ["--web.listen-address", f"127.0.0.1:{port}", "--state-directory", str(state), "--vm", OURS + vms]
    with running(*before, *PROGRAM, "exporter", *options, *more) as process:
        until(lambda: is_ready(port) or process.poll() is not None)
        assert process.poll() is None, "the exporter has ended"
        yield process, port


def migrate(scenario: Scenario, settled: Callable[[], object] = lambda: time.sleep(SETTLED_S)) -> None:
    """Migrates a VM without announcing it to the exporter. The VMs exist first, and wait until `settled` returns."""
    with QemuPair(scenario, None, NAMED) as pair:
        settled()
        with contextlib.closing(
            QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options())
        ) as migration:
            migration.prepare()
            assert migration.run(60).result == "completed"
        time.sleep(1.5)


def samples(port: int) -> list[Any]:
    text = fetch(f"http://127.0.0.1:{port}/metrics", "application/openmetrics-text; version=1.0.0")
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def value(port: int, name: str, **labels: str) -> float:
    return sum(float(s.value) for s in samples(port) if s.name == name and labels.items() <= s.labels.items())


def report(path: Path) -> Breakdown:
    recording = read_recording(path)
    assert not recording.truncated
    return analyse(recording).breakdown


def quietly(migration: QemuMigration) -> None:
    """Runs a migration, as a thread's target, and ignores any error."""
    with contextlib.suppress(Exception):
        migration.run(90)


def children(pid: int) -> dict[str, int]:
    """The processes of an exporter, by the last part of their module's name."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        words = cmdline.split("\0") if (cmdline := Path(f"/proc/{child}/cmdline").read_text()) else []
        if len(words) > 2:
            found[words[2].rpartition(".")[2]] = int(child)
    return found


def gone(pid: int) -> bool:
    """Whether the process is dead, or a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
