# SPDX-License-Identifier: Apache-2.0
"""What the exporter's processes use: real processes, under the names that the exporter gives them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse

from ebpf_mig.exporter.process_metrics import ProcessMetrics


def samples(supervisor: int) -> dict[tuple[str, str], float]:
    registry = CollectorRegistry()
    registry.register(ProcessMetrics(supervisor))
    families = parse(generate_latest(registry).decode())
    return {(s.name, s.labels["process"]): s.value for family in families for s in family.samples}


def test_the_supervisor_and_the_processes_that_it_started() -> None:
    waits = "import sys; print(flush=True); sys.stdin.read()"
    begin = time.time()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", waits, f"ebpf_mig.exporter.{module}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for module in ("analysis_worker", "watch_process", "loader_process")
    ]
    try:
        for child in children:  # the kernel shows a command line only a moment after execve(2) cannot fail any more
            assert child.stdout is not None and child.stdout.readline()
        got = samples(os.getpid())
    finally:
        for child in children:
            child.communicate()
    assert {process for _, process in got} == {"supervisor", "watch", "analyst", "listener"}, "the loader is not shown"
    assert {name for name, process in got if process == "listener"} == {"process_open_fds", "process_max_fds"}
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    assert 0.5 < got["process_resident_memory_bytes", "supervisor"] / resident < 2
    assert got["process_virtual_memory_bytes", "supervisor"] > resident
    spent = sum(os.times()[:4])
    assert 0 < got["process_cpu_seconds_total", "supervisor"] <= spent + 0.02
    assert abs(got["process_start_time_seconds", "analyst"] - begin) < 5
    assert got["process_threads", "analyst"] == 1
    assert got["process_open_fds", "listener"] >= 3


def test_a_supervisor_that_is_gone_has_no_figures() -> None:
    child = subprocess.Popen(["/bin/true"])
    child.wait()
    assert {process for _, process in samples(child.pid)} == {"listener"}
