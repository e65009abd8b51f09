# SPDX-License-Identifier: Apache-2.0
"""Many migrations of QEMU VMs, several at the same time, beside one exporter that must count each of them once.

In: how many. Out: lines for a table, and what did not hold. The witness of a migration is QEMU's own "completed".
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.integration.exporters import OURS, PROGRAM, children, free_port, is_ready, until, value
from tests.integration.test_results import Qmp
from tests.soak.usage import Usage, growth

SCENARIO = Scenario(memory_bytes=64 * MIB, working_set_bytes=8 * MIB, pages_per_s=1000, bandwidth_bytes=8 << 20)
"""A second of pre-copy, so that the probes are armed before its end on a busy machine, too."""
AGE_S = 1.5
"""A VM that migrates right after it was created can be missed (docs/exporter.md)."""
COUNTED_S = 20.0
SAMPLE_S = 5.0
RECORDINGS = 20


@dataclass
class Watched:
    """Migrations, made by `workers` threads."""

    migrations: int
    workers: int
    directory: Path
    ends: float
    """No migration begins after this time (monotonic)."""
    made: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    samples: dict[str, list[Usage]] = field(default_factory=dict)
    verdicts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def run(self) -> None:
        """Makes all of them, and compares with what the exporter says."""
        port, log = free_port(), self.directory / "lines"
        options = ["--web.listen-address", f"127.0.0.1:{port}", "--vm", f"{OURS}*", "--keep", str(RECORDINGS)]
        command = [*PROGRAM, "exporter", *options, "--log-format", "json", "--state-directory"]
        with log.open("w") as lines:
            exporter = subprocess.Popen([*command, str(self.directory / "state")], stdout=lines, stderr=lines)
        try:
            until(lambda: is_ready(port))
            workers = [threading.Thread(target=self._work) for _ in range(self.workers)]
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                time.sleep(SAMPLE_S)
                self._sample(exporter.pid)
            with contextlib.suppress(AssertionError):
                until(lambda: value(port, "ebpf_mig_migrations_total") >= len(self.made), COUNTED_S)
            self._compare(port, log)
        finally:
            exporter.terminate()
            if (status := exporter.wait(30)) != 0:
                self.broken.append(f"the exporter exits with {status}")

    def _work(self) -> None:
        while time.monotonic() < self.ends:
            number = next(self._numbers)
            if number >= self.migrations:
                return
            name = f"{OURS}{number}"
            try:
                self._migrate(name)
            except Exception as error:  # what went wrong with the lab is told at the end
                self.failed.append(f"{name}: {error!r}")

    def _migrate(self, name: str) -> None:
        with QemuPair(SCENARIO, None, ["-name", f"{name}-{{role}}"]) as pair:
            time.sleep(AGE_S)
            source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
            source("migrate-set-parameters", **{"max-bandwidth": SCENARIO.bandwidth_bytes})
            destination("migrate-incoming", uri=pair.uri)
            source("migrate", uri=pair.uri)
            ended = source.reaches("completed", "failed")
            if ended != "completed":
                raise RuntimeError(ended)
            self.made.append(name)
            until(destination.runs)
            time.sleep(0.3)

    def _sample(self, pid: int) -> None:
        with contextlib.suppress(OSError):
            for name, one in {"supervisor": pid, **children(pid)}.items():
                self.samples.setdefault(name, []).append(Usage.of(one))

    def _compare(self, port: int, log: Path) -> None:
        told = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        lines = [line for line in told if line.get("msg") == "migration"]
        names = Counter(str(line["vm"]).rpartition("-")[0] for line in lines if line["result"] == "completed")
        self.verdicts = Counter(str(line["verdict"]) for line in lines)
        missed = [name for name in self.made if not names[name]]
        twice = [name for name, times in names.items() if times > 1]
        others = [line for line in lines if line["result"] != "completed" or line["role"] != "both"]
        counted = value(port, "ebpf_mig_migrations_total", result="completed")
        restarts = value(port, "ebpf_mig_restarts_total")
        for what, found in (("missed", missed), ("twice", twice), ("otherwise", others), ("of the lab", self.failed)):
            if found:
                self.broken.append(f"{what}: {len(found)}, {found[:5]}")
        if counted != len(self.made):
            self.broken.append(f"counted {counted:.0f} of {len(self.made)}")
        if restarts:
            self.broken.append(f"{restarts:.0f} restarts")
        kept = len(list((self.directory / "state").glob("*.rec")))
        if kept > RECORDINGS:
            self.broken.append(f"{kept} recordings are kept")
        for name, samples in self.samples.items():
            if grown := growth(samples):
                self.broken.append(f"{name}: {grown}")

    def table(self) -> list[str]:
        """A row for each process: at the begin, in the middle, at the end."""
        rows = [f"{len(self.made)} migrations, {self.workers} at a time, verdicts {dict(self.verdicts)}"]
        for name, samples in self.samples.items():
            shown = [samples[at] for at in (0, len(samples) // 2, -1)]
            cells = [f"{one.resident / MIB:.1f} MiB, {one.descriptors}" for one in shown]
            rows.append(f"| {name} | {' | '.join(cells)} |")
        return rows
