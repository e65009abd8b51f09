# SPDX-License-Identifier: Apache-2.0
"""Many runs of `ebpf-mig demo`, one after the other: each must come to a breakdown, and leave nothing.

In: how many. Out: lines for a table, and what did not hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.kernel import descendants
from tests.integration.exporters import PROGRAM
from tests.soak.usage import Usage, growth

NO_EVENT_LOST = ("complete", "bounded")


@dataclass
class Demos:
    """The runs. A run leaves nothing if its directory is empty and no process of it is left."""

    runs: int
    directory: Path
    ends: float
    """No run begins after this time (monotonic)."""
    made: int = 0
    samples: list[Usage] = field(default_factory=list)
    """The most memory that each run had."""
    verdicts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    def run(self) -> None:
        """All of them."""
        temporary = self.directory / "tmp"
        temporary.mkdir()
        while self.made < self.runs and time.monotonic() < self.ends:
            wrong = self._once(temporary)
            if left := sorted(path.name for path in temporary.iterdir()):
                wrong.append(f"files are left: {left}")
            self.broken += [f"demo {self.made}: {one}" for one in wrong]
            self.made += 1
        if grown := growth(self.samples):
            self.broken.append(f"demo: {grown}")

    def _once(self, temporary: Path) -> list[str]:
        recording, report = self.directory / "demo.rec", self.directory / "demo.json"
        command = [*PROGRAM, "demo", "--format", "json", "--force", "-o", str(recording)]
        with report.open("w") as out, (self.directory / "demo.log").open("w") as log:
            process = subprocess.Popen(command, stdout=out, stderr=log, env={**os.environ, "TMPDIR": str(temporary)})
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.samples.append(Usage(used.ru_maxrss << 10, 0))
        if status:
            return [f"exit {process.returncode}: {(self.directory / 'demo.log').read_text()[-300:]!r}"]
        found = json.loads(report.read_text())
        verdict = found["completeness"]["verdict"]
        self.verdicts[verdict] += 1
        wrong = []
        if found["migration"]["result"] != "completed" or not found["blackout_ns"] or verdict not in NO_EVENT_LOST:
            wrong.append(f"{found['migration']['result']}, {found['blackout_ns']} ns, {found['completeness']}")
        if sum(phase["duration_ns"] or 0 for phase in found["phases"]) != found["window_ns"]:
            wrong.append("the phases do not add up to the window")
        if left := [words for words in descendants(os.getpid()).values() if str(recording) in words]:
            wrong.append(f"processes are left: {left}")
        return wrong

    def table(self) -> list[str]:
        """A row for the runs."""
        peaks = [one.resident / (1 << 20) for one in self.samples]
        shown = ", ".join(f"{peaks[at]:.1f}" for at in (0, len(peaks) // 2, -1)) if peaks else "none"
        return [
            f"{self.made} demos, verdicts {dict(self.verdicts)}; peak memory of the first, middle, last: {shown} MiB"
        ]
