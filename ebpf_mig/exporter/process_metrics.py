# SPDX-License-Identifier: Apache-2.0
"""`process_*`: what the exporter's processes use, by the usual names, with the label `process`.

In: /proc, read at each scrape. Out: Prometheus families. prometheus_client's own collector knows one process and no
label. Only files that user nobody may read are used, so open descriptors are those of the listener alone.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import procfs

_NAMES = {"watch_process": "watch", "serve": "listener", "analysis_worker": "analyst"}
"""By the last part of the module that the process runs. Others, such as the loader, are not shown."""
_TICK = os.sysconf("SC_CLK_TCK")
_UNREAD = (OSError, ValueError, PreflightError)
"""The last one: no descriptor is left."""


class ProcessMetrics:
    """Collector for the supervisor and its children."""

    def __init__(self, supervisor: int) -> None:
        """`supervisor`: pid of the process that started the others."""
        self._supervisor = supervisor
        self._boot_s = _boot_time()

    def collect(self) -> Iterator[Metric]:
        """The families; a process that is gone has no sample."""
        cpu = CounterMetricFamily(
            "process_cpu_seconds", "User and system CPU time, with that of children that ended.", labels=["process"]
        )
        resident = GaugeMetricFamily("process_resident_memory_bytes", "Resident memory.", labels=["process"])
        virtual = GaugeMetricFamily("process_virtual_memory_bytes", "Virtual memory.", labels=["process"])
        threads = GaugeMetricFamily("process_threads", "Threads.", labels=["process"])
        start = GaugeMetricFamily(
            "process_start_time_seconds", "Start time, seconds since the epoch.", labels=["process"]
        )
        for name, pid in self._processes().items():
            with contextlib.suppress(*_UNREAD):
                found = procfs.numbers(pid)
                cpu.add_metric([name], sum(map(int, found[11:15])) / _TICK)
                resident.add_metric([name], procfs.resident_bytes(pid))
                virtual.add_metric([name], int(found[20]))
                threads.add_metric([name], int(found[17]))
                start.add_metric([name], self._boot_s + int(found[19]) / _TICK)
        fds = GaugeMetricFamily("process_open_fds", "Open file descriptors.", labels=["process"])
        most = GaugeMetricFamily("process_max_fds", "Most file descriptors that may be open.", labels=["process"])
        with contextlib.suppress(*_UNREAD):
            fds.add_metric(["listener"], len(procfs.names("self", "fd")))
            most.add_metric(["listener"], resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        yield from (cpu, resident, virtual, threads, start, fds, most)

    def _processes(self) -> dict[str, int]:
        found = {"supervisor": self._supervisor}
        with contextlib.suppress(*_UNREAD):
            for pid in map(int, procfs.text(self._supervisor, "task", self._supervisor, "children").split()):
                modules = [part.rpartition(".")[2] for part in procfs.command_line(pid)[:4]]
                name = next((_NAMES[part] for part in modules if part in _NAMES), None)
                if name is not None:
                    found[name] = pid
        return found


def _boot_time() -> int:
    with contextlib.suppress(*_UNREAD):
        for line in procfs.text("stat", limit=1 << 24).splitlines():
            if line.startswith("btime "):
                return int(line.split()[1])
    return 0
